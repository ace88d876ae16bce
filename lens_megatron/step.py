"""One training step, in the order of LENS's Algorithm 1. Read this file first; every call is named like its file.

prompts --score--> purified prompts --sample, grade--> groups --merge--> samples --pack--> update
"""

from lens_megatron.algorithms import rescue, samples
from lens_megatron.phases import collect, update
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import StepResult


def run_step(run: Run, step: int) -> StepResult:
    """Gives the engine the policy's weights, samples a batch, trains on it. Steps count from 1. A collective."""
    version = run.policy.version
    sampled = collect.take_groups(run, step)
    seeds = [derive(run.config.run.seed, "merge", step, group.prompt.index) for group in sampled.groups]
    merged = [rescue.replace_failures(g, run.config.lens, seed=s) for g, s in zip(sampled.groups, seeds, strict=True)]
    rows = samples.to_samples(merged, run.config.algorithm)
    updates, packings = update.train_on(run, rows, step)
    return StepResult(step, tuple(merged), tuple(rows), updates, packings, run.last_sync.stats, sampled.stats, version)
