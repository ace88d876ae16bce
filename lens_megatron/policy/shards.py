"""Writes global tensors in pieces to safetensors files, and reads them back cut in any other way.

A file's header says in its metadata where each of its pieces stands in its global tensor. A piece is a run of elements
of a box: tensor and pipeline parallelism cut a global tensor into boxes, the distributed optimizer cuts the flattened
box into runs. Nothing here knows Megatron or needs pickle.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from lens_megatron.policy.checked_files import FileRecord, save_file


class ShardError(ValueError):
    """Files of pieces do not fit together, or are not the tensors asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of the flattened box at `offset` of shape `shape` in the global tensor `key`.

    Example: rows 64..128 of a [128, 16] weight, second half of them: Piece("model/w", (128, 16), (64, 0), (64, 16),
    512, 1024).
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    padded: bool = False
    """The global tensor's end is padding, of a length that depends on the layout; missing elements read as 0."""

    @property
    def name(self) -> str:
        """Name of its tensor in a file, unique within the file of a rank."""
        return f"{self.key}[{','.join(map(str, self.offset))}]"

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offset, self.shape

    @property
    def is_whole_box(self) -> bool:
        return (self.start, self.stop) == (0, math.prod(self.shape))

    def problem(self) -> str | None:
        """Returns why there can be no such piece, or None when there can be one."""
        if not len(self.global_shape) == len(self.offset) == len(self.shape):
            return f"offset {list(self.offset)} and shape {list(self.shape)} in {list(self.global_shape)}"
        ends = [offset + size for offset, size in zip(self.offset, self.shape, strict=True)]
        if min(self.offset + self.shape, default=0) < 0 or any(
            e > n for e, n in zip(ends, self.global_shape, strict=True)
        ):
            return f"a box to {ends} in {list(self.global_shape)}"
        if not 0 <= self.start <= self.stop <= math.prod(self.shape):
            return f"elements {self.start} to {self.stop} of a box of {math.prod(self.shape)}"
        return None


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A piece and the name of the file that holds it."""

    file: str
    piece: Piece


def write_file(path: Path, pieces: Iterable[tuple[Piece, Tensor]], others: Mapping[str, Tensor]) -> FileRecord:
    """Writes 1-D pieces (a whole box in its shape) and `others`, which no index will name.

    Raises OSError; ShardError when two pieces have one name.
    """
    pieces = list(pieces)
    tensors = {p.name: t.view(p.shape) if p.is_whole_box else t for p, t in pieces}
    if len(tensors) != len(pieces):
        raise ShardError(f"{path}: two pieces have one name")
    metadata = {"pieces": json.dumps([asdict(piece) for piece, _ in pieces])}
    return save_file({**others, **tensors}, path, metadata=metadata)


def read_pieces(folder: Path, files: Iterable[str]) -> tuple[StoredPiece, ...]:
    """Reads from the headers of `files` which pieces they hold.

    Raises ShardError when a file is missing, or the pieces of a tensor do not add up to it.
    """
    found = []
    for name in files:
        path = folder / name
        if not path.is_file():
            raise ShardError(f"{path} is missing; is the folder on a file system that all nodes share?")
        with safe_open(path, "pt") as file:
            found += [StoredPiece(name, _piece(record)) for record in json.loads(file.metadata()["pieces"])]
    counts: dict[str, int] = {}
    for stored in found:
        counts[stored.piece.key] = counts.get(stored.piece.key, 0) + stored.piece.stop - stored.piece.start
    for stored in found:
        whole, count = math.prod(stored.piece.global_shape), counts[stored.piece.key]
        if count != whole:
            raise ShardError(f"the pieces of {stored.piece.key} hold {count} elements, the tensor has {whole}")
    return tuple(found)


class ShardReader:
    """Reads any piece of the tensors of a folder, however they were cut. Use as a context manager."""

    def __init__(self, folder: Path, pieces: Iterable[StoredPiece]):
        self.folder, self._files = folder, ExitStack()
        self._open: dict[str, Any] = {}
        """Handles of safetensors for the files that were opened so far."""
        self._by_key: dict[str, list[StoredPiece]] = {}
        for stored in pieces:
            self._by_key.setdefault(stored.piece.key, []).append(stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._files.close()
        self._open.clear()

    def keys(self) -> Iterator[str]:
        return iter(self._by_key)

    def other(self, file: str, name: str) -> Tensor:
        """Returns a copy of a tensor that is no piece, by its name in `file`.

        A copy, because what safetensors gives is the mapped file: a bus error once somebody truncates it.
        """
        return self._handle(file).get_tensor(name).clone()

    def other_names(self, file: str) -> list[str]:
        handle = self._handle(file)
        pieces = {_piece(record).name for record in json.loads(handle.metadata()["pieces"])}
        return sorted(set(handle.keys()) - pieces)

    def read(self, wanted: Piece) -> Tensor:
        """Returns [stop - start] elements of `wanted`, in the stored type, to be copied before the reader is closed.

        Raises ShardError when they are not there.
        """
        stored = self._by_key.get(wanted.key)
        if stored is None:
            raise ShardError(f"there is no tensor {wanted.key}")
        there = stored[0].piece.global_shape
        if there != wanted.global_shape and not (wanted.padded and there[1:] == wanted.global_shape[1:]):
            raise ShardError(f"{wanted.key} has shape {list(there)} there and {list(wanted.global_shape)} here")
        same = [s for s in stored if s.piece.box == wanted.box]
        if same:
            return self._join(same, wanted.start, wanted.stop)
        return self._cut_from_boxes(stored, wanted)

    def _join(self, stored: Iterable[StoredPiece], start: int, stop: int) -> Tensor:
        """Returns elements [start, stop) of one box from its runs."""
        parts, position = [], start
        for s in sorted(stored, key=lambda s: s.piece.start):
            first, last = max(s.piece.start, position), min(s.piece.stop, stop)
            if first == position and first < last:
                run = self._handle(s.file).get_tensor(s.piece.name).view(-1)
                parts.append(run[first - s.piece.start : last - s.piece.start])
                position = last
        if position != stop:
            raise ShardError(f"{s.piece.key}: elements {position} to {stop} of a box are in no file")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def _cut_from_boxes(self, stored: list[StoredPiece], wanted: Piece) -> Tensor:
        """Returns the wanted box, filled from every stored box that overlaps it, then its run."""
        boxes: dict[tuple, list[StoredPiece]] = {}
        for s in stored:
            boxes.setdefault(s.piece.box, []).append(s)
        result, filled = None, 0
        for (offset, shape), runs in boxes.items():
            low = [max(a, b) for a, b in zip(offset, wanted.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, *wanted.box, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            box = self._join(runs, 0, math.prod(shape)).view(shape)
            if result is None:
                result = torch.zeros(wanted.shape, dtype=box.dtype)
            result[_slices(low, high, wanted.offset)] = box[_slices(low, high, offset)]
            filled += math.prod(b - a for a, b in zip(low, high, strict=True))
        missing = math.prod(wanted.shape) - filled
        if missing and not wanted.padded:
            raise ShardError(f"{wanted.key}: {missing} of {math.prod(wanted.shape)} elements of a box are in no file")
        if result is None:
            return torch.zeros(wanted.stop - wanted.start)
        return result.view(-1)[wanted.start : wanted.stop]

    def _handle(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._files.enter_context(safe_open(self.folder / name, "pt"))
        return self._open[name]


def _slices(low: list[int], high: list[int], offset: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))


def _piece(record: Mapping[str, Any]) -> Piece:
    return Piece(
        key=record["key"],
        global_shape=tuple(record["global_shape"]),
        offset=tuple(record["offset"]),
        shape=tuple(record["shape"]),
        start=record["start"],
        stop=record["stop"],
        padded=record["padded"],
    )
