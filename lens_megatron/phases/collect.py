"""Collects the groups of a step: scores and purifies prompts, gives the engine its weights, samples, grades, gathers.

With `rollout.off_policy_steps=1` the groups of the next step are sampled on a thread while this one trains:

    step k:  wait for groups k -> weights to the engine, begin groups k + 1 -> train on groups k

The rollouts then come from the policy of the step before, and `algorithm.correction` weights them to correct for that.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from lens_megatron.algorithms.purification import interference
from lens_megatron.phases import engine_turn
from lens_megatron.policy.forward import prompt_scores
from lens_megatron.records import between_ranks
from lens_megatron.rollout import replay
from lens_megatron.rollout.background import BackgroundSampling
from lens_megatron.rollout.vllm import tensor_parallel
from lens_megatron.rollout.vllm.tensor_parallel import EnginePrompts
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import CollectedGroups, Group, Prompt, StepPrompt, SyncStats


def take_groups(run: Run, step: int) -> CollectedGroups:
    """Returns the groups of this data-parallel rank's prompts, in the order of `run.places`. A collective."""
    if run.config.debug.load_rollouts:
        count, vocab_size = run.config.rollout.prompts_per_step, run.policy.vocab_size
        groups = replay.read_groups(run.config.debug.load_rollouts, step, count=count, vocab_size=vocab_size)
        return CollectedGroups([groups[place] for place in run.places])
    own = _sample_now(run, step) if run.background is None else _take_and_begin_next(run, run.background, step)
    with run.clock("exchange"):
        parts = between_ranks.all_gather(Group, own.groups, run.mesh.model_group)
    return replace(own, groups=between_ranks.interleave(parts))


def _sample_now(run: Run, step: int) -> CollectedGroups:
    """Returns the groups of this rank's own prompts, which are sampled while the trainer waits."""
    work = prepare(run, step)

    def sampling() -> CollectedGroups:
        with run.clock("gen"):
            return sample(run, work, step, run.policy.version)

    sampled, sync = engine_turn.let_engine_sample(run, sampling)
    with run.clock("exchange"):
        groups = tensor_parallel.scatter_from_leader(run.engine_group, sampled.groups, work)
    return replace(sampled, groups=groups, sync=sync)


def _take_and_begin_next(run: Run, background: BackgroundSampling, step: int) -> CollectedGroups:
    """Returns this rank's groups, which were sampled while the trainer trained, and begins to sample the next step."""
    sync = None
    if background.step != step:  # the first step of a run, or of a resumed one
        sync = _begin(run, background, step)
    with run.clock("gen"):
        sampled = background.take()
    if step < run.config.train.steps:
        sync = _begin(run, background, step + 1) or sync
    return replace(sampled, sync=sync)


def _begin(run: Run, background: BackgroundSampling, step: int) -> SyncStats | None:
    """Begins to sample `step`. Returns the transfer of weights before it, or None if the engine had them already."""
    work = prepare(run, step)
    sync = engine_turn.renew_engine(run)
    background.begin(step, partial(sample, run, work, step, run.policy.version))
    return sync


def prepare(run: Run, step: int) -> EnginePrompts:
    """Returns the prompts for this rank's engine. Scoring them needs the trainer's weights on the device."""
    prompts = run.prompts.take(step - 1)
    with run.clock("score"):
        scored = purify(run, [prompts[place] for place in run.places], step)
    return tensor_parallel.gather_to_leader(run.engine_group, scored[run.mesh.model_rank :: run.mesh.model_size])


def sample(run: Run, work: EnginePrompts, step: int, version: int) -> CollectedGroups:
    """Samples and grades with the weights of `version`, which the engine has. The trainer may train meanwhile."""
    with run.engine.phase():
        return run.scheduler.sample(work.prompts, step, version)


def purify(run: Run, prompts: Sequence[Prompt], step: int) -> list[StepPrompt]:
    """Returns the prompts at `run.places` of `step` with their purified prompts. Scores none without purification."""
    config = run.config
    if not config.lens.enabled:
        return [StepPrompt(place, prompt, None) for place, prompt in zip(run.places, prompts, strict=True)]
    budget = config.train.max_tokens_per_micro_batch
    scores = prompt_scores(run.policy, [p.token_ids for p in prompts], max_tokens=budget)
    seeds = [derive(config.run.seed, "ties", step, place) for place in run.places]
    purified = interference.purify_prompts(
        prompts, scores, config.lens, seeds=seeds, retokenize=run.tokenizer.retokenize
    )
    return [StepPrompt(*row) for row in zip(run.places, prompts, purified, strict=True)]
