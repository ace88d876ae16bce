"""Small records for tests, with literal values."""

from collections.abc import Sequence

from torch import Tensor

from lens_megatron.reward.types import GradeStatus
from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, Rollout, Sample, StepPrompt, TrainingRow

PROMPT = Prompt(3, (1, 10, 11, 12, 13, 2), (False, True, True, True, True, False), "7", "a b c d", "toy")


def rollout(correct: bool, origin: Origin = Origin.NATIVE, tokens: tuple[int, ...] = (5, 6)) -> Rollout:
    status = GradeStatus.CORRECT if correct else GradeStatus.WRONG
    return Rollout(tokens, tuple(-0.5 for _ in tokens), True, origin, 0, float(correct), status)


def group(native: str, rescue: str = "", prompt: Prompt = PROMPT) -> Group:
    """`native` and `rescue` spell the outcomes: "1100" is two successes and two failures."""
    purified = PurifiedPrompt((1, 10, 12, 13, 2), (2,), (0.0, 0.1, 0.9, 0.0, 0.4, 0.05))
    return Group(
        prompt,
        tuple(rollout(c == "1", tokens=(5, 6 + i)) for i, c in enumerate(native)),
        purified if rescue else None,
        tuple(rollout(c == "1", Origin.PURIFIED, tokens=(8, 9 + i)) for i, c in enumerate(rescue)),
    )


def sample(rollout: Rollout, advantage: float = 1.0, weight: float = 1.0) -> Sample:
    generated_from = (1, 10, 12, 13, 2) if rollout.origin is Origin.PURIFIED else PROMPT.token_ids
    return Sample(PROMPT.token_ids, generated_from, rollout, advantage, weight)


def step_prompts(
    prompts: Sequence[Prompt], purified: Sequence[PurifiedPrompt | None] | None = None
) -> list[StepPrompt]:
    """All prompts of a step, in the order of their places; without purified prompts if none are given."""
    rows = zip(prompts, purified or [None] * len(prompts), strict=True)
    return [StepPrompt(place, *row) for place, row in enumerate(rows)]


def training_rows(
    samples: Sequence[Sample],
    old: Sequence[Tensor | None] | None = None,
    reference: Sequence[Tensor | None] | None = None,
    trainer: Sequence[Tensor | None] | None = None,
) -> list[TrainingRow]:
    """`samples` with log-probabilities, [L] each. Those left out are None, but the trainer's are the old ones then."""
    nothing = [None] * len(samples)
    columns = old or nothing, trainer or old or nothing, reference or nothing
    return [TrainingRow(*row) for row in zip(samples, *columns, strict=True)]
