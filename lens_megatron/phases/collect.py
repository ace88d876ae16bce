"""The groups of a step: prompts scored and purified, weights to the engine, two waves sampled and graded, all gathered.

With `rollout.off_policy_steps=1` the groups of the next step are sampled on a thread while this one trains:

    step k:  wait for groups k -> weights to the engine, begin groups k + 1 -> train on groups k

They are then drawn by the policy of one update before the one they train; `algorithm.correction` weighs them for it.
"""

from collections.abc import Sequence
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
from lens_megatron.types import CollectedGroups, Group, Prompt, PurifiedPrompt


def take_groups(run: Run, step: int) -> CollectedGroups:
    """Of this data-parallel rank, in the order of the prompts. A collective."""
    if run.config.debug.load_rollouts:
        count, vocab_size = run.config.rollout.prompts_per_step, run.policy.vocab_size
        groups = replay.read_groups(run.config.debug.load_rollouts, step, count=count, vocab_size=vocab_size)
        return CollectedGroups(groups[run.mesh.dp_rank :: run.mesh.dp_size])
    sampled = _sample_now(run, step) if run.background is None else _take_and_begin_next(run, run.background, step)
    with run.clock("exchange"):
        parts = between_ranks.all_gather(Group, sampled.groups, run.mesh.model_group)
    return CollectedGroups(between_ranks.interleave(parts), sampled.stats)


def _sample_now(run: Run, step: int) -> CollectedGroups:
    work = prepare(run, step)
    with engine_turn.engine_awake(run), run.clock("gen"):
        sampled = sample(run, work, step, run.policy.version)
    with run.clock("exchange"):
        groups = tensor_parallel.scatter_from_leader(run.engine_group, sampled.groups, work)
    return CollectedGroups(groups, sampled.stats)


def _take_and_begin_next(run: Run, ahead: BackgroundSampling, step: int) -> CollectedGroups:
    if ahead.step != step:  # the first step of a run, or of a resumed one
        _begin(run, ahead, step)
    with run.clock("gen"):
        sampled = ahead.take()
    if step < run.config.train.steps:
        _begin(run, ahead, step + 1)
    return sampled


def _begin(run: Run, ahead: BackgroundSampling, step: int) -> None:
    work = prepare(run, step)
    engine_turn.renew_engine(run)
    ahead.begin(step, partial(sample, run, work, step, run.policy.version))


def prepare(run: Run, step: int) -> EnginePrompts:
    """Scores the step's prompts, while the trainer's weights are in place; what this rank's engine is to sample."""
    prompts = run.prompts.take(step - 1)[run.mesh.dp_rank :: run.mesh.dp_size]
    with run.clock("score"):
        purified = purified_prompts(run, prompts, step)
    share = slice(run.mesh.model_rank, None, run.mesh.model_size)
    return tensor_parallel.gather_to_leader(run.engine_group, prompts[share], purified[share])


def sample(run: Run, work: EnginePrompts, step: int, version: int) -> CollectedGroups:
    """Samples and grades with the weights of `version`, which the engine has. Not a collective of the trainer's."""
    groups: list[Group] = run.sampler.sample(work.prompts, work.purified, step, version)
    return CollectedGroups(groups, run.sampler.stats)


def purified_prompts(run: Run, prompts: Sequence[Prompt], step: int) -> list[PurifiedPrompt | None]:
    """One per prompt; None where nothing is to be deleted. Without purification nothing is scored (GRPO)."""
    config = run.config
    if not config.lens.enabled:
        return [None] * len(prompts)
    budget = config.train.max_tokens_per_micro_batch
    scores = prompt_scores(run.policy, [p.token_ids for p in prompts], max_tokens=budget)
    seeds = [derive(config.run.seed, "ties", step, p.index) for p in prompts]
    return interference.purify_prompts(prompts, scores, config.lens, seeds=seeds, retokenize=run.tokenizer.retokenize)
