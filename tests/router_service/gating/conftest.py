import pytest
import torch


@pytest.fixture
def assert_same_routing():
    """Compare (ids, weights) pairs as mappings: neither side promises an order within a token."""

    def compare(ours, ids_TK, weights_TK):
        ours_order = ours.expert_ids_TK.argsort(dim=-1)
        their_order = ids_TK.argsort(dim=-1)
        assert torch.equal(ours.expert_ids_TK.gather(1, ours_order), ids_TK.gather(1, their_order))
        torch.testing.assert_close(
            ours.weights_TK.gather(1, ours_order),
            weights_TK.float().gather(1, their_order),
            atol=1e-6,
            rtol=1e-6,
        )
        assert ours.expert_ids_TK.dtype == torch.int64
        assert ours.weights_TK.dtype == torch.float32

    return compare
