"""Schemes by their names in mesh.yaml."""

from __future__ import annotations

import torch

from experts.errors import ConfigError
from experts.quant.fp8_block import Fp8Block
from experts.quant.fp8_row import Fp8Row
from experts.quant.int4 import Int4
from experts.quant.int8 import Int8
from experts.quant.scheme import Scheme
from experts.quant.unquantised import Unquantised


def build_scheme(name: str, dtype: torch.dtype) -> Scheme:
    """The scheme that `model.quantization: name` asks for on a card that computes in `dtype`.

    Raises ConfigError for a name that no card has.
    """
    schemes: dict[str, Scheme] = {
        scheme.name: scheme for scheme in (Unquantised(dtype), Fp8Block(), Fp8Row(), Int8(), Int4())
    }
    if name not in schemes:
        raise ConfigError(f"model.quantization: {name!r} is not for GPUs; use one of {', '.join(schemes)}")
    return schemes[name]
