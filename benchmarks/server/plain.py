"""A server that only moves bytes: the limit of what any server on a socket can reach.

    python -m benchmarks.server.plain [FOLDER]

Prints its port. A request is a command, a key and a size (see `PlainClient`).

    put    the value that follows is received into the connection's memory of that key
    sync   one byte is sent back
    get    the memory of that key is sent
    file   FOLDER/SIZE-KEY is read into one reused buffer, and sent

Every key has memory of its own, so that values are as seldom in a processor cache as they are elsewhere.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

from benchmarks.server.clients import PlainClient, receive


def _serve(connection: socket.socket, folder: Path) -> None:
    header = memoryview(bytearray(PlainClient.REQUEST.size))
    memory: dict[tuple[int, int], memoryview] = {}
    try:
        while True:
            receive(connection, header)
            command, key, size = PlainClient.REQUEST.unpack(header)
            if command == PlainClient.FILE:
                value = memory.get((size, 0)) or memory.setdefault((size, 0), _new(size))
                connection.sendall(_read(folder / f"{size}-{key}", value))
                continue
            value = memory.get((size, key)) or memory.setdefault((size, key), _new(size))
            if command == PlainClient.PUT:
                receive(connection, value)
            else:
                connection.sendall(value if command == PlainClient.GET else b"k")
    except (EOFError, ConnectionError):
        connection.close()


def _new(size: int) -> memoryview:
    return memoryview(bytearray(size))


def _read(path: Path, into: memoryview) -> memoryview:
    file = os.open(path, os.O_RDONLY)
    try:
        assert os.preadv(file, [into], 0) == len(into)
    finally:
        os.close(file)
    return into


def main(folder: Path) -> None:
    """Serves until it is ended."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(f"READY raw=127.0.0.1:{listening.getsockname()[1]}", flush=True)
    while True:
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve, args=(connection, folder), daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
