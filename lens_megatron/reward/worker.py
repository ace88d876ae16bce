"""The worker process: reads (completion, answer) frames from standard input, writes verdicts to standard output.

A frame is a 4-byte length and JSON. The first frame out is `ready` (or why not), so that start-up is never graded.
The process ends when its parent's pipe closes, however the parent died.
"""

import ctypes
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
"""Address space a grading may add before it counts as a crash."""


def read_frame(stream: BinaryIO) -> dict | None:
    """None at the end of the stream."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(struct.unpack("<I", header)[0]))


def encode_frame(content: dict) -> bytes:
    """ASCII JSON, so that lone surrogates travel as escapes."""
    body = json.dumps(content).encode("ascii")
    return struct.pack("<I", len(body)) + body


def split_frames(buffer: bytes) -> tuple[list[dict], bytes]:
    """(whole frames, the rest) of bytes received so far."""
    frames = []
    while len(buffer) >= 4 and len(buffer) >= 4 + (size := struct.unpack_from("<I", buffer)[0]):
        frames.append(json.loads(buffer[4 : 4 + size]))
        buffer = buffer[4 + size :]
    return frames, buffer


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(grader_name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        _die_with_parent()
    frames_in = os.fdopen(os.dup(0), "rb")
    frames_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a grader prints must not look like a frame
    try:
        grader = load_grader(grader_name)
        if sys.platform == "linux":
            _limit_memory()
        answer = {"ready": True}
    except Exception as error:  # whatever a user's module raises, the trainer shows it
        answer = {"ready": False, "why": f"{type(error).__name__}: {error}"}
    frames_out.write(encode_frame(answer))
    frames_out.flush()
    while answer["ready"] and (task := read_frame(frames_in)) is not None:
        frames_out.write(encode_frame(_grade(grader, task)))
        frames_out.flush()


def _grade(grader: Grader, task: dict) -> dict:
    start = time.monotonic()
    try:
        verdict = grader(task["completion"], task["answer"], task["meta"])
    except (Exception, MemoryError) as error:  # a grader's failure is a status of the sample, not of the run
        verdict = Verdict(GradeStatus.CRASH, 0.0, None, f"{type(error).__name__}: {error}"[:500])
    return {
        "status": verdict.status,
        "score": verdict.score,
        "extracted": verdict.extracted,
        "detail": verdict.detail,
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    main(sys.argv[1])
