"""Keeps graded samples on disk as they come, so that an interrupted evaluation goes on where it stopped.

    evaluation.json   what was evaluated how: protocol, model, data; it is written first
    samples.jsonl     one graded completion a line, in the order of their grading; only ever appended to

A folder holds samples of one protocol, model, grader and seed. Others are refused, because their samples would be
counted together. Benchmarks and problems may be added.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lens_megatron.errors import UserError
from lens_megatron.files import append_whole, write_atomically
from lens_megatron.reward.types import GradeStatus

IDENTITY, SAMPLES = "evaluation.json", "samples.jsonl"


class EvaluationFolderError(UserError):
    """The folder of an evaluation cannot be used for this one."""


@dataclass(frozen=True, slots=True)
class EvalSample:
    """A graded completion."""

    benchmark: str
    problem: str
    """The problem's id."""
    sample: int
    """The sample's number, from 0."""
    status: GradeStatus
    extracted: str | None
    """The answer that was read."""
    tokens: int
    finished: bool
    """False where it was cut off at the most tokens."""
    certainty: float | None
    """Mean self-certainty; None where the engine does not report it."""
    detail: str
    """Why it was graded so, where the status does not say it."""
    text: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.problem, self.sample


@dataclass(frozen=True, slots=True)
class EvaluationIdentity:
    """What all samples of a folder have in common."""

    protocol: str
    """The protocol's name, for people."""
    protocol_hash: str
    settings: str
    """The protocol's canonical JSON."""
    model: str
    """The model's folder, for people."""
    fingerprint: str
    """Changes with the model's weights, configuration and tokenizer."""
    engine: str
    dtype: str
    grader: str
    seed: int
    digests: tuple[tuple[str, str], ...]
    """The data's digest by benchmark."""

    def _compared(self) -> tuple[tuple[str, object, str], ...]:
        """Returns what must be equal in a folder: its label, its value, and how a message shows it."""
        return (
            ("protocol", self.protocol_hash, f"{self.protocol} {self.protocol_hash}"),
            ("model", self.fingerprint, f"{self.model} ({self.fingerprint})"),
            ("engine", self.engine, self.engine),
            ("dtype", self.dtype, self.dtype),
            ("grader", self.grader, self.grader),
            ("seed", self.seed, str(self.seed)),
        )

    def clash(self, other: "EvaluationIdentity") -> str:
        """Returns what keeps samples of the two apart, with both values; empty if they may be counted together."""
        for (label, mine, shown), (_, theirs, other_shown) in zip(self._compared(), other._compared(), strict=True):
            if mine != theirs:
                return f"{label} {other_shown}, and not {shown}"
        old = dict(other.digests)
        for benchmark, digest in self.digests:
            if old.get(benchmark, digest) != digest:
                return f"other problems or answers of {benchmark} (digest {old[benchmark]}, and not {digest})"
        return ""

    def joined(self, other: "EvaluationIdentity") -> "EvaluationIdentity":
        """Returns this identity with the benchmarks of both."""
        return replace(self, digests=tuple(sorted({*other.digests, *self.digests})))


def identity_to_json(identity: EvaluationIdentity) -> str:
    content = asdict(identity) | {"settings": json.loads(identity.settings), "digests": dict(identity.digests)}
    return json.dumps(content, indent=1) + "\n"


def read_identity(folder: Path) -> EvaluationIdentity | None:
    """Returns the identity of a folder's samples, None without a file. Raises EvaluationFolderError if it is broken."""
    path = folder / IDENTITY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = json.dumps(content["settings"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        known = {field.name: content[field.name] for field in fields(EvaluationIdentity)}
        return EvaluationIdentity(
            **known | {"settings": settings, "digests": tuple(sorted(content["digests"].items()))}
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationFolderError(
            f"{path}: cannot be read: {type(error).__name__}: {error}; choose another folder with --out"
        ) from error


def read_samples(folder: Path) -> dict[tuple[str, str, int], EvalSample]:
    """Returns the folder's samples by their keys. A last line that is not whole is ignored.

    Raises EvaluationFolderError for any other line that is no sample.
    """
    path = folder / SAMPLES
    found: dict[tuple[str, str, int], EvalSample] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    sample = _sample(line, path, number)
                    found[sample.key] = sample
    except FileNotFoundError:
        pass
    except OSError as error:
        raise EvaluationFolderError(f"{path}: cannot be read: {error.strerror}; choose another folder") from error
    return found


def _sample(line: bytes, path: Path, number: int) -> EvalSample:
    try:
        content: Mapping[str, Any] = json.loads(line)
        known = {field.name: content[field.name] for field in fields(EvalSample)}
        return EvalSample(**known | {"status": GradeStatus(content["status"])})
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationFolderError(
            f"{path}:{number}: no sample of an evaluation ({type(error).__name__}: {error}); remove the line to sample "
            "it again, or choose another folder with --out"
        ) from error


class Journal:
    """Reads and appends the samples of a folder that this process alone writes to; see `open_journal`."""

    def __init__(self, folder: Path, samples: dict[tuple[str, str, int], EvalSample]):
        self.folder, self.samples = folder, samples

    def append(self, samples: Sequence[EvalSample]) -> None:
        """Writes samples, whole lines only. Raises EvaluationFolderError where the disk is full."""
        data = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples).encode("ascii")
        try:
            append_whole(self.folder / SAMPLES, data)
        except OSError as error:
            raise EvaluationFolderError(
                f"{self.folder / SAMPLES} cannot be written: {error.strerror}; make room: the same command goes on"
            ) from error
        self.samples |= {sample.key: sample for sample in samples}


@contextmanager
def open_journal(folder: Path, identity: EvaluationIdentity) -> Iterator[Journal]:
    """Takes the folder for this process, checks that its samples are of `identity`, and drops a line cut off by a kill.

    Raises EvaluationFolderError where another process has it, or it holds samples of another identity.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise EvaluationFolderError(f"--out {folder}: {error.strerror}; choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvaluationFolderError(
                f"--out {folder}: another evaluation writes there; wait for it, or choose another folder"
            ) from None
        earlier = read_identity(folder)
        if earlier and (why := identity.clash(earlier)):
            raise EvaluationFolderError(
                f"--out {folder} holds samples of another evaluation: {why}; choose another folder, or remove that one"
            )
        _drop_partial_line(folder / SAMPLES)
        samples = read_samples(folder)
        write_atomically(folder / IDENTITY, identity_to_json(identity.joined(earlier) if earlier else identity))
        yield Journal(folder, samples)


def _drop_partial_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        place, tail = size, b""
        while place and b"\n" not in tail:
            step = min(place, 1 << 16)
            place = file.seek(place - step)
            tail = file.read(step)
        kept = place + tail.rfind(b"\n") + 1 if b"\n" in tail else 0
        if kept < size:
            file.truncate(kept)
