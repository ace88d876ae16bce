"""Reads the groups of a run from its rollout files, as `output.rollout_files` writes them.

Files of version 0.2 and before are read too: there the marks [-...-] say what was deleted, and scores, noise and the
rollouts that were not trained on are not known.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from lens_megatron.files import read_regular

LARGEST_FILE = 1 << 30
"""The most bytes of one rollout file."""
_MARKED = re.compile(r"\[-(.*?)-\]", re.DOTALL)
_STEP = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt, or a longer piece of it where the file has no tokens."""

    text: str
    score: float | None = None
    """The number by which the purifier decided; None where the file has none."""
    deleted: bool = False
    noise: bool = False
    """True where the data marks the token as planted noise."""
    eligible: bool = False
    """True where purification may delete the token; False where the file does not say."""


@dataclass(frozen=True, slots=True)
class ShownCompletion:
    """A rollout of a group."""

    text: str
    status: str
    """The grade: correct, wrong, unparsed, timeout or crash."""
    reward: float
    weight: float | None
    """Weight and advantage are None where the rollout was not trained on."""
    advantage: float | None
    second: bool
    """True where it was sampled from the purified prompt."""
    tokens: int
    finished: bool

    @property
    def correct(self) -> bool:
        return self.status == "correct"

    @property
    def trained(self) -> bool:
        return self.weight is not None


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """A prompt of a step with its completions."""

    step: int
    prompt_index: int
    source: str
    answer: str
    gate: bool
    """True where successes of the second wave replaced failures of the first."""
    second_wave: bool
    """True where the prompt was sampled again."""
    tokens: tuple[PromptToken, ...]
    completions: tuple[ShownCompletion, ...]
    """Those that were trained on, and then the others of both waves; older files have the former only."""

    @property
    def first_wave(self) -> tuple[ShownCompletion, ...]:
        return tuple(c for c in self.completions if not c.second)

    @property
    def trained(self) -> tuple[ShownCompletion, ...]:
        return tuple(c for c in self.completions if c.trained)

    @property
    def success_before(self) -> float:
        """The share of correct rollouts of the first wave.

        In older files every rescued rollout stands for a failure that it has replaced.
        """
        first = self.first_wave
        return sum(c.correct for c in first) / max(len(first), len(self.trained))

    @property
    def zero_before(self) -> bool:
        """True where no rollout of the first wave has a reward above 0."""
        return all(c.reward <= 0 for c in self.first_wave)

    @property
    def zero_after(self) -> bool:
        """True where no rollout that is trained on has a reward above 0."""
        return all(c.reward <= 0 for c in self.trained)


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """The groups of a step, and how many lines of the file could not be read."""

    groups: tuple[RolloutGroup, ...]
    broken: int


def rollout_files(folder: Path) -> dict[int, Path]:
    """Returns the rollout files of the run in `folder` by their steps, ascending; empty where it has none."""
    found = ((_STEP.fullmatch(path.name), path) for path in (folder / "rollouts").glob("step_*.jsonl"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_step(path: Path) -> StepRollouts:
    """Reads a rollout file. Lines that are no sample are counted and left out. Raises OSError."""
    lines = [line for line in read_regular(path, LARGEST_FILE).split(b"\n") if line.strip()]
    samples = [sample for sample in map(_parsed, lines) if sample is not None]
    groups = [_group(part) for _, same in groupby(samples, _place) for part in _without_places(list(same))]
    found = tuple(group for group in groups if group is not None)
    return StepRollouts(found, len(lines) - sum(len(group.trained) for group in found))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return sample if isinstance(sample, dict) and "completion" in sample else None


def _place(sample: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(sample.get(name)) for name in ("place", "prompt_index", "prompt"))


def _without_places(samples: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Divides samples of one prompt that occurs twice in a step: where rescued ones are over, a new group begins."""
    start = 0
    for i in range(1, len(samples)):
        if samples[i].get("origin") == "native" and samples[i - 1].get("origin") == "purified":
            yield samples[start:i]
            start = i
    yield samples[start:]


def _group(samples: Sequence[Mapping[str, Any]]) -> RolloutGroup | None:
    head = samples[0]
    try:
        shared = head.get("group") or {}
        marked = head["purified_prompt"]
        return RolloutGroup(
            step=int(head["step"]),
            prompt_index=int(head["prompt_index"]),
            source=str(head["source"]),
            answer=str(head["answer"]),
            gate=bool(head["gate"]),
            second_wave=bool(shared.get("sampled_again", marked is not None)),
            tokens=_scored_tokens(shared) if shared else marked_pieces(str(head["prompt"]), marked),
            completions=(*map(_trained, samples), *map(_completion, shared.get("left_out") or ())),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _trained(sample: Mapping[str, Any]) -> ShownCompletion:
    return replace(_completion(sample), weight=_number(sample["weight"]), advantage=_number(sample["advantage"]))


def _completion(rollout: Mapping[str, Any]) -> ShownCompletion:
    return ShownCompletion(
        text=str(rollout["completion"]),
        status=str(rollout["status"]),
        reward=_number(rollout["reward"]),
        weight=None,
        advantage=None,
        second=rollout["origin"] == "purified",
        tokens=int(rollout["response_tokens"]),
        finished=bool(rollout["finished"]),
    )


def _number(value: Any) -> float:
    """Returns a finite number. Raises ValueError."""
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is not finite")
    return number


def _scored_tokens(shared: Mapping[str, Any]) -> tuple[PromptToken, ...]:
    scores, eligible = shared["scores"], shared["eligible"]
    # Without a second wave nothing was deleted, whatever the purifier would have deleted.
    deleted = set(shared["deleted"]) if shared["sampled_again"] else set()
    noise = set(shared["noise"])
    return tuple(
        PromptToken(
            text=str(text),
            score=None if scores is None else _number(scores[i]),
            deleted=i in deleted,
            noise=i in noise,
            eligible=bool(eligible[i]),
        )
        for i, text in enumerate(shared["prompt_tokens"])
    )


def marked_pieces(prompt: str, marked: str | None) -> tuple[PromptToken, ...]:
    """Returns a prompt in pieces, of which the marks in `marked` say whether they were deleted.

    Example: marked_pieces("a b c", "a[- b-] c") has the pieces "a", " b" (deleted) and " c". A prompt that contains
    such marks itself, so that nobody can tell whose they are, is returned in one piece.
    """
    if marked is not None:
        parts = _MARKED.split(marked)  # kept and deleted ones in turn
        if "[-" not in prompt or "".join(parts) == prompt:
            pieces = [PromptToken(text, deleted=bool(i % 2)) for i, text in enumerate(parts)]
            return tuple(piece for piece in pieces if piece.text)
    return (PromptToken(prompt),)
