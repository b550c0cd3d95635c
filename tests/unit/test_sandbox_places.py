"""The order in which requests for a sandbox get their place."""

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import CapacityRejected, Gone
from rorqual.sandbox.places import Places


def places(capacity: int = 1, max_waiting: int = 10) -> Places:
    return Places(capacity, max_waiting, lambda: None)


async def arrive(pool: Places, order: list[str], name: str, priority: int, owner: str = "") -> None:
    await pool.take(priority, owner)
    order.append(name)


def test_priority_then_arrival() -> None:
    async def scene() -> list[str]:
        pool, order = places(), list[str]()
        await pool.take(0, "")
        wanted = [("low", 0), ("high", 5), ("high too", 5), ("middle", 3)]
        tasks = [asyncio.create_task(arrive(pool, order, name, priority)) for name, priority in wanted]
        for _ in range(5):
            await asyncio.sleep(0.001)
            pool.give_back("")
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scene()) == ["high", "high too", "middle", "low"]


def test_the_owner_with_fewest_places_goes_first() -> None:
    async def scene() -> list[str]:
        pool, order = places(capacity=3), list[str]()
        for _ in range(3):
            await pool.take(0, "greedy")
        tasks = [asyncio.create_task(arrive(pool, order, f"greedy {i}", 0, "greedy")) for i in range(2)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(arrive(pool, order, "modest", 0, "modest")))
        await asyncio.sleep(0)
        for _ in range(3):
            pool.give_back("greedy")
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scene())[0] == "modest"


def test_too_many_waiting_are_refused_with_a_time() -> None:
    async def scene() -> None:
        pool = places(max_waiting=1)
        await pool.take(0, "")
        waiting = asyncio.create_task(pool.take(0, ""))
        await asyncio.sleep(0)
        with pytest.raises(CapacityRejected, match="1 sandboxes are in use and 1 requests wait; try again in") as error:
            await pool.take(9, "")
        assert error.value.retry_after_s > 0
        pool.give_back("")
        await waiting

    asyncio.run(scene())


def test_a_time_limit_and_a_closed_pool() -> None:
    async def scene() -> None:
        pool = places()
        await pool.take(0, "")
        with pytest.raises(CapacityRejected, match="came free within 0.01 s"):
            await pool.take(0, "", timeout=0.01)
        waiting = asyncio.create_task(pool.take(0, ""))
        await asyncio.sleep(0)
        pool.close()
        with pytest.raises(Gone):
            await waiting
        with pytest.raises(Gone):
            await pool.take(0, "")

    asyncio.run(scene())


@pytest.mark.parametrize("capacity, max_waiting", [(0, 1), (1, -1)])
def test_a_pool_that_serves_nobody_is_refused(capacity: int, max_waiting: int) -> None:
    with pytest.raises(SandboxError, match="cannot serve anyone"):
        places(capacity, max_waiting)


@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 4))
def test_never_more_than_capacity_and_nothing_lost(seed: int, capacity: int) -> None:
    """Requests that come, give up and leave in any order: at most `capacity` hold a place, all is free at the end."""
    dice = random.Random(seed)

    async def guest(pool: Places, held: Counter[str]) -> None:
        owner = dice.choice("ab")
        try:
            await asyncio.wait_for(
                pool.take(dice.randrange(3), owner, dice.choice([None, 0.002])), dice.choice([9, 0.001])
            )
        except (CapacityRejected, TimeoutError):
            return
        held["now"] += 1
        held["most"] = max(held["most"], held["now"])
        await asyncio.sleep(dice.choice([0, 0.001]))
        held["now"] -= 1
        pool.give_back(owner)

    async def scene() -> tuple[Counter[str], Places]:
        pool, held = Places(capacity, 5, lambda: None), Counter[str]()
        await asyncio.gather(*(guest(pool, held) for _ in range(20)))
        return held, pool

    held, pool = asyncio.run(scene())
    assert held["most"] <= capacity and pool.taken == 0 and not pool.waiting
