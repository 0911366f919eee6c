"""Exactly what the demo model's training holds out."""

from __future__ import annotations

import runpy
from pathlib import Path

from cluster.bench.held_out import held_out_texts

CORPUS = Path(__file__).parents[3] / "deploy" / "demo-model" / "training" / "corpus.py"


def test_the_same_files_as_in_training() -> None:
    training = runpy.run_path(str(CORPUS))
    sources = training["read_sources"]()
    expected = [source for path, source in sources.items() if training["is_held_out"](path)]
    assert expected
    assert held_out_texts() == expected
