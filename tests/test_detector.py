"""The analysis of the score as a detector, by numbers worked by hand and by independent counting."""

import math
from itertools import permutations, product

import numpy as np
import pytest

from benchmarks.reproduction import detector
from benchmarks.reproduction.detector import ScoredPrompt, bootstrap_interval, precision_at, recall_at, roc_area


def marks(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def prompt(scores: list[float], eligible: str, noise: str, operative: str) -> ScoredPrompt:
    return ScoredPrompt(np.array(scores, dtype=float), marks(eligible), marks(noise), marks(operative))


WORKED = prompt([9.0, 0.4, 0.7, 0.1, 0.4, 0.2, 0.4, 8.0], "01111110", "01101010", "00100010")
"""Eligible: places 1 to 6, scores .4 .7 .1 .4 .2 .4; noise at 1, 2, 4 and 6, its operative number at 2 and 6."""


def test_the_base_rate_and_what_is_protected():
    assert detector.base_rate(WORKED) == pytest.approx(4 / 6)
    assert math.isnan(detector.base_rate(prompt([1.0], "0", "1", "0")))


def test_precision_and_recall_at_k_worked():
    # k = 1: place 2, noise and operative. k = 2: one of three places with .4 comes in, all noise, one operative.
    assert [precision_at(WORKED, k) for k in (1, 2, 4, 5, 6)] == pytest.approx([1, 1, 1, 4 / 5, 4 / 6])
    assert [recall_at(WORKED, k) for k in (0, 1, 2, 3, 4)] == pytest.approx([0, 1 / 2, 1 / 2 + 1 / 6, 1 / 2 + 2 / 6, 1])
    assert math.isnan(precision_at(WORKED, 0)) and math.isnan(recall_at(prompt([1.0, 2.0], "11", "10", "00"), 1))
    with pytest.raises(ValueError, match="k is 7, and the prompt has 6 eligible tokens; choose 0 <= k <= 6"):
        precision_at(WORKED, 7)


def test_ties_have_the_mean_over_every_order_among_them():
    """Beside all 720 orders of six tokens, sorted by score alone."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        scores = generator.integers(0, 3, 6).astype(float)
        noise, operative = generator.random(6) < 0.5, generator.random(6) < 0.4
        operative[0] = True
        case = ScoredPrompt(scores, np.ones(6, dtype=bool), noise, operative)
        orders = [sorted(order, key=lambda i: -scores[i]) for order in permutations(range(6))]
        for k in range(1, 7):
            top = np.array([order[:k] for order in orders])
            assert precision_at(case, k) == pytest.approx(noise[top].mean())
            assert recall_at(case, k) == pytest.approx(operative[top].sum(1).mean() / operative.sum())


def test_a_score_that_says_nothing_has_the_base_rate_wherever_the_noise_stands():
    for noise in ("110000", "000011"):
        flat = prompt([0.0] * 6, "111111", noise, noise)
        assert precision_at(flat, 2) == pytest.approx(1 / 3) == recall_at(flat, 2)
        assert detector.prompt_roc_area(flat) == 0.5


def test_what_was_deleted():
    deleted = marks("00110010")
    assert detector.precision_of(deleted, WORKED) == pytest.approx(2 / 3)
    assert detector.recall_of(deleted, WORKED) == 1.0
    assert detector.recall_of(marks("00010010"), WORKED) == 0.5
    assert math.isnan(detector.precision_of(marks("0" * 8), WORKED))


def test_roc_area_worked():
    # Positives .8, .4 and negatives .6, .4, .1: wins 3 + (0 + .5 + 1) of 6.
    scores, positive = np.array([0.8, 0.4, 0.6, 0.4, 0.1]), marks("11000")
    assert roc_area(scores, positive) == pytest.approx(4.5 / 6)
    assert roc_area(-scores, positive) == pytest.approx(1.5 / 6)
    assert roc_area(np.array([1.0, 2.0]), marks("01")) == 1.0
    assert math.isnan(roc_area(scores, marks("00000"))) and math.isnan(roc_area(scores, marks("11111")))
    # Of WORKED: noise .4 .7 .4 .4 against .1 .2, all higher; places 0 and 7 do not count.
    assert detector.prompt_roc_area(WORKED) == 1.0


def test_roc_area_counts_pairs():
    generator = np.random.default_rng(1)
    scores, positive = generator.integers(0, 5, 60).astype(float), generator.random(60) < 0.3
    pairs = list(product(scores[positive], scores[~positive]))
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert roc_area(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_gates_and_means():
    assert detector.gate_share(np.array([0.0, 0.25, 0.25]), np.array([0.25, 0.25, 0.0])) == pytest.approx(1 / 3)
    assert detector.mean_of_known(np.array([1.0, math.nan, 2.0])) == 1.5
    assert detector.ratio_of_sums(np.array([[1.0, 2.0], [2.0, 2.0]])) == 0.75
    assert math.isnan(detector.ratio_of_sums(np.zeros((2, 2))))


def test_the_bootstrap_of_two_prompts_is_their_three_means():
    """Values 0 and 1: means 0, .5 and 1 with probabilities 1/4, 1/2 and 1/4."""
    values = np.array([0.0, 1.0])
    assert bootstrap_interval(values, level=0.9) == detector.Interval(0.5, 0.0, 1.0)
    assert bootstrap_interval(values, level=0.4) == detector.Interval(0.5, 0.5, 0.5)


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    found = bootstrap_interval(values, draws=4000)
    error = values.std() / 20
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.02)
    assert found == bootstrap_interval(values, draws=4000) != bootstrap_interval(values, draws=4000, seed=1)


def test_a_loop_over_draws_gives_what_the_vectorised_mean_gives(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).random(30)
    values[::7] = math.nan
    whole = bootstrap_interval(values, draws=500)
    assert whole == bootstrap_interval(values, lambda x: detector.mean_of_known(x), draws=500)
    monkeypatch.setattr(detector, "CHUNK", 100)  # three draws at once
    assert whole == bootstrap_interval(values, draws=500)
    columns = np.stack([np.nan_to_num(values), np.ones(30)], axis=1)
    assert bootstrap_interval(columns, detector.ratio_of_sums, draws=200).value == pytest.approx(columns[:, 0].mean())


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="of all 2 prompts is not a number"):
        bootstrap_interval(np.array([math.nan, math.nan]))
    with pytest.raises(ValueError, match=r"\[L\] for the same L"):
        ScoredPrompt(np.zeros(3), marks("111"), marks("11"), marks("000"))
    with pytest.raises(ValueError, match="1 NaN"):
        prompt([math.nan, 1.0], "11", "10", "10")


def test_the_sign_flip_test_counts_all_flips():
    # Of the 8 flips of 1, 2 and 3 the sums 6 and -6 alone are as far from 0; of 1, 2 and -1 four of eight are beyond 2.
    assert detector.sign_flip_p_value([1.0, 2.0, 3.0]) == 2 / 8
    sums = [abs(a + 2 * b - c) for a, b, c in product((1, -1), repeat=3)]
    assert detector.sign_flip_p_value([1.0, 2.0, -1.0]) == sum(x >= 2 for x in sums) / 8
    assert detector.sign_flip_p_value([0.5] * 8) == pytest.approx(0.0078125)
    with pytest.raises(ValueError, match="got 0 paired differences"):
        detector.sign_flip_p_value([])


def test_rounding_neither_adds_nor_loses_a_flip():
    """Tenths beside the same sums of whole numbers, among them sums that are 0 in exact arithmetic alone."""
    for numbers in product(range(-4, 5), repeat=4):
        sums = [abs(sum(s * x for s, x in zip(signs, numbers, strict=True))) for signs in product((1, -1), repeat=4)]
        expected = sum(x >= abs(sum(numbers)) for x in sums) / 16
        assert detector.sign_flip_p_value([x / 10 for x in numbers]) == expected, numbers
