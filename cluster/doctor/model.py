"""Are the model's files complete, and can its experts be spread over the groups asked for?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.config.mesh import MeshConfig
from cluster.doctor.finding import Finding
from experts.errors import CheckpointError, ConfigError

_GIB = 2**30


def check_model_files(config: MeshConfig) -> Iterator[Finding]:
    """Reads config.json and every header that experts are described by; no weights."""
    # Torch comes with this import: late, so that the other checks answer where it is broken.
    from cluster.model_files import check_model

    try:
        layout = check_model(config)
    except CheckpointError as error:
        yield Finding(check="model", status="fail", found=str(error), todo="complete or replace the checkpoint")
        return
    except ConfigError as error:
        yield Finding(check="model", status="fail", found=str(error), todo="change that in mesh.yaml")
        return
    per_layer = layout.experts_per_layer
    experts = f"{sum(per_layer.values())} experts in {len(per_layer)} layers"
    yield Finding(check="model", status="ok", found=f"{config.model.source}: {experts}")
    tokenizer = Path(config.model.source)
    if tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in _TOKENIZERS):
        yield Finding(
            check="model",
            status="warn",
            found=f"{tokenizer}: no tokenizer ({', '.join(_TOKENIZERS)})",
            todo="copy the tokenizer's files beside the weights; without them only token ids can be served",
        )


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
