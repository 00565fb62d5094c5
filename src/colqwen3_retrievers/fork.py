"""State that a forked child must not share with its parent: locks, settings of the process, open databases.

A child gets a copy of the parent's memory, but none of its other threads: a lock that one of them held would never be
released. Whoever owns such state registers it here, when the module is imported or the object is created:

* a :class:`ForkSafeLock` that another thread held is free in the child;
* a :class:`HeldSetting` that only other threads held is restored in the child;
* a function of :func:`after_fork` runs in the child, before ``os.fork`` returns there;
* a :func:`finalize` does nothing in the child;
* a fork waits, for a while, until no other thread is in a ``with no_fork`` block, and then runs the functions of
  :func:`before_fork`. Blocks are for libraries whose own state a fork in the middle of a call would break.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from types import MethodType
from typing import Any, Final, TypeVar

PATIENCE: Final = 5.0
"""Most seconds that a fork waits for ``no_fork`` blocks of other threads."""

inherited: Final[list[object]] = []
"""Objects of the parent, such as connections, that a child neither uses nor closes: both would disturb the parent."""

Hook = Callable[[], object]
HookT = TypeVar("HookT", bound=Hook)

_before: dict[int, Callable[[], Hook | None]] = {}
_in_child: dict[int, Callable[[], Hook | None]] = {}
_keys = itertools.count()


def after_fork(hook: HookT) -> HookT:
    """Call a function in each forked child, in the order of registration; also as a decorator.

    Args:
        hook: must not raise, and must not take locks of other libraries. A method is called while its object lives.

    Returns:
        The function.

    >>> after_fork(list)
    <class 'list'>
    """
    _register(_in_child, hook)
    return hook


def before_fork(hook: Hook) -> None:
    """Call a function before each fork, as :func:`after_fork`, unless a thread is still in a ``no_fork`` block."""
    _register(_before, hook)


def _register(hooks: dict[int, Callable[[], Hook | None]], hook: Hook) -> None:
    key = next(_keys)
    if isinstance(hook, MethodType):
        hooks[key] = weakref.WeakMethod(hook, lambda _: hooks.pop(key, None))
    else:
        hooks[key] = lambda: hook


def _call(hooks: dict[int, Callable[[], Hook | None]]) -> None:
    for reference in list(hooks.values()):
        hook = reference()
        if hook is not None:
            hook()


def finalize(owner: object, function: Callable[..., object], *arguments: object) -> weakref.finalize[..., Any]:
    """Return a ``weakref.finalize`` of this process alone: what it ends or removes is not a forked child's.

    >>> class Owner: ...
    >>> owner = Owner()
    >>> finalizer = finalize(owner, print, "removed")
    >>> del owner
    removed
    """
    key = next(_keys)

    def end() -> None:
        _in_child.pop(key, None)
        function(*arguments)

    finalizer = weakref.finalize(owner, end)
    _in_child[key] = lambda: finalizer.detach
    return finalizer


class ForkSafeLock:
    """A re-entrant lock for ``with``, free in a forked child unless the thread that forked holds it.

    Args:
        delays_fork: whether the lock's block is a ``no_fork`` block, too.

    >>> lock = ForkSafeLock()
    >>> with lock, lock:
    ...     pass
    """

    def __init__(self, *, delays_fork: bool = False) -> None:
        self._lock = threading.RLock()
        self._delays_fork = delays_fork
        after_fork(self._renew)

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._delays_fork:
            try:
                no_fork.__enter__()
            except BaseException:  # Ctrl-C, while waiting for a fork
                self._lock.release()
                raise

    def __exit__(self, *_: object) -> None:
        if self._delays_fork:
            no_fork.__exit__()
        self._lock.release()

    def _renew(self) -> None:
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


class HeldSetting:
    """A setting of the process, held while at least one thread is in the ``with`` block.

    Args:
        prepare: returns two functions, which set it and restore it; the second may be called twice, or alone.

    >>> values = ["theirs"]
    >>> setting = HeldSetting(lambda: (lambda: values.append("ours"), lambda: values.__delitem__(slice(1, None))))
    >>> with setting, setting:
    ...     values
    ['theirs', 'ours']
    >>> values
    ['theirs']
    """

    def __init__(self, prepare: Callable[[], tuple[Hook, Hook]]) -> None:
        self._prepare = prepare
        self._lock = ForkSafeLock()
        self._inside: list[int] = []  # threads, as often as they entered
        self._restore: Hook = _nothing
        after_fork(self._leave_for_others)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                hold, self._restore = self._prepare()
                hold()
            self._inside.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside.remove(threading.get_ident())
            self._restore_unless_held()

    def _restore_unless_held(self) -> None:
        if not self._inside:
            self._restore()
            self._restore = _nothing

    def _leave_for_others(self) -> None:
        """In a child, leave for the parent's other threads, which never will."""
        self._inside = [thread for thread in self._inside if thread == threading.get_ident()]
        self._restore_unless_held()


def _nothing() -> None:
    """Restore nothing."""


class _NoFork:
    """Blocks that a fork waits for; see this module.

    Attributes:
        torn: in a child, whether it was forked although a block was not left in time.
    """

    def __init__(self) -> None:
        self.torn = False
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # blocks by thread
        self._forking: set[int] = set()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._forking or me in self._forking or me in self._inside)
            self._inside[me] += 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    def before(self) -> None:
        """Let no other thread in, wait for those inside, and call the functions of :func:`before_fork`."""
        me = threading.get_ident()
        with self._changed:
            self._forking.add(me)
            self._changed.wait_for(lambda: self._inside.keys() <= {me}, PATIENCE)
            self.torn = bool(self._inside)
        if not self.torn:
            _call(_before)

    def in_parent(self) -> None:
        """Let other threads in again."""
        with self._changed:
            self.torn = False
            self._forking.discard(threading.get_ident())
            self._changed.notify_all()

    def in_child(self) -> None:
        """Forget the other threads, and call the functions of :func:`after_fork`."""
        me = threading.get_ident()
        self._changed = threading.Condition()
        self._inside = Counter({thread: count for thread, count in self._inside.items() if thread == me})
        self._forking.clear()
        _call(_in_child)


no_fork: Final = _NoFork()
"""A block that a fork of another thread waits for: ``with no_fork: ...``."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=no_fork.before, after_in_parent=no_fork.in_parent, after_in_child=no_fork.in_child)


def abandon(future: Future[Any], error: Exception) -> None:
    """Fail a future that a thread of the parent would have set; its callbacks are dropped.

    >>> future = Future()
    >>> abandon(future, ValueError("lost"))
    >>> future.exception()
    ValueError('lost')
    """
    Future.__init__(future)  # anew, since another thread may hold its condition
    future.set_exception(error)
