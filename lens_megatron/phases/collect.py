"""Collects the groups of a step: scores and purifies prompts, gives the engine its weights, samples, grades, gathers.

With `rollout.off_policy_steps=1` the groups of the next step are sampled on a thread while this one trains:

    step k:  wait for groups k -> weights to the engine, begin groups k + 1 -> train on groups k

The rollouts then come from the policy of the step before, and `algorithm.correction` weights them to correct for that.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from lens_megatron.algorithms import rescue
from lens_megatron.algorithms.entry import Evidence
from lens_megatron.algorithms.purification import PromptEvidence
from lens_megatron.algorithms.purify import purify_prompts
from lens_megatron.phases import engine_turn
from lens_megatron.policy.forward import prompt_scores
from lens_megatron.records import between_ranks
from lens_megatron.results import CollectedGroups, Outcome, SyncStats
from lens_megatron.rollout import replay
from lens_megatron.rollout.background import BackgroundSampling
from lens_megatron.rollout.vllm import tensor_parallel
from lens_megatron.rollout.vllm.tensor_parallel import EnginePrompts
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Prompt, StepPrompt


def take_groups(run: Run, step: int) -> CollectedGroups:
    """Returns the groups of this data-parallel rank's prompts, in the order of `run.places`. A collective."""
    if run.config.debug.load_rollouts:
        count, vocab_size = run.config.rollout.prompts_per_step, run.policy.vocab_size
        groups = replay.read_groups(run.config.debug.load_rollouts, step, count=count, vocab_size=vocab_size)
        return _observed(run, step, CollectedGroups([groups[place] for place in run.places]))
    return _sample_now(run, step) if run.background is None else _take_and_begin_next(run, run.background, step)


def _observed(run: Run, step: int, own: CollectedGroups) -> CollectedGroups:
    """Tells the selection what became of the step's prompts, those of all ranks. A collective."""
    outcomes = [_outcome(run, step, group) for group in own.groups]
    with run.clock("exchange"):
        of_ranks = between_ranks.all_gather(Outcome, outcomes, run.mesh.dp_group)
    everyone = sorted((outcome for of_rank in of_ranks for outcome in of_rank), key=lambda outcome: outcome.place)
    run.selection.observe(step, everyone)
    return own


def _outcome(run: Run, step: int, group: Group) -> Outcome:
    merged = rescue.merge(group, run.config.lens, run_seed=run.config.run.seed, step=step)
    return Outcome(
        place=group.place,
        prompt_index=group.prompt.index,
        kept=run.selection.keep(merged),
        success_rate=group.success_rate,
        trained_success_rate=sum(r.correct for r in merged.rollouts) / len(merged.rollouts),
        native_tokens=sum(len(r.token_ids) for r in group.native),
        rescue_tokens=sum(len(r.token_ids) for r in group.rescue),
    )


def _gathered(run: Run, step: int, own: CollectedGroups) -> CollectedGroups:
    """Returns the groups of all ranks that hold the model together, and tells the selection. A collective."""
    with run.clock("exchange"):
        parts = between_ranks.all_gather(Group, own.groups, run.mesh.model_group)
    return _observed(run, step, replace(own, groups=between_ranks.interleave(parts)))


def _sample_now(run: Run, step: int) -> CollectedGroups:
    """Returns the groups, which are sampled while the trainer waits."""
    work = prepare(run, step)

    def sampling() -> CollectedGroups:
        with run.clock("gen"):
            return sample(run, work, step, run.policy.version)

    sampled, sync = engine_turn.let_engine_sample(run, sampling)
    with run.clock("exchange"):
        groups = tensor_parallel.scatter_from_leader(run.engine_group, sampled.groups, work)
    return _gathered(run, step, replace(sampled, groups=groups, sync=sync))


def _take_and_begin_next(run: Run, background: BackgroundSampling, step: int) -> CollectedGroups:
    """Returns the groups that were sampled while the trainer trained, and begins to sample the next step."""
    sync = None
    if background.step != step:  # the first step of a run, or of a resumed one
        sync = _begin(run, background, step)
    with run.clock("gen"):
        sampled = background.take()
    collected = _gathered(run, step, sampled)  # before the next step's prompts are chosen
    if not run.is_over(step):
        sync = _begin(run, background, step + 1) or sync
    return replace(collected, sync=sync)


def _begin(run: Run, background: BackgroundSampling, step: int) -> SyncStats | None:
    """Begins to sample `step`. Returns the transfer of weights before it, or None if the engine had them already."""
    work = prepare(run, step)
    sync = engine_turn.renew_engine(run)
    background.begin(step, partial(sample, run, work, step, run.policy.version))
    return sync


def prepare(run: Run, step: int) -> EnginePrompts:
    """Returns the prompts for this rank's engine. Scoring them needs the trainer's weights on the device."""
    prompts = run.selection.candidates(step, run.config.rollout.prompts_per_step)
    with run.clock("score"):
        scored = purify(run, [prompts[place] for place in run.places], step)
    return tensor_parallel.gather_to_leader(run.engine_group, scored[run.mesh.model_rank :: run.mesh.model_size])


def sample(run: Run, work: EnginePrompts, step: int, version: int) -> CollectedGroups:
    """Samples and grades with the weights of `version`, which the engine has. The trainer may train meanwhile."""
    with run.engine.phase():
        return run.scheduler.sample(work.prompts, step, version)


def purify(run: Run, prompts: Sequence[Prompt], step: int) -> list[StepPrompt]:
    """Returns the prompts at `run.places` of `step` with their purified prompts. Scores none without purification."""
    config, purifier = run.config, run.methods.purifier
    if purifier is None:
        return [StepPrompt(place, prompt, None) for place, prompt in zip(run.places, prompts, strict=True)]
    evidence = _evidence(run, prompts)
    seeds = [derive(config.run.seed, "ties", step, place) for place in run.places]
    purified = purify_prompts(
        prompts, evidence, purifier, config.lens, seeds=seeds, retokenize=run.tokenizer.retokenize
    )
    return [StepPrompt(*row) for row in zip(run.places, prompts, purified, strict=True)]


def _evidence(run: Run, prompts: Sequence[Prompt]) -> list[PromptEvidence]:
    """Returns what the run's methods need to know of each prompt, and computes nothing else. A collective."""
    found = [PromptEvidence()] * len(prompts)
    budget = run.config.train.max_tokens_per_micro_batch
    if run.methods.need(Evidence.PROMPT_SCORES):
        scores = prompt_scores(run.policy, [p.token_ids for p in prompts], max_tokens=budget)
        found = [replace(evidence, scores=score) for evidence, score in zip(found, scores, strict=True)]
    return found
