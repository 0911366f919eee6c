"""How many nodes a token's experts lie on, expected over the gate's choice.

The gate is taken to choose uniformly: `topk_group` of the native groups, then K distinct experts of those
groups (all experts where there are no groups). What follows is exact under that assumption; a real gate that
has learned affinities touches fewer nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations
from math import comb

Holders = tuple[tuple[int, ...], ...]

# With copies the fewest covering nodes are counted exactly, by inclusion-exclusion over at most 6 node sets.
_EXACT_NODES = 4


@lru_cache(maxsize=4096)
def expected_nodes(holders: Holders, experts_per_token: int, num_groups: int = 1, topk_group: int = 1) -> float:
    """Expected number of nodes that a token's experts need.

    holders: for each expert, the nodes that hold a copy of it, ascending.
    Where experts have copies on several nodes, the router takes the fewest nodes that cover a token's
    experts: exact on up to 4 nodes; beyond, an upper bound (a copied expert counts a node of its own unless
    one of its nodes is needed anyhow).
    """
    subsets = list(_eligible(holders, num_groups, topk_group))
    nodes = max(node for held in holders for node in held) + 1
    total = 0.0
    for classes, weight in subsets:
        if all(len(held) == 1 for held in classes):
            expected = sum(_touched(classes, experts_per_token, nodes))
        elif nodes <= _EXACT_NODES:
            expected = _fewest_exact(classes, experts_per_token, nodes)
        else:
            expected = _fewest_bound(classes, experts_per_token, nodes)
        total += weight * expected
    return total


@lru_cache(maxsize=4096)
def touch_probabilities(
    holders: Holders, experts_per_token: int, num_groups: int = 1, topk_group: int = 1
) -> tuple[float, ...]:
    """For each node, the probability that a token needs it; experts with copies are at their first node."""
    first = tuple(held[:1] for held in holders)
    nodes = max(node for held in holders for node in held) + 1
    chances = [0.0] * nodes
    for classes, weight in _eligible(first, num_groups, topk_group):
        for node, chance in enumerate(_touched(classes, experts_per_token, nodes)):
            chances[node] += weight * chance
    return tuple(chances)


def _eligible(holders: Holders, num_groups: int, topk_group: int) -> Iterable[tuple[Counter[tuple[int, ...]], float]]:
    """For each choice of gate groups: its experts, counted by who holds them, and how likely it is."""
    size = len(holders) // num_groups
    groups = [Counter(holders[group * size : (group + 1) * size]) for group in range(num_groups)]
    alike: Counter[frozenset[tuple[tuple[int, ...], int]]] = Counter()
    for chosen in combinations(groups, topk_group):
        alike[frozenset(sum(chosen, Counter[tuple[int, ...]]()).items())] += 1
    for items, times in alike.items():
        yield Counter(dict(items)), times / comb(num_groups, topk_group)


def _none_drawn(total: int, kind: int, drawn: int) -> float:
    """Probability that `drawn` of `total` experts, without replacement, miss all `kind` of some kind."""
    return comb(total - kind, drawn) / comb(total, drawn)


def _touched(classes: Counter[tuple[int, ...]], drawn: int, nodes: int) -> list[float]:
    total = classes.total()
    return [1.0 - _none_drawn(total, classes[(node,)], drawn) for node in range(nodes)]


def _fewest_exact(classes: Counter[tuple[int, ...]], drawn: int, nodes: int) -> float:
    """Sum over m of P(no m nodes cover the draw); a set of nodes covers it if it holds all that is drawn."""
    total, expected = classes.total(), 1.0
    for size in range(1, nodes):
        sets = [frozenset(chosen) for chosen in combinations(range(nodes), size)]
        covered = 0.0
        for count in range(1, len(sets) + 1):
            sign = 1 if count % 2 else -1
            for family in combinations(sets, count):
                inside = sum(
                    number for held, number in classes.items() if all(nodes_.intersection(held) for nodes_ in family)
                )
                covered += sign * comb(inside, drawn) / comb(total, drawn)
        expected += 1.0 - covered
    return expected


def _fewest_bound(classes: Counter[tuple[int, ...]], drawn: int, nodes: int) -> float:
    total = classes.total()
    expected = sum(_touched(classes, drawn, nodes))
    for held, number in classes.items():
        if len(held) > 1:
            needed_anyhow = sum(classes[(node,)] for node in held)
            expected += number * drawn / total * _none_drawn(total - 1, needed_anyhow, drawn - 1)
    return expected
