"""Collects the groups of a step: scores and purifies prompts, gives the engine its weights, samples, grades, gathers.

With `rollout.off_policy_steps=1` the groups of the next step are sampled on a thread while this one trains:

    step k:  wait for groups k -> weights to the engine, begin groups k + 1 -> train on groups k

The rollouts then come from the policy of the step before, and `algorithm.correction` weights them to correct for that.

Where `selection.method` rejects groups, more prompts than a step trains on are prepared, and rollout/refill.py says
which of them are sampled.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from lens_megatron.algorithms import rescue
from lens_megatron.algorithms.entry import Evidence
from lens_megatron.algorithms.purification import PromptEvidence
from lens_megatron.algorithms.purify import purify_prompts
from lens_megatron.phases import engine_turn
from lens_megatron.policy.forward import prompt_log_probs
from lens_megatron.policy.prompt_gradients import prompt_gradients
from lens_megatron.records import between_ranks
from lens_megatron.results import CollectedGroups, Outcome, SyncStats
from lens_megatron.rollout import replay
from lens_megatron.rollout.background import BackgroundSampling
from lens_megatron.rollout.refill import OwnRefill, Refill, SharedRefill
from lens_megatron.rollout.vllm import tensor_parallel
from lens_megatron.rollout.vllm.tensor_parallel import EnginePrompts
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Prompt, StepPrompt, TrainingGroup

logger = logging.getLogger(__name__)


def take_groups(run: Run, step: int) -> CollectedGroups:
    """Returns the groups to train on, those at the positions `run.places` among all ranks' by place. A collective."""
    if run.config.debug.load_rollouts:
        return _load(run, run.config.debug.load_rollouts, step)
    return _sample_now(run, step) if run.background is None else _take_and_begin_next(run, run.background, step)


def _load(run: Run, folder: str, step: int) -> CollectedGroups:
    """Returns saved groups. The selection is told of all, and filters none."""
    count, vocab_size = run.config.rollout.prompts_per_step, run.policy.vocab_size
    groups = replay.read_groups(folder, step, count=count, vocab_size=vocab_size, fewer=run.selection.refills)
    outcomes = tuple(replace(_outcome(run, _merged(run, step, group)), kept=True) for group in groups)
    run.selection.observe(step, outcomes)
    return CollectedGroups([groups[position] for position in run.places(len(groups))], outcomes=outcomes)


def _gathered(run: Run, step: int, sampled: CollectedGroups) -> CollectedGroups:
    """Tells the selection what became of the step's prompts; returns the groups that it keeps. A collective."""
    with run.clock("exchange"):
        parts = between_ranks.all_gather(Group, sampled.groups, run.mesh.model_group)
        groups = sorted((group for part in parts for group in part), key=lambda group: group.place)
        merged = [_merged(run, step, group) for group in groups]
        own = [_outcome(run, group) for group in merged]
        of_ranks = between_ranks.all_gather(Outcome, own, run.mesh.dp_group)
    outcomes = tuple(sorted((found for of_rank in of_ranks for found in of_rank), key=lambda found: found.place))
    run.selection.observe(step, outcomes)
    rejected = tuple(group for group, outcome in zip(merged, own, strict=True) if not outcome.kept)
    if run.selection.refills:
        groups = _dealt(run, groups, outcomes)
        _warn_if_short(run, step, outcomes)
    return replace(sampled, groups=groups, rejected=rejected, outcomes=outcomes)


def _dealt(run: Run, groups: Sequence[Group], outcomes: Sequence[Outcome]) -> list[Group]:
    """Deals the groups that were kept to the data-parallel ranks in turn, by place. A collective.

    So every layout trains on the same groups in the same order, and no rank on many more than another.
    """
    kept = [outcome.place for outcome in outcomes if outcome.kept]
    owner = {place: position % run.mesh.dp_size for position, place in enumerate(kept)}
    leaving: list[list[Group]] = [[] for _ in range(run.mesh.dp_size)]
    for group in groups:
        if group.place in owner:
            leaving[owner[group.place]].append(group)
    if run.mesh.dp_size == 1:
        return leaving[0]
    with run.clock("exchange"):
        arrived = between_ranks.all_to_all(Group, leaving, run.mesh.dp_group)
    return sorted((group for part in arrived for group in part), key=lambda group: group.place)


def _warn_if_short(run: Run, step: int, outcomes: Sequence[Outcome]) -> None:
    kept, wanted = sum(outcome.kept for outcome in outcomes), run.config.rollout.prompts_per_step
    if run.is_main and kept < wanted:
        logger.warning(
            f"step {step}: {kept} of {len(outcomes)} candidates passed selection.method="
            f"{run.config.selection.method}, so the step trains on {kept} groups instead of {wanted}; "
            f"selection.candidate_batches={run.config.selection.candidate_batches} allows no more candidates"
        )


