import numpy as np
import pytest
import torch

from experts.errors import RequestError
from router_service.dispatch import plan_dispatch, plan_rows
from router_service.slot_index import build_slot_index


def rows_of(part, num_tokens):
    """(token, expert, weight) triples that a part asks for."""
    tokens = np.arange(num_tokens) if part.tokens_T is None else part.tokens_T
    out = []
    for s, expert in enumerate(part.expert_ids_S):
        for row in range(part.offsets_S1[s], part.offsets_S1[s + 1]):
            out.append((int(tokens[part.token_rows_R[row]]), int(expert), float(part.weights_R[row])))
    return out


def random_batch(num_tokens, num_experts, top_k, drop=0.0):
    torch.manual_seed(num_tokens)
    ids_TK = torch.rand(num_tokens, num_experts).topk(top_k).indices
    ids_TK[torch.rand(ids_TK.shape) < drop] = -1
    return ids_TK, torch.rand(num_tokens, top_k)


def random_holders(num_experts, num_groups, most, seed=0):
    rng = np.random.default_rng(seed)
    return [
        tuple(sorted(rng.choice(num_groups, rng.integers(1, most + 1), replace=False).tolist()))
        for _ in range(num_experts)
    ]


@pytest.mark.parametrize("num_tokens", [1, 2, 33, 300])
@pytest.mark.parametrize(("num_groups", "most"), [(1, 1), (4, 1), (7, 3)])
@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_every_row_once_to_a_holder_in_order(num_tokens, num_groups, most, drop):
    holders = random_holders(32, num_groups, most)
    index = build_slot_index(holders, num_groups)
    ids_TK, weights_TK = random_batch(num_tokens, 32, 4, drop)
    plan = plan_dispatch(index, 5, ids_TK, weights_TK)
    asked = []
    for part in plan.parts:
        assert part.layer == 5
        assert list(part.expert_ids_S) == sorted(set(part.expert_ids_S.tolist()))
        rows = rows_of(part, num_tokens)
        assert [row[:2] for row in rows] == sorted((row[:2] for row in rows), key=lambda row: (row[1], row[0]))
        assert all(part.group in holders[expert] for _, expert, _ in rows)
        if part.tokens_T is not None:
            assert sorted({token for token, _, _ in rows}) == part.tokens_T.tolist()
            assert len(part.tokens_T) < num_tokens
        for array in (part.expert_ids_S, part.offsets_S1, part.token_rows_R):
            assert array.dtype == np.int32
        asked += rows
    wanted = [
        (token, expert, weight)
        for token, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True))
        for expert, weight in zip(ids, weights, strict=True)
        if expert >= 0
    ]
    assert sorted(asked) == sorted(wanted)
    assert [part.group for part in plan.parts] == sorted({part.group for part in plan.parts})
    expected = np.bincount(ids_TK[ids_TK >= 0], minlength=32)
    assert plan.tokens_per_expert_E.tolist() == expected.tolist()


def test_a_call_holds_each_distinct_token_once():
    index = build_slot_index([(0,), (0,), (1,), (1,)], 2)
    ids_TK = torch.tensor([[0, 1], [2, 3], [1, 2]])
    hidden_TH = torch.randn(3, 4)
    first, second = plan_dispatch(index, 0, ids_TK, torch.ones(3, 2)).parts
    assert torch.equal(first.call(hidden_TH).hidden_TH, hidden_TH[[0, 2]])
    assert torch.equal(second.call(hidden_TH).hidden_TH, hidden_TH[[1, 2]])
    assert first.call(hidden_TH).token_rows_R.tolist() == [0, 0, 1]


def test_redundant_slots_share_the_rows():
    index = build_slot_index([(0, 1, 2)], 3)
    parts = plan_dispatch(index, 0, torch.zeros(300, 1, dtype=torch.long), torch.ones(300, 1)).parts
    assert [len(part.token_rows_R) for part in parts] == [100, 100, 100]


def test_avoided_groups_get_only_what_nobody_else_holds():
    index = build_slot_index([(0, 1), (0,), (1,)], 2, avoid={0})
    parts = plan_dispatch(index, 0, torch.tensor([[0, 1, 2]]), torch.ones(1, 3)).parts
    assert [(part.group, part.expert_ids_S.tolist()) for part in parts] == [(0, [1]), (1, [0, 2])]


def test_a_part_planned_again_is_the_same_part():
    index = build_slot_index(random_holders(32, 4, 1), 4)
    ids_TK, weights_TK = random_batch(50, 32, 4)
    for part in plan_dispatch(index, 0, ids_TK, weights_TK).parts:
        (again,) = plan_rows(index, 0, 50, *part.rows())
        assert again.group == part.group
        for name in ("expert_ids_S", "offsets_S1", "token_rows_R", "weights_R"):
            np.testing.assert_array_equal(getattr(again, name), getattr(part, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_may_lie_as_they_like(dtype):
    index = build_slot_index([(0,), (1,)], 2)
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, 0]])
    weights_TK = torch.tensor([[0.5, 9.0], [0.25, 9.0], [2.0, 9.0]], dtype=dtype)
    first, second = plan_dispatch(index, 0, ids_TK[:, :1], weights_TK[:, :1]).parts
    assert (first.weights_R.tolist(), second.weights_R.tolist()) == ([0.5, 2.0], [0.25])
    (part,) = plan_dispatch(index, 0, torch.zeros(3, 2, dtype=torch.int32), torch.ones(1, 1).expand(3, 2)).parts
    assert part.weights_R.tolist() == [1.0] * 6


@pytest.mark.parametrize("wrong", [8, 40000, -2])
def test_an_expert_that_the_layer_does_not_have_is_refused(wrong):
    """A table of fewer experts than the gate's: compiled code must not read beyond its arrays."""
    index = build_slot_index([(0,)] * 4 + [(1,)] * 4, 2)
    ids_TK = torch.tensor([[0, 7], [wrong, 3]])
    with pytest.raises(RequestError, match=rf"{wrong}.*layer 5 has experts 0 to 7"):
        plan_dispatch(index, 5, ids_TK, torch.ones(2, 2))
    rows = ids_TK.reshape(-1).numpy(), np.array([0, 0, 1, 1], np.int32), np.ones(4, np.float32)
    with pytest.raises(RequestError, match="experts 0 to 7"):
        plan_rows(index, 5, 2, *rows)
