"""Measures time and memory of callables in one process, in turn, so that drift of the machine affects all alike.

On CUDA, events around the call give seconds on the device. The host's launches count where they leave the device idle.
On a CPU it reads time.perf_counter, or on a machine that others use time.process_time, which does not count the time
they take. Before every call a buffer larger than the caches is overwritten.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    run: Callable[[], object]
    """The call that is timed. Its result is dropped outside the timed region."""
    prepare: Callable[[], None] = lambda: None
    """Runs before every call, untimed: it makes fresh logits for a peer that overwrites them."""


def measure(runners: dict[str, Runner], rounds: int, device: torch.device, clock: str) -> dict[str, list[float]]:
    """Returns seconds of every round by runner; each round calls every runner once. `clock` only matters on a CPU."""
    flush = torch.empty(CACHE_BYTES[device.type], dtype=torch.int8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            runner.prepare()
            flush.zero_()
            seconds[name].append(_seconds(runner.run, device, CLOCKS[clock]))
    return seconds


def _seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        result = run()
        stop = clock()
        del result
        return stop - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    del result
    return begin.elapsed_time(end) / 1e3  # milliseconds


def peak_extra_bytes(runner: Runner, device: torch.device) -> int:
    """Returns the most that one call holds beyond what was there before it, results included.

    CUDA: the caching allocator's peak; workspaces that a library allocates itself are not in it. CPU: the running sum
    of PyTorch's own allocations as torch.profiler records them, exact to the byte; scratch memory inside MKL is not in.
    """
    runner.prepare()
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = runner.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = runner.run()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def release(device: torch.device) -> None:
    """Gives back what the last peer left: a failed one's traceback may hold its tensors in a cycle."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


_replayed = 0.0


def replayed_time() -> float:
    """A clock for pytest-benchmark that stands still until `replay` moves it: its table shows our seconds."""
    return _replayed


def replay(seconds: float) -> None:
    global _replayed
    _replayed += seconds
