"""Shares of ranks and the cut into micro-batches: nothing lost, budgets kept, cost balanced."""

import random

import pytest

from lens_megatron.batch.balance import assign, cost, cut, fewest, imbalance


def costs_of(lengths: list[int], hidden_size: int) -> list[int]:
    return [cost(length, hidden_size) for length in lengths]


def test_worked_example():
    """Budget 10: 7+3, 6+4 and 5 are the fewest. Dearest first into the cheapest with room: 7, 6+3, 5+4."""
    lengths = [3, 7, 4, 6, 5]
    assert fewest(lengths, 10) == 3
    assert cut(lengths, costs_of(lengths, 1), 10, 3) == [[1], [0, 3], [2, 4]]
    assert cost(10, 2) == 10 * (48 + 10)


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_and_within_the_budget(seed: int):
    generator = random.Random(seed)
    lengths = [generator.randint(1, 1200) for _ in range(generator.randint(0, 80))]
    budget, extra = generator.choice([100, 1000, 4096]), generator.randint(0, 5)
    count = fewest(lengths, budget) + extra
    parts = cut(lengths, costs_of(lengths, 64), budget, count)
    assert len(parts) == count and sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert part == sorted(part)
        assert len(part) <= 1 or sum(lengths[i] for i in part) <= budget


def test_a_sample_over_the_budget_goes_alone():
    assert cut([50, 3, 4], [50, 3, 4], 10, fewest([50, 3, 4], 10)) == [[0], [1, 2]]


def test_costs_are_balanced():
    """256 samples of a long tail in 16 micro-batches: the dearest costs at most 5 % more than the mean."""
    generator = random.Random(0)
    lengths = [min(4096, int(generator.lognormvariate(6.5, 0.8))) for _ in range(256)]
    parts = cut(lengths, costs_of(lengths, 2048), 65536, 16)
    costs = [sum(cost(lengths[i], 2048) for i in part) for part in parts]
    assert max(costs) < 1.05 * sum(costs) / len(costs)


def test_too_few_micro_batches_are_refused():
    with pytest.raises(ValueError, match="count: got 1 micro-batches, need 2 for a budget of 10 tokens"):
        cut([9, 9], [9, 9], 10, 1)


def test_no_samples():
    assert fewest([], 10) == 0 and cut([], [], 10, 2) == [[], []]


def test_worked_example_of_dealing():
    """With h = 1, costs 25, 52, 81, 112, 145 for 1 to 5 tokens: 5 | 4, 4+3 | 5+2 (197 > 193), 5+2 | 4+3+1."""
    lengths = [1, 2, 3, 4, 5]
    assert [cost(n, 1) for n in lengths] == [25, 52, 81, 112, 145]
    assert assign(costs_of(lengths, 1), 2) == [[1, 4], [0, 2, 3]]
    assert imbalance(costs_of(lengths, 1), [[1, 4], [0, 2, 3]]) == pytest.approx(218 / (415 / 2))
    assert assign([7, 7, 7], 2) == [[0, 2], [1]]  # ties: by index, to the lowest rank


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_ranks_share_all_samples_equally(ranks: int):
    generator = random.Random(ranks)
    lengths = [min(4096, int(generator.lognormvariate(6.5, 0.8))) for _ in range(16 * ranks)]
    shares = assign(costs_of(lengths, 2048), ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert imbalance(costs_of(lengths, 2048), shares) < 1.05
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) < 1.1 * sum(tokens) / ranks


def test_the_order_of_samples_changes_who_has_which_but_not_how_much():
    lengths = random.Random(0).sample(range(1, 1000), 50)
    order = random.Random(1).sample(range(50), 50)
    costs = costs_of(lengths, 64)
    shares, others = assign(costs, 4), assign([costs[i] for i in order], 4)
    assert [{lengths[i] for i in share} for share in shares] == [{lengths[order[i]] for i in share} for share in others]


def test_more_ranks_than_samples():
    assert assign([3, 9], 4) == [[1], [0], [], []] and assign([], 2) == [[], []]
    assert imbalance([3, 3], [[0], [1], [], []]) == 2.0 and imbalance([], [[], []]) == 1.0
