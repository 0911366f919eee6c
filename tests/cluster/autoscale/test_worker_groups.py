import logging
import threading

import pytest

from cluster.autoscale.worker_groups import WorkerGroupFollower, idle_addresses, replicas_wanted
from cluster.kubernetes.errors import KubernetesError
from cluster.kubernetes.scale import Scaled


def deployment(target, *replicas):
    return {
        "target_num_replicas": target,
        "replicas": [{"node_ip": address, "state": state} for address, state in replicas],
    }


APPLICATION = {
    "deployments": {
        "controller": deployment(1, ("10.0.0.1", "RUNNING")),
        "engine": deployment(2, ("10.0.0.1", "RUNNING"), (None, "STARTING")),
        "experts-0": deployment(3, ("10.0.0.2", "RUNNING"), ("10.0.0.3", "STOPPING")),
        "experts-1": deployment(1, ("10.0.0.4", "STOPPED")),
    }
}
NODES = [{"NodeManagerAddress": f"10.0.0.{number}", "Alive": number != 6} for number in range(1, 7)]


class Prescaler:
    """Stands for the pre-scaler: remembers what it was asked and answers as the test says."""

    def __init__(self):
        self.asked = []
        self.error = None
        self.called = threading.Event()

    def follow(self, wanted, idle):
        self.asked.append((dict(wanted), set(idle)))
        self.called.set()
        if self.error:
            raise self.error
        return [Scaled(kind="RayCluster", name="mesh", before={"experts": 1}, after={"experts": 2})]


@pytest.fixture
def prescaler():
    return Prescaler()


def follower(prescaler, application=lambda: APPLICATION, period_s=5.0):
    return WorkerGroupFollower(prescaler, application=application, ray_nodes=lambda: NODES, period_s=period_s)


def test_targets_are_summed_by_worker_group_whether_they_run_or_not():
    assert replicas_wanted(APPLICATION) == {"engine": 2, "experts": 4}


def test_a_node_is_idle_only_without_any_replica_that_is_not_stopped():
    assert idle_addresses(APPLICATION, NODES) == {"10.0.0.4", "10.0.0.5"}


def test_a_step_hands_both_to_the_prescaler_and_logs_what_changed(prescaler, caplog):
    caplog.set_level(logging.INFO)
    follower(prescaler).step()
    assert prescaler.asked == [({"engine": 2, "experts": 4}, {"10.0.0.4", "10.0.0.5"})]
    assert "RayCluster mesh: replicas {'experts': 1} -> {'experts': 2}" in caplog.text


def test_the_same_refusal_is_logged_once(prescaler, caplog):
    prescaler.error = KubernetesError("patching is forbidden", 403)
    following = follower(prescaler)
    for _ in range(3):
        following.step()
    assert caplog.text.count("patching is forbidden") == 1
    prescaler.error = None
    following.step()
    prescaler.error = KubernetesError("patching is forbidden", 403)
    following.step()
    assert caplog.text.count("patching is forbidden") == 2


def test_the_thread_survives_a_step_that_fails(prescaler):
    answers = iter([RuntimeError("Serve's controller restarts")])

    def application():
        for error in answers:
            raise error
        return APPLICATION

    following = follower(prescaler, application, period_s=0.001)
    following.start()
    assert prescaler.called.wait(10)
    following.stop()
