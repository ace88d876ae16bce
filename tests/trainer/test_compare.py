"""What `lens-compare` computes: paired differences, curves and what is said of them, with numbers worked by hand."""

import json
from pathlib import Path

import pytest

from lens_megatron.config.files import read_tree
from lens_megatron.tools.compare import curves, methods, paired, table
from lens_megatron.tools.compare.arms import step_that_reaches
from lens_megatron.tools.compare.curves import ArmCurve, CurvePoint
from lens_megatron.tools.compare.request import Budget, BudgetUnit, CompareError, read_budget

STEPS, TOKENS = Budget(BudgetUnit.STEPS, 20), Budget(BudgetUnit.TOKENS, 250)


def test_the_interval_is_students():
    # Mean 2, deviation sqrt(((1-2)^2 + 0 + (3-2)^2) / 2) = 1, t of 2 degrees of freedom at .975 = 4.30265.
    found = paired.compare([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation) == (2.0, 1.0)
    assert found.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-5)
    assert found.high == pytest.approx(2 + 4.30265 / 3**0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only +++ and --- give a sum of 6
        ([1.0, 2.0, -3.0], 8 / 8),  # the sum is 0: every flip is as far
        ([1.0, 1.0, -1.0], 8 / 8),  # sums are 3, 1, -1, -3: all at least 1 from 0
        ([4.0, 2.0, -1.0], 4 / 8),  # |sums| 7, 5, 3, 1 twice each: 7 and 5 are at least 5
        ([0.1, 0.2, 0.3], 2 / 8),  # rounding does not lose the observed sum itself
        ([1.0] * 8, 2 / 256),
    ],
)
def test_the_sign_flip_test_counts_all_flips(differences: list[float], p_value: float):
    assert paired.sign_flip_p_value(differences) == p_value


def test_beyond_twelve_pairs_flips_are_drawn():
    # 13 equal differences: 2 of 8192 flips are as far, so about 5 of 20,000 draws.
    p_value = paired.sign_flip_p_value([1.0] * 13)
    assert 1 / 20_001 <= p_value < 20 / 20_001
    assert p_value == paired.sign_flip_p_value([1.0] * 13)
    assert paired.sign_flip_p_value([1.0, -1.0] * 7) == 1.0


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (-0.5, 34)])
def test_the_seeds_that_a_claim_needs_are_those_of_published_tables(effect: float, pairs: int):
    # What G*Power 3 gives for a two-sided paired t test with alpha .05 and power .8.
    assert paired.seeds_needed(effect) == pairs
    assert paired.power(effect, pairs) >= 0.8 > paired.power(effect, pairs - 1)


def test_nothing_is_said_where_nothing_can_be():
    alone = paired.compare([0.25])
    assert alone.mean == 0.25 and (alone.low, alone.p_value, alone.seeds_needed) == (None, None, None)
    assert paired.seeds_needed(0.0) is None and paired.seeds_needed(0.001) is None
    assert paired.compare([0.5, 0.5]).seeds_needed is None  # no deviation
    assert paired.compare([0.0] * 5).least_p_value == 0.0625


def points(*pairs: tuple[float, float]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(*pair) for pair in pairs)


def arm(method: str, seed: int, *pairs: tuple[float, float]) -> ArmCurve:
    return ArmCurve(method, seed, points(*pairs), 20, 2000.0)


def test_the_height_is_the_area_divided_by_the_width():
    # Trapezes: 10 (.2 + .4) / 2 + 30 (.4 + .6) / 2 = 3 + 15; the width is 40.
    assert curves.mean_height(points((0, 0.2), (10, 0.4), (40, 0.6))) == pytest.approx(18 / 40)
    assert curves.mean_height(points((5, 0.3))) == 0.3


def test_the_speed_up_is_read_off_the_mean_curves():
    arms = [
        arm("grpo", 0, (0, 0.1), (10, 0.3), (20, 0.5)),
        arm("grpo", 1, (0, 0.3), (10, 0.5), (20, 0.3)),  # the mean is .2, .4, .4: its best is at 10
        arm("lens", 0, (0, 0.1), (5, 0.5), (20, 0.8)),
        arm("lens", 1, (0, 0.3), (5, 0.5), (20, 0.6)),
        arm("slow", 0, (0, 0.9), (10, 0.2), (20, 0.2)),  # what it had at the fork it has not learnt
    ]
    grpo, lens, slow = curves.compare_methods(arms, ["grpo", "lens", "slow"], "grpo")
    assert (grpo.spent_to_baselines_best, grpo.speed_up, grpo.final) == (10, 1.0, None)
    assert (lens.spent_to_baselines_best, lens.speed_up) == (5, 2.0)
    assert (slow.spent_to_baselines_best, slow.speed_up) == (None, None)
    assert lens.final is not None and lens.final.differences == pytest.approx((0.3, 0.3))
    # Seed 0: lens (5 .3 + 15 .65) / 20 = .5625, grpo (10 .2 + 10 .4) / 20 = .3.
    assert lens.height is not None and lens.height.differences[0] == pytest.approx(0.2625)
    assert slow.final is not None and slow.final.differences == pytest.approx((-0.3,))  # seed 0 alone


