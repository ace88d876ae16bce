"""Frames between the trainer and a grading process: a 4-byte length, and a record as ASCII JSON.

trainer -> grading process     Submission, one for each answer
grading process -> trainer     Started first, so that the time of its start counts for no answer; then Grades
"""

import json
import struct
from dataclasses import dataclass, fields
from typing import BinaryIO

from lens_megatron.reward.types import AnswerFacts, Grade, GradeStatus, Submission

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Started:
    """The first frame of a grading process."""

    pid: int
    why_not: str = ""
    """The reason if the graders could not be loaded, else empty."""


def encode(content: Submission | Started | Grade) -> bytes:
    """Makes a frame. It is ASCII, so that lone surrogates are sent as escapes."""
    body = json.dumps(content, default=_fields).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def _fields(content: Submission | AnswerFacts | Started | Grade) -> dict[str, object]:
    # dataclasses.asdict would copy thousands of token ids one by one.
    return {field.name: getattr(content, field.name) for field in fields(content)}


def split(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Returns the bodies of the whole frames among the bytes that were received so far, and the bytes after them."""
    bodies = []
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            break
        bodies.append(buffer[_LENGTH.size : end])
        buffer = buffer[end:]
    return bodies, buffer


def read(stream: BinaryIO) -> bytes | None:
    """Reads one frame and returns its body. Returns None at the end of the stream."""
    header = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(header)[0]) if len(header) == _LENGTH.size else None


def decode_submission(body: bytes) -> Submission:
    content = json.loads(body)
    facts = content.pop("facts")
    return Submission(**content, facts=AnswerFacts(facts["source"], facts["record"], tuple(facts["token_ids"])))


def decode_started(body: bytes) -> Started:
    return Started(**json.loads(body))


def decode_grade(body: bytes) -> Grade:
    content = json.loads(body)
    return Grade(GradeStatus(content.pop("status")), **content)
