"""What a forked child renews, by the parts of :mod:`colqwen3_retrievers.fork`."""

from __future__ import annotations

import ast
import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

import colqwen3_retrievers
from colqwen3_retrievers import fork
from tests.forking import answer_of_child, held_elsewhere

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python 3.12 warns of any fork beside threads
]


def enters(block: object) -> str:
    with block:  # type: ignore[attr-defined]
        return "entered"


def test_a_lock_that_another_thread_held_is_free_in_the_child() -> None:
    lock = fork.ForkSafeLock()
    with held_elsewhere(lock):
        assert answer_of_child(lambda: enters(lock)) == "entered"
    assert enters(lock) == "entered"


def test_a_lock_that_the_forking_thread_holds_stays_its_own() -> None:
    lock = fork.ForkSafeLock()

    def refused_to_others() -> str:
        entered = threading.Event()
        threading.Thread(target=lambda: (enters(lock), entered.set()), daemon=True).start()
        return "free" if entered.wait(0.3) else "held"

    with lock:
        assert answer_of_child(refused_to_others) == "held"


def test_a_setting_that_another_thread_held_is_restored_in_the_child() -> None:
    values = ["theirs"]

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        before = list(values)
        return lambda: values.__setitem__(0, "ours"), lambda: values.__setitem__(slice(None), before)

    setting = fork.HeldSetting(prepare)

    def seen() -> str:
        before = values[0]
        with setting:
            inside = values[0]
        return f"{before} {inside} {values[0]}"

    with held_elsewhere(setting):
        assert values == ["ours"]
        assert answer_of_child(seen) == "theirs ours theirs"
        with setting:
            assert answer_of_child(lambda: values[0]) == "ours", "the thread that forked holds it too"
    assert values == ["theirs"]


def test_a_fork_waits_for_blocks_of_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fork.before_fork(hook := lambda: calls.append("before"))
    monkeypatch.setattr(fork, "PATIENCE", 10)
    entered = threading.Event()

    def stay() -> None:
        with fork.no_fork, fork.no_fork:
            entered.set()
            threading.Event().wait(0.3)
            calls.append("left")

    thread = threading.Thread(target=stay)
    thread.start()
    assert entered.wait(10)
    assert answer_of_child(lambda: f"{calls} {fork.no_fork.torn} {enters(fork.no_fork)}") == (
        "['left', 'before'] False entered"
    )
    thread.join(10)
    assert enters(fork.no_fork) == "entered"
    del hook


def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "PATIENCE", 0.1)
    with held_elsewhere(fork.no_fork):
        assert answer_of_child(lambda: f"{fork.no_fork.torn} {enters(fork.no_fork)}") == "True entered"
        assert enters(fork.no_fork) == "entered", "the parent goes on"
    with fork.no_fork:
        assert answer_of_child(lambda: str(fork.no_fork.torn)) == "True", "its own block is no better"


def test_threads_that_come_meanwhile_wait_for_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "PATIENCE", 10)
    order: list[str] = []

    def late() -> None:
        while not fork.no_fork._forking:
            threading.Event().wait(0.01)
        with fork.no_fork:
            order.append("late")

    def early() -> None:
        with fork.no_fork:
            entered.set()
            threading.Event().wait(0.4)

    entered = threading.Event()
    threads = [threading.Thread(target=early), threading.Thread(target=late)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    assert answer_of_child(lambda: str(order)) == "[]"
    for thread in threads:
        thread.join(10)
    assert order == ["late"]


def test_hooks_of_objects_end_with_them() -> None:
    class Owner:
        def hook(self) -> None: ...

    gc.collect()
    before = len(fork._in_child)
    owner = Owner()
    fork.after_fork(owner.hook)
    lock, finalizer = fork.ForkSafeLock(), fork.finalize(owner, len, "")
    assert len(fork._in_child) == before + 3
    del owner, lock
    gc.collect()
    assert not finalizer.alive
    assert len(fork._in_child) == before


def test_what_the_parent_would_remove_stays_when_a_child_ends(tmp_path: Path) -> None:
    class Owner: ...

    owner = Owner()
    fork.finalize(owner, tmp_path.rmdir)

    def drop() -> str:
        nonlocal owner
        del owner
        gc.collect()
        return str(tmp_path.exists())

    assert answer_of_child(drop) == "True"
    assert tmp_path.exists()
    del owner
    gc.collect()
    assert not tmp_path.exists()


def test_an_abandoned_future_fails_though_its_condition_is_held() -> None:
    future: Future[int] = Future()

    def outcome() -> str:
        fork.abandon(future, ValueError("lost"))
        return repr(future.exception(5))

    with held_elsewhere(future._condition):
        assert answer_of_child(outcome) == "ValueError('lost')"


# Locks that need not be renewed, with the reason.
LEFT = {
    "fork.py": "the locks inside, renewed there",
    "encoding/batching.py": "a child drops the engine and its queue",
    "encoding/shared_engine.py": "a child drops the engines and makes new lanes",
    "encoding/futures.py": "a child fails the futures and makes new lanes",
    "engines/server/transport.py": "a child drops the engine and its client",
    "pages/remote_images.py": "of one fetch, in one thread",
    "stores/qdrant/connection.py": "an event, replaced in a child",
    "vectors/kernels/torch_maxsim.py": "of workers that a child replaces",
}


def test_every_lock_of_the_package_is_renewed_or_known() -> None:
    package = Path(colqwen3_retrievers.__file__).parent
    kinds = ("Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore", "Event", "Barrier")
    names = {f"threading.{kind}" for kind in kinds}
    users = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in names:
                users.add(path.relative_to(package).as_posix())
            assert not (isinstance(node, ast.ImportFrom) and node.module == "threading"), path
            assert not (isinstance(node, ast.Attribute) and node.attr in ("getpid", "register_at_fork")) or (
                path.name in ("fork.py", "lock.py", "plugin.py")
            ), f"{path}: forks are noticed in fork.py"
    assert users <= set(LEFT)
