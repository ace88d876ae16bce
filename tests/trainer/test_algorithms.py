"""Hand-worked numbers for every formula between graded groups and packed micro-batches.

Sources: LENS eq. 1-7 and its Algorithm 1; GRPO as verl and TRL compute it. What is not covered here: the kernels
(tests/kernels) and the model (test_policy.py).
"""

import math
from dataclasses import replace

import pytest
import torch
from chosen import judge, method, objective, purify
from lens_kernels import linear_policy_loss, linear_token_logprobs
from records import PROMPT, group, rollout, sample, training_rows

from lens_megatron.algorithms import samples
from lens_megatron.algorithms.advantages.crpo import weighted_advantages
from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.algorithms.objectives.clip import clipped_surrogate
from lens_megatron.algorithms.purification.interference import select
from lens_megatron.algorithms.registry import Kind
from lens_megatron.algorithms.rescue import is_hard, replace_failures
from lens_megatron.batch import pack
from lens_megatron.config import AlgorithmConfig, LensConfig
from lens_megatron.types import GroupNumbers, LossScale, Origin, TokenTerms, TrainingGroup

ALGORITHM = AlgorithmConfig()
GRPO = AlgorithmConfig(advantage="grpo")
LENS = LensConfig()


def test_crpo_on_a_rescued_group_of_eight():
    # a = .25; three of six failures are replaced by three successes: sum w~ = 5, mu = .55, sigma = .497494
    merged = replace_failures(group("11000000", "11100000"), LENS, seed=0)
    assert [r.origin for r in merged.rollouts].count(Origin.PURIFIED) == 3
    assert len(merged.rollouts) == 8 and merged.gate
    result = judge(merged, ALGORITHM)
    by_kind = {
        (r.origin, r.correct): (w, a)
        for r, w, a in zip(merged.rollouts, result.weights, result.advantages, strict=True)
    }
    expected = {
        (Origin.NATIVE, True): (0.25, 0.904534),
        (Origin.NATIVE, False): (0.75, -1.105542),
        (Origin.PURIFIED, True): (0.75, 0.904534),
    }
    for kind, (weight, advantage) in expected.items():
        assert by_kind[kind] == pytest.approx((weight, advantage), abs=3e-6)
    weighted = [w * a for w, a in zip(result.weights, result.advantages, strict=True)]
    assert sum(weighted) == pytest.approx(0, abs=1e-6)
    assert sorted(set(round(x, 5) for x in weighted)) == pytest.approx([-0.829156, 0.226134, 0.678401], abs=1e-5)


def test_crpo_when_no_original_rollout_succeeded():
    result = judge(replace_failures(group("00000000", "11000000"), LENS, seed=0), ALGORITHM)
    assert set(result.weights) == {1.0}
    assert sorted(set(result.advantages)) == pytest.approx([-0.577350, 1.732051], abs=1e-5)


def test_crpo_reweights_an_untouched_group():
    result = judge(replace_failures(group("11111100"), LENS, seed=0), ALGORITHM)
    assert result.weights == (0.75,) * 6 + (0.25,) * 2
    assert result.advantages == pytest.approx((1 / 3,) * 6 + (-3.0,) * 2, abs=2e-5)


@pytest.mark.parametrize("native", ["1111", "0000"])
def test_a_group_without_contrast_has_no_advantage(native):
    assert set(judge(replace_failures(group(native), LENS, seed=0), ALGORITHM).advantages) == {0.0}
    assert set(judge(replace_failures(group(native), LENS, seed=0), GRPO).advantages) == {0.0}


def test_weights_scope_and_normalised_weights():
    untouched = replace_failures(group("1000"), LENS, seed=0)
    assert judge(untouched, replace_algorithm(weights_scope="purified_only")).weights == (1.0,) * 4
    # w~ = .25 and three of .75: sum 2.5, four samples -> 4 w~ / 2.5
    assert judge(untouched, replace_algorithm(loss_weight="normalised")).weights == pytest.approx((0.4, 1.2, 1.2, 1.2))


