"""Sorting routed rows against a plain Python sort."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.ops.sort import sort_by_expert


@given(
    st.integers(1, 4).flatmap(
        lambda top_k: st.lists(st.lists(st.integers(-1, 5), min_size=top_k, max_size=top_k), max_size=12).map(
            lambda rows: torch.tensor(rows, dtype=torch.int64).view(-1, top_k)
        )
    )
)
def test_equals_a_python_sort(ids_TK: torch.Tensor) -> None:
    weights_TK = torch.arange(ids_TK.numel(), dtype=torch.float32).view(ids_TK.shape) / 7
    rows = sort_by_expert(ids_TK, weights_TK)
    pairs = sorted(
        (int(expert), token, slot)
        for token, experts in enumerate(ids_TK.tolist())
        for slot, expert in enumerate(experts)
        if expert >= 0
    )
    assert rows.expert_ids_S.tolist() == sorted({expert for expert, _, _ in pairs})
    assert rows.token_rows_R.tolist() == [token for _, token, _ in pairs]
    assert rows.weights_R.tolist() == [weights_TK[token, slot].item() for _, token, slot in pairs]
    starts = [next(i for i, pair in enumerate(pairs) if pair[0] == e) for e in rows.expert_ids_S.tolist()]
    assert rows.offsets_S1.tolist() == [*starts, len(pairs)]
    assert {t.dtype for t in rows[:3]} == {torch.int32}
