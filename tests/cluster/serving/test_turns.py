from __future__ import annotations

import pytest

from cluster.serving.turns import OtherFailed, Turns


def test_one_works_until_it_hands_over() -> None:
    turns, diary = Turns(), []

    def work(name: str, rounds: int) -> str:
        for index in range(rounds):
            diary.append(f"{name}{index}")
            turns.hand_over()
        return name

    assert turns.run(lambda: work("a", 2), lambda: work("b", 4)) == ("a", "b")
    # The shorter one ends; the other then goes on alone.
    assert diary == ["a0", "b0", "a1", "b1", "b2", "b3"]


def test_either_may_be_the_longer() -> None:
    turns, diary = Turns(), []

    def work(name: str, rounds: int) -> None:
        for index in range(rounds):
            diary.append(f"{name}{index}")
            turns.hand_over()

    turns.run(lambda: work("a", 3), lambda: work("b", 0))
    assert diary == ["a0", "a1", "a2"]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_failure_is_raised_and_ends_the_other(failing: int) -> None:
    turns, ends = Turns(), []

    def fails() -> None:
        turns.hand_over()
        raise ValueError("broken")

    def waits() -> None:
        try:
            for _ in range(5):
                turns.hand_over()
            ends.append("got to its end")
        except OtherFailed:
            ends.append("other failed")
            raise

    works = [waits, waits]
    works[failing] = fails
    with pytest.raises(ValueError, match="broken"):
        turns.run(*works)
    assert ends == ["other failed"]


def test_the_second_does_not_begin_where_the_first_failed_before() -> None:
    turns, begun = Turns(), []

    def fails() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        turns.run(fails, lambda: begun.append(1))
    assert not begun
