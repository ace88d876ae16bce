"""Checks on a few sampled tokens, after each transfer of weights, that the engine computes what the trainer computes.

The manifest of weights makes sure that every tensor arrived. It does not show whether a tensor came from the right
layer, replaced a tied copy, or is used as the trainer uses it (rope, head, temperature). Such mistakes raise no error,
and the run would train on another model's samples; so it ends if the two disagree here.
"""

import math
from dataclasses import dataclass

import torch

from lens_megatron.phases.weight_sync import WeightSyncError
from lens_megatron.policy.forward import response_log_probs
from lens_megatron.rollout.engine import Completion, Request, RolloutEngine
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Prompt

TOKENS = 8
"""The number of tokens that are compared."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
"""The most nats by which engine and trainer may differ, in the mean over the tokens, for each `model.dtype`.

In float32, sums in another order gave 3e-6 on peaked random models of 2 and 8 layers with either engine, while wrong
weights give tenths to several nats. In bfloat16 the two round at different places: 0.025 was seen in the mean, 0.1 at
single tokens, by which transformers in bfloat16 also differs from itself in float32. Real models are deeper, and
routers may choose another expert, so ten times what was seen is allowed. The mean is taken since a single token's error
has a long tail. Smaller differences show in `training/rollout_probs_diff_*`, over all tokens of a step.
"""


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """Compares the log-probabilities of a rank's engine and of the trainer for the same tokens."""

    difference: float
    """The mean over tokens of |engine's - trainer's log-probability|, in nats; infinite if either is no number."""
    position: int
    """The place in the completion, counted from 0, of the token about which they differ most."""
    token: int
    """The id of that token."""
    engine: float
    """The engine's log-probability of that token, in nats."""
    trainer: float
    """The trainer's log-probability of that token, in nats."""


ABSENT = EngineComparison(0.0, 0, 0, 0.0, 0.0)
"""The value for a rank whose engine cannot be asked."""


def ask(run: Run) -> Completion | None:
    """Returns the engine's completion of a prompt of the data, or None if it cannot be asked now, see `sample`."""
    config, version = run.config, run.policy.version
    prompt = question(run)
    seed = derive(config.run.seed, "sync_check", version)
    length = min(TOKENS, config.rollout.max_response_length)
    return sample(run.engine, Request(0, prompt.token_ids, length, config.rollout.temperature, seed))


def question(run: Run) -> Prompt:
    """Returns the prompt that engines complete; every version of the weights has another one."""
    return run.prompts.at(run.policy.version)


def check(run: Run, own: Completion | None) -> float:
    """Compares what every rank's engine has answered with the trainer, which has the same weights. A collective.

    Returns the largest mean difference of any rank, in nats. Raises WeightSyncError, on every rank, if it is more than
    the tolerance.
    """
    config, mesh, prompt = run.config, run.mesh, question(run)
    temperature = config.rollout.temperature
    responses = _gather(own, run)
    asked = sorted(set(responses) - {()})
    pairs = [(prompt.token_ids, tokens) for tokens in asked]
    budget = config.train.max_tokens_per_micro_batch
    expected = response_log_probs(run.policy, pairs, max_tokens=budget, temperature=temperature)
    comparison = ABSENT
    if own:
        comparison = compare(own, dict(zip(asked, expected, strict=True))[own.token_ids].tolist())
    numbers = (comparison.difference, comparison.position, comparison.token, comparison.engine, comparison.trainer)
    table = torch.empty(mesh.world_size, len(numbers), dtype=torch.float64, device=mesh.device)
    torch.distributed.all_gather_into_tensor(
        table.view(-1), torch.tensor(numbers, dtype=torch.float64, device=mesh.device)
    )
    rank = int(table[:, 0].argmax())
    difference, position, token, *both = table[rank].tolist()
    worst = EngineComparison(difference, int(position), int(token), *both)
    if worst.difference > TOLERANCES[config.model.dtype]:
        raise WeightSyncError(_message(worst, rank, run.policy.version, config.model.dtype))
    return worst.difference


def sample(engine: RolloutEngine, request: Request) -> Completion | None:
    """Returns the engine's completion, or None if it is not serving or has requests whose completions would be lost."""
    progress = engine.progress()
    if not engine.capacity() or progress.waiting or progress.running:
        return None
    engine.submit([request])
    while engine.capacity():
        for completion in engine.step():
            return completion
    engine.cancel({request.request_id})
    return None


def compare(completion: Completion, trainer: list[float]) -> EngineComparison:
    """Compares the engine's log-probabilities of the completion's tokens with `trainer`, the trainer's, in nats."""
    differences = [abs(a - b) for a, b in zip(completion.log_probs, trainer, strict=True)]
    differences = [d if math.isfinite(d) else math.inf for d in differences]
    place = differences.index(max(differences))
    mean = sum(differences) / len(differences)
    return EngineComparison(mean, place, completion.token_ids[place], completion.log_probs[place], trainer[place])


def _gather(own: Completion | None, run: Run) -> list[tuple[int, ...]]:
    """Gathers the tokens of every completion in the model-parallel group, so that one forward pass serves all."""
    row = torch.full((TOKENS,), -1, dtype=torch.int64)
    if own:
        row[: len(own.token_ids)] = torch.tensor(own.token_ids)
    table = torch.empty(run.mesh.model_size, TOKENS, dtype=torch.int64, device=run.mesh.device)
    torch.distributed.all_gather_into_tensor(table.view(-1), row.to(run.mesh.device), group=run.mesh.model_group)
    return [tuple(token for token in tokens if token >= 0) for tokens in table.tolist()]


def _message(worst: EngineComparison, rank: int, version: int, dtype: str) -> str:
    return (
        f"weights of version {version}: of token {worst.token}, number {worst.position + 1} after a prompt of "
        f"the data, the engine of rank {rank} says log-probability {worst.engine:.4f}, the trainer {worst.trainer:.4f}"
        f"; over all tokens they differ by {worst.difference:.4g} nats in the mean, and may by {TOLERANCES[dtype]} "
        f"in {dtype}. The engine does not compute the trainer's model, and its samples must not be trained on. Look "
        f"for options under `vllm:` that change the model (quantization, rope, hf_overrides), try rollout.engine=local "
        f"or model.dtype=float32; the same command goes on from the last checkpoint"
    )
