"""Writes a file per step with its rollouts: every data-parallel rank writes its part, and rank 0 joins the parts.

rollouts/step_NNNNNN.jsonl has one JSON object per sample that was trained on. Samples of one group stand together and
have the same `place`, the group's number in the step. The first of them also has the key `group`, whose value describes
what the samples of the group share:

    prompt_tokens  [L] the text of every token of the prompt; joined they are `prompt`
    eligible       [L] true where purification may delete the token
    scores         [L] the purifier's number of every token (`types.PurifiedPrompt.scores`); null without a purifier, or
                   where it wanted no second wave
    deleted        the places, 0 to L - 1, of the tokens that the purifier deleted
    noise          the places of the tokens that the data marks as noise (`data.noise_key`)
    sampled_again  whether the group was hard, so that a second wave was sampled from what is left
    left_out       the rollouts of both waves that were not trained on: first-wave failures that rescued rollouts have
                   replaced, and second-wave rollouts that the gate did not admit. Each has the keys `completion`,
                   `status`, `reward`, `origin`, `response_tokens`, `finished` and `weight_version` of a sample.

Files of version 0.2 and before have neither `place` nor `group`.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lens_megatron.data.tokenizer import Tokenizer
from lens_megatron.errors import UserError
from lens_megatron.policy.parallel import Mesh
from lens_megatron.results import StepResult
from lens_megatron.supervision.agreement import first_to_fail, raise_together
from lens_megatron.types import Rollout, Sample, TrainingGroup

logger = logging.getLogger(__name__)


class RolloutFileError(UserError):
    """Rollouts that the user asked for cannot be written; the message says what to change."""


class RolloutFiles:
    """The rollout files of one folder, on every rank.

    Args:
        name: what messages call these files.
        required: if True, a step that cannot be written ends the run. Otherwise training goes on without it, with one
            warning until a step can be written again.
    """

    def __init__(self, folder: Path, name: str, mesh: Mesh, *, required: bool):
        self.folder, self.name, self.mesh, self.required = folder, name, mesh, required
        self.lost: list[int] = []
        """The steps that could not be written since the last one that was."""

    def write(self, step: int, lines: Sequence[str]) -> None:
        """Writes the file of a step, which is whole or absent. A collective.

        Raises:
            RolloutFileError: on every rank, if the files are required.
        """
        failure = None
        if self.mesh.model_rank == 0:
            failure = _attempt(lambda: write_part(self.folder, step, self.mesh.dp_rank, lines))
        failed = first_to_fail(failure is not None, self.mesh.device)
        if self.mesh.rank == 0:
            if failed is None:
                failure = _attempt(lambda: join_parts(self.folder, step, self.mesh.dp_size))
                failed = None if failure is None else 0
            remove_parts(self.folder, step)
        if self.required:
            here = RolloutFileError(f"{self._describe(step)}: {failure}; make room, or leave the option out")
            there = RolloutFileError(f"{self._describe(step)}: another rank could not write its part")
            raise_together(here if failure else None, there, self.mesh.device)
        elif failed is None:
            self._recovered()
        else:
            if failed == self.mesh.rank and not self.lost:
                logger.warning(f"{self._describe(step)}: {failure}; training goes on without")
            self.lost.append(step)

    def _recovered(self) -> None:
        if self.lost and self.mesh.rank == 0:
            steps = f"step {self.lost[0]}" + f" to {self.lost[-1]}" * (len(self.lost) > 1)
            logger.info(f"{self.name} can be written again; lost: {steps}")
        self.lost.clear()

    def _describe(self, step: int) -> str:
        return f"{self.name} cannot be written to {self.folder} at step {step}"


def _attempt(action: Callable[[], None]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def write_part(folder: Path, step: int, part: int, lines: Sequence[str]) -> None:
    """Writes one data-parallel rank's part of a step's file; `join_parts` joins the parts. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(line + "\n" for line in lines)
    _part(folder, step, part).write_text(text, encoding="utf-8", errors="backslashreplace")


