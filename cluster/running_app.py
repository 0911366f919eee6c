"""The running application as an operator's commands see it: how to reach Ray, where the engines are."""

from __future__ import annotations

import logging
import re
from typing import Any

import ray
from ray import serve

from experts.errors import ConfigError

APPLICATION = "expertmesh"


def connect(address: str) -> None:
    """Join the Ray cluster at `address` ("auto": the one running here). Raises ConfigError where there is none."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"cannot join the Ray cluster at {address}: {first}; give --address or RAY_ADDRESS") from None


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
    return [
        {"replica": r["replica_id"], "node": r["node_ip"] or "", "state": str(getattr(r["state"], "value", r["state"]))}
        for r in replicas
    ]


def deployment_failure() -> str:
    """Why the application could not be deployed: our own error's words where one was raised, else Serve's."""
    application = serve.status().applications.get(APPLICATION)
    messages = [d.message for d in application.deployments.values()] if application else []
    for message in (*messages, application.message if application else ""):
        if own := re.search(r"experts\.errors\.\w+: (.+)", message):
            return own.group(1)
    words = next((m for m in messages if "Error" in m or "failed" in m), "the application did not start")
    return f"{words.strip().splitlines()[-1]}; see the logs under /tmp/ray/session_latest/logs/serve"
