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
    config, version = run.config, run.policy.version
    collected = collect.take_groups(run, step)
    seeds = [derive(config.run.seed, "merge", step, place) for place in run.places]
    merged = [rescue.replace_failures(g, config.lens, seed=s) for g, s in zip(collected.groups, seeds, strict=True)]
    weighted = samples.to_samples(merged, config.algorithm)
    updates, packings = update.train_on(run, merged, weighted, step)
    return StepResult(
        step=step,
        groups=tuple(merged),
        samples=tuple(weighted),
        updates=updates,
        packings=packings,
        sync=collected.sync,
        sampling=collected.stats,
        weight_version=version,
    )
