"""Refuse an autoscaling section that Serve would accept and then not follow."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from cluster.config.mesh import AutoscalingSection
from experts.errors import ConfigError

_POLICY_KEYS = ("policy_function", "policy_kwargs")


def check_sections(autoscaling: AutoscalingSection) -> None:
    """Check both sections of a mesh.yaml's `autoscaling`. Raises ConfigError as `check_autoscaling` does."""
    for part, section in (("engine", autoscaling.engine), ("experts", autoscaling.experts)):
        if section is not None:
            check_autoscaling(section, f"autoscaling.{part}", from_zero=part == "engine")


def check_autoscaling(section: Mapping[str, Any], where: str, *, from_zero: bool = True) -> None:
    """Check a Serve `autoscaling_config`; `where` names it in messages, e.g. `autoscaling.experts`.

    from_zero: False for a deployment whose calls do not pass through Serve: at zero replicas nobody reports
        load, and nothing would ever bring it back

    Raises ConfigError for an unknown key, a value that Serve refuses, a policy that cannot be imported or
    whose kwargs do not fit, and kwargs for a policy that is a function, which Serve drops.
    """
    _refuse_unknown(section, AutoscalingConfig.model_fields, where)
    policy = section.get("policy")
    if policy is not None:
        if not isinstance(policy, Mapping):
            raise ConfigError(f"{where}.policy must hold {' and '.join(_POLICY_KEYS)}, and is {policy!r}")
        _refuse_unknown(policy, _POLICY_KEYS, f"{where}.policy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            config = AutoscalingConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *map(str, first["loc"])])
        raise ConfigError(f"{key}: {first['msg']}") from error
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        function = (policy or {}).get("policy_function")
        raise ConfigError(f"{where}.policy.policy_function {function!r} cannot be imported: {error}") from error
    except DeprecationWarning as error:
        raise ConfigError(f"{where}: {error}") from error
    if config.min_replicas == 0 and not from_zero:
        raise ConfigError(f"{where}.min_replicas must be at least 1: with none running, no load is ever reported")
    _check_kwargs(config.policy.get_policy(), config.policy.policy_kwargs, f"{where}.policy.policy_kwargs")


def _check_kwargs(policy: Any, kwargs: Mapping[str, Any], where: str) -> None:
    if not inspect.isclass(policy):
        if kwargs:
            raise ConfigError(f"{where}: the policy is a function, and Serve gives kwargs only to classes")
        return
    try:
        inspect.signature(policy).bind(**kwargs)
        policy(**kwargs)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _refuse_unknown(section: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in section:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
