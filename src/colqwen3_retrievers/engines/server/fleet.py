"""Several servers as one: who is asked next, who is left alone for a while, and when one is asked again.

Each server has a circuit. It opens when requests have failed for a second without an answer in between, and then nobody
waits for that server; after a pause, which doubles from one failure to the next, the circuit is half open: one check
decides whether the server is back, and whoever wants it waits for that check. A server nobody has asked yet stands half
open too, so the first thing any server hears is the check, and so is the first after it was gone: it may have come back
with another model.

All of it runs in one event loop, which takes the place of locks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from colqwen3_retrievers.errors import EngineError

GRACE = 1.0
"""Seconds of failures alone after which a server is gone: many requests that break off at once say no more than one."""

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
_DOUBLINGS = 10  # no more: a server may be gone for days, and a float ends at 1,024

T = TypeVar("T")


class Server(Generic[T]):
    """One server.

    Args:
        url: its address, without a slash at the end.
        clock: seconds that only go forward.

    Attributes:
        active: requests under way.
        known: what the last check found out; None while the circuit is not closed.
    """

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.url = url
        self.active = 0
        self.known: T | None = None
        self._clock = clock
        self._why = ""  # the last failure, in words
        self._failing_since: float | None = None
        self._opened = 0  # times in a row
        self._pause_ends = 0.0
        self._busy_until = 0.0
        self._check: asyncio.Task[T] | None = None

    @property
    def resting(self) -> float:
        """Seconds until its circuit is half open; 0 when it may be asked."""
        return max(0.0, self._pause_ends - self._clock())

    @property
    def busy(self) -> float:
        """Seconds for which it has asked to be left alone (``Retry-After``)."""
        return max(0.0, self._busy_until - self._clock())

    @property
    def checking(self) -> bool:
        """Whether a check is under way."""
        return self._check is not None

    @property
    def why(self) -> str:
        """What its last failure was."""
        return self._why

    async def ready(self, check: Callable[[Server[T]], Awaitable[T]]) -> T:
        """Give what is known of it; when nothing is, check it, once for all who wait.

        Raises:
            ColQwen3Error: what the check raised.
        """
        known = self.known  # read once: other threads may set it to None, so that it is checked anew
        if known is not None:
            return known
        if self._check is None:
            self._check = asyncio.ensure_future(self._run_check(check))
            self._check.add_done_callback(lambda task: task.cancelled() or task.exception())  # somebody has looked
        return await asyncio.shield(self._check)

    async def _run_check(self, check: Callable[[Server[T]], Awaitable[T]]) -> T:
        try:
            known = await check(self)
        except EngineError as exc:
            if exc.retryable:
                self._note_failure(str(exc))
            raise
        else:
            self.known = known
            self.succeeded()
            return known
        finally:
            self._check = None

    def succeeded(self) -> None:
        """Note an answer of any kind: it is there."""
        self._failing_since, self._opened = None, 0

    def failed(self, why: str = "") -> None:
        """Note that it did not answer, and what was seen instead."""
        if self.known is not None:  # otherwise its check has noted that, or will
            self._note_failure(why)

    def leave_alone(self, seconds: float) -> None:
        """Note that it asked not to be asked for so long."""
        self._busy_until = max(self._busy_until, self._clock() + seconds)

    def _note_failure(self, why: str) -> None:
        now = self._clock()
        self._why = why
        if self._failing_since is None:
            self._failing_since = now
        if not self._opened and now - self._failing_since < GRACE:
            return
        self._pause_ends = now + min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._opened, _DOUBLINGS))
        self._opened += 1
        self.known = None


class Fleet(Generic[T]):
    """Servers of the same model.

    Args:
        urls: their addresses.
        clock: seconds that only go forward.

    >>> fleet: Fleet[str] = Fleet(["http://a", "http://b"], clock=lambda: 0.0)
    >>> with fleet.use() as first, fleet.use() as second:
    ...     first is second
    False
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float]) -> None:
        self.servers: list[Server[T]] = [Server(url, clock) for url in urls]

    @contextmanager
    def use(self, but: Sequence[Server[T]] = ()) -> Iterator[Server[T]]:
        """Pick the server with the fewest requests under way, and count one more while the block lasts.

        Args:
            but: servers that have just failed, which are picked only when there is no other.

        Raises:
            EngineError: all circuits are open; it fails at once, and says when the next server will be tried.
        """
        there = [server for server in self.servers if not server.resting]
        if not there:
            pause = min(server.resting for server in self.servers)
            names = ", ".join(server.url for server in self.servers)
            why = next((f" ({server.why})" for server in self.servers if server.why), "")
            raise EngineError(f"no answer from {names}; not asked again for {pause:.1f} s{why}", retryable=True)
        checked = any(server.known is not None for server in there)  # then nobody joins those who wait for a check
        # ties are broken by lot, so that several clients do not all start with the first
        picked = min(
            there,
            key=lambda one: (one in but, one.busy > 0, checked and one.checking, one.active, random.random()),  # noqa: S311 - no secret
        )
        picked.active += 1
        try:
            yield picked
        finally:
            picked.active -= 1
