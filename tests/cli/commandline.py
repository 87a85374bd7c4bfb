"""The command line, called in this process: a new one takes seconds to start, and there are many calls.

That a process of its own answers alike is tested where signals, environment or workers matter.
"""

from __future__ import annotations

import io
import logging
import subprocess
import warnings
from contextlib import redirect_stderr, redirect_stdout

from droidspeak.integrations.cli.main import main


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """What `droidspeak ARGUMENTS` prints and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    # What nobody has configured goes to standard error; pytest's own handlers stand in the way of that.
    warned = logging.StreamHandler(err)
    warned.setLevel(logging.WARNING)
    logging.getLogger().addHandler(warned)
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        finally:
            logging.getLogger().removeHandler(warned)
    code = status if isinstance(status, int) else 0
    return subprocess.CompletedProcess(list(map(str, arguments)), code, out.getvalue(), err.getvalue())