def _outcome(run: Run, merged: TrainingGroup) -> Outcome:
    group = merged.group
    return Outcome(
        place=group.place,
        prompt_index=group.prompt.index,
        kept=run.selection.keep(merged),
        success_rate=group.success_rate,
        trained_success_rate=sum(r.correct for r in merged.rollouts) / len(merged.rollouts),
        native_tokens=sum(len(r.token_ids) for r in group.native),
        rescue_tokens=sum(len(r.token_ids) for r in group.rescue),
    )


def _merged(run: Run, step: int, group: Group) -> TrainingGroup:
    return rescue.merge(group, run.config.lens, run_seed=run.config.run.seed, step=step)


def _sample_now(run: Run, step: int) -> CollectedGroups:
    """Returns the groups, which are sampled while the trainer waits."""
    prepared = prepare(run, step)

    def sampling() -> CollectedGroups:
        with run.clock("gen"):
            return sample(run, prepared, step, run.policy.version)

    sampled, sync = engine_turn.let_engine_sample(run, sampling)
    with run.clock("exchange"):
        groups = tensor_parallel.scatter_from_leader(run.engine_group, sampled.groups, prepared.work)
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
    prepared = prepare(run, step)
    sync = engine_turn.renew_engine(run)
    background.begin(step, partial(sample, run, prepared, step, run.policy.version))
    return sync


@dataclass(frozen=True, slots=True)
class Prepared:
    """The candidates of a step, ready to be sampled."""

    work: EnginePrompts
    """Those of this rank's engine."""
    count: int
    """The number of those of all ranks."""


def prepare(run: Run, step: int) -> Prepared:
    """Returns the candidates for this rank's engine. Scoring them needs the trainer's weights on the device.

    Where groups may be rejected, all candidates that may take their places are scored: there is no other time for it.
    """
    batches = run.config.selection.candidate_batches if run.selection.refills else 1
    candidates = run.selection.candidates(step, batches * run.config.rollout.prompts_per_step)
    places = run.places(len(candidates))
    with run.clock("score"):
        scored = purify(run, [candidates[place] for place in places], places, step)
    own = scored[run.mesh.model_rank :: run.mesh.model_size]
    return Prepared(tensor_parallel.gather_to_leader(run.engine_group, own), len(candidates))


def sample(run: Run, prepared: Prepared, step: int, version: int) -> CollectedGroups:
    """Samples and grades with the weights of `version`, which the engine has. The trainer may train meanwhile."""

    def keep(group: Group) -> bool:
        return run.selection.keep(_merged(run, step, group))

    with run.engine.phase():
        if not run.selection.refills or not run.engine_group.leads:  # a follower's leader samples for it
            return run.scheduler.sample(prepared.work.prompts, step, version)
        refill = _refill(run, step, prepared.count)
        return run.scheduler.sample(prepared.work.prompts, step, version, keep=keep, refill=refill)


def _refill(run: Run, step: int, candidates: int) -> Refill:
    wanted = run.config.rollout.prompts_per_step
    if run.engine_group.engines == 1:
        return OwnRefill(wanted)
    return SharedRefill(run.control, step, wanted, candidates)


def purify(run: Run, prompts: Sequence[Prompt], places: Sequence[int], step: int) -> list[StepPrompt]:
    """Returns the prompts at `places` of `step` with their purified prompts. Scores none without purification."""
    config, purifier = run.config, run.methods.purifier
    if purifier is None:
        return [StepPrompt(place, prompt, None) for place, prompt in zip(places, prompts, strict=True)]
    evidence = _evidence(run, prompts)
    seeds = [derive(config.run.seed, "ties", step, place) for place in places]
    purified = purify_prompts(
        prompts, evidence, purifier, config.lens, seeds=seeds, retokenize=run.tokenizer.retokenize
    )
    return [StepPrompt(*row) for row in zip(places, prompts, purified, strict=True)]


def _evidence(run: Run, prompts: Sequence[Prompt]) -> list[PromptEvidence]:
    """Returns what the run's methods need to know of each prompt, and computes nothing else. A collective."""
    found = [PromptEvidence()] * len(prompts)
    budget = run.config.train.max_tokens_per_micro_batch
    if run.methods.need(Evidence.PROMPT_SCORES):
        both = prompt_log_probs(run.policy, [p.token_ids for p in prompts], max_tokens=budget)
        found = [
            replace(evidence, scores=of.scores, log_probs=of.policy, reference_log_probs=of.reference)
            for evidence, of in zip(found, both, strict=True)
        ]
    if run.methods.need(Evidence.PROMPT_GRADIENTS):
        longest = run.config.rollout.max_response_length  # the model's context holds a prompt and this much
        pairs = [(p.token_ids, run.tokenizer.boxed(p.answer)[:longest]) for p in prompts]
        norms = prompt_gradients(run.policy, pairs, max_tokens=budget)
        found = [replace(evidence, gradients=norm) for evidence, norm in zip(found, norms, strict=True)]
    return found
