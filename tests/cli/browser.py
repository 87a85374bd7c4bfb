"""A real browser for tests of pages: headless Chromium, driven through chromedriver.

Without it the tests are skipped, unless DROIDSPEAK_REQUIRE_BROWSER=1 says that it must be there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager

import pytest

REQUIRED = os.environ.get("DROIDSPEAK_REQUIRE_BROWSER") == "1"

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextmanager
def browser():
    """A driver with a profile folder of its own; both are gone when the block ends."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        say = pytest.fail if REQUIRED else pytest.skip
        say("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (*_FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        # What the browser itself leaves behind goes there too.
        service = webdriver.ChromeService(driver, env={**os.environ, "TMPDIR": folder})
        opened = webdriver.Chrome(options, service)
        try:
            yield opened
        finally:
            opened.quit()


def show(driver, url, *, width=1280, height=900, scheme="light", media="screen"):
    """Opens `url` in a viewport of `width` x `height` CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    driver.get(url)
