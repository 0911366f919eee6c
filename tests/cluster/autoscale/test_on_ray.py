"""Serve itself calls a policy that YAML names: the group that reports a long queue grows, and shrinks again."""

import tempfile
import time
from pathlib import Path

import pytest
import ray
from ray import serve

pytestmark = [
    pytest.mark.ray,
    # Serve warns about any look-back below the default interval of its metrics; the test sets that interval lower.
    pytest.mark.filterwarnings("ignore:`look_back_period_s`:FutureWarning"),
]


@serve.deployment(ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=1)
class Reporting:
    """Reports what the test wrote into a file, shared out over replicas as a queue would be."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"queue_depth": float(self._path.read_text())}


@pytest.fixture
def short_directory():
    """Ray's sockets lie below it, and their paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield directory


@pytest.fixture
def deployment(tmp_path, short_directory, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.1")
    monkeypatch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_RECORD_INTERVAL_S", "0.1")
    ray.init(num_cpus=1, _temp_dir=short_directory, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    queue = tmp_path / "queue_depth"
    queue.write_text("0")
    config = {
        "min_replicas": 1,
        "max_replicas": 3,
        "look_back_period_s": 1,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "policy": {
            "policy_function": "cluster.autoscale.policies:QueueDepth",
            "policy_kwargs": {"target_queue_depth": 4, "upscale_cooldown_s": 0, "downscale_cooldown_s": 0},
        },
    }
    serve.run(
        Reporting.options(name="experts-0", autoscaling_config=config).bind(str(queue)), name="mesh", route_prefix=None
    )
    yield queue
    serve.shutdown()
    ray.shutdown()


def wait_for_running(replicas: int) -> None:
    deadline = time.monotonic() + 60
    states: dict[str, int] = {}
    while time.monotonic() < deadline:
        states = serve.status().applications["mesh"].deployments["experts-0"].replica_states
        if states == {"RUNNING": replicas}:
            return
        time.sleep(0.05)
    pytest.fail(f"not {replicas} replicas running after 60 s: {states}")


def test_replicas_follow_what_they_report(deployment):
    wait_for_running(1)
    deployment.write_text("10")
    wait_for_running(3)
    deployment.write_text("1")
    wait_for_running(1)