def rows(*tokens: float, accuracies: dict[int, float]) -> list[dict]:
    found = [{"step": 3, "perf/generated_tokens": 1e9, "val-core/eval/acc/mean@1": 0.1}]
    found += [{"step": 4 + i, "perf/generated_tokens": count} for i, count in enumerate(tokens)]
    return [row | ({"val-core/eval/acc/mean@1": a} if (a := accuracies.get(row["step"])) else {}) for row in found]


def test_curves_count_from_the_fork():
    read = rows(100, 100, 100, accuracies={5: 0.4, 6: 0.5})
    by_steps = curves.read_curve("lens", 0, read, 3, STEPS)
    by_tokens = curves.read_curve("lens", 0, read, 3, TOKENS)
    assert by_steps.points == points((0, 0.1), (2, 0.4), (3, 0.5))
    assert by_tokens.points == points((0, 0.1), (200, 0.4), (300, 0.5))
    assert (by_tokens.steps, by_tokens.tokens, by_tokens.final) == (3, 300, 0.5)


def test_the_step_that_reaches_the_budget_is_the_first():
    read = rows(100, 150, 100, accuracies={})
    assert step_that_reaches(read, 3, TOKENS) == 5  # 100 + 150 are 250
    assert step_that_reaches(read, 3, Budget(BudgetUnit.TOKENS, 251)) == 6
    assert step_that_reaches(read, 3, Budget(BudgetUnit.TOKENS, 351)) is None


@pytest.mark.parametrize("text", ["steps", "steps=0", "seconds=3", "steps=-1", "tokens=1.5", "steps=99999999999"])
def test_budgets_that_are_none(text: str):
    with pytest.raises(CompareError, match="expected steps=K or tokens=K"):
        read_budget(text)
    assert read_budget("tokens=1_000") == Budget(BudgetUnit.TOKENS, 1000)


def rendered(*arms: ArmCurve, names: tuple[str, ...] = ("grpo", "lens"), seeds: int = 1) -> str:
    return table.render("runs/mine@3", STEPS, "grpo", curves.compare_methods(arms, names, "grpo"), seeds)


def test_one_seed_claims_nothing():
    text = rendered(arm("grpo", 0, (20, 0.5)), arm("lens", 0, (20, 0.8)))
    assert "| lens | 1 | +30.0 | one seed: none |  |  |" in text
    assert "lens: +30.0 points with one seed, which says nothing about another seed." in text


def test_too_few_seeds_claim_nothing_and_enough_may():
    def of(count: int) -> str:
        gains = [0.10, 0.12, 0.11, 0.09, 0.13, 0.10]
        base = [arm("grpo", seed, (20, 0.5)) for seed in range(count)]
        return rendered(*base, *(arm("lens", s, (20, 0.5 + gains[s])) for s in range(count)), seeds=6)

    assert "cannot fall below p = 0.062, so nothing can be claimed" in of(5)
    assert "higher than that of grpo: +10.8 points over 6 seeds, p = 0.031." in of(6)
    assert "Done: 5 of 6 seeds" in of(5)


def test_without_an_accuracy_the_table_says_so():
    text = rendered(arm("grpo", 0, (20, 0.5)), arm("lens", 0))
    assert "| lens | 0 |" in text and "lens: no seed with an accuracy is done for both, so nothing can be said" in text


def test_a_method_replaces_what_methods_set_and_nothing_else():
    """A run of DAPO with options of its own becomes GRPO: neither DAPO's clip nor its rules are left."""
    run = {
        "data": {"train": "x"},
        "selection": {"method": "dynamic_sampling", "options": {}, "candidate_batches": 9},
        "reward": {"rules": {"overlong": {}}, "grader": "mine:score"},
        "lens": {"enabled": True, "tau": 0.9, "deletion_ratio": 0.2},
        "algorithm": {
            "clip_high": 0.28,
            "mask_truncated": True,
            "loss_weight": "normalised",
            "correction": "token_mask",
        },
        "rollout": {"rollouts_per_prompt": 16},
    }
    (grpo,) = methods.find_methods("grpo")
    found = methods.with_method(run, grpo)
    assert found["selection"] == {"method": "every_prompt", "options": {}}  # candidate_batches is DAPO's to set
    assert found["reward"] == {"grader": "mine:score", "rules": {}}
    assert found["lens"] == {"enabled": False, "deletion_ratio": 0.2}
    assert found["algorithm"] == {"correction": "token_mask"} | read_tree(*grpo.files)["algorithm"]
    assert found["data"] == run["data"] and found["rollout"] == run["rollout"]
    assert run["lens"]["tau"] == 0.9  # the run's own are as they were
    (own,) = methods.find_methods("own")
    assert methods.with_method(run, own) == run


def test_files_may_be_joined_or_ones_own(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({"algorithm": {"clip_high": 0.5}}))
    joined, own = methods.find_methods(f"grpo+reward_flips,{mine}")
    assert joined.name == "grpo+reward_flips" and own.name == "mine"
    assert methods.with_method({}, joined)["reward"]["rules"] == {"flips": {"rate": 0.4, "unit": "group"}}
    assert methods.with_method({"algorithm": {"clip_low": 0.1}}, own) == {"algorithm": {"clip_high": 0.5}}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lense", "did you mean .*lens"),
        ("grpo,", "no method ''"),
        ("nothing/there.yaml", "there is no file nothing/there.yaml"),
        ("lens,grpo,lens", "would both be called lens"),
    ],
)
def test_methods_that_are_none(names: str, message: str):
    with pytest.raises(CompareError, match=message):
        methods.find_methods(names)
