"""Says what a folder of checkpoints holds, which of them are whole, and which may go.

Nothing here is a collective or holds a tensor in memory.

index.json has a checksum of its own content and one of every other file; state.json must agree with it and with the
folder's name. Nothing that a file says is believed before that.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from lens_megatron.errors import UserError
from lens_megatron.files import flush
from lens_megatron.policy.checked_files import DamageError, FileRecord, check_content, check_size, checksum, write_file
from lens_megatron.policy.shards import StoredPiece, read_pieces

INDEX, STATE, EXPORT = "index.json", "state.json", "hf"
TRACKER = "latest_checkpointed_iteration.txt"
"""Beside the checkpoints: the step of the newest one, written last."""
FORMAT = 2
"""The number of the format of index.json. Format 1 had sizes and no checksums; it is still read."""
_NAME = re.compile(r"iter_(\d{7,})")
_Count = Annotated[int, Field(ge=0)]
_Record = TypeVar("_Record")


class CheckpointError(UserError):
    """A checkpoint could not be written or read; earlier ones are untouched."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Describes state.json: what resuming needs besides tensors. Seeds are functions of `step`."""

    step: _Count
    """The number of steps that have been done."""
    version: _Count
    scheduler_steps: _Count
    optimizer_steps: _Count
    layout: dict[str, int]
    metric: float | None = None
    """`keep_best` compares this, and higher is better; None where nothing was evaluated."""
    selection: dict[str, Any] | None = None
    """The state of the method of selection after `step`, before that of the next step; None in older versions."""
    epoch: float | None = None
    """The passes over the data that have been made; None in older versions."""


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """Lists what one rank wrote, which it tells rank 0 by a file."""

    files: dict[str, FileRecord]
    export: dict[str, FileRecord]
    """Files below `hf/`, by their names there."""


