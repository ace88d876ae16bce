"""The worker process, which reads (completion, answer) frames from standard input and writes verdicts to its output.

A frame is a 4-byte length and JSON. The first frame that it writes is `ready` (or why it is not), so that the time of
its start counts for no answer. The keeper (keeper.py) forks this process and ends it.
"""

import json
import os
import resource
import signal
import struct
import sys
import time
from typing import BinaryIO

from lens_megatron.reward.registry import Grader, load_grader
from lens_megatron.reward.types import GradeStatus, Verdict

MEMORY_BYTES = 2 << 30
"""Bytes of address space that a grading process may add after its start. One that needs more counts as crashed."""


def read_frame(stream: BinaryIO) -> dict | None:
    """Reads one frame. Returns None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(struct.unpack("<I", header)[0]))


def encode_frame(content: dict) -> bytes:
    """Makes a frame of ASCII JSON, so that lone surrogates are sent as escapes."""
    body = json.dumps(content).encode("ascii")
    return struct.pack("<I", len(body)) + body


def split_frames(buffer: bytes) -> tuple[list[dict], bytes]:
    """Returns the whole frames among the bytes that were received so far, and the bytes after them."""
    frames = []
    while len(buffer) >= 4 and len(buffer) >= 4 + (size := struct.unpack_from("<I", buffer)[0]):
        frames.append(json.loads(buffer[4 : 4 + size]))
        buffer = buffer[4 + size :]
    return frames, buffer


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)


def main(grader_name: str) -> None:
    """Grades until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer
    own = os.getpid()
    frames_in, frames_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What a grader prints must not look like a frame, and a program that it starts must not read our frames.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        grader = load_grader(grader_name)
        if sys.platform == "linux":
            _limit_memory()
        hello: dict[str, object] = {"ready": True, "pid": own}
    except (Exception, SystemExit) as error:  # the trainer shows whatever a user's module raises
        hello = {"ready": False, "why": f"{type(error).__name__}: {error}"}
    _send(frames_out, hello)
    while hello["ready"] and (task := read_frame(frames_in)) is not None:
        answer = _grade(grader, task)
        if os.getpid() != own:
            os._exit(1)  # a process forked by the grader came back from it
        _send(frames_out, answer)


def _send(stream: BinaryIO, content: dict) -> None:
    stream.write(encode_frame(content))
    stream.flush()


def _grade(grader: Grader, task: dict) -> dict:
    start = time.monotonic()
    try:
        verdict = grader(task["completion"], task["answer"], task["meta"])
    except (Exception, SystemExit) as error:  # a grader's failure is a status of the sample, not of the run
        verdict = Verdict(GradeStatus.CRASH, 0.0, None, f"{type(error).__name__}: {error}"[:500])
    return {
        "status": verdict.status,
        "score": verdict.score,
        "extracted": verdict.extracted,
        "detail": verdict.detail,
        "seconds": time.monotonic() - start,
    }
