"""The controller: joins, losses, restarts; tables never go back and never leave out a group that is still there."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cluster.control.controller import Assignment, Controller
from experts.errors import ConfigError
from experts.spec import ExpertKey
from router_service.placement import GroupReplica, PlacementTable

LAYERS = {1: 8, 2: 8}


class Health:
    """Stands in for the network: `lose(address)` is a connection that breaks."""

    def __init__(self) -> None:
        self._gone: dict[str, asyncio.Event] = {}

    async def watch(self, address: str) -> str:
        await self._gone.setdefault(address, asyncio.Event()).wait()
        return "its connection broke"

    def lose(self, address: str) -> None:
        self._gone.setdefault(address, asyncio.Event()).set()


def _replica(group: int, start: int = 0, node: str = "a") -> GroupReplica:
    return GroupReplica(group=group, replica=f"g{group}s{start}", node=node, address=f"{node}:{group}{start}")


async def _join(
    controller: Controller,
    replica: GroupReplica,
    resident: frozenset[ExpertKey] = frozenset(),
    known: int = 0,
) -> Assignment:
    return await controller.join(replica, device="cpu", resident=resident, known_version=known)


async def _start(controller: Controller, groups: int) -> list[Assignment]:
    assignments = await asyncio.gather(*(_join(controller, _replica(group)) for group in range(groups)))
    for group in range(groups):
        await controller.ready(_replica(group).replica)
    return assignments


async def _next(tables: AsyncIterator[PlacementTable]) -> PlacementTable:
    return await asyncio.wait_for(anext(tables), 10)


def _run(scenario: object) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))  # type: ignore[arg-type]


def test_every_expert_is_assigned_once_and_the_table_says_where() -> None:
    async def scenario() -> None:
        controller = Controller(experts_per_layer=LAYERS, num_groups=4, watch_health=Health().watch)
        assignments = await _start(controller, 4)
        table = await _next(controller.watch(0))
        keys = [key for assignment in assignments for key in assignment.keys]
        assert sorted(keys) == [ExpertKey(layer, e) for layer in LAYERS for e in range(8)]
        for group, assignment in enumerate(assignments):
            for layer, expert in assignment.keys:
                assert table.holders[layer][expert] == (group,)
        assert [replica.group for replica in table.replicas] == [0, 1, 2, 3]

    _run(scenario())


def test_nobody_gets_a_table_before_every_group_is_ready() -> None:
    async def scenario() -> None:
        controller = Controller(experts_per_layer=LAYERS, num_groups=2, watch_health=Health().watch)
        tables = controller.watch(0)
        first = asyncio.ensure_future(anext(tables))
        await asyncio.gather(*(_join(controller, _replica(group)) for group in range(2)))
        await controller.ready("g0s0")
        assert controller.status()["missing_groups"] == [1]
        assert not first.done()
        await controller.ready("g1s0")
        assert (await asyncio.wait_for(first, 10)).missing_groups() == ()

    _run(scenario())


def test_each_learns_how_many_listen_on_its_address() -> None:
    async def scenario() -> None:
        controller = Controller(experts_per_layer=LAYERS, num_groups=3, watch_health=Health().watch)
        pods = ("10.0.0.1", "10.0.0.1", "10.0.0.2")  # two pods, which may be on one machine
        assignments = await asyncio.gather(
            *(
                _join(controller, GroupReplica(group=group, replica=f"g{group}", node="a", address=f"{pod}:500{group}"))
                for group, pod in enumerate(pods)
            )
        )
        assert [assignment.groups_on_host for assignment in assignments] == [(0, 1), (0, 1), (2,)]
        assert [assignment.replicas_on_host for assignment in assignments] == [2, 2, 1]
        again = GroupReplica(group=1, replica="g1-again", node="a", address="10.0.0.1:5009")
        assignment = await _join(controller, again)
        assert (assignment.groups_on_host, assignment.replicas_on_host) == ((0, 1), 3)

    _run(scenario())


def test_a_lost_replica_leaves_the_table_and_its_successor_enters_with_the_same_experts() -> None:
    async def scenario() -> None:
        health = Health()
        controller = Controller(experts_per_layer=LAYERS, num_groups=2, watch_health=health.watch)
        before = await _start(controller, 2)
        tables = controller.watch(0)
        first = await _next(tables)
        health.lose("a:10")
        without = await _next(tables)
        assert without.missing_groups() == (1,)
        assert controller.status()["replicas_lost"] == 1
        again = await _join(controller, _replica(1, start=1))
        assert again.keys == before[1].keys
        await controller.ready("g1s1")
        healed = await _next(tables)
        assert [replica.replica for replica in healed.replicas] == ["g0s0", "g1s1"]
        assert first.version < without.version < healed.version

    _run(scenario())


def test_a_second_replica_of_a_group_is_added_and_leaves_without_a_gap() -> None:
    async def scenario() -> None:
        controller = Controller(experts_per_layer=LAYERS, num_groups=2, watch_health=Health().watch)
        await _start(controller, 2)
        tables = controller.watch(0)
        await _next(tables)
        await _join(controller, _replica(0, start=1, node="b"))
        await controller.ready("g0s1")
        assert [r.replica for r in (await _next(tables)).replicas] == ["g0s0", "g0s1", "g1s0"]
        await controller.retire("g0s0")
        retired = await _next(tables)
        assert [r.replica for r in retired.replicas] == ["g0s0", "g0s1", "g1s0"]
        assert retired.leaving == {"g0s0"}
        await controller.leave("g0s0")
        left = await _next(tables)
        assert [r.replica for r in left.replicas] == ["g0s1", "g1s0"]
        assert not left.leaving
        assert controller.status()["replicas_lost"] == 0

    _run(scenario())


def test_a_restarted_controller_learns_from_the_groups_and_goes_on_counting() -> None:
    async def scenario() -> None:
        old = Controller(experts_per_layer=LAYERS, num_groups=2, watch_health=Health().watch)
        held = await _start(old, 2)
        version = (await _next(old.watch(0))).version + 40
        new = Controller(experts_per_layer=LAYERS, num_groups=2, watch_health=Health().watch)
        swapped = (held[1], held[0])  # what groups hold wins over what the controller would choose
        again = await asyncio.gather(
            *(_join(new, _replica(g), resident=swapped[g].keys, known=version) for g in range(2))
        )
        assert [assignment.keys for assignment in again] == [assignment.keys for assignment in swapped]
        await new.ready("g0s0")
        await new.ready("g1s0")
        assert (await _next(new.watch(version))).version == version + 1

    _run(scenario())


def test_a_group_count_that_the_model_cannot_fill_is_refused_before_anyone_joins() -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=r"experts\.groups is 3, but layer 1 has 2 experts"):
            Controller(experts_per_layer={1: 2}, num_groups=3, watch_health=Health().watch)

    _run(scenario())