def replace_algorithm(**options) -> AlgorithmConfig:
    return AlgorithmConfig(**options)


def test_grpo_uses_the_unbiased_deviation():
    assert judge(TrainingGroup(group("1000"), group("1000").native, False), GRPO).advantages == pytest.approx(
        (1.5, -0.5, -0.5, -0.5), abs=1e-5
    )
    assert judge(TrainingGroup(group("1100"), group("1100").native, False), GRPO).advantages == pytest.approx(
        (0.866025,) * 2 + (-0.866025,) * 2, abs=1e-5
    )


def test_weighted_advantages_equal_a_float64_oracle():
    generator = torch.Generator().manual_seed(0)
    rewards, weights = torch.rand(2, 16, generator=generator, dtype=torch.float64)
    w = weights / weights.sum()
    mu = (w * rewards).sum()
    oracle = (rewards - mu) / ((w * (rewards - mu) ** 2).sum().sqrt() + 1e-6)
    assert weighted_advantages(rewards.tolist(), weights.tolist(), 1e-6) == pytest.approx(oracle.tolist(), rel=1e-12)


def test_gate_is_strict_and_second_wave_failures_never_enter():
    assert not replace_failures(group("1000", "1000"), LENS, seed=0).gate
    assert replace_failures(group("1000", "1000"), LensConfig(gate="always"), seed=0).gate
    merged = replace_failures(group("1000", "1100"), LENS, seed=0)
    assert merged.gate and all(r.correct for r in merged.rollouts if r.origin is Origin.PURIFIED)
    assert not replace_failures(group("0000", "0000"), LensConfig(gate="always"), seed=0).gate


def test_all_failures_may_leave_and_the_switches_that_prevent_it():
    # One success, three failures, four rescued: literally all failures leave, the group grows to five, no contrast.
    literal = replace_failures(group("1000", "1111"), LENS, seed=0)
    assert len(literal.rollouts) == 5 and all(r.correct for r in literal.rollouts)
    kept = replace_failures(group("1000", "1111"), LensConfig(min_keep_failures=1), seed=0)
    assert [r.correct for r in kept.rollouts].count(False) == 1
    capped = replace_failures(group("1000", "1111"), LensConfig(cap_rescued=True), seed=0)
    assert len(capped.rollouts) == 4


def test_the_failures_that_leave_depend_on_the_seed_alone():
    kept = {
        tuple(r.token_ids for r in replace_failures(group("0" * 8, "1000"), LENS, seed=s).rollouts) for s in range(40)
    }
    assert len(kept) == 8
    again = [replace_failures(group("0" * 8, "1000"), LENS, seed=5).rollouts for _ in range(2)]
    assert again[0] == again[1]


def test_hard_is_strictly_below_tau():
    assert is_hard(0.375, LENS) and not is_hard(0.5, LENS)
    assert not is_hard(0.0, LensConfig(enabled=False))


def test_selection_of_the_worked_example():
    scores = torch.tensor([0.1, 0.9, 0.0, 0.4, 0.05])
    everyone = torch.ones(5, dtype=torch.bool)
    one = select(scores, everyone, LensConfig(deletion_ratio=0.05), seed=0)
    two = select(scores, everyone, LensConfig(deletion_ratio=0.3), seed=0)
    assert one.tolist() == [True, False, True, True, True]
    assert two.tolist() == [True, False, True, False, True]


def test_purified_prompts_keep_order_and_never_touch_ineligible_tokens():
    scores = torch.tensor([9.0, 0.1, 0.3, 0.3, 0.2, 9.0])
    (purified,) = purify([PROMPT], [scores], LensConfig(deletion_ratio=0.25), seeds=[0])
    assert purified.deleted == (2,) and purified.token_ids == (1, 10, 12, 13, 2)  # the tie goes to the earlier
    (full,) = purify([PROMPT], [scores], LensConfig(deletion_ratio=0.25, ratio_base="full"), seeds=[0])
    assert full.deleted == (2, 3)  # ceil(.25 * 6) instead of ceil(.25 * 4)


