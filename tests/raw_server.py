"""A server that answers with given bytes, whatever HTTP says of them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raw_server(head: bytes, flood: bytes = b"") -> Iterator[tuple[str, list[int]]]:
    """Answer with these bytes, then with others for ever; gives an address, and what each client took of them."""
    taken: list[int] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            taken.append(0)
            with connection:
                try:
                    connection.recv(65_536)
                    connection.sendall(head)
                    while flood and not closing.is_set():
                        connection.sendall(flood)
                        taken[-1] += len(flood)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)
                except OSError:
                    pass

    closing = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", taken
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
