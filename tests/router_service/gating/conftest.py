import pytest
import torch
from mixture_of_experts.mixture_of_experts import Top2Gating


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


@pytest.fixture
def tensor2tensor_top_2():
    """GShard's gating as tensor2tensor published it, in the port of the package mixture-of-experts."""

    def weights_TE(weight_EH, hidden_TH, factor):
        # Its factor is of tokens by experts, ours of choices by experts.
        num_experts, hidden_size = weight_EH.shape
        gating = Top2Gating(hidden_size, num_experts, second_policy_eval="all", capacity_factor_eval=2 * factor).eval()
        gating.w_gating.data = weight_EH.T
        with torch.no_grad():
            _, combine_1TEC, _ = gating(hidden_TH[None])
        return combine_1TEC[0].sum(dim=-1)

    return weights_TE


@pytest.fixture
def by_expert():
    """A gate's output as weights of all experts."""

    def weights_TE(output, num_experts):
        open_TE = torch.zeros(len(output.expert_ids_TK), num_experts + 1)
        ids_TK = torch.where(output.expert_ids_TK < 0, num_experts, output.expert_ids_TK)
        return open_TE.scatter_(1, ids_TK, output.weights_TK)[:, :num_experts]

    return weights_TE
