"""Advantages, weights and what becomes of them in samples: numbers worked by hand, and what must hold for any rewards.

That they equal verl's and TRL's is in tests/oracles.
"""

import math
from dataclasses import replace

import pytest
import torch
from chosen import Judgement, judge, method, objective
from hypothesis import given
from hypothesis import strategies as st
from records import group, training_rows

from lens_megatron.algorithms import registry
from lens_megatron.algorithms.advantages import Advantage, Credit
from lens_megatron.algorithms.entry import Method, NoOptions
from lens_megatron.algorithms.registry import Kind
from lens_megatron.algorithms.rescue import is_hard, replace_failures
from lens_megatron.algorithms.samples import to_samples
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig, ConfigError, LensConfig
from lens_megatron.types import GroupNumbers, Sample, TrainingGroup

EVERY = registry.names(Kind.ADVANTAGES)
RESCUED = replace_failures(group("11000000", "11100000"), LensConfig(), seed=0)
"""a = .25; three successes of the second wave replace three of six failures, so that five of eight succeed."""


def untouched(outcomes: str) -> TrainingGroup:
    return replace_failures(group(outcomes), LensConfig(), seed=0)


def with_rewards(rewards: list[float]) -> TrainingGroup:
    plain = group("0" * len(rewards))
    rollouts = tuple(replace(r, reward=reward) for r, reward in zip(plain.native, rewards, strict=True))
    return TrainingGroup(replace(plain, native=rollouts), rollouts, gate=False)


def judged(trained: TrainingGroup, advantage: str, **options: object) -> Judgement:
    return judge(trained, AlgorithmConfig(advantage=advantage, **options))


def samples_of(
    trained: TrainingGroup, algorithm: AlgorithmConfig, advantage: Method[Advantage] | None = None
) -> list[Sample]:
    chosen = advantage or method(Kind.ADVANTAGES, algorithm.advantage)
    return to_samples([trained], [GroupNumbers.of(trained)], chosen, algorithm)


def test_dr_grpo_does_not_divide():
    assert judged(untouched("1000"), "dr_grpo").advantages == (0.75, -0.25, -0.25, -0.25)
    # The rewards' scale stays: a group of [10, 0] weighs ten times one of [1, 0].
    assert judged(with_rewards([10.0, 0.0]), "dr_grpo").advantages == (5.0, -5.0)


def test_rloo_compares_with_the_others():
    assert judged(untouched("1000"), "rloo").advantages == pytest.approx((1.0, -1 / 3, -1 / 3, -1 / 3))
    rewards = [2.0, -1.0, 0.5, 4.0]
    others = [r - sum(rewards[:i] + rewards[i + 1 :]) / 3 for i, r in enumerate(rewards)]
    assert judged(with_rewards(rewards), "rloo").advantages == pytest.approx(others)


@pytest.mark.parametrize(("advantage", "loss"), [("dr_grpo", 0.09375), ("rloo", 0.125)])
def test_dr_grpos_loss_worked(advantage: str, loss: float):
    """r = [1, 0, 0, 0], |y| = [2, 4, 4, 4], rho = 1, L_max = 4: -(2 * .75 - 12 * .25) / 4 / 4, and 4 / 3 of it."""
    rewarded = with_rewards([1.0, 0.0, 0.0, 0.0])
    rollouts = tuple(
        replace(r, token_ids=(5,) * n, log_probs=(-1.0,) * n)
        for r, n in zip(rewarded.rollouts, (2, 4, 4, 4), strict=True)
    )
    algorithm = AlgorithmConfig(advantage=advantage, aggregation="seq-mean-token-sum-norm", kl_coef=0.0)
    found = samples_of(replace(rewarded, rollouts=rollouts), algorithm)
    (batch,) = pack.pack(
        training_rows(found),
        scale=pack.count(found),
        algorithm=algorithm,
        max_response_length=4,
        parts=[range(4)],
        device=torch.device("cpu"),
    )
    result = objective(algorithm).losses(torch.linspace(-2, -1, 14), torch.zeros(14), batch.terms, algorithm)
    assert result.losses.sum().item() == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_a_group_of_one_or_without_contrast_has_no_advantage(name: str):
    for rewards in ([1.0], [0.0], [-3.5], [0.25] * 4):
        assert judged(with_rewards(rewards), name).advantages == (0.0,) * len(rewards)


@pytest.mark.parametrize("name", EVERY)
def test_no_rewards_make_it_raise(name: str):
    """A number that is not finite reaches the loss, so that the update is skipped and reported."""
    huge = judged(with_rewards([1e200, -1e200, 0.0]), name).advantages
    assert len(huge) == 3 and not any(map(math.isnan, huge))
    for bad in (math.nan, math.inf, -math.inf):
        assert any(map(math.isnan, judged(with_rewards([0.0, bad, 1.0]), name).advantages))


@pytest.mark.parametrize("name", EVERY)
def test_a_rank_without_groups_has_no_credits(name: str):
    advantage = method(Kind.ADVANTAGES, name)
    elsewhere = [GroupNumbers.of(untouched("10"))]
    assert advantage.call([], elsewhere, AlgorithmConfig(), advantage.options) == []


@pytest.mark.parametrize("name", EVERY)
def test_each_group_is_judged_for_itself_in_order(name: str):
    advantage, algorithm = method(Kind.ADVANTAGES, name), AlgorithmConfig(advantage=name)
    groups = [untouched("10"), RESCUED, untouched("1110000"), untouched("0")]
    together = advantage.call(groups, list(map(GroupNumbers.of, groups)), algorithm, advantage.options)
    alone = [judge(one, algorithm).advantages for one in groups]
    assert [tuple(credit.advantage for credit in credits) for credits in together] == alone


