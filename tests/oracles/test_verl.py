"""Advantages, losses, aggregations, k3 and corrections equal those of verl 0.9.1: values and gradients, in float64.

So do scores, where its own function grades.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lens_kernels import k3
from oracle_client import Oracle, make_importable
from our_loss import (
    LIMIT,
    Responses,
    assert_equal,
    assert_gradients_equal,
    our_advantages,
    our_loss,
    padded,
    random_responses,
    token_terms,
)
from prompt_data import write_jsonl
from test_graders import LIMIT_S, facts_of, whole

from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.config import AlgorithmConfig
from lens_megatron.reward import GradeStatus, grade

SEEDS = range(5)
ESTIMATORS = {
    "grpo": ("compute_grpo_outcome_advantage", {}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {}),
}


@dataclass(frozen=True)
class Case:
    """One objective under our names and under verl's."""

    verls_name: str
    shared: dict[str, object]
    own: dict[str, float]
    verls: dict[str, float]
    correction: str = "token_truncate"
    aggregations: tuple[str, ...] = tuple(AGGREGATIONS)


LOSSES = {
    "clip": Case("vanilla", {"dual_clip": 1.5}, {}, {"clip_ratio_high": 0.28, "clip_ratio_c": 1.5}),
    "gspo": Case(
        "gspo",
        {"ratio": "sequence_geometric", "dual_clip": None},
        {},
        {"clip_ratio_high": 0.28},
        # verl gives each token the gradient of its own share of the response: the same where weights are of responses.
        correction="sequence_truncate",
    ),
    "sapo": Case(
        "sapo",
        {"objective": "sapo"},
        {"tau_positive": 0.8, "tau_negative": 1.3},
        {"tau_pos": 0.8, "tau_neg": 1.3},
        aggregations=("seq-mean-token-mean",),  # verl's knows no other
    ),
    "cispo": Case(
        "cispo",
        {"objective": "cispo"},
        {"lowest_ratio": 0.6, "highest_ratio": 1.28},
        {"clip_ratio_low": 0.4, "clip_ratio_high": 0.28},  # counted from 1
    ),
}
EVERY = [(name, aggregation) for name, case in LOSSES.items() for aggregation in case.aggregations]