def join_parts(folder: Path, step: int, parts: int) -> None:
    """Concatenates parts 0 to `parts` - 1 into step_NNNNNN.jsonl, published by one rename. Raises OSError."""
    partial = folder / f".step_{step:06d}.partial"
    try:
        with partial.open("wb") as file:
            for part in range(parts):
                file.write(_part(folder, step, part).read_bytes())
        partial.rename(folder / f"step_{step:06d}.jsonl")
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def remove_parts(folder: Path, step: int) -> None:
    """Removes the parts of a step, also those of an attempt with more ranks."""
    with suppress(OSError):
        for path in folder.glob(f".step_{step:06d}.[0-9]*"):
            path.unlink()


def _part(folder: Path, step: int, part: int) -> Path:
    return folder / f".step_{step:06d}.{part:05d}"


def rollout_lines(result: StepResult, tokenizer: Tokenizer, step: int) -> list[str]:
    """Returns one JSON object per trained sample, as the module's docstring describes it."""
    lines, position = [], 0
    for group in result.groups:
        samples = result.samples[position : position + len(group.rollouts)]
        position += len(group.rollouts)
        records = [_record(group, sample, tokenizer, step) for sample in samples]
        if records:
            records[0]["group"] = _group_record(group, tokenizer)
        lines += [json.dumps(record, ensure_ascii=False) for record in records]
    return lines


def _record(group: TrainingGroup, sample: Sample, tokenizer: Tokenizer, step: int) -> dict:
    prompt = group.group.prompt
    return {
        "step": step,
        "place": group.group.place,
        "prompt_index": prompt.index,
        "source": prompt.source,
        "prompt": tokenizer.decode_all(prompt.token_ids),
        "purified_prompt": marked_prompt(group, tokenizer),
        "answer": prompt.answer,
        "weight": sample.weight,
        "advantage": sample.advantage,
        "gate": group.gate,
        **_rollout_record(sample.rollout, tokenizer),
    }


def _rollout_record(rollout: Rollout, tokenizer: Tokenizer) -> dict:
    return {
        "completion": tokenizer.decode_all(rollout.token_ids),
        "status": rollout.status,
        "reward": rollout.reward,
        "origin": rollout.origin,
        "response_tokens": len(rollout.token_ids),
        "finished": rollout.finished,
        "weight_version": rollout.weight_version,
    }


def _group_record(group: TrainingGroup, tokenizer: Tokenizer) -> dict:
    prompt, purified = group.group.prompt, group.group.purified
    trained = {id(rollout) for rollout in group.rollouts}  # two rollouts of a group may be equal
    left_out = [r for r in (*group.group.native, *group.group.rescue) if id(r) not in trained]
    return {
        "prompt_tokens": tokenizer.decode_each(prompt.token_ids),
        "eligible": prompt.eligible,
        "scores": None if purified is None else [float(f"{score:.4g}") for score in purified.scores],
        "deleted": () if purified is None else purified.deleted,
        "noise": [place for place, marked in enumerate(prompt.noise) if marked],
        "sampled_again": bool(group.group.rescue),
        "left_out": [_rollout_record(rollout, tokenizer) for rollout in left_out],
    }


def marked_prompt(group: TrainingGroup, tokenizer: Tokenizer) -> str | None:
    """Returns the prompt with each run of deleted tokens in [- -], or None where it was not sampled again."""
    purified = group.group.purified
    if purified is None or not group.group.rescue:
        return None
    deleted = set(purified.deleted)
    parts: list[tuple[bool, list[int]]] = []
    for position, token in enumerate(group.group.prompt.token_ids):
        gone = position in deleted
        if not parts or parts[-1][0] != gone:
            parts.append((gone, []))
        parts[-1][1].append(token)
    texts = [(gone, tokenizer.decode_all(tokens)) for gone, tokens in parts]
    return "".join(f"[-{text}-]" if gone else text for gone, text in texts)
