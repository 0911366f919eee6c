"""A team does every task once, whoever takes it."""

from __future__ import annotations

import gc
import threading

import pytest

from experts.ops.cpu_threads import ThreadTeam


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 3, 200])
def test_every_task_runs_once(num_threads: int, num_tasks: int) -> None:
    team = ThreadTeam(num_threads)
    for _ in range(20):
        done: list[int] = []
        team.run(done.append, num_tasks)
        assert sorted(done) == list(range(num_tasks))


def test_tasks_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=30)
    ThreadTeam(3).run(lambda _: [meeting.wait()].clear(), 3)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_tasks_error_is_raised_and_the_team_works_on(num_threads: int) -> None:
    team = ThreadTeam(num_threads)

    def fail(index: int) -> None:
        if index == 2:
            raise RuntimeError("task 2")

    with pytest.raises(RuntimeError, match="task 2"):
        team.run(fail, 5)
    done: list[int] = []
    team.run(done.append, 5)
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_helpers_leave_with_their_team() -> None:
    before = set(threading.enumerate())
    team = ThreadTeam(3)
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    team.run(lambda _: None, 10)
    del team
    gc.collect()
    for helper in helpers:
        helper.join(30)
        assert not helper.is_alive()
