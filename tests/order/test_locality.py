"""LPD's order: every position once, groups spread out, near what is decided."""

import torch

from orderlab.order.paths import REPULSION, locality_order
from orderlab.sampling.unmask import reveal_counts


def test_groups_are_near_what_is_decided_and_far_from_each_other() -> None:
    counts = reveal_counts(256, 32, "cosine")
    order = locality_order(16, 16, counts, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(256))
    starts = [sum(counts[:i]) for i in range(len(counts))]
    cells = [divmod(p, 16) for p in order.tolist()]
    near = apart = pairs = 0
    for start, count in zip(starts[1:20], counts[1:20]):
        group, before = cells[start : start + count], set(cells[:start])
        near += sum(any((r + i, c + j) in before for i in (-1, 0, 1) for j in (-1, 0, 1)) for r, c in group)
        gaps = [max(abs(a[0] - b[0]), abs(a[1] - b[1])) for i, a in enumerate(group) for b in group[:i]]
        apart, pairs = apart + sum(gap > REPULSION for gap in gaps), pairs + len(gaps)
    assert near / sum(counts[1:20]) > 0.8, "most have a decided neighbour"
    assert apart / pairs > 0.95


def test_it_is_a_function_of_its_generator() -> None:
    first, again, other = (locality_order(4, 4, [1, 3, 4, 8], torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    starts = {int(locality_order(4, 4, [1] * 16, torch.Generator().manual_seed(seed))[0]) for seed in range(60)}
    assert len(starts) > 10, "the first is uniform"


def test_a_first_group_of_several_is_spread_out() -> None:
    order = locality_order(8, 8, [4, 60], torch.Generator().manual_seed(3))
    cells = [divmod(p, 8) for p in order[:4].tolist()]
    assert min((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 for i, a in enumerate(cells) for b in cells[:i]) >= 9
