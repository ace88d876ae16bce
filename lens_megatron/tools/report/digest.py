"""Reads the rollouts of a run file by file, and keeps of each what a report can show of it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lens_megatron.tools.report import shares
from lens_megatron.tools.report.rollout_groups import (
    PromptToken,
    RolloutGroup,
    ShownCompletion,
    StepRollouts,
    read_step,
    rollout_files,
)
from lens_megatron.tools.report.run_data import RunData
from lens_megatron.tools.report.shares import NoisePrecision, ScoreBin, StepShares

logger = logging.getLogger(__name__)

MOST_BYTES = 256 << 20
"""Rollout files of more bytes together are not all read, so that a report takes minutes at most."""
GROUPS_PER_STEP = 16
LONGEST_TEXT, SHOWN_AT_END = 2000, 500
"""Characters of a completion that are shown, and how many of them are its last ones, where the answer is."""
MOST_TOKENS = 1200
MOST_COMPLETIONS = 32


@dataclass(frozen=True, slots=True)
class StepDigest:
    """What a report keeps of the rollout file of a step."""

    shares: StepShares | None
    scores: tuple[ScoreBin, ...]
    precision: NoisePrecision | None
    groups: tuple[RolloutGroup, ...]
    """At most GROUPS_PER_STEP groups, the most telling ones first, with their texts shortened."""
    groups_in_file: int
    broken: int


@dataclass(frozen=True, slots=True)
class RunDigest:
    """What a report keeps of the rollouts of a run."""

    run: RunData
    steps: tuple[StepDigest, ...]
    notes: tuple[str, ...]
    """Sentences on what was not read."""

    @property
    def shares(self) -> tuple[StepShares, ...]:
        return tuple(step.shares for step in self.steps if step.shares)

    @property
    def scores(self) -> tuple[ScoreBin, ...]:
        return shares.added(step.scores for step in self.steps)

    @property
    def precision(self) -> tuple[NoisePrecision, ...]:
        return tuple(step.precision for step in self.steps if step.precision)


class RolloutReader:
    """Reads rollout files, each once for as long as it does not change: `--watch` asks for all of them again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], StepDigest]] = {}

    def read(self, run: RunData) -> RunDigest:
        """Reads the rollouts of a run. A file that cannot be read is left out, with a note."""
        files = rollout_files(run.folder)
        chosen = _affordable(list(files.items()))
        digests, notes = [], []
        if len(chosen) < len(files):
            notes.append(
                f"Of {run.name} the rollouts of {len(chosen)} of {len(files)} steps were read, evenly chosen: all "
                f"together have more than {MOST_BYTES >> 20} MiB."
            )
        for step, path in chosen:
            try:
                digests.append(self._digest(step, path))
            except OSError as error:
                notes.append(f"{path.name} of {run.name} cannot be read ({error.strerror or error}) and was left out.")
        if broken := sum(digest.broken for digest in digests):
            notes.append(f"{broken} lines of the rollout files of {run.name} are broken and were left out.")
        return RunDigest(run, tuple(digests), tuple(notes))

    def _digest(self, step: int, path: Path) -> StepDigest:
        status = os.stat(path)
        version = status.st_size, status.st_mtime_ns
        known = self._known.get(path)
        if known is None or known[0] != version:
            known = self._known[path] = version, digest(step, read_step(path))
        return known[1]


def _affordable(files: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Returns every n-th file, with the least n whose files have no more than MOST_BYTES, and always the last one."""
    sizes = [_size(path) for _, path in files]
    for stride in range(1, len(files) + 1):
        places = range(len(files) - 1, -1, -stride)
        if sum(sizes[i] for i in places) <= MOST_BYTES:
            return [files[i] for i in reversed(places)]
    return list(files[-1:])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def digest(step: int, rollouts: StepRollouts) -> StepDigest:
    """Counts the groups of a step and keeps those of them that tell the most."""
    groups = rollouts.groups
    telling = sorted(groups, key=interest, reverse=True)[:GROUPS_PER_STEP]
    return StepDigest(
        shares=shares.step_shares(step, groups),
        scores=shares.histogram(shares.token_scores(groups)),
        precision=shares.noise_precision(step, groups),
        groups=tuple(map(shortened, telling)),
        groups_in_file=len(groups),
        broken=rollouts.broken,
    )


def interest(group: RolloutGroup) -> tuple[bool, bool, int]:
    """Sorts groups: those that a second wave rescued are looked at first, then the others that had one."""
    return group.gate, group.second_wave, -group.prompt_index


def shortened(group: RolloutGroup) -> RolloutGroup:
    """Returns the group with long texts cut, each with a word on how much is missing."""
    tokens, completions = group.tokens, group.completions
    if len(tokens) > MOST_TOKENS:
        missing = f"[... {len(tokens) - MOST_TOKENS:,} tokens left out ...]"
        tokens = (*tokens[:MOST_TOKENS], PromptToken(missing))
    tokens = tuple(replace(token, text=_cut(token.text)) for token in tokens)
    return replace(group, tokens=tokens, completions=tuple(map(_shortened, completions[:MOST_COMPLETIONS])))


def _shortened(completion: ShownCompletion) -> ShownCompletion:
    return replace(completion, text=_cut(completion.text))


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    missing = f"[... {len(text) - LONGEST_TEXT:,} characters left out ...]"
    return f"{text[: LONGEST_TEXT - SHOWN_AT_END]}\n{missing}\n{text[-SHOWN_AT_END:]}"
