"""Which tiles a card runs fastest: a table in the repo, then what `expertmesh warmup` measured, kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from experts.errors import ConfigError
from experts.ops.cache_directory import cache_directory
from experts.ops.known_cards import ROW_BUCKETS, bucket_of, candidates
from experts.ops.projection import Projection
from experts.ops.tile_config import TileConfig


class TileCache:
    """Measured choices on disk: one JSON object, key to TileConfig's fields."""

    def __init__(self, path: Path | None = None) -> None:
        """Read `path` (default: tiles.json in `cache_directory()`) where it exists; ConfigError when it is no such."""
        self.path = path or cache_directory() / "tiles.json"
        self._choices: dict[str, TileConfig] = {}
        if not self.path.exists():
            return
        try:
            entries = json.loads(self.path.read_text())
            self._choices = {key: TileConfig(**fields) for key, fields in entries.items()}
        except (json.JSONDecodeError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.path}: not a tile cache ({error}); delete it and run `expertmesh warmup`"
            ) from error

    def get(self, key: str) -> TileConfig | None:
        """The choice for `key`, if one was measured."""
        return self._choices.get(key)

    def put(self, key: str, config: TileConfig) -> None:
        """Remember and write at once; the file changes in one step, so that readers never see half of it."""
        self._choices[key] = config
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        draft.write_text(json.dumps({k: c.to_json() for k, c in sorted(self._choices.items())}, indent=1) + "\n")
        draft.replace(self.path)


class Tuning:
    """Chooses tiles for one backend's two projections; never measures on its own."""

    def __init__(self, device: torch.device, scheme: str, dtype: torch.dtype, cache: TileCache | None = None) -> None:
        self._card = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        self._scheme = scheme
        self._dtype = dtype
        self._cache = cache or TileCache()
        self._chosen: dict[tuple[Projection, int], TileConfig] = {}

    def choose(self, projection: Projection, rows_per_expert: int) -> TileConfig:
        """The measured choice, else the card's default."""
        wanted = projection, bucket_of(rows_per_expert)
        if wanted not in self._chosen:  # every call asks; the key is a long string
            default = candidates(self._card, self._scheme, wanted[1])[0]
            self._chosen[wanted] = self._cache.get(self._key(*wanted)) or default
        return self._chosen[wanted]

    def tune(
        self, projection: Projection, measure: Callable[[TileConfig, int], float]
    ) -> Iterator[tuple[int, TileConfig, float]]:
        """Time every candidate of every bucket with `measure(config, rows per expert) -> ms`, keep the fastest.

        Yields (bucket, choice, ms). A candidate that `measure` puts at infinity cannot run on this card.
        """
        for bucket in ROW_BUCKETS:
            timed = [(measure(config, bucket), config) for config in candidates(self._card, self._scheme, bucket)]
            fastest_ms, choice = min(timed, key=lambda pair: pair[0])
            if fastest_ms == float("inf"):
                raise ConfigError(f"{self._card}: no tiles for {self._scheme} experts run on this card")
            self._cache.put(self._key(projection, bucket), choice)
            self._chosen[projection, bucket] = choice
            yield bucket, choice, fastest_ms

    def _key(self, projection: Projection, bucket: int) -> str:
        name = "up" if projection.gather else "down"
        gated = "gated" if projection.gated else "plain"
        return (
            f"{self._card}|triton {triton_version()}|{self._scheme}|{str(self._dtype).removeprefix('torch.')}|"
            f"{name} {gated} {projection.n}x{projection.k}|{bucket} rows"
        )


def triton_version() -> str:
    """Of the installed package; choices of another version are not used."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
