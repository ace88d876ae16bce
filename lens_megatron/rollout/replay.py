"""Turns groups into JSON lines and back, for people and for `debug.save_rollouts` and `debug.load_rollouts`."""

import json
import reprlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from lens_megatron.errors import UserError
from lens_megatron.files import open_regular, why_no_folder
from lens_megatron.reward.types import GradeStatus
from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, Rollout

_LONGEST_LINE = 1 << 29
_OLD_ORIGINS = {"rescued": Origin.PURIFIED}
"""Names of origins in files that versions up to 0.1.0 wrote."""


class ReplayError(UserError):
    """Saved rollouts are missing or cannot be read; the message names file and line."""


def to_json(group: Group) -> str:
    """Returns the group as one line of JSON. `from_json` reads every float to the bit."""
    return json.dumps(group, default=_fields)


def _fields(record: Prompt | PurifiedPrompt | Rollout | Group) -> dict[str, object]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def from_json(line: str | bytes) -> Group:
    """Returns the group that `to_json` made `line` of. Raises ValueError where the line is no graded group."""
    try:
        group = _parse(line)
        mistake = next(_mistakes(group), "")
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if mistake:
        raise ValueError(mistake)
    return group


def _parse(line: str | bytes) -> Group:
    row = json.loads(line)
    purified = row["purified"]
    return Group(
        prompt=_read_prompt(row["prompt"]),
        native=tuple(map(_read_rollout, row["native"])),
        purified=purified and PurifiedPrompt(**_tuples(purified, "token_ids", "deleted", "scores")),
        rescue=tuple(map(_read_rollout, row["rescue"])),
        place=row.get("place", 0),
    )


def _mistakes(group: Group) -> Iterator[str]:
    """Returns what is wrong with the values of a group; the types of its fields are not trusted."""
    prompt, purified = group.prompt, group.purified
    yield from _token_mistakes("prompt", prompt.token_ids)
    if not all(isinstance(text, str) for text in (prompt.answer, prompt.problem, prompt.source, prompt.record)):
        yield "prompt: answer, problem, source and record are not all text"
    if type(prompt.index) is not int or prompt.index < 0:
        yield f"prompt: index {reprlib.repr(prompt.index)} is no row"
    if len(prompt.eligible) != len(prompt.token_ids) or set(map(type, prompt.eligible)) - {bool}:
        yield f"prompt: eligible has {len(prompt.eligible)} entries for {len(prompt.token_ids)} tokens, or no booleans"
    if purified:
        yield from _token_mistakes("purified", purified.token_ids)
        if len(purified.scores) != len(prompt.token_ids) or not _are_finite(purified.scores):
            yield f"purified: {len(purified.scores)} scores for {len(prompt.token_ids)} tokens, or not finite"
        if not set(purified.deleted) <= set(range(len(prompt.token_ids))):
            yield f"purified: deleted {reprlib.repr(purified.deleted)} are no positions of the prompt"
    if type(group.place) is not int or group.place < 0:
        yield f"place {reprlib.repr(group.place)} is no place"
    if prompt.noise and len(prompt.noise) != len(prompt.token_ids):
        yield f"prompt: noise has {len(prompt.noise)} entries for {len(prompt.token_ids)} tokens"
    if not group.native:
        yield "native: no rollouts"
    if group.rescue and not purified:
        yield "rescue: rollouts of a purified prompt that is not there"
    for name, rollouts, origin in (("native", group.native, Origin.NATIVE), ("rescue", group.rescue, Origin.PURIFIED)):
        for place, rollout in enumerate(rollouts):
            yield from _rollout_mistakes(f"{name}[{place}]", rollout, origin)


def _rollout_mistakes(name: str, rollout: Rollout, origin: Origin) -> Iterator[str]:
    yield from _token_mistakes(name, rollout.token_ids)
    if len(rollout.log_probs) != len(rollout.token_ids) or not _are_finite(rollout.log_probs):
        yield f"{name}: {len(rollout.log_probs)} log_probs for {len(rollout.token_ids)} tokens, or not finite"
    if not _are_finite([rollout.reward]):
        yield f"{name}: reward {reprlib.repr(rollout.reward)} is no finite number"
    if type(rollout.weight_version) is not int or rollout.weight_version < 0 or type(rollout.finished) is not bool:
        yield f"{name}: weight_version is no version, or finished no boolean"
    if rollout.origin is not origin:
        yield f"{name}: origin is {rollout.origin}, expected {origin}"


