"""One training step, in the order of LENS's Algorithm 1. Read this file first; every call is named like its file.

prompts --score--> purified prompts --sample, grade--> groups --merge--> samples --pack--> update
"""

from lens_megatron.algorithms import rescue, samples
from lens_megatron.phases import batch_numbers, collect, update
from lens_megatron.results import StepResult
from lens_megatron.run import Run


def run_step(run: Run, step: int) -> StepResult:
    """Gives the engine the policy's weights, samples a batch, trains on it. Steps count from 1. A collective."""
    config, version = run.config, run.policy.version
    collected = collect.take_groups(run, step)
    merged = [rescue.merge(group, config.lens, run_seed=config.run.seed, step=step) for group in collected.groups]
    batch = batch_numbers.gather(run, merged)
    weighted = samples.to_samples(merged, batch, run.methods.advantage, config.algorithm)
    updates, packings = update.train_on(run, merged, weighted, step, len(batch))
    return StepResult(
        step=step,
        groups=tuple(merged),
        samples=tuple(weighted),
        updates=updates,
        packings=packings,
        sync=collected.sync,
        sampling=collected.stats,
        weight_version=version,
        rejected=collected.rejected,
        outcomes=collected.outcomes,
    )