@dataclass(frozen=True, slots=True)
class Index:
    """Describes index.json, which lists every file and the place of each piece of a tensor."""

    files: dict[Annotated[str, Field(pattern=r"^(rank_\d{5,}\.safetensors|state\.json)$")], FileRecord]
    """Files without which the checkpoint cannot be loaded, by name."""
    pieces: tuple[StoredPiece, ...]
    export: dict[Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*$")], FileRecord] = field(default_factory=dict)
    """Files below `hf/`, which other programs load; a run resumes without them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose index.json and state.json are as written, and whose files have their sizes."""

    path: Path
    state: TrainingState
    index: Index

    @property
    def has_checksums(self) -> bool:
        return all(record.checksum is not None for record in self.index.files.values())


_STATE, _INDEX, _WRITTEN = TypeAdapter(TrainingState), TypeAdapter(Index), TypeAdapter(WrittenFiles)


def published(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints, oldest first, damaged ones among them.

    Raises CheckpointError when `folder` is there and cannot be listed: a run must not start over because of that.
    """
    try:
        with os.scandir(folder) as entries:
            found = [folder / entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"checkpoints in {folder} cannot be listed: {error}; correct its permissions, or set another run.directory"
        ) from error
    steps = {path: step for path in found if (step := step_of(path)) is not None}
    return sorted(steps, key=lambda path: (steps[path], path.name))


def step_of(path: Path) -> int | None:
    """Returns the step in a checkpoint's name; None where something else has that name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def inspect(path: Path) -> Checkpoint:
    """Reads index.json and state.json and looks at the sizes of all files that loading needs; quick.

    Raises DamageError with the first thing that is not as it was written.
    """
    index = read_index(path)
    for name, record in index.files.items():
        check_size(path / name, record)
    if STATE in index.files:
        check_content(path / STATE, index.files[STATE])
    state = _parsed(_STATE, _read(path / STATE), STATE)
    if path.name != folder_name(state.step):
        raise DamageError(f"{STATE} is of step {state.step}, the folder is {path.name}")
    return Checkpoint(path, state, index)


def verify(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> None:
    """Reads every `parts`-th file from `part` on, so that ranks share the work.

    Raises DamageError naming the file and both checksums.
    """
    for name, record in sorted(checkpoint.index.files.items())[part::parts]:
        check_content(checkpoint.path / name, record)


def verify_export(checkpoint: Checkpoint) -> None:
    """Reads what is below hf/. Raises DamageError naming the file and both checksums."""
    for name, record in sorted(checkpoint.index.export.items()):
        check_content(checkpoint.path / EXPORT / name, record)


def newest_state(folder: Path) -> TrainingState | None:
    """Returns the state of the newest checkpoint whose files are all there in their sizes; None when there is none."""
    for path in reversed(published(folder)):
        try:
            return inspect(path).state
        except DamageError:
            continue
    return None


def steps_saved(folder: Path) -> int:
    """Returns the step of that checkpoint; 0 when there is none."""
    state = newest_state(folder)
    return state.step if state else 0


def whole(folder: Path) -> list[Checkpoint]:
    """Returns the checkpoints that `inspect` accepts, oldest first."""
    found = []
    for path in published(folder):
        try:
            found.append(inspect(path))
        except DamageError:
            continue  # it must not be deleted: the user may want to repair it
    return found


def superfluous(states: Sequence[tuple[Path, TrainingState]], keep_last: int, keep_best: int) -> list[Path]:
    """Returns the paths of checkpoints that are neither among the newest nor among the best; newer beats equal.

    `states` are the checkpoints, oldest first.
    """
    kept = {path for path, _ in states[-keep_last:]}
    scored = [(state.metric, state.step, path) for path, state in states if state.metric is not None]
    kept |= {path for *_, path in sorted(scored, reverse=True)[:keep_best]}
    return [path for path, _ in states if path not in kept]


def folder_name(step: int) -> str:
    """Returns the name of the folder of the checkpoint of `step`."""
    return f"iter_{step:07d}"


def rank_file(rank: int) -> str:
    """Returns the name of the file that holds the pieces of `rank`."""
    return f"rank_{rank:05d}.safetensors"


def write_receipt(folder: Path, rank: int, written: WrittenFiles) -> None:
    """Tells rank 0 what this rank wrote. Raises OSError."""
    write_file(folder / _receipt(rank), _json(asdict(written)))


def write_index(folder: Path, state: TrainingState) -> None:
    """Writes state.json and index.json of the files that all ranks have written. Only rank 0 calls it.

    Raises:
        ShardError: a rank's file is missing, or the pieces of a tensor do not add up to it. OSError: writing failed.
    """
    ranks = range(state.layout["world_size"])
    pieces = read_pieces(folder, [rank_file(rank) for rank in ranks])
    receipts = [folder / _receipt(rank) for rank in ranks]
    written = [_parsed(_WRITTEN, _read(receipt), receipt.name) for receipt in receipts]
    files: dict[str, FileRecord] = {}
    export: dict[str, FileRecord] = {}
    for rank in written:
        files |= rank.files
        export |= rank.export
    _seal(folder, state, Index(files, pieces, export))
    for receipt in receipts:
        receipt.unlink()


def copy_with_state(checkpoint: Checkpoint, folder: Path, state: TrainingState) -> None:
    """Makes the new `folder` a checkpoint of the same tensors with another state, without an export.

    The files of tensors are hard links where the file system has them, else copies: no file of a checkpoint is ever
    written again, so that neither checkpoint can change the other.

    Raises:
        DamageError: a file of `checkpoint` is missing or has another size. OSError: writing failed.
    """
    folder.mkdir(parents=True)
    tensors = {name: record for name, record in checkpoint.index.files.items() if name != STATE}
    for name, record in tensors.items():
        _link_or_copy(checkpoint.path / name, folder / name)
        check_size(folder / name, record)
    _seal(folder, state, Index(tensors, checkpoint.index.pieces))
    flush(folder)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        flush(target)


def _seal(folder: Path, state: TrainingState, index: Index) -> None:
    """Writes state.json, adds it to the index, and writes index.json."""
    record = write_file(folder / STATE, _lines(state))
    content = asdict(replace(index, files=dict(index.files) | {STATE: record}))
    sealed = {"format": FORMAT, "checksum": checksum(_json(content)), "index": content}
    write_file(folder / INDEX, _json(sealed))


def read_index(folder: Path) -> Index:
    """Reads index.json. Raises DamageError when it is not what `write_index` wrote."""
    tree = _tree(_read(folder / INDEX), INDEX)
    if tree.keys() == {"files", "pieces"}:
        return _first_format(tree)
    if tree.get("format") != FORMAT or tree.keys() != {"format", "checksum", "index"}:
        raise DamageError(f"{INDEX} is of format {tree.get('format')!r}; this version reads 1 and {FORMAT}")
    content = _json(tree["index"])
    if checksum(content) != tree["checksum"]:
        raise DamageError(f"{INDEX} has the checksum {checksum(content)} instead of {tree['checksum']}")
    return _consistent(_parsed(_INDEX, content, INDEX))


def _first_format(tree: dict[str, Any]) -> Index:
    """Reads format 1, which had sizes in place of records, and pieces beside the names of their files."""
    try:
        files = {name: {"size": size, "checksum": None} for name, size in tree["files"].items()}
        pieces = [{"file": p["file"], "piece": {k: p[k] for k in p if k != "file"}} for p in tree["pieces"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise DamageError(f"{INDEX} is not as it was written: {type(error).__name__}: {error}") from error
    return _consistent(_parsed(_INDEX, _json({"files": files, "pieces": pieces, "export": {}}), INDEX))


def _consistent(index: Index) -> Index:
    for stored in index.pieces:
        if stored.file not in index.files:
            raise DamageError(f"{INDEX} names {stored.file}, of which it has no size")
        if problem := stored.piece.problem():
            raise DamageError(f"{INDEX}: {stored.piece.key}: {problem}")
    return index


def _receipt(rank: int) -> str:
    return f".rank_{rank:05d}.json"


def _lines(state: TrainingState) -> bytes:
    """Returns JSON with one line per field: the state of a selection can hold a number for each of a million prompts,
    for which `asdict` and an indentation would take seconds."""
    lines = [f" {json.dumps(field.name)}: {json.dumps(getattr(state, field.name))}" for field in fields(state)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _json(content: Any) -> bytes:
    """Makes the same text of equal contents, since checksums are computed from it."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DamageError(f"{path.name} is missing") from error
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read: {error}") from error


def _tree(data: bytes, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name} is not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(tree, dict):
        raise DamageError(f"{name} holds a {type(tree).__name__} instead of an object")
    return tree


def _parsed(adapter: TypeAdapter[_Record], data: bytes, name: str) -> _Record:
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"])
        raise DamageError(f"{name} is not as it was written: {place}: {first['msg']}".replace(": : ", ": ")) from error
