import pytest
import torch

from router_service.dispatch import plan_dispatch
from router_service.node_part import bundle
from router_service.slot_index import build_slot_index


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_a_bundle_asks_for_what_its_parts_ask_for(num_tokens, top_k):
    torch.manual_seed(top_k)
    index = build_slot_index([(expert // 4,) for expert in range(16)], 4)
    ids_TK = torch.rand(num_tokens, 16).topk(top_k).indices
    hidden_TH = torch.randn(num_tokens, 4)
    parts = [p for p in plan_dispatch(index, 0, ids_TK, torch.rand(num_tokens, top_k)).parts if p.group in (1, 2)]
    if not parts:
        return
    node = bundle(parts, num_tokens)
    wanted = [t for t in range(num_tokens) if any(4 <= expert < 12 for expert in ids_TK[t].tolist())]
    assert node.num_tokens == len(wanted)
    call = node.call(hidden_TH, [f"peer{part.group}" for part in parts])
    assert torch.equal(call.hidden_TH, hidden_TH[wanted])
    for part, share in zip(parts, call.shares, strict=True):
        alone, shared = part.call(hidden_TH), share.call(0, call.hidden_TH)
        assert (share.group, share.address) == (part.group, f"peer{part.group}")
        for name in ("hidden_TH", "expert_ids_S", "offsets_S1", "token_rows_R", "weights_R"):
            assert torch.equal(getattr(alone, name), getattr(shared, name))
