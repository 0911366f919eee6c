"""Independent tasks over a few threads that share no barrier."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue


class ThreadTeam:
    """`num_threads` threads, the caller's being one, that take tasks until none is left.

    OpenMP would split every matrix multiplication and wait at its end for the slowest thread: on a machine whose
    cores are shared, for as long as the scheduler likes. Here a task runs in one thread from start to end, and a
    helper that wakes late only means that the others did its share. Tasks are compiled code, without the GIL.
    """

    NAME = "experts"
    """Of its threads."""

    def __init__(self, num_threads: int) -> None:
        assert num_threads >= 1
        self.num_threads = num_threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for _ in range(num_threads - 1):
            threading.Thread(target=_help, args=(self._jobs,), name=self.NAME, daemon=True).start()
        weakref.finalize(self, _dismiss, self._jobs, num_threads - 1)

    def run(self, task: Callable[[int], None], num_tasks: int) -> None:
        """Call `task(i)` once for every i below `num_tasks`, in no order; raises what a task raised."""
        if num_tasks == 1:
            task(0)
            return
        job = _Job(task, num_tasks)
        for _ in range(min(self.num_threads, num_tasks) - 1):
            self._jobs.put(job)
        job.work()
        job.finish()


class _Job:
    def __init__(self, task: Callable[[int], None], num_tasks: int) -> None:
        self._task = task
        self.num_tasks = num_tasks
        self._next = itertools.count()
        self._lock = threading.Lock()
        self._finished = False
        self._helping = 0
        self._last_helper_left = threading.Event()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Take tasks until none is left, or until one fails."""
        try:
            # A count's `next` is one bytecode: no two threads get the same number.
            while self._error is None and (index := next(self._next)) < self.num_tasks:
                self._task(index)
        except BaseException as error:
            self._error = error

    def help(self) -> None:
        """A helper's part; none if the caller is done already."""
        with self._lock:
            if self._finished:
                return
            self._helping += 1
        self.work()
        with self._lock:
            self._helping -= 1
            if self._finished and not self._helping:
                self._last_helper_left.set()

    def finish(self) -> None:
        """The caller's wait for helpers that are in a task."""
        with self._lock:
            self._finished = True
            helping = self._helping
        if helping:
            self._last_helper_left.wait()
        if self._error is not None:
            raise self._error


def _help(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.help()
        # Waiting for the next job must not keep this one's tensors alive.
        del job


def _dismiss(jobs: SimpleQueue[_Job | None], num_helpers: int) -> None:
    for _ in range(num_helpers):
        jobs.put(None)
