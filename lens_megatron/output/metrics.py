"""Names and computes all metrics, reduces them over data-parallel ranks, and writes JSONL, trackers and console.

Names are verl's, plus `lens/*`. Every rank adds the same names in the same order, so a step costs one sum and one max.
"""

import json
import math
import resource
import statistics
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from lens_megatron.algorithms.mismatch import mismatch, pooled
from lens_megatron.output.second_wave_metrics import tally_second_waves
from lens_megatron.output.side_log import SideLog
from lens_megatron.output.tally import Metrics as Metrics
from lens_megatron.output.tally import Tally
from lens_megatron.output.trackers.tracker import Tracker
from lens_megatron.results import (
    MismatchSums,
    Outcome,
    RescuedRatios,
    SamplingStats,
    StepResult,
    SyncStats,
    UpdateStats,
)
from lens_megatron.reward.types import GradeStatus

MISMATCH_WARNING, MISMATCH_ALARM = 0.005, 0.01
"""Mean |probability difference| of engine and trainer. Users of verl regard 0.01 as the highest healthy value."""


def accuracy_name(source: str, samples: int) -> str:
    return f"val-core/{source}/acc/mean@{samples}"


def best_model_metric(evaluated: Metrics, name: str | None) -> float | None:
    """Returns the metric `name`, or the mean of all accuracies, which ranks checkpoints; None without an evaluation."""
    scores = [value for key, value in evaluated.items() if key.startswith("val-core/") and name in (None, key)]
    return sum(scores) / len(scores) if scores else None


def tally_step(result: StepResult) -> Tally:
    """Tallies this data-parallel rank's groups, samples and rollouts."""
    tally = Tally()
    native = [r for g in result.groups for r in g.group.native]
    rescue = [r for g in result.groups for r in g.group.rescue]
    tally.spread("critic/score", [float(r.correct) for r in native])
    tally.spread("critic/rewards", [r.reward for r in native])
    tally.spread("critic/advantages", [s.advantage for s in result.samples])
    tally.spread("response_length", [float(len(r.token_ids)) for r in native])
    tally.mean("response_length/clip_ratio", [float(not r.finished) for r in native])
    tally.spread(
        "training/rollout_staleness", [float(result.weight_version - r.weight_version) for r in native + rescue]
    )
    tally.spread("prompt_length", [float(len(g.group.prompt.token_ids)) for g in result.groups])
    for status in GradeStatus:
        tally.mean(f"reward/{status}_rate", [float(r.status is status) for r in native + rescue])
    trained = [s for s in result.samples if s.keep]
    tally.total("perf/total_num_tokens", sum(len(s.prompt) + len(s.rollout.token_ids) for s in trained))
    packings = result.packings
    tally.share("perf/padding_waste", sum(p.padding for p in packings), sum(p.rows for p in packings))
    tally.mean("perf/imbalance", [p.imbalance for p in packings])
    tally_second_waves(tally, (*result.groups, *result.rejected))
    return tally


def update_metrics(updates: tuple[UpdateStats, ...], kl_coef: float) -> Metrics:
    """Returns means over the step's optimizer updates, which are already global."""
    if not updates:
        return {}

    def mean(name: str) -> float:
        return sum(getattr(u, name) for u in updates) / len(updates)

    return rescued_metrics([u.rescued for u in updates]) | {
        "actor/loss": mean("loss"),
        "actor/pg_loss": mean("policy_loss"),
        "actor/kl_loss": mean("kl"),
        "actor/kl_coef": kl_coef,
        "actor/entropy": mean("entropy"),
        "actor/ppo_kl": mean("ppo_kl"),
        "actor/pg_clipfrac": mean("clip_fraction"),
        "actor/ratio_min": min(u.ratio_min for u in updates),
        "actor/ratio_max": max(u.ratio_max for u in updates),
        "actor/grad_norm": mean("grad_norm"),
        "actor/lr": updates[-1].learning_rate,
        "actor/skipped_updates": float(sum(u.skipped for u in updates)),
        "lens/clip_fraction_rescued": mean("clip_fraction_rescued"),
        "lens/abs_log_ratio_rescued": mean("abs_log_ratio_rescued"),
    }


def rescued_metrics(updates: Sequence[RescuedRatios]) -> Metrics:
    """Returns what the original prompt leaves of rescued responses, over all of the step's updates and ranks.

    With rho_t = pi(y_t | x) / pi_old(y_t | x') for the original prompt x and the purified one x':

    * `lens/rho_min` is the mean over responses of their least rho, `lens/rho_min_median` the median;
    * `lens/rho_product` is the median over responses of the product of rho, whose mean a few responses would decide;
    * `lens/rescued_gradient_share` is sum |g_t| / sum |g'_t| over tokens, g_t being the derivative of the weighted
      policy loss by log pi(y_t | x), with 0 where a clip holds, and g'_t what it would be with every ratio at 1. It is
      1 where nothing is lost, and may exceed 1 in the acl form, whose ratio contains 1 / w~.

    A step without rescued responses has none of them. One whose rescued responses have advantages of 0 alone has no
    share.
    """
    least, products = ([value for u in updates for value in getattr(u, name)] for name in ("least", "products"))
    if not least:
        return {}
    found = {
        "lens/rho_min": math.fsum(least) / len(least),
        "lens/rho_min_median": statistics.median(least),
        "lens/rho_product": statistics.median(products),
    }
    on_policy = sum(u.on_policy_gradient for u in updates)
    if on_policy:
        found["lens/rescued_gradient_share"] = sum(u.gradient for u in updates) / on_policy
    return found


