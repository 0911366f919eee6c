from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.bench.processes import child_process, descendants, interruptible, log_tail

# The grandchild ignores SIGTERM and has a session of its own, as a daemon that a server forgets would.
PARENT = """
import signal, subprocess, sys
grandchild = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", grandchild], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
open(sys.argv[1], "w").write(str(child.pid))
print("ready", flush=True)
signal.pause()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the process tree from /proc")
def test_nothing_is_left_behind_even_on_an_interrupt(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    argv = [sys.executable, "-c", PARENT, str(tmp_path / "pid")]
    started: list[subprocess.Popen[str]] = []

    def interrupted() -> None:
        with child_process(argv, env=os.environ, log=tmp_path / "log") as process:
            started.append(process)
            grandchild = int((tmp_path / "pid").read_text())  # a fifo: waits until the child has written it
            assert is_running(grandchild)
            assert grandchild in [pid for pid, _ in descendants(process.pid)]
            (tmp_path / "grandchild").write_text(str(grandchild))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].poll() is not None
    assert not is_running(int((tmp_path / "grandchild").read_text()))


def test_input_and_log(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; print(sys.stdin.read().upper()); print('end', file=sys.stderr)"]
    with child_process(argv, env=os.environ, log=tmp_path / "log", stdin="one\ntwo") as process:
        assert process.wait(60) == 0
    assert log_tail(tmp_path / "log") == "ONE\nTWO\nend"
    assert log_tail(tmp_path / "log", 1) == "end"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_unwinds_and_the_next_does_not_disturb_it(number: signal.Signals) -> None:
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    stopped: list[bool] = []

    def interrupted() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                stopped.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stopped
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
