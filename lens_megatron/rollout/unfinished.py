"""Keeps graded groups of the step in progress on disk until the step is done, so that a restart samples only the rest.

    run.directory/unfinished/step_000014_00003_of_00008.jsonl     one line per group, share 3 of 8

A share is what one rank samples of a step: the prompts at places 3, 11, 19, ... in data order, also those whose groups
the step rejects, since a rejection decides what else is sampled. It has the same prompts
under every layout of as many ranks. A line is the place of a prompt and its group as JSON. What a killed writer left of
a line is no JSON, and is ignored.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from lens_megatron.files import append_whole
from lens_megatron.rollout.replay import from_json, to_json
from lens_megatron.types import Group, StepPrompt

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class UnfinishedGroups:
    """The graded groups of one share of every step."""

    folder: Path
    share: int
    """The number of this rank's share, from 0."""
    shares: int
    """The number of shares of a step."""
    staleness: int = 0
    """The number of updates that the policy may be ahead of the one that sampled a group."""
    found: tuple[Path, ...] = field(init=False)
    """The files of the attempt before. They are listed once, since no rank writes into another's share later."""
    writable: bool = field(default=True, init=False)
    """True if the last group could be written."""

    def __post_init__(self) -> None:
        self.found = tuple(sorted(self.folder.glob("step_*_of_*.jsonl")))

    def read(self, step: int, prompts: Sequence[StepPrompt], version: int) -> dict[int, Group]:
        """Returns the groups of `prompts`, by place, that weights of `version`, or little older ones, sampled."""
        paths = self._files_of_other_shares(step) + [path for path in self.found if path == self._path(step)]
        found = {place: group for path in paths for place, group in _read(path) if self._is_fresh(group, version)}
        asked = {prompt.place: prompt.prompt for prompt in prompts}
        kept = {place: group for place, group in found.items() if asked.get(place) == group.prompt}
        if kept:
            logger.info(
                f"step {step}: {len(kept)} of {len(prompts)} groups of share {self.share} kept from the interrupted "
                "attempt"
            )
        return kept

    def append(self, step: int, place: int, group: Group) -> None:
        """Writes the group of the prompt at `place` in `step`. Without room on the disk the run goes on without it.

        The line is handed to the operating system before this returns.
        """
        line = f"\n{place} {to_json(group)}"  # the line break comes first, because the file may end in half a line
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_whole(self._path(step), line.encode("utf-8", errors="backslashreplace"))
            self.writable = True
        except OSError as error:
            if self.writable:
                self.writable = False
                logger.warning(f"{self.folder}: graded rollouts are not kept for a restart: {error}")

    def remove(self, step: int) -> None:
        """Deletes this share's file of `step`; share 0 also deletes the files of another number of shares.

        To be called when no rank needs the groups of `step` any more.
        """
        for path in (self._path(step), *(self._files_of_other_shares(step) if self.share == 0 else ())):
            with suppress(OSError):
                path.unlink()

    def _is_fresh(self, group: Group, version: int) -> bool:
        """Returns whether weights of `version`, or of at most `staleness` updates before, sampled the whole group."""
        versions = {rollout.weight_version for rollout in (*group.native, *group.rescue)}
        return version - self.staleness <= min(versions) <= max(versions) <= version

    def _files_of_other_shares(self, step: int) -> list[Path]:
        """Returns files that a run with another number of shares wrote: any of them may hold a prompt of this share."""
        files = [path for path in self.found if path.name.startswith(f"step_{step:06d}_")]
        return [path for path in files if not path.stem.endswith(_suffix(self.shares))]

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}_{self.share:05d}{_suffix(self.shares)}.jsonl"


def _suffix(shares: int) -> str:
    return f"_of_{shares:05d}"


def _read(path: Path) -> list[tuple[int, Group]]:
    """Returns the groups of a file with their places."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    groups = []
    for line in lines:
        try:
            place, _, group = line.partition(" ")
            groups.append((int(place), replace(from_json(group), place=int(place))))
        except ValueError:
            continue  # the line is blank, or cut off
    return groups
