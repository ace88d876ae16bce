"""Measures one operator at one shape: checks every peer, then times all of them and the roof in turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.operators.catalog import Operator
from benchmarks.operators.inputs import Inputs, refresh, with_working_copy
from benchmarks.operators.peers import Peer
from benchmarks.operators.roof import Roof, bandwidth, gemms
from benchmarks.operators.shapes import Shape
from benchmarks.operators.timing import Runner, measure, peak_extra_bytes, release
from benchmarks.operators.verify import Answer, answer, bound, check_ours, difference

MEASURED = "measured"
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


def blank(peer: Peer, status: str, reason: str) -> dict:
    """Makes the row of a peer that was not timed: skipped, wrong or failed, and why."""
    return {"peer": peer.name, "version": peer.version(), "note": peer.note, "status": status, "reason": reason}


def run_case(case: Case, rounds: int | None = None, clock: str = "wall") -> dict:
    """Returns one entry of the results. With `rounds` None it runs as many as fit ROUNDS_SECONDS.

    Raises AssertionError if the answer of ours is wrong.
    """
    off = check_ours(case.operator, case.dtype, case.device)
    pristine = case.operator.inputs(case.shape, case.dtype, case.device)
    inplace = any(peer.inplace for peer in case.operator.peers)
    working = with_working_copy(pristine) if inplace else pristine
    rows, runners = [], {}
    ours = None
    for peer in case.operator.peers:
        runner = _runner(case.operator, peer, pristine, working)
        row, got = _check(case, peer, runner, working if peer.inplace else pristine, ours)
        rows.append(row)
        ours = ours or got
        if row["status"] == MEASURED:
            runners[peer.name] = runner
        release(case.device)
    roofs = {**bandwidth(case.device), **_gemms(case)}
    every = {**runners, **{name: roof.runner for name, roof in roofs.items()}}
    round_seconds = sum(row.pop("warm_seconds", 0) for row in rows)
    if rounds is None:
        low, high = ROUNDS
        rounds = max(low, min(high, int(ROUNDS_SECONDS[case.device.type] / round_seconds)))
    seconds = measure(every, rounds, case.device, clock)
    return {**_report(case, rows, seconds, roofs, off.value), "clock": clock}


def _gemms(case: Case) -> dict[str, Roof]:
    if not case.operator.linear:
        return {}
    return gemms(case.shape, case.dtype, case.device, case.operator.backward)


def _runner(operator: Operator, peer: Peer, pristine: Inputs, working: Inputs) -> Runner:
    if not peer.inplace:
        return Runner(run=lambda: operator.call(peer, pristine))
    return Runner(run=lambda: operator.call(peer, working), prepare=lambda: refresh(working, pristine))


def _check(case: Case, peer: Peer, runner: Runner, inputs: Inputs, ours: Answer | None) -> tuple[dict, Answer | None]:
    """(The peer's row so far, its answer): runs it three times, for its answer, its memory and its rough time."""
    obstacle = peer.obstacle(case.device)
    if obstacle:
        return blank(peer, "skipped", obstacle), None
    try:
        runner.prepare()
        got = answer(case.operator, peer, inputs)
        row = blank(peer, MEASURED, "")
        if ours is not None:
            off = difference(got, ours)
            row["difference"] = {"value": off.value, "gradient": off.gradient}
            if off.exceeds(bound(case.operator, case.dtype)):
                return blank(peer, "wrong", f"differs from lens_kernels: {off}"), None
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
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        reason = str(error).strip().split("\n")[0][:200]
        return blank(peer, "failed", "out of memory" if out_of_memory else f"{type(error).__name__}: {reason}"), None


def _report(case: Case, rows: list[dict], seconds: dict, roofs: dict[str, Roof], off: float) -> dict:
    rates = {name: roof.amount / statistics.median(seconds[name]) for name, roof in roofs.items()}
    work = case.operator.work(case.shape, case.dtype)
    if case.operator.linear:
        of_gemms = [rate for name, rate in rates.items() if "gemm" in name]
        roof_seconds = sum(work / case.operator.passes / rate for rate in of_gemms)
    else:
        roof_seconds = work / rates["roof copy"]
    for row in rows:
        if row["status"] == MEASURED:
            taken = seconds[row["peer"]]
            row["seconds"] = spread(taken)
            row["rate"] = work / row["seconds"]["median"]
            row["roof_fraction"] = roof_seconds / row["seconds"]["median"]
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
        "roof_seconds": roof_seconds,
        "roof": {name: {"rate": rates[name], "seconds": spread(seconds[name])} for name in roofs},
        "ours_from_float64": off,
        "rows": rows,
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