@given(
    st.sampled_from([name for name in EVERY if name != "crpo"]),
    st.lists(st.floats(-10, 10, width=16), min_size=2, max_size=9),
    st.sampled_from([-2.0, 0.5, 8.0]),
)
def test_advantages_add_up_to_zero_and_know_no_offset(name: str, rewards: list[float], offset: float):
    found = judged(with_rewards(rewards), name).advantages
    assert sum(found) == pytest.approx(0, abs=1e-9)
    shifted = judged(with_rewards([r + offset for r in rewards]), name).advantages
    assert shifted == pytest.approx(found, rel=1e-6, abs=1e-6)


# What LENS is compared with: its parts one by one.


def test_grpos_advantages_with_purification():
    # Five successes of eight: mean .625, unbiased deviation sqrt(1.875 / 7) = .517549.
    result = judged(RESCUED, "grpo")
    assert sorted(set(result.advantages)) == pytest.approx([-0.625 / 0.517549, 0.375 / 0.517549], rel=1e-5)
    assert result.advantages.count(max(result.advantages)) == 5 and result.weights == (1.0,) * 8


def test_dr_grpos_advantages_with_purification():
    result = judged(RESCUED, "dr_grpo")
    assert sorted(result.advantages) == [-0.625] * 3 + [0.375] * 5 and result.weights == (1.0,) * 8


def test_lens_weights_with_grpos_advantages():
    result = judged(RESCUED, "grpo", weights="crpo")
    assert result.advantages == judged(RESCUED, "grpo").advantages
    # .25 for successes of the first wave, .75 for failures and for what the second wave brought.
    assert sorted(result.weights) == [0.25] * 2 + [0.75] * 6
    assert result.weights == judged(RESCUED, "crpo").weights


def test_crpos_advantages_without_its_weights():
    result = judged(RESCUED, "crpo", weights="none")
    assert result.advantages == judged(RESCUED, "crpo").advantages and result.weights == (1.0,) * 8


@pytest.mark.parametrize("successes", range(9))
def test_crpo_without_purification_is_dr_grpo(successes: int):
    """w~ A = r - mean(r) in every group that the second wave has not changed, but for eps."""
    lens, outcomes = LensConfig(enabled=False), "1" * successes + "0" * (8 - successes)
    assert not is_hard(successes / 8, lens)
    trained = replace_failures(group(outcomes), lens, seed=0)
    crpo = judged(trained, "crpo")
    products = [w * a for w, a in zip(crpo.weights, crpo.advantages, strict=True)]
    assert products == pytest.approx(judged(trained, "dr_grpo").advantages, rel=1e-5, abs=1e-12)


def test_crpo_without_purification_worked():
    # a = .25: w~ = .25 for two successes and .75 for six failures, mu = .1, sigma = .3.
    result = judged(untouched("11000000"), "crpo")
    assert result.advantages == pytest.approx((3.0,) * 2 + (-1 / 3,) * 6, rel=1e-5)
    assert result.weights == (0.25,) * 2 + (0.75,) * 6


# What becomes of credits in samples.


def test_a_credits_weight_multiplies_that_of_the_weights():
    def halves(groups, batch, algorithm, options):
        return [[Credit(2.0, weight=0.5)] * len(one.rollouts) for one in groups]

    found = samples_of(RESCUED, AlgorithmConfig(weights="crpo"), Method("halves", halves, NoOptions()))
    assert sorted(sample.weight for sample in found) == [0.125] * 2 + [0.375] * 6
    assert {sample.advantage for sample in found} == {2.0} and all(sample.keep for sample in found)


def test_a_credit_may_leave_a_rollout_out():
    def first_only(groups, batch, algorithm, options):
        return [[Credit(1.0, keep=place == 0) for place, _ in enumerate(one.rollouts)] for one in groups]

    found = samples_of(untouched("100"), AlgorithmConfig(), Method("first_only", first_only, NoOptions()))
    assert [sample.keep for sample in found] == [True, False, False]


def test_credits_that_do_not_fit_the_rollouts_are_refused():
    def forgetful(groups, batch, algorithm, options):
        return [[Credit(0.0)] * 3 for one in groups]

    with pytest.raises(ConfigError, match=r"algorithm.advantage=mine:ENTRY returned \[3\] .* of \[2\] rollouts"):
        samples_of(untouched("10"), AlgorithmConfig(), Method("mine:ENTRY", forgetful, NoOptions()))


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_rollouts_count_in_their_group_and_may_leave_the_loss(masked: bool):
    plain = group("1000")
    cut = tuple(replace(r, finished=place != 3) for place, r in enumerate(plain.native))
    trained = TrainingGroup(replace(plain, native=cut), cut, gate=False)
    found = samples_of(trained, AlgorithmConfig(advantage="dr_grpo", mask_truncated=masked))
    assert [sample.keep for sample in found] == [True, True, True, not masked]
    assert [sample.advantage for sample in found] == [0.75, -0.25, -0.25, -0.25]


def test_the_step_of_all_ranks_is_what_a_batch_wide_advantage_sees():
    def less_the_batch(groups, batch, algorithm, options):
        rewards = [reward for numbers in batch for reward in numbers.rewards]
        mean = sum(rewards) / len(rewards)
        return [[Credit(r.reward - mean) for r in one.rollouts] for one in groups]

    mine, elsewhere = untouched("10"), untouched("1111")
    batch = [GroupNumbers.of(mine), GroupNumbers.of(elsewhere)]
    chosen = Method("less_the_batch", less_the_batch, NoOptions())
    found = to_samples([mine], batch, chosen, AlgorithmConfig(weights="none"))
    assert [sample.advantage for sample in found] == pytest.approx([1 / 6, -5 / 6])