def test_below_the_noise_floor_nothing_is_purified():
    assert purify([PROMPT], [torch.full((6,), 9e-5)], LENS, seeds=[0]) == [None]
    assert purify([PROMPT], [torch.zeros(6)], LensConfig(min_score=0.0), seeds=[0]) != [None]


def test_random_ties_are_seeded():
    lens = LensConfig(tie_break="random", deletion_ratio=0.25)
    choices = [purify([PROMPT], [torch.ones(6)], lens, seeds=[s])[0].deleted for s in range(40)]
    assert set(choices) == {(1,), (2,), (3,), (4,)}
    assert purify([PROMPT], [torch.ones(6)], lens, seeds=[7])[0].deleted == choices[7]


def test_samples_carry_the_prompt_that_generated_them():
    merged = replace_failures(group("1000", "1100"), LENS, seed=0)
    rows = samples.to_samples([merged], [GroupNumbers.of(merged)], method(Kind.ADVANTAGES, "crpo"), ALGORITHM)
    assert [r.prompt for r in rows] == [PROMPT.token_ids] * len(rows)
    for row in rows:
        rescued = row.rollout.origin is Origin.PURIFIED
        assert row.generation_prompt == ((1, 10, 12, 13, 2) if rescued else PROMPT.token_ids)


def test_aggregations():
    # Two responses of 2 and 6 tokens with losses -1 and +1 per token.
    scale, losses = LossScale(8, 2, 0), {2: -1.0, 6: 1.0}
    expected = {
        "token-mean": 0.5,
        "seq-mean-token-mean": 0.0,
        "seq-mean-token-sum": 2.0,
        "seq-mean-token-sum-norm": 0.25,
    }
    for name, value in expected.items():
        total = sum(n * loss * AGGREGATIONS[name](n, scale, 8) for n, loss in losses.items())
        assert total == pytest.approx(value)


