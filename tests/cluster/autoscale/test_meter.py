import threading

from cluster.autoscale.meter import GroupMeter


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_rates_and_percentile_over_the_window_only():
    clock = Clock()
    meter = GroupMeter(clock, window_s=10)
    assert meter.stats() == {"tokens_per_s": 0, "p95_dispatch_ms": 0, "queue_depth": 0, "load_share": 1}
    for milliseconds in range(1, 101):
        accepted = meter.accept()
        clock.now += milliseconds / 1000
        meter.answer(accepted, rows=20)
    clock.now = 60.0
    stats = meter.stats()
    assert stats["tokens_per_s"] == 100 * 20 / 10
    assert round(stats["p95_dispatch_ms"], 6) == 95
    clock.now += 20
    assert meter.stats()["tokens_per_s"] == 0


def test_idle_is_the_time_since_the_last_answer():
    clock = Clock()
    meter = GroupMeter(clock, window_s=10)
    clock.now += 3
    assert meter.idle_s() == 3
    accepted = meter.accept()
    clock.now += 2
    assert meter.idle_s() == 0
    meter.answer(accepted, rows=1)
    clock.now += 1
    assert meter.idle_s() == 1


def test_a_young_meter_divides_by_its_age():
    clock = Clock()
    meter = GroupMeter(clock, window_s=10)
    meter.answer(meter.accept(), rows=300)
    clock.now += 2
    assert meter.stats()["tokens_per_s"] == 150


def test_open_calls_of_many_threads_are_counted_and_uncounted():
    meter = GroupMeter(Clock())
    opened, release = threading.Barrier(9), threading.Event()

    def call() -> None:
        accepted = meter.accept()
        opened.wait()
        release.wait()
        meter.answer(accepted, rows=1)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    opened.wait()
    meter.set_load_share(2.5)
    assert meter.stats()["queue_depth"] == 8
    assert meter.stats()["load_share"] == 2.5
    release.set()
    for thread in threads:
        thread.join()
    assert meter.stats()["queue_depth"] == 0


def test_a_call_that_comes_again_in_another_form_is_no_answer():
    meter = GroupMeter(Clock())
    meter.accept()
    meter.withdraw()
    assert meter.stats()["queue_depth"] == 0
    assert meter.stats()["tokens_per_s"] == 0
