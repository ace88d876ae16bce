"""Makes the reward of a training rollout of its verdict: reward rules, then the success threshold.

This happens as soon as a verdict is read, so that early decisions about hard prompts see what the finished group does.
Groups that an interrupted attempt or `debug.load_rollouts` gives have their rewards already, and keep them.
"""

from dataclasses import dataclass

from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.reward_rules import apply_rules
from lens_megatron.algorithms.rewards import RewardRule, RolloutFacts
from lens_megatron.reward.types import AnswerFacts, Grade
from lens_megatron.rollout.engine import Completion
from lens_megatron.seeds import derive
from lens_megatron.types import Origin, Prompt, StepPrompt


def answer_facts(prompt: Prompt, completion: Completion) -> AnswerFacts:
    """Returns what graders are told of a completion of `prompt` besides its text."""
    tokens = completion.token_ids if prompt.record else ()
    return AnswerFacts(prompt.source, prompt.record, tokens)


@dataclass(frozen=True, slots=True)
class Rewarding:
    """What changes the grades of training rollouts. By default nothing does."""

    rules: tuple[Method[RewardRule], ...] = ()
    success_threshold: float | None = None

    def final(
        self,
        grade: Grade,
        prompt: StepPrompt,
        origin: Origin,
        sample: int,
        completion: Completion,
        text: str,
        *,
        step: int,
        run_seed: int,
        max_response_length: int,
    ) -> Grade:
        """Returns the grade that the group of the rollout holds.

        Args:
            sample: the rollout's number in its wave.
            text: the completion without special tokens.

        Raises:
            RewardRuleError: a rule failed.
        """
        if self.rules:
            facts = RolloutFacts(
                prompt=prompt.prompt,
                completion=text,
                tokens=len(completion.token_ids),
                finished=completion.finished,
                origin=origin,
                step=step,
                max_response_length=max_response_length,
                group_seed=derive(run_seed, "reward", step, prompt.place),
                rollout_seed=derive(run_seed, "reward", step, prompt.place, origin, sample),
            )
            grade = apply_rules(grade, facts, self.rules)
        return grade.judged(self.success_threshold)
