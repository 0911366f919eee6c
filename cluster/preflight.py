"""What of a mesh.yaml is found wrong by looking at files and devices, before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cluster.api_keys import read_api_keys
from cluster.autoscale.check import check_sections
from cluster.config.mesh import EngineConfig, ExpertsConfig, MeshConfig
from cluster.model_files import engine_dtype, open_checkpoint, pick_device
from cluster.serving.rope_reach import check_reach, rope_reach
from experts.errors import CheckpointError, ConfigError
from experts.ops.cpu_format import check_cpu_quantization


def setting_problems(config: MeshConfig, *, here: bool) -> list[str]:
    """What is wrong, each in a line that names the key; of the checkpoint itself `check_model` tells.

    here: it is to be served on this machine. What only the devices of another would tell is left out otherwise.
    """
    checks: tuple[Callable[[MeshConfig, bool], None], ...] = (
        _keys,
        _autoscaling,
        _services,
        _engine,
        _experts,
        _length,
    )
    return list(_problems(checks, config, here))


def _problems(checks: tuple[Callable[[MeshConfig, bool], None], ...], config: MeshConfig, here: bool) -> Iterator[str]:
    for check in checks:
        try:
            check(config, here)
        except ConfigError as error:
            yield str(error)
        except CheckpointError:
            continue  # `check_model` says so


def _keys(config: MeshConfig, here: bool) -> None:
    if here:  # on a cluster each engine reads its own node's file
        read_api_keys(config.http.api_keys_file)


def _autoscaling(config: MeshConfig, here: bool) -> None:
    check_sections(config.autoscaling)


def _services(config: MeshConfig, here: bool) -> None:
    port, several = config.router.service_port, config.engine.replicas > 1 or config.autoscaling.engine is not None
    if here and port and several:  # on a cluster each may be on a node of its own
        raise ConfigError(
            f"router.service_port: only one engine of a machine can listen on {port}; give 0, for any free port, or "
            "have one engine (engine.replicas: 1, no autoscaling.engine)"
        )


def _engine(config: MeshConfig, here: bool) -> None:
    device = _device("engine", config.engine, here)
    if device is not None:
        engine_dtype(config.model.dtype, open_checkpoint(config.model).config(), device)


def _experts(config: MeshConfig, here: bool) -> None:
    device = _device("experts", config.experts, here)
    if device is not None and device.type == "cpu":
        check_cpu_quantization(config.model.quantization)


def _length(config: MeshConfig, here: bool) -> None:
    if config.engine.max_model_len != "auto":
        # Transformers takes seconds to import.
        from cluster.serving.model_config import model_config

        check_reach(config.engine.max_model_len, rope_reach(model_config(open_checkpoint(config.model))))


def _device(name: str, section: EngineConfig | ExpertsConfig, here: bool) -> torch.device | None:
    """Where `section` computes; None where another machine's devices decide."""
    if not here and section.device != "cpu":
        return None
    try:
        return pick_device(section.device)
    except ConfigError as error:
        raise ConfigError(f"{name}.{error}") from None
