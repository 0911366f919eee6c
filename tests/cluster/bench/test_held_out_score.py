from pathlib import Path

from cluster.bench.held_out_score import excerpts_of
from cluster.serving.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[3] / "deploy" / "demo-model"


def test_excerpts_cover_as_many_tokens_as_asked() -> None:
    excerpts = excerpts_of(load_tokenizer(MODEL), tokens=250, context=100)
    assert [len(excerpt.ids_T) - 1 for excerpt in excerpts] == [100, 100, 50]
