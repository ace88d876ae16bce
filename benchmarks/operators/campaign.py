"""Measures one operator at one shape: checks every peer, then times all of them and the roof in turn."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import asdict, dataclass

import torch

from benchmarks.operators import results
from benchmarks.operators.catalog import OPERATORS, Operator
from benchmarks.operators.inputs import Inputs, refresh, with_working_copy
from benchmarks.operators.peers import OURS, Peer
from benchmarks.operators.results import Status
from benchmarks.operators.roof import Roof, bandwidth, gemms, roof_seconds
from benchmarks.operators.shapes import Shape
from benchmarks.operators.timing import Runner, Sample, measure, peak_extra_bytes, release
from benchmarks.operators.verify import Answer, answer, bound, check_ours, difference

ROUNDS = (7, 30)  # at least and at most
ROUNDS_SECONDS = {"cuda": 5.0, "cpu": 15.0}  # seconds that the rounds of one case should take together


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    operator: Operator
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.operator.name}-{self.shape}-{str(self.dtype).removeprefix('torch.')}"


def cases(which: str, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Lists the cases of a set of shapes in the order of their worth, as a run with a budget needs it.

    The first shape of every operator comes first, then the second of every operator. Operators and shapes stand in that
    order in `catalog.OPERATORS` and in `shapes`.
    """
    depth = max(len(operator.shapes(which)) for operator in OPERATORS)
    return [
        Case(operator=operator, shape=operator.shapes(which)[i], dtype=dtype, device=device)
        for i in range(depth)
        for operator in OPERATORS
        if i < len(operator.shapes(which))
    ]


def blank(peer: Peer, status: Status, reason: str) -> dict:
    """Makes the row of a peer that was not timed, and says why."""
    return {"peer": peer.name, "version": peer.version(), "note": peer.note, "status": status, "reason": reason}


def run_case(case: Case, rounds: int | None = None, clock: str = "wall") -> dict:
    """Returns one entry of the results. With `rounds` None it runs as many as fit ROUNDS_SECONDS.

    Raises AssertionError if the answer of ours is wrong.
    """
    with contextlib.ExitStack() as sessions:
        return _run_case(case, rounds, clock, sessions)


def _run_case(case: Case, rounds: int | None, clock: str, sessions: contextlib.ExitStack) -> dict:
    off = check_ours(case.operator, case.dtype, case.device)
    pristine = case.operator.inputs(case.shape, case.dtype, case.device)
    inplace = any(peer.inplace for peer in case.operator.peers)
    working = with_working_copy(pristine) if inplace else pristine
    # The roofs come first: a peer for which their buffers leave too little memory then fails here, and alone.
    memory, products = bandwidth(case.device), _gemms(case)
    rows, runners = [], {}
    ours = None
    for peer in case.operator.peers:
        runner = _runner(case.operator, peer, pristine, working)
        row, got = _check(case, peer, runner, working if peer.inplace else pristine, ours, sessions)
        rows.append(row)
        ours = ours or got
        if row["status"] == Status.MEASURED:
            runners[peer.name] = runner
        release(case.device)
    roofs = {**memory, **products}
    every = {**runners, **{name: roof.runner for name, roof in roofs.items()}}
    round_seconds = sum(row.pop("warm_seconds", 0) for row in rows)
    if rounds is None:
        low, high = ROUNDS
        rounds = max(low, min(high, int(ROUNDS_SECONDS[case.device.type] / round_seconds)))
    samples = measure(every, rounds, case.device, clock)
    return {**_report(case, rows, samples, roofs, products or memory, off.value), "clock": clock}


def _gemms(case: Case) -> dict[str, Roof]:
    if not case.operator.linear:
        return {}
    return gemms(case.shape, case.dtype, case.device, case.operator.backward)


def _runner(operator: Operator, peer: Peer, pristine: Inputs, working: Inputs) -> Runner:
    if not peer.inplace:
        return Runner(run=lambda: operator.call(peer, pristine))
    return Runner(run=lambda: operator.call(peer, working), prepare=lambda: refresh(working, pristine))


def _check(
    case: Case, peer: Peer, runner: Runner, inputs: Inputs, ours: Answer | None, sessions: contextlib.ExitStack
) -> tuple[dict, Answer | None]:
    """(The peer's row so far, its answer): runs it three times, for its answer, its memory and its rough time."""
    obstacle = peer.obstacle(case.device, case.dtype, case.shape.vocab)
    if obstacle:
        return blank(peer, *obstacle), None
    try:
        sessions.enter_context(peer.session(case.device))
        runner.prepare()
        got = answer(case.operator, peer, inputs)
        row = blank(peer, Status.MEASURED, "")
        if ours is not None:
            off = difference(got, ours)
            row["difference"] = {"value": off.value, "gradient": off.gradient}
            if off.exceeds(bound(case.operator, case.dtype, peer)):
                return blank(peer, Status.WRONG, f"differs from lens_kernels: {off}"), None
        row["peak_extra_bytes"] = peak_extra_bytes(runner, case.device)
        runner.prepare()
        start = time.perf_counter()
        runner.run()
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        row["warm_seconds"] = time.perf_counter() - start
        return row, got
    except Exception as error:  # another library's failure must cost its own row only
        if ours is None:
            raise
        return blank(peer, Status.FAILED, _reason(error)), None


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"


def _report(
    case: Case, rows: list[dict], samples: dict[str, list[Sample]], roofs: dict, limits: dict, off: float
) -> dict:
    seconds = {name: [sample.seconds for sample in taken] for name, taken in samples.items()}
    work = case.operator.work(case.shape, case.dtype)
    least = roof_seconds(limits, seconds, work)
    for row in rows:
        if row["status"] == Status.MEASURED:
            row |= _times(samples[row["peer"]])
            row["rate"] = work / row["seconds"]["median"]
            row["roof_fraction"] = least / row["seconds"]["median"]
    shape, itemsize = case.shape, case.dtype.itemsize
    return {
        "case": str(case),
        "operator": case.operator.name,
        "backward": case.operator.backward,
        "shape": {"T": shape.rows, "V": shape.vocab, "H": shape.hidden, "TP": shape.tensor_parallel},
        "dtype": str(case.dtype).removeprefix("torch."),
        "unit": "FLOP/s" if case.operator.linear else "B/s",
        "work": work,
        "logits_bytes": shape.rows * shape.vocab * itemsize,
        "roof_seconds": least,
        "roof": {
            name: {"rate": roof.amount / statistics.median(seconds[name]), "seconds": spread(seconds[name])}
            for name, roof in roofs.items()
        },
        "ours_from_float64": off,
        "rows": rows,
        "comparison": asdict(results.compare(rows, OURS)),
    }


def _times(samples: list[Sample]) -> dict:
    """The host's seconds are None on a CPU; `host_hidden` is the share of rounds without waiting for the host."""
    host = [sample.host_seconds for sample in samples if sample.host_seconds is not None]
    return {
        "seconds": spread([sample.seconds for sample in samples]),
        "host_seconds": spread(host) if host else None,
        "host_hidden": sum(sample.hidden for sample in samples) / len(samples),
    }


def spread(seconds: list[float]) -> dict:
    """Median, quartiles, extremes, and every round in the order it was run."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {
        "median": median,
        "quartiles": [low, high],
        "min": min(seconds),
        "max": max(seconds),
        "rounds": [float(f"{x:.4g}") for x in seconds],
    }
