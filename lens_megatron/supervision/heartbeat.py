"""Describes how far every rank is, and finds from that which rank is late."""

import json
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType

import torch

from lens_megatron.supervision.clock import PhasePosition

UNCOUNTED = "uncounted"
"""The description of a group whose collectives do not show how far a rank is."""
SHOWN = 32
"""Number of ranks that a report on the console lists; the file lists all."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Says which line and phase a rank was in when it last reported.

    Example: Heartbeat(rank=3, step=12, phase="gen", seconds=71.2, changes=140, collectives={"0": 12, "4": 7},
    where="local.py:98 in _decode", waiting=False, answered=True).
    """

    rank: int
    step: int
    phase: str
    seconds: float
    """Seconds that the rank has spent in this phase."""
    changes: int
    """The value of `clock.PhasePosition.changes`."""
    collectives: dict[str, int]
    """Number of collectives begun, by name of the group."""
    where: str
    """The innermost Python line that the main thread executes."""
    waiting: bool
    """True if that line is one of torch.distributed's: the rank waits for others."""
    answered: bool = False
    """True if the rank wrote this after the alarm."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class LateRanks:
    ranks: tuple[int, ...]
    why: str


def take(rank: int, position: PhasePosition, seconds: float, *, answered: bool) -> Heartbeat:
    """Takes this process's heartbeat, from any thread. `seconds` have passed since `position`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return Heartbeat(
        rank=rank,
        step=position.step,
        phase=position.phase,
        seconds=round(seconds, 1),
        changes=position.changes,
        collectives=collectives_begun(),
        where=_describe(frame),
        waiting=_waits(frame),
        answered=answered,
    )


def collectives_begun() -> dict[str, int]:
    """Counts the collectives that each group has begun, by its name.

    Gloo and NCCL count them, but nothing public gives the count or names all groups.
    """
    world = torch.distributed.distributed_c10d._world
    counted = [group for group in list(world.pg_map) if group.group_desc != UNCOUNTED]
    # torch's stubs lack the method.
    return {group.group_name: group._get_sequence_number_for_group() for group in counted}  # type: ignore[attr-defined]


def late_ranks(beats: Sequence[Heartbeat | None]) -> LateRanks:
    """Finds the ranks that keep the others waiting; `beats[rank]` is None where a rank never wrote one.

    The first of these conditions that any rank meets decides: it does not answer; it is in an earlier phase; it has
    begun fewer collectives than others of its group and is ahead of nobody in any group (a rank that waits for the
    late one may be behind elsewhere); it does not wait.
    """
    silent = tuple(rank for rank, beat in enumerate(beats) if beat is None or not beat.answered)
    if silent:
        return LateRanks(silent, "did not answer: frozen, gone, or in C code that holds Python's lock")
    known = [beat for beat in beats if beat is not None]
    first = min(beat.changes for beat in known)
    if any(beat.changes > first for beat in known):
        return LateRanks(_ranks(beat for beat in known if beat.changes == first), "in an earlier phase than the others")
    most, least = _extremes(known)
    behind = [
        beat
        for beat in known
        if any(count < most[group] for group, count in beat.collectives.items())
        and all(count == least[group] for group, count in beat.collectives.items())
    ]
    if behind:
        return LateRanks(_ranks(behind), "others of its group have begun a collective that it has not")
    busy = [beat for beat in known if not beat.waiting]
    if busy and len(busy) < len(known):
        return LateRanks(_ranks(busy), "the others wait in torch.distributed, it does not")
    return LateRanks(_ranks(known), "all ranks are equally far")


def report(beats: Sequence[Heartbeat | None], limit: int | None = SHOWN) -> str:
    """Returns lines for people: the late ranks with the reason, then at most `limit` ranks, late ones first."""
    verdict = late_ranks(beats)
    late = [beats[rank] for rank in verdict.ranks]
    phases = sorted({f"{b.phase} of step {b.step}" if b else "an unknown phase" for b in late})
    names = ", ".join(map(str, verdict.ranks[:limit])) + ", ..." * (len(verdict.ranks) > len(verdict.ranks[:limit]))
    lines = [f"late: rank {names} in {', '.join(phases)} ({verdict.why})"]
    order = [*verdict.ranks, *sorted(set(range(len(beats))) - set(verdict.ranks))]
    lines += [_line(rank, beats[rank]) for rank in order[:limit]]
    if len(order) > len(order[:limit]):
        lines.append(f"  and {len(order) - len(order[:limit])} more")
    return "\n".join(lines)


def _line(rank: int, beat: Heartbeat | None) -> str:
    if beat is None:
        return f"  rank {rank}: never heard of"
    doing = "waits in" if beat.waiting else "at"
    silent = "" if beat.answered else " when last heard of"
    return f"  rank {rank}: step {beat.step}, {beat.phase} for {beat.seconds} s{silent}, {doing} {beat.where}"


def _extremes(beats: Sequence[Heartbeat]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the most and the fewest collectives that any member of each group has begun."""
    most: dict[str, int] = {}
    least: dict[str, int] = {}
    for beat in beats:
        for group, count in beat.collectives.items():
            most[group], least[group] = max(count, most.get(group, count)), min(count, least.get(group, count))
    return most, least


def _ranks(beats: Iterable[Heartbeat]) -> tuple[int, ...]:
    return tuple(beat.rank for beat in beats)


def _describe(frame: FrameType | None) -> str:
    if frame is None:
        return "no Python line"
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"


def _waits(frame: FrameType | None) -> bool:
    path = frame.f_code.co_filename if frame else ""
    return "torch/distributed/" in path or path.endswith("p2p_communication.py")
