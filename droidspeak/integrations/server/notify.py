"""Word to systemd, where it asks for it (`Type=notify`)."""

from __future__ import annotations

import os
import socket

__all__ = ["sd_notify"]


def sd_notify(message: str) -> None:
    """Sends `message` (`READY=1`, `STOPPING=1`) to `NOTIFY_SOCKET`; nothing without one.

    Source: sd_notify(3). A socket that cannot be written is the service manager's to notice.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.sendto(message.encode(), address)
        except OSError:
            return
