"""Samples of a step -> reference and old log-probabilities -> packed micro-batches -> optimizer steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_megatron import pack
from lens_megatron.algorithms.objectives import OBJECTIVES
from lens_megatron.policy.forward import plan_micro_batches, response_log_probs
from lens_megatron.policy.model import reference_weights
from lens_megatron.policy.update import update
from lens_megatron.run import Run
from lens_megatron.types import LossScale, Origin, Sample, UpdateStats


def train_on(run: Run, samples: Sequence[Sample]) -> tuple[UpdateStats, ...]:
    """`train.updates_per_batch` optimizer steps, each on an equal share of this rank's prompts. A collective."""
    if run.config.debug.rollout_only:
        return ()
    with run.clock("old_log_prob"):
        old = old_log_probs(run, samples)
    with run.clock("ref"):
        reference = reference_log_probs(run, samples)
    with run.clock("update_actor"):
        return tuple(
            _update_on(run, [samples[i] for i in part], [old[i] for i in part], [reference[i] for i in part])
            for part in split_by_prompt(samples, run.config.train.updates_per_batch)
        )


def old_log_probs(run: Run, samples: Sequence[Sample]) -> list[Tensor | None]:
    """Per sample, log pi_old of its response under the prompt that generated it; None where it need not be computed.

    With one update per batch pi_old is the policy itself, so only rescued rows, whose prompt differs, are computed.
    """
    algorithm = run.config.algorithm
    everyone = run.config.train.updates_per_batch > 1 or algorithm.ratio_form == "acl"
    wanted = [i for i, s in enumerate(samples) if everyone or s.rollout.origin is Origin.RESCUED]
    pairs = [(samples[i].generation_prompt, samples[i].rollout.token_ids) for i in wanted]
    values = _log_probs(run, pairs)
    found = dict(zip(wanted, values, strict=True))
    return [found.get(i) for i in range(len(samples))]


def reference_log_probs(run: Run, samples: Sequence[Sample]) -> list[Tensor | None]:
    """Per sample, log pi_ref of its response under the original prompt; None without a KL term."""
    if run.config.algorithm.kl_coef == 0:
        return [None] * len(samples)
    with reference_weights(run.policy):
        return list(_log_probs(run, [(s.prompt, s.rollout.token_ids) for s in samples]))


def split_by_prompt(samples: Sequence[Sample], parts: int) -> list[list[int]]:
    """Indices of samples in `parts` runs of whole prompts, as equal as they go. Consecutive samples share a prompt."""
    groups: list[list[int]] = []
    for index, sample in enumerate(samples):
        if not index or sample.prompt is not samples[index - 1].prompt:
            groups.append([])
        groups[-1].append(index)
    bounds = [round(len(groups) * part / parts) for part in range(parts + 1)]
    return [sum(groups[bounds[i] : bounds[i + 1]], []) for i in range(parts)]


def _update_on(
    run: Run, samples: list[Sample], old: list[Tensor | None], reference: list[Tensor | None]
) -> UpdateStats:
    config = run.config
    scale = _global_scale(run, pack.count(samples))
    lengths = [len(sample.prompt) + len(sample.rollout.token_ids) for sample in samples]
    batches = pack.pack(
        samples,
        old_log_probs=old,
        reference_log_probs=reference,
        scale=scale,
        algorithm=config.algorithm,
        max_response_length=config.rollout.max_response_length,
        parts=plan_micro_batches(run.policy, lengths, config.train.max_tokens_per_micro_batch) or [[]],
        device=run.mesh.device,
        layout=run.policy.layout,
    )
    objective = OBJECTIVES[config.algorithm.ratio]
    return update(run.policy, batches, scale, objective, config.algorithm, config.rollout.temperature)


def _log_probs(run: Run, pairs: list) -> list[Tensor]:
    config = run.config
    return response_log_probs(
        run.policy,
        pairs,
        max_tokens=config.train.max_tokens_per_micro_batch,
        temperature=config.rollout.temperature,
    )


def _global_scale(run: Run, own: LossScale) -> LossScale:
    counts = torch.tensor(
        [own.response_tokens, own.sequences, own.rescued_sequences], dtype=torch.int64, device=run.mesh.device
    )
    torch.distributed.all_reduce(counts, group=run.mesh.dp_group)
    return LossScale(*counts.tolist())
