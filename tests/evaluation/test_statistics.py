"""Every estimate against numbers worked by hand, or against the exact distribution."""

import numpy as np
import pytest

from lens_megatron.evaluation.statistics import (
    DRAWS,
    average,
    bootstrap_means,
    borda_votes,
    estimate,
    majority,
    majority_at,
    paired,
    pass_at,
)


def test_pass_at_k_by_hand():
    """Of 4 samples with 2 successes, C(2,2) of the C(4,2) = 6 pairs have none; with 1 success, 3, 2, 1 of 4 miss it."""
    expected = [[0.5, 5 / 6, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.25, 0.5, 0.75, 1]]
    np.testing.assert_allclose(pass_at([2, 0, 4, 1], 4), expected, atol=1e-12)


def test_pass_at_k_stays_exact_for_many_samples():
    """At c = 1 it is k / n, whatever n is: the binomials themselves would overflow."""
    np.testing.assert_allclose(pass_at([1], 2000)[0], np.arange(1, 2001) / 2000, atol=1e-9)


@pytest.mark.parametrize("counts", [[-1], [5]])
def test_pass_at_k_refuses_impossible_counts(counts: list[int]):
    with pytest.raises(ValueError, match="counts lie between 0 and samples"):
        pass_at(counts, 4)


def test_the_bootstrap_is_that_of_two_problems():
    """Means of two draws from {0, 1} are 0, 1/2, 1 with chances 1/4, 1/2, 1/4: standard deviation sqrt(1/8)."""
    draws = bootstrap_means([0.0, 1.0], seed=1)
    shares = [(draws == value).mean() for value in (0, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)
    found = estimate([0.0, 1.0], seed=1)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.standard_error == pytest.approx(0.125**0.5, abs=0.01)


def test_no_success_at_all_is_not_certainty():
    """Beta(1, 31): the upper bound is 1 - 0.025^(1/31), the variance 31 / (32^2 * 33)."""
    found = estimate([0.0] * 30, seed=2)
    assert (found.mean, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 31), abs=0.005)
    assert found.standard_error == pytest.approx((31 / (32**2 * 33)) ** 0.5, rel=0.05)
    every = estimate([1.0] * 30, seed=2)
    assert every.high == 1.0 and every.low == pytest.approx(0.025 ** (1 / 31), abs=0.005)


def test_equal_seeds_give_equal_numbers():
    scores = np.linspace(0, 1, 40)
    assert estimate(scores, 5) == estimate(scores, 5) != estimate(scores, 6)
    assert bootstrap_means(scores, 5).shape == (DRAWS,)
    with pytest.raises(ValueError, match="needs at least one problem"):
        bootstrap_means([], 0)


def test_an_average_of_benchmarks_counts_them_equally():
    """Three problems beside one of another benchmark; and two equal parts halve the variance: sqrt(1/16)."""
    assert average([[0.0, 0.0, 0.0], [1.0, 0.0]], seed=0).mean == 0.25
    assert average([[0.0, 1.0], [0.0, 1.0]], seed=0).standard_error == pytest.approx(0.25, abs=0.01)


def test_a_paired_comparison_by_hand():
    """Three of four problems differ, all for the first run: 2 of the 8 sign flips reach the sum."""
    found = paired([([1, 1, 1, 0], [0, 0, 0, 0])], seed=0)
    assert (found.mean, found.p_value) == (0.75, 0.25)
    assert paired([([1, 0], [0, 1])], seed=0).p_value == 1.0
    same = paired([([1, 0], [1, 0])], seed=0)
    assert (same.mean, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_paired_comparison_weighs_benchmarks_equally():
    """Terms 1/2 and +-1/4: of the 8 flips only those with 1/2 against both quarters, 2, stay below the sum 1/2."""
    found = paired([([1], [0]), ([1, 0], [0, 1])], seed=0)
    assert (found.mean, found.p_value) == (0.5, 0.75)


def test_random_flips_agree_with_the_binomial():
    """12 wins and 8 losses: the chance of 12 or more, or 8 or fewer, heads of 20 is 0.5034."""
    found = paired([([1] * 12 + [0] * 8, [0] * 12 + [1] * 8)], seed=3)
    assert found.p_value == pytest.approx(0.5034, abs=0.02)
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - 1.96 * (0.96 / 20) ** 0.5, abs=0.06)
    assert paired([([1] * 40, [0] * 40)], seed=3).p_value == pytest.approx(1 / (DRAWS + 1))


def test_a_paired_comparison_needs_the_same_problems():
    with pytest.raises(ValueError, match="2 scores beside 1; both runs must have the same problems"):
        paired([([1, 0], [1])], seed=0)
    with pytest.raises(ValueError, match="nothing to compare"):
        paired([], seed=0)


def test_majority_by_hand():
    assert majority([1, 1, 1], [0, 0, 1], 0) == 1.0
    assert majority([1, 1, 1], [0, 1, 2], 0) == pytest.approx(1 / 3)  # a tie of three is broken by lot
    assert majority([1, 1], [-1, -1], 0) == 0.0
    assert majority([1, 3, 1], [0, 1, 0], 0) == 0.0  # one heavy vote outweighs two


def test_majority_of_k_by_hand():
    """Of {right, wrong, wrong}: one is right in 1 of 3, pairs are two ties and one wrong pair, all three are wrong."""
    assert [majority_at([0, 1, 1], 0, k, seed=0) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 0])


def test_majority_of_random_subsets():
    """Of 12 right and 4 wrong ones, a single sample is right in 3 of 4."""
    assert majority_at([0] * 12 + [1] * 4, 0, 1, seed=0) == 0.75
    assert majority_at([0] * 12 + [1] * 4, 0, 3, seed=0) == pytest.approx(0.864, abs=0.05)  # 484 of C(16,3) = 560


def test_borda_by_hand():
    assert borda_votes([2.0, 3.0, 1.0], power=1) == [2, 3, 1]
    assert borda_votes([5.0, 5.0], power=0.5) == pytest.approx([2**0.5, 1])
