"""Measures time and memory of callables in one process, in turn, so that drift of the machine affects all alike.

On CUDA, events around the call give seconds on the device. A call of several kernels takes the host longer to launch
than a short case takes the device to run, and the device would wait between them. So the device sleeps first, for
longer than the host needs: by the time it wakes, all launches are queued, and the events enclose its work alone. The
host's own time is measured beside it and reported, since it counts wherever nothing else keeps the device busy.
On a CPU it reads time.perf_counter, or on a machine that others use time.process_time, which does not count the time
they take. Before every call a buffer larger than the caches is overwritten.
"""

from __future__ import annotations

import functools
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
FIRST_PAUSE, LONGEST_PAUSE = 5e-4, 2e-2
"""Seconds that the device sleeps before a call. A call that outlasts the longest waits for the device, or for a queue
that is full."""
PAUSE_MARGIN = 1.5
"""How many times the host's seconds a pause must last, since a launch takes longer in some rounds than in others."""
CALIBRATION_CYCLES = 10_000_000  # 5 ms at 2 GHz


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    run: Callable[[], object]
    """The call that is timed. Its result is dropped outside the timed region."""
    prepare: Callable[[], None] = lambda: None
    """Runs before every call, untimed: it makes fresh logits for a peer that overwrites them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timed call."""

    seconds: float
    """On CUDA those of the device, on a CPU those of the clock."""
    host_seconds: float | None = None
    """How long the call kept the host; None on a CPU. If the call waits for the device, that wait is in it."""
    hidden: bool = True
    """True if the host was done before the device woke, so that `seconds` contains no waiting for the host."""


def measure(runners: dict[str, Runner], rounds: int, device: torch.device, clock: str) -> dict[str, list[Sample]]:
    """Returns a sample of every round by runner; each round calls every runner once. `clock` only matters on a CPU."""
    flush = torch.empty(CACHE_BYTES[device.type], dtype=torch.int8, device=device)
    if device.type == "cuda":
        take = functools.partial(_cuda_sample, sleep_cycles=_sleep_rate())
    else:
        take = functools.partial(_cpu_sample, clock=CLOCKS[clock])

    def sample(runner: Runner, pause: float) -> Sample:
        runner.prepare()
        flush.zero_()
        return take(runner.run, pause)

    pauses = dict.fromkeys(runners, 0.0)
    if device.type == "cuda":
        pauses = {name: choose_pause(functools.partial(sample, runner)) for name, runner in runners.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            samples[name].append(sample(runner, pauses[name]))
    return samples


def choose_pause(sample: Callable[[float], Sample]) -> float:
    """Returns the seconds that the device should sleep before a call: enough to hide the host, or LONGEST_PAUSE.

    `sample` makes the call after such a pause. Its first call only warms up: it may load kernels and allocate memory.
    """
    sample(FIRST_PAUSE)
    pause = FIRST_PAUSE
    while pause < LONGEST_PAUSE:
        taken = sample(pause)
        if taken.hidden and taken.host_seconds * PAUSE_MARGIN <= pause:
            return pause
        pause = min(LONGEST_PAUSE, max(2 * pause, PAUSE_MARGIN * taken.host_seconds))
    return LONGEST_PAUSE


def _cuda_sample(run: Callable[[], object], pause: float, sleep_cycles: float) -> Sample:
    asleep, begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    queued = time.perf_counter()
    asleep.record()
    torch.cuda._sleep(int(pause * sleep_cycles))  # PyTorch has no public way to keep a stream busy without memory
    begin.record()
    start = time.perf_counter()
    result = run()
    end.record()
    done = time.perf_counter()
    torch.cuda.synchronize()
    del result
    slept = asleep.elapsed_time(begin) / 1e3  # milliseconds
    return Sample(seconds=begin.elapsed_time(end) / 1e3, host_seconds=done - start, hidden=done - queued < slept)


def _sleep_rate() -> float:
    """Measures the cycles per second that torch.cuda._sleep counts. The second of two sleeps runs at full clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CALIBRATION_CYCLES)
    begin.record()
    torch.cuda._sleep(CALIBRATION_CYCLES)
    end.record()
    torch.cuda.synchronize()
    return CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1e3)


def _cpu_sample(run: Callable[[], object], pause: float, clock: Callable[[], float]) -> Sample:
    start = clock()
    result = run()
    stop = clock()
    del result
    return Sample(seconds=stop - start)


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