def mismatch_metrics(updates: tuple[UpdateStats, ...], correction: str) -> Metrics:
    """Compares engine and trainer over all tokens of the step's samples, and over native and rescued ones.

    Names are verl's, with the suffixes _native and _rescued. Rows without tokens have no metrics. All are global.
    """
    native, rescued = (pooled(getattr(u, f"mismatch_{origin}") for u in updates) for origin in ("native", "rescued"))
    parts = {"": pooled((native, rescued)), "_native": native, "_rescued": rescued}
    found: Metrics = {}
    for suffix, sums in parts.items():
        if sums.tokens:
            found |= {f"{name}{suffix}": value for name, value in _mismatch_values(sums, correction).items()}
    return found


def _mismatch_values(sums: MismatchSums, correction: str) -> Metrics:
    values = mismatch(sums)
    found = {
        "training/rollout_probs_diff_mean": values.mean,
        "training/rollout_probs_diff_max": values.largest,
        "training/rollout_probs_diff_std": values.std,
        "rollout_corr/kl": values.kl,
        "rollout_corr/k3_kl": values.k3,
    }
    if values.pearson is not None:
        found["training/rollout_actor_probs_pearson_corr"] = values.pearson
    if correction != "none":
        limited = "rollout_rs_masked_fraction" if correction.endswith("mask") else "rollout_is_ratio_fraction_high"
        found |= {"rollout_corr/rollout_is_mean": values.weight, f"rollout_corr/{limited}": values.limited}
    return found


def mismatch_warning(metrics: Metrics, correction: str) -> str | None:
    """Returns a warning where engine and trainer differ too much on native or on rescued rows, else None."""
    name = "training/rollout_probs_diff_mean"
    means = {origin: metrics[f"{name}_{origin}"] for origin in ("native", "rescued") if f"{name}_{origin}" in metrics}
    # The comparison counts a mean that is not a number as too large.
    over = {origin: mean for origin, mean in means.items() if not mean < MISMATCH_WARNING}
    if not over:
        return None
    alarm = any(not mean < MISMATCH_ALARM for mean in over.values())
    head = f"!!! ALARM (limit {MISMATCH_ALARM})" if alarm else f"mismatch (limit {MISMATCH_WARNING})"
    shown = ", ".join(f"{mean:.4f} on {origin} rows" for origin, mean in over.items())
    remedy = "compare dtype, temperature and weight version of engine and trainer"
    if correction == "none":
        remedy += ", or set algorithm.correction=token_truncate"
    return f"{head}: engine and trainer disagree on the sampled tokens' probabilities by {shown}; {remedy}"


def selection_metrics(outcomes: Sequence[Outcome], discarded_tokens: float) -> Metrics:
    """Returns what was sampled in a step: candidates, how many of their groups were kept, and tokens of responses.

    Args:
        outcomes: those of all ranks.
        discarded_tokens: tokens that were sampled on all ranks and belong to no group.
    """
    kept, tokens = sum(o.kept for o in outcomes), sum(o.native_tokens + o.rescue_tokens for o in outcomes)
    return {
        "selection/candidates": float(len(outcomes)),
        "selection/kept": float(kept),
        "selection/rejected": float(len(outcomes) - kept),
        "selection/pass_rate": kept / len(outcomes) if outcomes else 0.0,
        "perf/generated_tokens": tokens + discarded_tokens,
    }


def sampling_metrics(stats: SamplingStats, device: torch.device, ranks_per_engine: int = 1) -> Metrics:
    """Returns the sampling metrics of all engines, each from the first of its consecutive ranks. A collective.

    An engine is idle while it runs no step: it waits for graders, or for the engine whose share takes longest.
    """
    own = torch.tensor(astuple(stats), dtype=torch.float64, device=device)
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, own)
    seconds, engine, second, early, discarded, regraded = torch.stack(every[::ranks_per_engine]).T.tolist()
    idle = [1 - busy / max(seconds) if max(seconds) else 0.0 for busy in engine]
    return {
        "perf/engine_idle_share/mean": sum(idle) / len(idle),
        "perf/engine_idle_share/max": max(idle),
        "perf/engine_idle_share/min": min(idle),
        "timing_s/second_wave": max(second),
        "lens/early_decisions": sum(early),
        "lens/discarded_tokens": sum(discarded),
        "reward/regraded": sum(regraded),
    }


