"""The groups of a step: prompts scored and purified, weights to the engine, two waves sampled and graded, all gathered.

With `rollout.off_policy_steps=1` the groups of the next step are sampled on a thread while this one trains:

    step k:  wait for groups k -> weights to the engine, begin groups k + 1 -> train on groups k

They are then drawn by the policy of one update before the one they train; `algorithm.correction` weighs them for it.
"""

from collections.abc import Callable, Sequence

from lens_megatron import interference
from lens_megatron.policy.forward import prompt_scores
from lens_megatron.rollout import replay
from lens_megatron.rollout.ahead import Ahead
from lens_megatron.run import Run
from lens_megatron.seeds import derive
from lens_megatron.types import Prompt, PurifiedPrompt, Sampled


def take_groups(run: Run, step: int) -> Sampled:
    """Of this data-parallel rank, in the order of the prompts. A collective."""
    if run.config.debug.load_rollouts:
        groups = replay.read_groups(run.config.debug.load_rollouts, step)[run.mesh.dp_rank :: run.mesh.dp_size]
        return Sampled(groups)
    if run.ahead is None:
        sample = prepare(run, step)
        with run.clock("gen"):
            own = sample()
    else:
        own = _take_and_go_ahead(run, run.ahead, step)
    with run.clock("exchange"):
        return Sampled(replay.interleave(replay.exchange(own.groups, run.mesh.model_group)), own.stats)


def _take_and_go_ahead(run: Run, ahead: Ahead, step: int) -> Sampled:
    if ahead.step != step:  # the first step of a run, or of a resumed one
        ahead.begin(step, prepare(run, step))
    with run.clock("gen"):
        own = ahead.take()
    if step < run.config.train.steps:
        ahead.begin(step + 1, prepare(run, step + 1))
    return own


def prepare(run: Run, step: int) -> Callable[[], Sampled]:
    """Scores the step's prompts while the trainer's weights are in place, and gives the engine these weights.

    Returns what samples and grades this rank's share of the prompts: not a collective, and in need of the engine only.
    """
    prompts = run.prompts.take(step - 1)[run.mesh.dp_rank :: run.mesh.dp_size]
    with run.clock("score"):
        purified = purified_prompts(run, prompts, step)
    with run.clock("update_weights"):
        run.weights.renew()
    share, version = slice(run.mesh.model_rank, None, run.mesh.model_size), run.policy.version

    def sample() -> Sampled:
        groups = run.sampler.sample(prompts[share], purified[share], step, version)
        return Sampled(groups, run.sampler.stats)

    return sample


def purified_prompts(run: Run, prompts: Sequence[Prompt], step: int) -> list[PurifiedPrompt | None]:
    """One per prompt; None where nothing is to be deleted. Without purification nothing is scored (GRPO)."""
    config = run.config
    if not config.lens.enabled:
        return [None] * len(prompts)
    budget = config.train.max_tokens_per_micro_batch
    scores = prompt_scores(run.policy, [p.token_ids for p in prompts], max_tokens=budget)
    seeds = [derive(config.run.seed, "ties", step, p.index) for p in prompts]
    return interference.purify_prompts(prompts, scores, config.lens, seeds=seeds, retokenize=run.tokenizer.retokenize)
