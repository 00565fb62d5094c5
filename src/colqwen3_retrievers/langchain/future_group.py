"""Work that is given up together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any


class FutureGroup:
    """Futures that are cancelled together, those too that a thread adds after they were.

    A task that is cancelled while a thread still submits for it cannot stop that thread, and would never see its
    futures; the thread adds them here instead.

    >>> group, late = FutureGroup(), Future()
    >>> group.cancel()
    >>> group.add([late])
    >>> late.cancelled()
    True
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: list[Future[Any]] = []
        self._over = False

    def add(self, futures: Iterable[Future[Any]]) -> None:
        """Add futures; they are cancelled at once when the group is."""
        added = list(futures)
        with self._lock:
            self._futures += added
            over = self._over
        if over:
            for future in added:
                future.cancel()

    async def settled(self) -> None:
        """Wait on the event loop until all are done, well or not; cancelling the wait cancels them."""
        with self._lock:
            futures = list(self._futures)
        await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)

    def cancel(self) -> None:
        """Cancel what has not begun; what is done stays done."""
        with self._lock:
            self._over = True
            futures = list(self._futures)
        for future in futures:
            future.cancel()