def test_clipped_surrogate_and_dual_clip():
    algorithm = AlgorithmConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    ratio, advantages = torch.tensor([1.35, 0.7, 0.7, 5.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, clipped = clipped_surrogate(ratio, advantages, algorithm)
    assert loss.tolist() == pytest.approx([-1.28, 0.8, -0.7, 3.0])
    assert clipped.tolist() == [1.0, 1.0, 0.0, 1.0]


def rescued_terms(old: list[float], advantage: float, weight: float, algorithm: AlgorithmConfig) -> TokenTerms:
    row = sample(rollout(True, Origin.PURIFIED, tokens=(1, 1, 1)), advantage, weight)
    row = replace(row, prompt=(1,), generation_prompt=(1,))
    return pack.pack(
        training_rows([row], [torch.tensor(old)]),
        scale=LossScale(3, 1, 1),
        algorithm=algorithm,
        max_response_length=3,
        parts=[[0]],
        device=torch.device("cpu"),
    )[0].terms


NEW = torch.tensor([-0.5, -2.0, -0.1])
"""log pi of the worked example's rescued row, whose old log-probabilities are -0.6, -1.2, -0.1."""


def test_the_rescued_row_of_the_worked_example():
    # rho = [1.105171, .449329, 1], A = .904534, w~ = .75 -> loss -.577658
    algorithm = AlgorithmConfig(aggregation="seq-mean-token-mean", kl_coef=0.0)
    terms = rescued_terms([-0.6, -1.2, -0.1], 0.904534, 0.75, algorithm)
    result = objective(algorithm).losses(NEW, torch.zeros(3), terms, algorithm)
    assert float(result.losses.sum()) == pytest.approx(-0.577658, abs=1e-6)
    assert result.ratio.tolist() == pytest.approx([1.105171, 0.449329, 1.0], abs=1e-6)


@pytest.mark.parametrize(("form", "ratio"), [("sequence", 0.496585), ("sequence_geometric", 0.791890)])
def test_sequence_ratios_of_the_worked_example(form, ratio):
    algorithm = AlgorithmConfig(aggregation="seq-mean-token-mean", kl_coef=0.0, ratio=form)
    terms = rescued_terms([-0.6, -1.2, -0.1], 0.904534, 0.75, algorithm)
    log_probs = NEW.clone().requires_grad_()
    result = objective(algorithm).losses(log_probs, torch.zeros(3), terms, algorithm)
    assert result.ratio.tolist() == pytest.approx([ratio] * 3, abs=1e-6)
    assert result.losses.sum().item() == pytest.approx(-0.75 * 0.904534 * ratio, abs=1e-6)
    result.losses.sum().backward()
    # d loss / d logp_t = -w A ratio / |y| (geometric) or that times |y| (product)
    per_token = -0.75 * 0.904534 * ratio / (3 if form == "sequence_geometric" else 1)
    assert log_probs.grad.tolist() == pytest.approx([per_token] * 3, abs=1e-6)


def test_a_sequence_ratio_keeps_responses_apart():
    algorithm = AlgorithmConfig(kl_coef=0.0, ratio="sequence")
    rows = [sample(rollout(True, Origin.PURIFIED, tokens=(5,) * n)) for n in (2, 1, 3)]
    (batch,) = packed(rows, [torch.full((n,), -1.0) for n in (2, 1, 3)], algorithm)
    log_probs = torch.tensor([-1.1, -1.2, -0.9, -1.0, -1.1, -0.8])
    result = objective(algorithm).losses(log_probs, torch.zeros(6), batch.terms, algorithm)
    expected = [math.exp(x) for x in (-0.3, -0.3, 0.1, 0.1, 0.1, 0.1)]
    assert result.ratio.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["sequence", "sequence_geometric"])
def test_sequence_objectives_are_gspos_formula_written_out(form):
    # Ratios within the clip, beyond it on the side that holds and on the other, an on-policy response, dual clip.
    algorithm = AlgorithmConfig(ratio=form, kl_coef=0.3, entropy_coef=0.2, imitation_coef=0.1, dual_clip=1.5)
    lengths, advantages, weights = (2, 3, 1, 2, 2), (1.2, 0.7, -0.8, -0.9, 2.0), (1.0, 0.5, 1.0, 0.75, 1.0)
    origins = [Origin.NATIVE, Origin.PURIFIED, Origin.NATIVE, Origin.NATIVE, Origin.NATIVE]
    rows = [
        sample(rollout(True, origin, (5,) * n), a, w)
        for origin, n, a, w in zip(origins, lengths, advantages, weights, strict=True)
    ]
    shifts = (0.05, 0.4, 0.9, -0.6, None)
    new = torch.linspace(-2.0, -0.5, 10)
    old = [None if x is None else part - x for part, x in zip(new.split(lengths), shifts, strict=True)]
    reference = [part + 0.3 for part in new.split(lengths)]
    (batch,) = packed(rows, old, algorithm, reference)
    log_probs, entropy = new.clone().requires_grad_(), torch.linspace(0.1, 1.0, 10).requires_grad_()
    found = objective(algorithm).losses(log_probs, entropy, batch.terms, algorithm)
    gradients = torch.autograd.grad(found.losses.sum(), (log_probs, entropy))

    total = torch.zeros(())
    parts = zip(log_probs.split(lengths), entropy.split(lengths), old, reference, rows, strict=True)
    for p, h, q, r, row in parts:
        difference = (p - (p.detach() if q is None else q)).sum()
        s = (difference / len(p) if form == "sequence_geometric" else difference).exp()
        a = row.advantage
        gained = torch.minimum(s * a, s.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * a)
        if a < 0:
            gained = gained.clamp(min=1.5 * a)
        kl = (r - p).exp() - (r - p) - 1
        total = total + (-row.weight * gained * len(p) + 0.3 * kl.sum() - 0.2 * h.sum()) / 10
        if row.rollout.origin is Origin.PURIFIED:
            total = total - 0.1 * p.mean()
    assert found.losses.sum().item() == pytest.approx(total.item(), rel=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(total, (log_probs, entropy)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert found.clipped.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0] and found.ratio[8:].tolist() == [1.0, 1.0]


def test_acl_form_divides_the_old_probability_by_the_weight():
    algorithm = AlgorithmConfig(aggregation="seq-mean-token-mean", kl_coef=0.0, ratio_form="acl")
    terms = rescued_terms([-0.6, -1.2, -0.1], 1.0, 0.75, algorithm)
    result = objective(algorithm).losses(NEW, torch.zeros(3), terms, algorithm)
    assert result.ratio.tolist() == pytest.approx([1.105171 / 0.75, 0.449329 / 0.75, 1 / 0.75], abs=1e-5)


def test_imitation_adds_the_mean_negative_log_likelihood_of_rescued_rows():
    algorithm = AlgorithmConfig(aggregation="seq-mean-token-mean", kl_coef=0.0, imitation_coef=0.1)
    terms = rescued_terms([-0.6, -1.2, -0.1], 0.904534, 0.75, algorithm)
    result = objective(algorithm).losses(NEW, torch.zeros(3), terms, algorithm)
    assert float(result.losses.sum()) == pytest.approx(-0.577658 + 0.1 * 2.6 / 3, abs=1e-6)
    assert objective(algorithm).fused(terms, algorithm) is None


@pytest.mark.parametrize(
    "coefficients", [{"kl_coef": 0.3, "entropy_coef": 0.2}, {"kl_coef": 0.3, "kl_limit": 10.0}, {"kl_coef": 0.0}]
)
def test_the_fused_loss_is_the_objective_that_names_it(coefficients):
    # Ratios inside and outside every clip, an on-policy response, k3 within and beyond its limit; values and gradients.
    algorithm = AlgorithmConfig(dual_clip=1.5, **coefficients)
    rows = [sample(rollout(True, tokens=(1, 2, 0, 1)), a, w) for a, w in ((1.2, 0.5), (-0.7, 1.0), (2.0, 1.0))]
    old = [torch.tensor([-1.0, -2.5, -0.3, -1.1]), torch.tensor([-3.0, -0.2, -1.3, -1.8]), None]
    reference = [torch.tensor([-1.2, -0.9, -1.4, -0.4]), torch.tensor([-1.5, -0.7, 3.0, -1.1]), torch.zeros(4) - 1]
    (batch,) = packed(rows, old, algorithm, reference)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 4, generator=generator), torch.randn(3, 4, generator=generator)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            result = linear_policy_loss(
                h, w, batch.sequences.target_ids, **objective(algorithm).fused(batch.terms, algorithm)
            )
            loss, tokens = result.loss, (result.ratio, result.clipped, result.kl)
        else:
            log_probs, entropy = linear_token_logprobs(h, w, batch.sequences.target_ids, return_entropy=True)
            losses, *tokens = objective(algorithm).losses(log_probs, entropy, batch.terms, algorithm)
            loss = losses.sum()
        loss.backward()
        results.append([loss, *tokens, h.grad, w.grad])
    assert 0 < results[0][2].sum() < 8
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["token", "sequence"])
@pytest.mark.parametrize("kl_limit", [None, 10.0, 0.01])
def test_kl_limit_bounds_the_value_and_takes_the_gradient_away(form, kl_limit):
    """Beside float64, tokens whose reference is above and below them, within a limit and beyond it, and beyond 20."""
    shifts = torch.tensor([-25.0, -12.0, -2.0, -0.1, -1e-4, 1e-4, 0.1, 2.5, 2.7, 8.0, 19.0, 25.0])
    algorithm = AlgorithmConfig(ratio=form, kl_coef=0.5, kl_limit=kl_limit)
    count = len(shifts)
    new = torch.linspace(-3.0, -0.5, count)
    rows = [sample(rollout(True, tokens=(1,) * count), advantage=0.0)]
    (batch,) = packed(rows, [None], algorithm, [new + shifts])
    log_probs = new.clone().requires_grad_()
    result = objective(algorithm).losses(log_probs, torch.zeros(count), batch.terms, algorithm)
    result.losses.sum().backward()

    exact = new.double().requires_grad_()
    d = (batch.terms.reference_log_probs.double() - exact).clamp(-20, 20)
    kl = torch.expm1(d) - d
    flat = d.detach().abs() >= 20
    if kl_limit is not None:
        flat |= kl > kl_limit
        kl = kl.clamp(max=kl_limit)
    (0.5 / count * kl).sum().backward()
    # A float32 difference of log-probabilities is off by 1e-7, which at 1e-4 nats is 2e-3 of its square.
    torch.testing.assert_close(result.kl.double(), kl.detach(), rtol=5e-6, atol=1e-15)
    torch.testing.assert_close(log_probs.grad.double(), exact.grad, rtol=5e-6, atol=1e-15)
    assert (log_probs.grad == 0).equal(flat) and flat.any()


