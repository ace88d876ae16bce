"""One training step, in the order of LENS's Algorithm 1. Read this file first; every call is named like its file.

prompts --score--> purified prompts --sample, grade--> groups --merge--> samples --pack--> update --> engine weights
"""

from collections.abc import Sequence

from lens_megatron import handover, interference, purify, samples, update_batch
from lens_megatron.policy.forward import prompt_scores
from lens_megatron.rollout import replay, team
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Prompt, PurifiedPrompt, StepResult


def run_step(run: Run, step: int) -> StepResult:
    """Samples a batch, trains on it, gives the engine the new weights. Steps count from 1. A collective."""
    prompts = run.prompts.take(step - 1)[run.mesh.dp_rank :: run.mesh.dp_size]
    groups = sample_groups(run, prompts, step)
    seeds = [derive(run.config.run.seed, "merge", step, group.prompt.index) for group in groups]
    merged = [purify.merge(g, run.config.lens, seed=s) for g, s in zip(groups, seeds, strict=True)]
    rows = samples.to_samples(merged, run.config.algorithm)
    updates, packings = update_batch.train_on(run, rows, step)
    sync = handover.push_weights(run)
    return StepResult(step, tuple(merged), tuple(rows), updates, packings, sync)


def sample_groups(run: Run, prompts: Sequence[Prompt], step: int) -> list[Group]:
    """Purified prompts first, while the trainer's weights are in place; then both waves; then all that was sampled."""
    if run.config.debug.load_rollouts:
        return replay.read_groups(run.config.debug.load_rollouts, step)[run.mesh.dp_rank :: run.mesh.dp_size]
    mesh = run.mesh
    with run.clock("score"):
        purified = purified_prompts(run, prompts, step)
    share = slice(mesh.model_rank, None, mesh.model_size)
    work = team.collect(run.team, prompts[share], purified[share])
    with handover.engine_awake(run), run.clock("gen"):
        sampled = run.sampler.sample(work.prompts, work.purified, step, run.policy.version)
    with run.clock("exchange"):
        own = team.hand_back(run.team, sampled, work)
        return replay.interleave(replay.exchange(own, mesh.model_group))


def purified_prompts(run: Run, prompts: Sequence[Prompt], step: int) -> list[PurifiedPrompt | None]:
    """One per prompt; None where nothing is to be deleted. Without purification nothing is scored (GRPO)."""
    config = run.config
    if not config.lens.enabled:
        return [None] * len(prompts)
    budget = config.train.max_tokens_per_micro_batch
    scores = prompt_scores(run.policy, [p.token_ids for p in prompts], max_tokens=budget)
    seeds = [derive(config.run.seed, "ties", step, p.index) for p in prompts]
    return interference.purify_prompts(prompts, scores, config.lens, seeds=seeds, retokenize=run.tokenizer.retokenize)
