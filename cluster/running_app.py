"""The running application as an operator's commands see it: how to reach Ray, where the engines are."""

from __future__ import annotations

import logging
import re
from typing import Any

import ray
from ray import serve
from ray._private import services
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

from cluster.loopback import keep_loopback
from cluster.reachable import unreachable
from experts.errors import ConfigError

log = logging.getLogger(__name__)
APPLICATION = "expertmesh"
# A step that waits for a lost group ends after ten.
_ANSWER_S = 15.0


def connect(address: str) -> None:
    """Join the Ray cluster at `address` ("auto": the one running here). Raises ConfigError where there is none."""
    keep_loopback()
    # Serve tells of every connection it makes; an operator waits for none of that.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        found = services.get_ray_address_from_environment(address, None) if address == "auto" else address
        if reason := unreachable(found):
            raise ConnectionError(reason if found == address else f"{found}: {reason}")
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"cannot join the Ray cluster at {address}: {first}; "
            "give --address or RAY_ADDRESS, and RAY_AUTH_MODE=token where it wants a token"
        ) from None


def application_details() -> dict[str, Any]:
    """What Serve knows of the application: deployments, their replicas, targets; empty where it does not run.

    The document is public (`ray.serve.schema.ServeInstanceDetails`), the way to it is not: `serve.status()` leaves out
    replicas and targets, and Serve's REST API runs only where Ray's dashboard does.
    """
    details: dict[str, Any] = serve.context._get_global_client().get_serve_details()
    application: dict[str, Any] = details["applications"].get(APPLICATION, {"deployments": {}})
    return application


def engine_replicas() -> list[dict[str, str]]:
    """Replica, node and state of each engine."""
    replicas = application_details()["deployments"].get("engine", {}).get("replicas", [])
    return [  # one that is just being started is on no node yet
        {
            "replica": r["replica_id"],
            "node": r.get("node_ip") or "",
            "state": str(getattr(r["state"], "value", r["state"])),
        }
        for r in replicas
    ]


def router_services() -> dict[str, str]:
    """Replica of each running engine that offers RouterService -> host:port where it does."""
    return {replica: address for replica, address in _ask_engines("router_service") if address is not None}


def end_sequences() -> None:
    """Have the engines answer what they are at with an error event, and take nothing new."""
    _ask_engines("end_sequences")


def _ask_engines(method: str) -> list[Any]:
    """The answer of every running engine; none where one of them has just died, or does not answer."""
    if not any(engine["state"] == "RUNNING" for engine in engine_replicas()):
        return []
    engines = serve.get_deployment_handle("engine", APPLICATION)
    try:
        answers: list[Any] = engines.broadcast(method).results(timeout_s=_ANSWER_S)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("not every engine answers: %s", type(error).__name__)
        return []
    return answers


def deployment_failure() -> str:
    """Why the application could not be deployed: our own error's words where one was raised, else Serve's."""
    application = serve.status().applications.get(APPLICATION)
    if application is not None and (own := own_words(application)):
        return own[0]
    messages = [d.message for d in application.deployments.values()] if application else []
    words = next((m for m in messages if "Error" in m or "failed" in m), "the application did not start")
    return f"{words.strip().splitlines()[-1]}; see the logs under /tmp/ray/session_latest/logs/serve"


def own_words(application: ApplicationStatusOverview) -> list[str]:
    """Of our own errors that keep replicas from starting."""
    messages = (*(deployment.message for deployment in application.deployments.values()), application.message)
    found = (re.search(r"experts\.errors\.\w+: (.+)", message) for message in messages)
    return [own.group(1) for own in found if own]
