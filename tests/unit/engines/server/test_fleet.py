"""The fleet: who is picked, when a circuit opens, and that a server is checked once for all who wait for it."""

from __future__ import annotations

import asyncio

import pytest

from colqwen3_retrievers.engines.server.fleet import FIRST_PAUSE, GRACE, LONGEST_PAUSE, Fleet, Server
from colqwen3_retrievers.errors import ConfigError, EngineError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def well(server: Server[str]) -> str:
    await asyncio.sleep(0)
    return f"checked {server.url}"


async def gone(server: Server[str]) -> str:
    raise EngineError("gone", retryable=True)


def open_circuit(server: Server[str], clock: Clock) -> None:
    asyncio.run(server.ready(well))
    server.failed()
    clock.now += GRACE
    server.failed()


def test_the_least_loaded_is_picked_and_the_busy_last(clock: Clock) -> None:
    fleet: Fleet[str] = Fleet(["a", "b", "c"], clock)
    with fleet.use() as one, fleet.use() as two, fleet.use() as three:
        assert {one.url, two.url, three.url} == {"a", "b", "c"}
        two.leave_alone(5)
        with fleet.use(but=[one]) as four:
            assert four is three
    clock.now += 5
    assert not any(server.busy or server.active for server in fleet.servers)


def test_a_circuit_opens_when_nothing_but_failures_came_for_a_while(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)
    asyncio.run(server.ready(well))
    for _ in range(50):  # many requests broken off at once are one failure
        server.failed()
    clock.now += 0.9 * GRACE
    server.failed()
    server.succeeded()
    clock.now += GRACE
    server.failed()
    assert not server.resting
    clock.now += GRACE
    server.failed()
    assert server.resting == FIRST_PAUSE
    assert server.known is None


def test_failures_of_requests_already_under_way_do_not_lengthen_the_pause(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)
    open_circuit(server, clock)
    for _ in range(30):
        server.failed()
    assert server.resting == FIRST_PAUSE


def test_all_open_fails_at_once_and_says_until_when(clock: Clock) -> None:
    fleet: Fleet[str] = Fleet(["http://a", "http://b"], clock)
    for server in fleet.servers:
        asyncio.run(server.ready(well))
        server.failed()
    clock.now += GRACE
    for server in fleet.servers:
        server.failed()
    with pytest.raises(EngineError, match=r"no answer from http://a, http://b; not asked again for 1\.0 s") as caught:
        fleet.use().__enter__()
    assert caught.value.retryable
    clock.now += FIRST_PAUSE
    with fleet.use() as server:
        assert asyncio.run(server.ready(well)) == f"checked {server.url}"


def test_pauses_double_up_to_a_bound_and_start_anew_after_success(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)
    open_circuit(server, clock)
    pauses = []
    for _ in range(7):
        pauses.append(server.resting)
        clock.now += server.resting
        with pytest.raises(EngineError):
            asyncio.run(server.ready(gone))  # half open: one failure is enough
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]
    clock.now += LONGEST_PAUSE
    open_circuit(server, clock)
    assert server.resting == FIRST_PAUSE


def test_one_check_for_all_who_wait(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)
    checks = 0

    async def check(which: Server[str]) -> str:
        nonlocal checks
        checks += 1
        return await well(which)

    async def many() -> list[str]:
        return await asyncio.gather(*(server.ready(check) for _ in range(20)))

    assert asyncio.run(many()) == ["checked a"] * 20
    assert checks == 1


def test_who_stops_waiting_does_not_stop_the_check(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)

    async def slow(which: Server[str]) -> str:
        await asyncio.sleep(0.05)
        return which.url

    async def impatient() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await server.ready(slow)
        return await server.ready(slow)

    assert asyncio.run(impatient()) == "a"


def test_a_server_that_is_wrong_is_not_one_that_is_gone(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)

    async def wrong(which: Server[str]) -> str:
        raise ConfigError("another model")

    for _ in range(9):
        clock.now += GRACE
        with pytest.raises(ConfigError):
            asyncio.run(server.ready(wrong))
    assert not server.resting


def test_a_server_that_is_gone_for_days_is_still_one_that_is_gone(clock: Clock) -> None:
    server: Server[str] = Server("a", clock)
    for _ in range(1100):
        clock.now += LONGEST_PAUSE
        with pytest.raises(EngineError):
            asyncio.run(server.ready(gone))
    assert server.resting == LONGEST_PAUSE


def test_all_open_says_what_was_last_seen(clock: Clock) -> None:
    fleet: Fleet[str] = Fleet(["http://a"], clock)
    for _ in range(2):
        clock.now += GRACE
        with fleet.use() as server, pytest.raises(EngineError):
            asyncio.run(server.ready(gone))
    with pytest.raises(EngineError, match=r"not asked again for 1\.0 s \(gone\)"):
        fleet.use().__enter__()


def test_nobody_joins_a_check_while_another_server_is_there(clock: Clock) -> None:
    fleet: Fleet[str] = Fleet(["a", "b"], clock)
    there, back = fleet.servers

    async def hangs(server: Server[str]) -> str:
        await asyncio.sleep(60)
        return server.url

    async def many() -> None:
        await there.ready(well)
        there.active = 9
        with fleet.use() as picked:
            assert picked is back, "somebody has to find out"
            checked = asyncio.ensure_future(back.ready(hangs))
            await asyncio.sleep(0)
            there.active, back.active = 9, 0
            with fleet.use() as other:
                assert other is there
            checked.cancel()

    asyncio.run(many())