def sync_metrics(sync: SyncStats | None) -> Metrics:
    """Returns what a transfer of weights to the engine took on this rank; the last metric is the same on every rank.

    A step or an evaluation without a transfer used weights that the engine had already, and has no such metrics.
    """
    if sync is None:
        return {}
    return {
        "perf/weight_sync_bytes": sync.bytes,
        "perf/weight_sync_received_bytes": sync.received_bytes,
        "perf/weight_sync_gb_per_s": sync.gb_per_s,
        "training/sync_log_prob_diff": sync.sync_difference,
    }


def time_metrics(seconds: dict[str, float], metrics: Metrics, world_size: int) -> Metrics:
    """Returns timing_s/* and perf/*, where memory is this process's peak.

    Tokens are those of the samples that are trained on, prompts included: per second of the step and rank (verl's
    `perf/throughput`), and of all ranks per second of the updates alone.
    """
    total, update = seconds.get("step", 0.0), seconds.get("update_actor", 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    timing = {f"timing_s/{phase}": value for phase, value in seconds.items()}
    tokens = metrics.get("perf/total_num_tokens", 0.0)
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return timing | {
        "perf/time_per_step": total,
        "perf/throughput": tokens / total / world_size if total else 0.0,
        "perf/update_tokens_per_s": tokens / update if update else 0.0,
        "perf/cpu_memory_used_gb": peak,
        "perf/max_memory_allocated_gb": gpu,
    }


def with_more_seconds(metrics: Metrics, seconds: dict[str, float]) -> Metrics:
    """Returns the timing_s/* of `metrics`, with `seconds` added, for phases that went on after they were taken."""
    names = {phase: f"timing_s/{phase}" for phase in seconds}
    return {name: metrics.get(name, 0.0) + seconds[phase] for phase, name in names.items()}


class MetricsWriter:
    """Appends to metrics.jsonl and to trackers. When a run resumes, lines of steps that will be repeated are dropped.

    No error of the disk ends the run: see `side_log.SideLog`.

    Args:
        trackers: they get every metric too, and are closed with the writer. They must not raise: see `GuardedTracker`.
    """

    def __init__(self, folder: Path, *, first_step: int, trackers: Sequence[Tracker] = ()):
        self._last: dict = {}
        try:
            rows = [row for row in read_metrics(folder) if row["step"] < first_step]
            self._last, kept = (rows or [{}])[-1], b"".join(map(_line, rows))
        except OSError:
            kept = None  # a file that cannot be read must not be replaced; readers take the last row of a step
        self.rows = SideLog(folder / "metrics.jsonl", kept)
        self.trackers = trackers

    def write(self, step: int, metrics: Metrics) -> None:
        self._last = {"step": step, **metrics}
        self.rows.append(_line(self._last))
        self._show(step, metrics)

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds metrics to the row of `step`, which is the last one, or begins that row."""
        if self._last.get("step") != step:
            self.write(step, metrics)
            return
        self._last |= metrics
        self.rows.replace_last(_line(self._last))
        self._show(step, metrics)

    def _show(self, step: int, metrics: Metrics) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        self.rows.close()
        for tracker in self.trackers:
            tracker.close()


def _line(row: dict) -> bytes:
    return json.dumps(row).encode() + b"\n"


def read_metrics(folder: Path) -> list[dict]:
    """Returns the last row of each step in metrics.jsonl. Raises OSError where the file exists and cannot be read.

    Lines that are no rows, as a killed writer or a broken disk leaves them, are ignored.
    """
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows: dict[int, dict] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.pop(row["step"], None)
            rows[row["step"]] = row
    return list(rows.values())


def console_line(step: int, steps: int, metrics: Metrics) -> str:
    """Returns the line per iteration that Megatron prints."""
    fields = [
        f"iteration {step:6d}/{steps:6d}",
        f"reward: {metrics['critic/rewards/mean']:.3f}",
        f"resp len: {metrics['response_length/mean']:.1f}",
    ]
    if "actor/loss" in metrics:
        fields += [
            f"loss: {metrics['actor/loss']:+.4E}",
            f"kl: {metrics['actor/kl_loss']:.2E}",
            f"entropy: {metrics['actor/entropy']:.3f}",
            f"grad norm: {metrics['actor/grad_norm']:.3f}",
            f"learning rate: {metrics['actor/lr']:.2E}",
        ]
    fields += [
        f"purified: {metrics['lens/purified_rate']:.2f}",
        f"rescued: {metrics['lens/rescued_rate']:.2f}",
        f"elapsed time per iteration (ms): {metrics['timing_s/step'] * 1000:.1f}",
        f"tokens/s/rank: {metrics['perf/throughput']:.0f}",
    ]
    return " " + " | ".join(fields) + " |"
