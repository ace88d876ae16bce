"""Advantages, losses and rewards equal those of TRL 1.16.0: values and gradients, in float64."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from oracle_client import Oracle, make_importable
from our_loss import LIMIT, Responses, assert_equal, our_advantages, our_loss, padded, random_responses
from prompt_data import write_jsonl
from test_graders import LIMIT_S, facts_of, whole

from lens_megatron.config import AlgorithmConfig
from lens_megatron.reward import grade

SEEDS = range(5)
TEMPERATURES = {"sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.3}
PER_RESPONSE = {"importance_sampling_level": "sequence"}


@dataclass(frozen=True)
class Case:
    """One loss under our names and under TRL's."""

    trls_name: str
    shared: dict[str, object]
    own: dict[str, float] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    """TRL's, as are `arguments`."""
    arguments: dict[str, float] = field(default_factory=dict)


LOSSES = {
    "grpo": Case("grpo", {"aggregation": "seq-mean-token-mean"}),
    "grpo with k3": Case("grpo", {"aggregation": "seq-mean-token-mean", "kl_coef": 0.3}, options={"beta": 0.3}),
    "dapo": Case("dapo", {"aggregation": "token-mean"}),
    "bnpo, which is a mean over tokens": Case("bnpo", {"aggregation": "token-mean"}),
    "dr_grpo": Case("dr_grpo", {"advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm"}),
    "gspo": Case("grpo", {"ratio": "sequence_geometric", "aggregation": "seq-mean-token-mean"}, options=PER_RESPONSE),
    "sapo": Case(
        "sapo",
        {"objective": "sapo", "aggregation": "seq-mean-token-mean"},
        {"tau_positive": 0.8, "tau_negative": 1.3},
        arguments=TEMPERATURES,
    ),
    "sapo per response": Case(
        "sapo",
        {"objective": "sapo", "ratio": "sequence_geometric", "aggregation": "seq-mean-token-mean"},
        {"tau_positive": 0.8, "tau_negative": 1.3},
        options=PER_RESPONSE,
        arguments=TEMPERATURES,
    ),
    "cispo": Case("cispo", {"objective": "cispo"}, {"highest_ratio": 1.28}, options={"epsilon_high": 1.28}),
    "cispo per response": Case(
        "cispo",
        {"objective": "cispo", "ratio": "sequence_geometric"},
        {"highest_ratio": 1.28},
        options={"epsilon_high": 1.28, **PER_RESPONSE},
    ),
}


def advantages_of(trl: Oracle, responses: Responses, advantage: str) -> list[float]:
    scale = "none" if advantage == "dr_grpo" else "group"
    return trl("advantages", rewards=responses.flat_rewards, group_size=len(responses.rewards[0]), scale=scale)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_advantages(trl: Oracle, name: str, size: int):
    for seed in SEEDS:
        responses = random_responses(seed, sizes=(size,) * 4)
        found = our_advantages(responses, AlgorithmConfig(advantage=name, advantage_eps=1e-4))
        assert found == pytest.approx(advantages_of(trl, responses, name), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("corrected", [False, True], ids=["uncorrected", "corrected"])
@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(trl: Oracle, name: str, corrected: bool):
    """From rewards to gradients, advantages included; corrected by truncated weights of tokens or responses."""
    case = LOSSES[name]
    per_response = case.options.get("importance_sampling_level") == "sequence"
    correction = "sequence_truncate" if per_response else "token_truncate"
    shared = {"advantage": "grpo", "kl_coef": 0.0, **case.shared, "correction": correction if corrected else "none"}
    algorithm = AlgorithmConfig(clip_high=0.28, dual_clip=None, advantage_eps=1e-4, correction_high=1.1, **shared)
    for seed in SEEDS:
        responses = random_responses(seed, sizes=(4, 4))
        expected = trl(
            "policy_loss",
            name=case.trls_name,
            log_probs=padded(responses.log_probs),
            old=padded(responses.old),
            advantages=advantages_of(trl, responses, algorithm.advantage),
            mask=responses.mask,
            weights=truncated(responses, per_response) if corrected else None,
            reference=padded(responses.reference),
            options={"epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": LIMIT, **case.options},
            arguments=case.arguments,
        )
        assert_equal(our_loss(responses, algorithm, **case.own), expected)


def truncated(responses: Responses, per_response: bool) -> torch.Tensor:
    """TRL is given these weights; [N, T], or [N, 1] per response."""
    log_ratio = padded(responses.old) - padded(responses.engine)
    return (log_ratio.sum(-1, keepdim=True) if per_response else log_ratio).exp().clamp(max=1.1)


def test_its_own_rewards_are_those_of_our_grading_processes(
    trl: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_importable(monkeypatch)
    completions = [
        r"<think>x</think> \boxed{\frac{2}{4}}",
        r"\boxed{3}",
        "<think>x",
        "",
        r"<think></think>$\frac{1}{2}$",
    ]
    row = {"prompt": [{"role": "user", "content": "How"}], "solution": r"\frac{1}{2}", "answer": "1/2"}
    (prompt,) = whole(write_jsonl(tmp_path / "rows.jsonl", row))
    found = grade(
        completions, [prompt.answer] * len(completions), LIMIT_S, workers=1,
        grader=("trl.rewards:accuracy_reward", "trl.rewards:think_format_reward"), weights=(1.0, 0.25),
        facts=[facts_of(prompt)] * len(completions),
    )  # fmt: skip
    expected = trl("scores", texts=completions, solution=row["solution"])
    assert [g.score for g in found] == expected and len(set(expected)) > 2, found
