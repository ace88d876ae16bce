"""Pays for phrases of reasoning (Reasoning Pattern Reward, arXiv 2505.22653), alone or beside the grader's score."""

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from lens_megatron.algorithms.entry import Entry
from lens_megatron.algorithms.rewards import RolloutFacts
from lens_megatron.config import Section
from lens_megatron.reward.types import Grade

PHRASES = (
    "i need to", "we need to", "wait", "alternatively", "let me check", "let me see", "let's focus on", "we know that",
    "we can observe ", "we can see ", "let me try", "let's try", "let us try", "first, ", "firstly, ", "next, ",
    "finally, ", "let us first", "let's first", "let me first", "try again", "still not", "not working", "not correct",
    "does not work", "doesn't work", "makes sence", "since we ", "because we ", "consequently", "as a result", "thus",
    "therefore", "hence", "so that", "thereby", "if we", "given there ", "for instance ", "for example ",
)  # fmt: skip
"""The 40 phrases of the paper's code for mathematics, with their blanks and commas, and with its spelling."""
PHRASES_FOR_FULL_REWARD = 20
WORDS_OF_A_REPETITION = 20
NEW_TURN = "user: "
"""A response that goes on with a turn of the user loses 1 for each."""
NOISY_MODEL_BOUND = 0.5
"""Scores of a reward model below this are calibrated."""
NOISY_MODEL_SHARE = 0.1
"""The most that the calibration adds."""


class RprOptions(Section):
    """The options of `rpr`."""

    mode: Literal["only", "warmup", "wrong", "calibrated"] = "only"
    """Says where the pattern reward stands. only: it is the reward. warmup: it is the reward in the first
    `warmup_steps` steps. wrong: answers that are not correct get it. calibrated: a score of a noisy reward model in
    [0, 1] that is below 0.5 gets a tenth of it added."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of the mode warmup."""

    @model_validator(mode="after")
    def _needs_steps(self) -> "RprOptions":
        if (self.mode == "warmup") != (self.warmup_steps > 0):
            raise ValueError(
                f"mode={self.mode} with warmup_steps={self.warmup_steps}: mode=warmup needs at least 1 step, and no "
                "other mode has any"
            )
        return self


def rpr(grade: Grade, facts: RolloutFacts, options: RprOptions) -> Grade:
    """Returns the grade with the score that `mode` says. The verdict stays the grader's.

    An answer whose grading failed keeps its score where the score depends on the verdict (wrong, calibrated).
    """
    if options.mode == "only" or (options.mode == "warmup" and facts.step <= options.warmup_steps):
        return grade.with_score(pattern_reward(facts.completion))
    if grade.failed:
        return grade
    if options.mode == "wrong" and not grade.correct:
        return grade.with_score(pattern_reward(facts.completion))
    if options.mode == "calibrated" and grade.score < NOISY_MODEL_BOUND:
        return grade.with_score(min(1.0, grade.score + NOISY_MODEL_SHARE * pattern_reward(facts.completion)))
    return grade


def pattern_reward(completion: str) -> float:
    """Returns max(0, min(1, phrases / 20) - repetition - turns), a number in [0, 1].

    phrases is the number of different phrases that occur, in lower case; repetition is the number of different
    sequences of 20 words that occur more than once, divided by that of all sequences of 20 words, and 0 for fewer words
    than that; turns is the number of turns of the user.
    """
    text = completion.lower()
    phrases = sum(phrase in text for phrase in PHRASES)
    paid = min(1.0, phrases / PHRASES_FOR_FULL_REWARD)
    return max(0.0, paid - repetition(text) - text.count(NEW_TURN))


def repetition(text: str) -> float:
    """Returns the share of repeated sequences of 20 words that `pattern_reward` subtracts."""
    words = text.split()
    count = len(words) - WORDS_OF_A_REPETITION + 1
    if count <= 0:
        return 0.0
    found = Counter(tuple(words[start : start + WORDS_OF_A_REPETITION]) for start in range(count))
    return sum(times > 1 for times in found.values()) / count


ENTRY = Entry(rpr, paper="Reasoning Pattern Reward, arXiv 2505.22653", options=RprOptions)