def advantages_of(verl: Oracle, name: str, responses: Responses) -> list[float]:
    function, options = ESTIMATORS[name]
    return verl(
        "advantages", function=function, rewards=responses.flat_rewards, groups=responses.groups, options=options
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages(verl: Oracle, name: str):
    for seed in SEEDS:
        responses = random_responses(seed, sizes=(2, 8, 3, 5))
        found = our_advantages(responses, AlgorithmConfig(advantage=name))
        assert found == pytest.approx(advantages_of(verl, name, responses), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("corrected", [False, True], ids=["uncorrected", "corrected"])
@pytest.mark.parametrize(("name", "aggregation"), EVERY)
def test_policy_losses(verl: Oracle, name: str, aggregation: str, corrected: bool):
    """From rewards to gradients, advantages and corrections included."""
    case = LOSSES[name]
    shared = {**case.shared, "correction": case.correction if corrected else "none", "correction_high": 1.1}
    algorithm = AlgorithmConfig(advantage="grpo", aggregation=aggregation, clip_high=0.28, kl_coef=0.0, **shared)
    fractions = set()
    for seed in SEEDS:
        responses = random_responses(seed, extreme=name != "gspo")
        expected = verl(
            "policy_loss",
            name=case.verls_name,
            log_probs=padded(responses.log_probs),
            old=padded(responses.old),
            advantages=advantages_of(verl, "grpo", responses),
            mask=responses.mask,
            weights=weights_of(verl, responses, case.correction.split("_")[0]) if corrected else None,
            options={**case.verls, "loss_agg_mode": aggregation, "loss_scale_factor": LIMIT},
        )
        found = our_loss(responses, algorithm, **case.own)
        assert_equal(found, expected)
        assert found.clipped == pytest.approx(expected["clipped"], abs=1e-6)
        fractions.add(round(found.clipped, 6))
    assert (fractions == {0}) == (name == "sapo"), "a clip that never holds is compared with nothing"


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_truncated_responses_leave_the_loss_and_its_denominators(verl: Oracle, aggregation: str):
    """They are judged with their groups; verl then masks all of their tokens."""
    algorithm = AlgorithmConfig(
        advantage="grpo", aggregation=aggregation, clip_high=0.28, kl_coef=0.0, dual_clip=1.5, mask_truncated=True
    )
    for seed in SEEDS:
        responses = random_responses(seed)
        expected = verl(
            "policy_loss",
            name="vanilla",
            log_probs=padded(responses.log_probs),
            old=padded(responses.old),
            advantages=advantages_of(verl, "grpo", responses),
            mask=responses.mask * torch.tensor(responses.finished)[:, None],
            weights=None,
            options={**LOSSES["clip"].verls, "loss_agg_mode": aggregation, "loss_scale_factor": LIMIT},
        )
        assert_equal(our_loss(responses, algorithm), expected)


def weights_of(verl: Oracle, responses: Responses, level: str) -> list:
    log_ratio = padded(responses.old) - padded(responses.engine)
    return verl("correction", log_ratio=log_ratio, mask=responses.mask, level=level, threshold="1.1")


@pytest.mark.parametrize("limit", [None, 10.0])
def test_k3(verl: Oracle, limit: float | None):
    """verl's is limited to 10 nats; without a limit, where its own limit does not hold."""
    responses = random_responses(0)
    new, reference = torch.cat(responses.log_probs), torch.cat(responses.reference)
    if limit is not None:
        reference = reference + torch.linspace(-24, 24, len(new), dtype=torch.float64).float().double()
    variable = new.clone().requires_grad_()
    found = k3(reference - variable, limit)
    found.sum().backward()
    expected = verl("kl", log_probs=new, reference=reference)
    # verl's exp(d) - d - 1 loses digits where d is small.
    torch.testing.assert_close(found.detach(), torch.tensor(expected["values"]).double(), rtol=1e-6, atol=1e-7)
    assert_gradients_equal(variable.grad, expected["gradient"])


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_aggregations(verl: Oracle, name: str):
    for seed in SEEDS:
        responses = random_responses(seed)
        algorithm = AlgorithmConfig(advantage="grpo", aggregation=name)
        shares = token_terms(responses, algorithm).policy_weights.double()
        expected = verl("aggregate", losses=padded(responses.reference), mask=responses.mask, mode=name, limit=LIMIT)
        assert float(shares @ torch.cat(responses.reference)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("token_truncate", "correction", {"level": "token", "threshold": "1.25"}),
        ("token_mask", "correction", {"level": "token", "threshold": "0.8_1.25"}),
        ("sequence_truncate", "correction", {"level": "sequence", "threshold": "1.25"}),
        ("sequence_mask", "correction", {"level": "sequence", "threshold": "0.8_1.25"}),
        ("sequence_geometric_mask", "rejection", {"mode": "seq_mean_k1", "threshold": "0.8_1.25"}),
    ],
)
def test_corrections(verl: Oracle, name: str, function: str, arguments: dict):
    """verl's geometric bounds are those of pi_engine / pi_trainer: .8 and 1.25 are each other's inverse."""
    kinds = set()
    for seed in SEEDS:
        responses = random_responses(seed)
        algorithm = AlgorithmConfig(advantage="grpo", correction=name, correction_low=0.8, correction_high=1.25)
        terms = token_terms(responses, algorithm)
        log_ratio = padded(responses.old) - padded(responses.engine)
        expected = torch.tensor(verl(function, log_ratio=log_ratio, mask=responses.mask, **arguments))
        assert terms.corrections.tolist() == pytest.approx(expected[responses.mask > 0].tolist(), rel=1e-6)
        kinds.update(terms.limited.tolist())
    assert kinds == {True, False}


def test_its_own_scores_are_those_of_our_grading_processes(
    verl: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_importable(monkeypatch)
    completions = ["It is #### 72", r"so \boxed{72}", "Answer: 72", "<answer> 72 </answer>", "#### 71", ""]
    completions += [r"<think>...</think> \boxed{72}", r"\boxed{\frac{144}{2}}", "Answer: $\\boxed{72}$"]
    sources = ["openai/gsm8k", "lighteval/MATH", "HuggingFaceH4/MATH-500", "math_dapo", "aime2024",
               "searchR1_nq"]  # fmt: skip
    truths = {"searchR1_nq": {"target": ["72", "seventy-two"]}}
    source = write_jsonl(
        tmp_path / "rows.jsonl",
        *({"data_source": name, "prompt": "How", "reward_model": {"ground_truth": truths.get(name, "72")}}
          for name in sources),
    )  # fmt: skip
    prompts = [prompt for prompt in whole(source) for _ in completions]
    found = grade(
        completions * len(sources), [p.answer for p in prompts], LIMIT_S, workers=1,
        grader="verl.utils.reward_score:default_compute_score", facts=[facts_of(prompt) for prompt in prompts],
    )  # fmt: skip
    cases = [(name, text, truths.get(name, "72")) for name in sources for text in completions]
    expected = verl("scores", cases=cases)
    assert {name.status for name in found} == {GradeStatus.CORRECT, GradeStatus.WRONG}
    assert [g.score for g in found] == [e["score"] for e in expected]
    assert [g.correct for g in found] == [bool(e["acc"]) for e in expected]
    # The default's example: math_dapo pays 1 and -1, the others 1 and 0.
    assert {e["score"] for e in expected} >= {-1.0, 0.0, 1.0}
