"""Measures the sampling time of LENS over GRPO by schedule of the second waves on a CPU, and simulates it for 8 A800.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout_schedule --out benchmarks/results/rollout_schedule_cpu_202611.json

It measures the real scheduler and the local engine with random weights. The runs of a seed have the same model, prompts
and verdicts, as far as they sample the same. The cost of the engine's steps is fitted on the first seeds and tried on
the others. It simulates the setting of LENS (arXiv 2601.21244), with the assumptions of benchmarks/sampling/work.py.
"""

import argparse
import json
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.operators.results import environment
from benchmarks.sampling import measured, work
from benchmarks.sampling.simulator import Cost, Setting, simulate
from lens_megatron.rollout.engine import RolloutEngine

VARIANTS = {
    "sequential": ("sequential", {}),
    "streamed": ("streamed", {}),
    "early": ("early", {}),
    **{f"speculative_{guess}": ("speculative", {"guess": guess}) for guess in (1,)},
    **{f"fill_{fill}": ("fill", {"fill": fill}) for fill in (32, 128, 256)},
}
SETTINGS = {
    "own_queues": {},
    "shared_queue": {"shared_queue": True},
    "48_places": {"capacity": 48},
    "48_places_shared_longest_first": {"capacity": 48, "shared_queue": True, "longest_first": True},
}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(size: measured.Size, seeds: int, calibration: int) -> dict:
    """Measures seconds of every schedule, and those that the fit and the simulator give for the same lengths."""
    with tempfile.TemporaryDirectory() as name:
        return measure_on(measured.make_engine(size, Path(name)), size, seeds, calibration)


def measure_on(engine: RolloutEngine, size: measured.Size, seeds: int, calibration: int) -> dict:
    """Measures the same on an engine that writes its steps down in `log`, as `measured.Timed` does."""
    measured.run(engine, size, 10_000, "sequential")  # the first run includes the warm-up of all
    runs = []
    for seed in tqdm(range(seeds), desc=size.name):
        runs.append({policy: measured.run(engine, size, seed, policy) for policy in measured.POLICIES})
    cost = measured.fit([row for run in runs[:calibration] for result in run.values() for row in result["log"]])
    rows = [{policy: describe(result, cost, policy) for policy, result in run.items()} for run in runs]
    for row, run in zip(rows, runs, strict=True):
        drawn = [drawn_tokens(run[policy]) for policy in list(measured.POLICIES)[1:]]
        row["same_groups"] = all(tokens == drawn[0] for tokens in drawn)
        row["hard"] = sum(bool(g.rescue) for g in run["sequential"]["groups"])
    return {"size": asdict(size), "cost": asdict(cost), "rows": rows, **summary(rows, calibration)}


def describe(result: dict, cost: Cost, policy: str) -> dict:
    return {
        "wall_s": result["wall_s"],
        "cpu_s": result["cpu_s"],
        "steps": len(result["log"]),
        "work_s": measured.work_seconds(result["log"], cost),
        "predicted_s": measured.predict(result["groups"], cost, policy),
        "tokens": sum(len(tokens) for group in drawn_tokens(result) for tokens in group),
        **asdict(result["stats"]),
    }


def drawn_tokens(result: dict) -> list[list[tuple[int, ...]]]:
    return [[r.token_ids for r in (*g.native, *g.rescue)] for g in result["groups"]]


def summary(rows: list[dict], calibration: int) -> dict:
    """Returns ratios to GRPO of the same seed, and the simulator's errors on seeds that the cost was not fitted on."""
    ratios = {
        key: {p: spread([r[p][key] / r["grpo"][key] for r in rows]) for p in list(measured.POLICIES)[1:]}
        for key in ("steps", "work_s", "cpu_s", "wall_s", "tokens")
    }
    tried = rows[calibration:]
    errors = {
        key: {p: spread([r[p]["predicted_s"] / r[p][key] - 1 for r in tried]) for p in measured.POLICIES}
        for key in ("work_s", "cpu_s")
    }
    return {"ratio_to_grpo": ratios, "prediction_error": errors}


def simulate_paper(seeds: int) -> list[dict]:
    small, large = work.MODELS
    cases = [(small, work.WORKS[0], "own_queues"), *((large, load, "own_queues") for load in work.WORKS)]
    cases += [(large, work.WORKS[0], name) for name in list(SETTINGS)[1:]]
    with ProcessPoolExecutor(4) as pool:
        running = [pool.submit(simulate_case, *case, seeds) for case in cases]
        return [case.result() for case in tqdm(running, desc="8 A800, simulated")]


def simulate_case(model: work.Model, load: work.Work, name: str, seeds: int) -> dict:
    base = replace(Setting(work.a800(model), engines=8, grading_s=work.GRADING_S), **SETTINGS[name])
    found: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    plain = []
    for seed in range(seeds):
        groups = work.draw(load, seed)
        grpo, training = simulate(groups, base, "grpo"), work.training_seconds(model, groups, base.engines)
        lengths = [n for g in groups for n, _ in g.native]
        plain.append({
            "sampling_s": grpo.seconds,
            "training_s": training,
            "idle_share": grpo.idle_share,
            "mean_length": statistics.mean(lengths),
            "cut": lengths.count(load.limit) / len(lengths),
        })  # fmt: skip
        for variant, (policy, options) in VARIANTS.items():
            lens = simulate(groups, replace(base, **options), policy)
            found[variant].append({
                "sampling_ratio": lens.seconds / grpo.seconds,
                "step_ratio": (lens.seconds + training) / (grpo.seconds + training),
                "token_ratio": (lens.generated_tokens) / grpo.generated_tokens,
                "first_wave_ratio": lens.first_wave_s / grpo.first_wave_s,
                "beyond_first_wave": max(0.0, lens.seconds - lens.first_wave_s) / grpo.seconds,
                "idle_share": lens.idle_share,
                "hard_share": lens.hard / len(groups),
                "early_share": lens.early / max(1, lens.hard),
                "wasted_share": lens.wasted_tokens / lens.generated_tokens,
                "peak_kv_gb": lens.peak_kv_tokens * model.kv_bytes_per_token / 1e9,
            })  # fmt: skip
    return {
        "model": model.name,
        "work": load.name,
        "setting": name,
        "grpo": {key: spread([row[key] for row in plain]) for key in plain[0]},
        **{variant: {key: spread([r[key] for r in rows]) for key in rows[0]} for variant, rows in found.items()},
    }


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--simulated-seeds", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=2, help="seeds, the first ones, that the cost is fitted on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = {
        "environment": environment(torch.device("cpu"), "benchmarks.rollout_schedule"),
        "load_average": os.getloadavg(),
        "assumed": {
            "works": [asdict(load) for load in work.WORKS],
            "models": [asdict(model) | {"cost": asdict(work.a800(model))} for model in work.MODELS],
            "bandwidth_share": work.BANDWIDTH_SHARE,
            "arithmetic_share": work.ARITHMETIC_SHARE,
            "training_share": work.TRAINING_SHARE,
            "grading_s": work.GRADING_S,
        },
        "simulated": simulate_paper(options.simulated_seeds),
        "measured": [measure(size, options.seeds, options.calibration) for size in measured.SIZES],
    }
    options.out.write_text(json.dumps(rounded(content)) + "\n")


if __name__ == "__main__":
    main()
