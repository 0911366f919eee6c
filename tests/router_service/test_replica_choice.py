from collections import Counter

import pytest

from router_service.placement import GroupReplica, PlacementTable
from router_service.replica_choice import RETRY_S, ReplicaChoice
from router_service.table_view import TableView


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def choice(clock):
    return ReplicaChoice(clock)


def replica(name, group=0):
    return GroupReplica(group=group, replica=name, node="n", address="")


def view(*names, leaving=()):
    table = PlacementTable(
        version=1,
        num_groups=1,
        holders={0: ((0,),)},
        replicas=tuple(replica(name) for name in names),
        leaving=frozenset(leaving),
    )
    return TableView(table)


def test_fewest_rows_in_flight(choice):
    choice.sent(replica("a"), 10)
    choice.sent(replica("b"), 3)
    assert choice.choose(view("a", "b"), 0) == replica("b")
    settle = choice.sent(replica("b"), 20)
    assert choice.choose(view("a", "b"), 0) == replica("a")
    settle()
    settle()
    assert choice.choose(view("a", "b"), 0) == replica("b")


def test_callers_that_wait_for_each_answer_use_all_replicas_alike(choice):
    turns = Counter(choice.choose(view("a", "b", "c"), 0).replica for _ in range(30))
    assert turns == {"a": 10, "b": 10, "c": 10}


def test_a_new_replica_takes_the_next_call(choice):
    for _ in range(5):
        choice.choose(view("a", "b"), 0)
    assert choice.choose(view("a", "b", "new"), 0) == replica("new")


def test_a_leaving_replica_is_called_only_where_there_is_no_other(choice):
    assert {choice.choose(view("a", "b", leaving=["a"]), 0).replica for _ in range(4)} == {"b"}
    assert choice.choose(view("a", leaving=["a"]), 0) == replica("a")
    assert choice.choose(view("a", "b", leaving=["a", "b"]), 0) is not None


def test_a_lost_replica_is_left_out_for_a_while(choice, clock, caplog):
    choice.lost(replica("a", group=3), "its connection broke")
    choice.lost(replica("a", group=3), "nor is this news")
    assert [record.getMessage() for record in caplog.records] == [
        "expert group 3 counts as lost for 1 s: its connection broke"
    ]
    assert {choice.choose(view("a", "b"), 0).replica for _ in range(4)} == {"b"}
    assert choice.choose(view("a"), 0) is None
    clock.now += RETRY_S
    assert choice.choose(view("a"), 0) == replica("a")


def test_a_failure_is_forgotten_though_it_came_after_the_replica_had_left(choice, clock):
    choice.forget((replica("gone"),))
    choice.lost(replica("gone"), "its connection broke")
    assert choice.unreachable(view("a")) == frozenset()
    clock.now += RETRY_S
    assert choice.choose(view("a"), 0) == replica("a")
    assert not choice._lost_at  # which would keep every later choice from being quick
