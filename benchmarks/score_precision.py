"""Measures whether the precision of logits and log-probabilities changes which prompt tokens are deleted.

    python -m benchmarks.score_precision

Policy and reference differ by a little noise in the LM head. Each of four precisions scores the same tokens and selects
the highest of every prompt with select_interference_tokens; the truth does so in float64 from the same operands. We
can choose between two of them: linear_token_logprobs never rounds a logit, and token_logprobs takes what the model's
head returns. The data are synthetic: which |score| a real policy has after n steps is not measured here.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lens_kernels import linear_token_logprobs, select_interference_tokens, token_logprobs
from torch import Tensor

from benchmarks.operators import results

TOKENS, PROMPT, VOCAB, HIDDEN = 1024, 128, 32000, 512
OPERANDS = torch.bfloat16  # the type of hidden states and LM head, in which the policy computes
TARGET_LOGITS = (4.0, 26.0)
RATIO = 0.05
DISTANCES = (0.0, 0.005, 0.015, 0.05, 0.15)
"""Standard deviation of the change of a logit, in nats; 0 stands for step 0, where nothing must be deleted."""

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Models:
    hidden: Tensor  # [T, H], of policy and reference alike
    policy: Tensor  # [V, H]
    reference: Tensor  # [V, H]
    token_ids: Tensor  # [T]


def make_models(distance: float, seed: int, vocab: int = VOCAB, tokens: int = TOKENS) -> Models:
    """Makes tokens whose own logit is spread over TARGET_LOGITS, among logits of standard deviation 3."""
    draw = torch.Generator().manual_seed(seed)
    reference = torch.randn(vocab, HIDDEN, generator=draw) * (3 / HIDDEN**0.5)
    token_ids = torch.randint(vocab, (tokens,), generator=draw)
    hidden = torch.randn(tokens, HIDDEN, generator=draw)
    low, high = TARGET_LOGITS
    wanted = low + (high - low) * torch.rand(tokens, 1, generator=draw)
    own = reference[token_ids]
    norm = own.square().sum(1, keepdim=True)
    hidden += (wanted - (hidden * own).sum(1, keepdim=True)) / norm * own
    noise = torch.randn(vocab, HIDDEN, generator=draw)
    # Each token's noise is as long as makes its logits move by `distance`.
    policy = reference + noise * (distance / hidden.square().sum(1).mean().sqrt())
    return Models(hidden.to(OPERANDS), policy.to(OPERANDS), reference.to(OPERANDS), token_ids)


def exact(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(1).gather(1, token_ids[:, None])[:, 0]


def rounded_logits(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Returns logits of a head that computes in float32 and returns bfloat16."""
    return token_logprobs((hidden.float() @ weight.float().T).bfloat16(), token_ids)


def rounded_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return linear_token_logprobs(hidden, weight, token_ids).bfloat16().float()


def rounded_both(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return rounded_logits(hidden, weight, token_ids).bfloat16().float()


PRECISIONS: dict[str, Logprobs] = {
    "linear_token_logprobs": linear_token_logprobs,
    "bf16 logits": rounded_logits,
    "bf16 log-probs": rounded_logprobs,
    "both bf16": rounded_both,
}


def scores(models: Models, logprobs: Logprobs) -> Tensor:
    policy = logprobs(models.hidden, models.policy, models.token_ids)
    return (policy - logprobs(models.hidden, models.reference, models.token_ids)).abs()


def deleted(score: Tensor) -> Tensor:
    """Returns [T] bool, by the same selection for every precision; ties go by position."""
    cu_seqlens = torch.arange(0, len(score) + 1, PROMPT, dtype=torch.int32)
    return ~select_interference_tokens(score, cu_seqlens, ratio=RATIO)[0]


@torch.no_grad()
def compare(models: Models) -> dict:
    """Returns one row, which says how the scores and the selection of each precision differ from the exact ones."""
    truth = scores(models, exact)
    chosen = deleted(truth)
    row = {"mean_score": truth.mean().item(), "deleted": int(chosen.sum()), "precisions": {}}
    for name, logprobs in PRECISIONS.items():
        score = scores(models, logprobs)
        error = (score - truth).abs()
        row["precisions"][name] = {
            "overlap": (deleted(score) & chosen).sum().item() / int(chosen.sum()),
            "max_error": error.max().item(),
            "mean_error": error.mean().item(),
            "zero_scores": int((score == 0).sum()),
        }
    return row


def rows(seeds: int) -> Iterator[dict]:
    for distance in DISTANCES:
        yield {"distance": distance, "seeds": [compare(make_models(distance, seed)) for seed in range(seeds)]}


def line(row: dict) -> str:
    mean_score = statistics.mean(run["mean_score"] for run in row["seeds"])
    cells = []
    for name in PRECISIONS:
        runs = [run["precisions"][name] for run in row["seeds"]]
        overlap = [run["overlap"] for run in runs]
        # At distance 0 every score is 0: there is no ranking to agree with.
        agreed = (
            "-" if row["distance"] == 0 else f"{statistics.mean(overlap):.2f} ({min(overlap):.2f}-{max(overlap):.2f})"
        )
        cells.append(f"{agreed}, {max(run['max_error'] for run in runs):.1e}")
    return f"| {mean_score:.4f} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    arguments = parser.parse_args()
    print(
        "Overlap of the deleted tokens with the exact selection, mean (least-most of the seeds), largest score error\n"
    )
    print("| mean score | " + " | ".join(PRECISIONS) + " |")
    print("|---" * (1 + len(PRECISIONS)) + "|")
    table = []
    for row in rows(arguments.seeds):
        table.append(row)
        print(line(row), flush=True)
    surroundings = results.environment(torch.device("cpu"), module="benchmarks.score_precision")
    path = results.results_path(arguments.out, torch.device("cpu"), "score_precision")
    results.write(path, surroundings, table)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
