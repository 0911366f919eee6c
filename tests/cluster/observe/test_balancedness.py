import numpy as np
import pytest

from cluster.observe.balancedness import balancedness
from router_service.placement import PlacementTable

TABLE = PlacementTable(
    version=1, num_groups=2, holders={0: ((0,), (0,), (1,), (1,)), 1: ((0, 1), (0,), (1,), (1,))}, replicas=()
)


@pytest.mark.parametrize(
    ("expert_tokens", "expected"),
    [
        ({0: [5, 5, 5, 5]}, 1.0),
        ({0: [0, 0, 7, 3]}, 0.5),
        ({0: [6, 0, 1, 1]}, 4 / 6),
        ({1: [8, 0, 0, 0]}, 1.0),  # in two groups
        ({0: [5, 5, 5, 5], 1: [0, 0, 4, 4]}, 0.75),
        ({0: [0, 0, 0, 0], 1: [0, 0, 4, 4]}, 0.5),  # a layer without tokens does not count
        ({0: [0, 0, 0, 0]}, None),
        ({7: [1]}, None),
        ({}, None),
    ],
)
def test_mean_by_largest_averaged_over_layers(expert_tokens: dict[int, list[int]], expected: float | None) -> None:
    ratio = balancedness({layer: np.array(tokens) for layer, tokens in expert_tokens.items()}, TABLE)
    assert ratio == pytest.approx(expected)
