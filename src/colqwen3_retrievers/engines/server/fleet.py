"""Several servers as one: which is used next, which is skipped for a while, and when it is tried again.

Each server has a circuit breaker. It opens when requests have failed for a second without an answer in between, and the
server is then skipped; after a pause, which doubles with each failure, the circuit is half open: one check decides
whether the server is back, and its callers wait for that check. A new server starts half open, so the first request to
any server is the check, as is the first after it was unavailable: it may have returned with another model.

All of it runs in one event loop, which replaces locks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from colqwen3_retrievers.errors import EngineError

GRACE = 1.0
"""Seconds of failures without a success after which the circuit opens, since many requests may break off at once."""

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
_DOUBLINGS = 10  # at most: a server may be down for days, and a float overflows at 1,024

T = TypeVar("T")


class Server(Generic[T]):
    """One server.

    Args:
        url: its address, without a slash at the end.
        clock: returns monotonic seconds.

    Attributes:
        active: pending requests.
        known: findings of the last check; None while the circuit is not closed.
        why: the last failure, in words.
    """

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self.url = url
        self.active = 0
        self.known: T | None = None
        self._clock = clock
        self.why = ""
        self._failing_since: float | None = None
        self._opened = 0  # times in a row
        self._pause_ends = 0.0
        self._busy_until = 0.0
        self._check: asyncio.Task[T] | None = None

    @property
    def resting(self) -> float:
        """Seconds until its circuit is half open; 0 when it is usable."""
        return max(0.0, self._pause_ends - self._clock())

    @property
    def busy(self) -> float:
        """Seconds left of its ``Retry-After``."""
        return max(0.0, self._busy_until - self._clock())

    @property
    def checking(self) -> bool:
        """Whether a check is running."""
        return self._check is not None

    async def ready(self, check: Callable[[Server[T]], Awaitable[T]]) -> T:
        """Return its findings, after a check if there are none, shared by all callers.

        Raises:
            ColQwen3Error: what the check raised.
        """
        known = self.known  # read once: other threads may set it to None for a new check
        if known is not None:
            return known
        if self._check is None:
            self._check = asyncio.ensure_future(self._run_check(check))
            self._check.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieves it
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
        """Record an answer of any kind."""
        self._failing_since, self._opened = None, 0

    def failed(self, why: str = "") -> None:
        """Record that it did not answer, and the failure."""
        if self.known is not None:  # otherwise its check records that
            self._note_failure(why)

    def leave_alone(self, seconds: float) -> None:
        """Record its ``Retry-After``."""
        self._busy_until = max(self._busy_until, self._clock() + seconds)

    def _note_failure(self, why: str) -> None:
        now = self._clock()
        self.why = why
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
        clock: returns monotonic seconds.

    >>> fleet: Fleet[str] = Fleet(["http://a", "http://b"], clock=lambda: 0.0)
    >>> with fleet.use() as first, fleet.use() as second:
    ...     first is second
    False
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float]) -> None:
        self.servers: list[Server[T]] = [Server(url, clock) for url in urls]

    @contextmanager
    def use(self, but: Sequence[Server[T]] = ()) -> Iterator[Server[T]]:
        """Select the server with the fewest pending requests, and count one more within the block.

        Args:
            but: servers that have just failed, selected only when there is no other.

        Raises:
            EngineError: all circuits are open; it says when the next server will be tried.
        """
        there = [server for server in self.servers if not server.resting]
        if not there:
            pause = min(server.resting for server in self.servers)
            names = ", ".join(server.url for server in self.servers)
            why = next((f" ({server.why})" for server in self.servers if server.why), "")
            raise EngineError(f"no answer from {names}; not asked again for {pause:.1f} s{why}", retryable=True)
        checked = any(server.known is not None for server in there)  # then none waits for a check
        # ties are broken at random, so that several clients do not all start with the first
        picked = min(
            there,
            key=lambda one: (one in but, one.busy > 0, checked and one.checking, one.active, random.random()),  # noqa: S311 - no secret
        )
        picked.active += 1
        try:
            yield picked
        finally:
            picked.active -= 1