def packed(rows, old, algorithm: AlgorithmConfig, reference=None):
    return pack.pack(
        training_rows(rows, old, reference),
        scale=pack.count(rows),
        algorithm=algorithm,
        max_response_length=4,
        parts=[range(len(rows))],
        device=torch.device("cpu"),
    )


def test_pack_aligns_responses_and_pads_nothing():
    rows = [sample(rollout(True, tokens=(5, 6))), sample(rollout(False, Origin.PURIFIED, tokens=(7, 8, 9)))]
    (batch,) = pack.pack(
        training_rows(
            rows,
            [None, torch.tensor([-1.0, -2.0, -3.0])],
            [torch.tensor([-0.1, -0.2]), torch.tensor([-0.3, -0.4, -0.5])],
        ),
        scale=pack.count(rows),
        algorithm=AlgorithmConfig(kl_coef=0.5),
        max_response_length=3,
        parts=[[0, 1]],
        device=torch.device("cpu"),
    )
    sequences, terms = batch.sequences, batch.terms
    prompt = list(PROMPT.token_ids)
    assert sequences.input_ids.tolist() == [[*prompt, 5, 6, *prompt, 7, 8, 9]]
    assert sequences.position_ids.tolist() == [[*range(len(prompt) + 2), *range(len(prompt) + 3)]]
    assert sequences.bounds == (0, len(prompt) + 2, 2 * len(prompt) + 5)
    assert sequences.target_ids.tolist() == [5, 6, 7, 8, 9] and sequences.lengths == (2, 3)
    n = len(prompt)
    assert sequences.positions.tolist() == [n - 1, n, 2 * n + 1, 2 * n + 2, 2 * n + 3]
    assert terms.old_log_probs[:2].isnan().all() and terms.old_log_probs[2:].tolist() == [-1.0, -2.0, -3.0]
    assert terms.reference_log_probs.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5])
    assert terms.policy_weights.tolist() == pytest.approx([0.2] * 5)
    assert terms.kl_weights.sum().item() == pytest.approx(0.5)
    assert terms.rescued.tolist() == [False, False, True, True, True] and terms.first.tolist() == [0, 0, 2, 2, 2]


def test_a_rank_without_samples_gets_one_empty_micro_batch():
    (batch,) = pack.pack(
        [],
        scale=LossScale(4, 1, 0),
        algorithm=ALGORITHM,
        max_response_length=3,
        parts=[[]],
        device=torch.device("cpu"),
    )
    assert batch.sequences.input_ids.shape == (1, 2) and batch.sequences.lengths == (0,)
    assert batch.sequences.target_ids.shape == batch.terms.policy_weights.shape == (0,)
