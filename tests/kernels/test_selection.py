"""select_interference_tokens against a loop over Python lists."""

import math
import random
from fractions import Fraction

import pytest
import torch
from lens_kernels import select_interference_tokens

pytestmark = pytest.mark.usefixtures("backend")


def oracle(scores, bounds, ratio, eligible, min_score):
    """(keep, kept, new bounds); `ratio` is an exact Fraction."""
    keep, kept = [True] * bounds[-1] + [False] * (len(scores) - bounds[-1]), []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        chosen = [i for i in range(start, stop) if eligible[i]]
        count = math.ceil(ratio * len(chosen))
        ranked = sorted((i for i in chosen if not math.isnan(scores[i])), key=lambda i: (-scores[i], i))
        if ranked and scores[ranked[0]] >= min_score:
            for i in ranked[:count]:
                keep[i] = False
        kept.append(sum(keep[start:stop]))
    return keep, kept, [sum(kept[:i]) for i in range(len(kept) + 1)]


def run(scores, bounds, ratio, eligible=None, min_score=0.0, dtype=torch.float32):
    keep, kept, new = select_interference_tokens(
        torch.tensor(scores, dtype=dtype),
        torch.tensor(bounds, dtype=torch.int32),
        ratio=ratio,
        eligible=None if eligible is None else torch.tensor(eligible, dtype=torch.bool),
        min_score=min_score,
    )
    assert keep.dtype == torch.bool and kept.dtype == torch.int32 and new.dtype == torch.int32
    return keep.tolist(), kept.tolist(), new.tolist()


def test_matches_oracle_on_random_prompts():
    """Empty prompts, ties (scores of few values), NaN, infinities, ineligible tokens, a tail past the last prompt."""
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.choice([0, 1, 2, 5, 17]) for _ in range(rng.randint(0, 5))]
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        tokens = bounds[-1] + rng.choice([0, 0, 3])
        scores = [rng.choice([0.0, 0.25, 0.5, 1.0, math.nan, math.inf, -1.0]) for _ in range(tokens)]
        eligible = [rng.random() < 0.7 for _ in range(tokens)]
        hundredths, min_score = rng.randint(0, 100), rng.choice([0.0, 0.5, 2.0, -math.inf])
        expected = oracle(scores, bounds, Fraction(hundredths, 100), eligible, min_score)
        assert run(scores, bounds, hundredths / 100, eligible, min_score) == expected


@pytest.mark.parametrize(
    ("ratio", "tokens", "deleted"),
    [
        (0.05, 20, 1),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (1 / 3, 9000, 3000),
        (0.0, 5, 0),
        (1.0, 5, 5),
        (1e-12, 5, 1),
        (0.051, 20, 2),
    ],
)
def test_ceil_is_of_the_decimal_ratio(ratio, tokens, deleted):
    """In floating point .07 * 100 is 7.000000000000001, whose ceil is 8."""
    keep, kept, _ = run([float(i) for i in range(tokens)], [0, tokens], ratio)
    assert kept == [tokens - deleted]
    assert keep == [True] * (tokens - deleted) + [False] * deleted


def test_every_two_digit_ratio_is_exact():
    for hundredths in range(101):
        _, kept, _ = run([0.0] * 300, [0, 100, 300], hundredths / 100)
        assert kept == [100 - hundredths, 200 - 2 * hundredths]


def test_ties_delete_the_earlier_token():
    assert run([1.0, 2.0, 2.0, 2.0, 1.0], [0, 5], 0.4)[0] == [True, False, False, True, True]


def test_min_score_guards_whole_prompts():
    """The gate looks at a prompt's highest eligible score; once open, lower scores may go too."""
    scores = [0.1, 0.2, 0.05, 0.01, 9.0, 0.3]
    keep, kept, _ = run(scores, [0, 2, 6], 1.0, [True, True, True, True, False, True], min_score=0.25)
    assert keep == [True, True, False, False, True, False]
    assert kept == [2, 1]


def test_nan_is_never_deleted_but_counts_as_eligible():
    assert run([math.nan, 1.0, 2.0, math.nan], [0, 4], 0.5)[0] == [True, False, False, True]
    assert run([math.nan, 1.0, math.nan, math.nan], [0, 4], 1.0)[0] == [True, False, True, True]


def test_no_tokens_and_no_prompts():
    assert run([], [0, 0, 0], 0.5) == ([], [0, 0], [0, 0, 0])
    assert run([], [0], 0.5) == ([], [], [0])