def _token_mistakes(name: str, token_ids: Sequence[int]) -> Iterator[str]:
    if not token_ids or set(map(type, token_ids)) != {int} or min(token_ids) < 0:
        yield f"{name}: token_ids {reprlib.repr(token_ids)} are no token ids"


def _are_finite(values: Sequence[float]) -> bool:
    return set(map(type, values)) <= {int, float} and all(abs(value) <= sys.float_info.max for value in values)


def _read_prompt(row: dict) -> Prompt:
    return Prompt(**{**row, **_tuples(row, "token_ids", "eligible"), "noise": tuple(row.get("noise", ()))})


def _read_rollout(row: dict) -> Rollout:
    kept = {"origin": Origin(_OLD_ORIGINS.get(row["origin"], row["origin"])), "status": GradeStatus(row["status"])}
    return Rollout(**{**row, **kept, **_tuples(row, "token_ids", "log_probs")})


def _tuples(row: dict, *names: str) -> dict:
    return {name: tuple(row[name]) for name in names}


def replay_path(folder: str, step: int) -> Path:
    """Returns the file in `folder` that holds the groups of `step`, one per line."""
    return Path(folder) / f"step_{step:06d}.jsonl"


def read_groups(folder: str, step: int, *, count: int, vocab_size: int, fewer: bool = False) -> list[Group]:
    """Returns the `count` groups of `step`, in the order of their places.

    Files of version 0.1.0 hold no places: their groups get those of the order in the file.

    Args:
        fewer: the file may have fewer groups, as a selection that rejects groups leaves them.

    Raises:
        ReplayError: the file cannot be read, has fewer or more groups, or tokens beyond `vocab_size`.
    """
    path, groups = replay_path(folder, step), []
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                groups.append(_read_line(line, f"{path}:{number}", vocab_size))
    except OSError as error:
        saved = len(list(Path(folder).glob("step_*.jsonl")))
        raise ReplayError(
            f"debug.load_rollouts: {path} cannot be read ({error.strerror}); the folder holds {saved} steps, "
            "lower train.steps or save more with debug.save_rollouts"
        ) from error
    if len(groups) > count or (len(groups) < count and not fewer):
        remedy = f"set that to {len(groups)}" if groups else "save it again with debug.save_rollouts"
        raise ReplayError(
            f"debug.load_rollouts: {path} holds {len(groups)} groups, rollout.prompts_per_step asks for {count}; "
            f"{remedy}"
        )
    if len({group.place for group in groups}) < len(groups):
        return [replace(group, place=place) for place, group in enumerate(groups)]
    return sorted(groups, key=lambda group: group.place)


def _read_line(line: bytes, where: str, vocab_size: int) -> Group:
    if len(line) > _LONGEST_LINE:
        raise ReplayError(f"{where}: the line has more than {_LONGEST_LINE:,} bytes; save it again")
    try:
        group = from_json(line)
    except ValueError as error:
        raise ReplayError(f"{where}: not a saved group: {error}; save it again") from error
    largest = max(max(tokens) for tokens in _all_tokens(group))
    if largest >= vocab_size:
        raise ReplayError(
            f"{where}: token {largest} is beyond the model's vocabulary of {vocab_size}; load rollouts of this model"
        )
    return group


def _all_tokens(group: Group) -> Iterator[Sequence[int]]:
    yield group.prompt.token_ids
    if group.purified:
        yield group.purified.token_ids
    yield from (rollout.token_ids for rollout in (*group.native, *group.rescue))


def check_folders(load: str | None, save: str | None, steps: int) -> None:
    """Raises ReplayError unless `load` has a file for each of `steps` steps and `save` can be a folder."""
    if save and (why := why_no_folder(Path(save))):
        raise ReplayError(f"debug.save_rollouts {save}: {why}; choose another folder")
    if load:
        saved = {path.name for path in Path(load).glob("step_*.jsonl")}
        lacking = next((s for s in range(1, steps + 1) if replay_path(load, s).name not in saved), None)
        if saved and lacking is not None:
            raise ReplayError(
                f"debug.load_rollouts: {load} has no {replay_path(load, lacking).name}, train.steps is {steps}; the "
                f"folder holds {len(saved)} steps, lower train.steps or save more with debug.save_rollouts"
            )
