"""Child processes of a benchmark that leave nothing behind, whatever ends the benchmark."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from experts.errors import MeshError

STOP_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 5.0
START_TIMEOUT_S = 120.0


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, start time) of every process below `pid`, from /proc; empty where there is no /proc."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command name may hold spaces and parentheses: fields count from the last ")".
            fields = entry.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append((int(entry.parent.name), fields[19]))
    found: list[tuple[int, str]] = []
    frontier = [pid]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += [child for child, _ in below]
    return found


def _is_same(pid: int, start_time: str) -> bool:
    """Whether `pid` is still the process that started at `start_time`, and not a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z" and fields[19] == start_time


def stop_tree(process: subprocess.Popen[str], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """SIGTERM to `process`; after it ended or `timeout_s` passed, SIGKILL to all that it started and left."""
    below = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    left = [entry for entry in below if _is_same(*entry)]
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
        process.wait()
    # They are not our children, so the kernel lets us watch them go but not wait for them.
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while any(_is_same(*entry) for entry in left) and time.monotonic() < deadline:
        time.sleep(0.01)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, and neither disturbs the unwinding: what was started is stopped."""

    def interrupt(*_: object) -> None:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def child_process(
    argv: Sequence[str], *, env: Mapping[str, str], log: Path, stdin: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Runs `argv` with stdout and stderr in `log`; on leaving, stops it and everything below it.

    The child has a session of its own, so that a Ctrl-C in the terminal reaches only the benchmark, which
    then stops its children in order.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
        yield process
    finally:
        stop_tree(process)


def log_tail(log: Path, lines: int = 15) -> str:
    """The end of a child's log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def announcing_processes(commands: Sequence[Callable[[Path], Sequence[str]]]) -> Iterator[list[str]]:
    """Start a process for each command, which is told the file to announce itself in; what each wrote, once all have.

    Raises MeshError with the end of its output where one does not start.
    """
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as directory, contextlib.ExitStack() as stack:
        started = []
        for index, command in enumerate(commands):
            file, log = Path(directory, f"{index}.address"), Path(directory, f"{index}.log")
            started.append((stack.enter_context(child_process(command(file), env=os.environ, log=log)), file, log))
        deadline = time.monotonic() + START_TIMEOUT_S
        for process, file, log in started:
            while not file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise MeshError(f"a process of the benchmark did not start:\n{log_tail(log)}")
                time.sleep(0.02)
        yield [file.read_text() for _, file, _ in started]
