"""What a running server's engine spent its time on, as its /metrics say."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.observe.request_metrics import STEP_SECONDS


def step_seconds(url: str) -> dict[str, float]:
    """Seconds of the engine's steps since its start, by part; nothing where the server does not say."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=30.0).raise_for_status().text
        families = {family.name: family for family in text_string_to_metric_families(text)}
    except (httpx.HTTPError, ValueError):  # not there, or in another format
        return {}
    samples = families[STEP_SECONDS].samples if STEP_SECONDS in families else []
    return {sample.labels["part"]: sample.value for sample in samples if sample.name.endswith("_total")}


def shares_of(before: Mapping[str, float], after: Mapping[str, float], wall_s: float) -> dict[str, float]:
    """Each part's share of `wall_s`, and under `between_steps` what is left: HTTP, its client, waiting for requests."""
    if not after:
        return {}
    shares = {part: (after[part] - before.get(part, 0.0)) / wall_s for part in after}
    return shares | {"between_steps": 1.0 - sum(shares.values())}
