"""Compares methods on the demo over several seeds: accuracy, sampled tokens, seconds, and what second waves cost.

    python -m benchmarks.methods --demo ~/.cache/lens_megatron/demo --runs runs/methods --out results.json \
        --methods lens,grpo,dapo,grpo+reward_flips --seeds 3 --steps 60

A method is a file of configs/methods, or several joined by +, the later ones over the earlier. --out is written after
every run; runs that it holds are not repeated, and interrupted ones in --runs go on, so that the table can be made in
several sittings. Each run takes two processes, like the demo; --parallel says how many runs go on at once. All runs of
a seed have the same steps, but files that set train.epochs (dapo_extended: twice as many passes as dapo) have as many
times more: --steps is what one pass stands for here.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lens_megatron import config as configuration
from lens_megatron.files import write_atomically
from lens_megatron.output.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ACCURACY = "val-core/eval/acc/mean@2"
PAPER = ("grpo,grpo_extended,dapo,dapo_extended,greso,greso_extended,resampling,random_pruning,gradient_pruning,lens,"
         "lens_keep_one,lens_literal,lens_grpo_advantage,crpo_without_purification,oracle_pruning")  # fmt: skip
"""The methods of LENS' tables, its controls, and the upper bound."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What one finished run gave; sums are over its steps."""

    accuracy: list[float]
    """Of each evaluation in order, before the first step included."""
    steps: int
    sampled_tokens: float
    seconds: float
    gate_open_rate: float
    """The share of second waves that were used; 0 without any."""
    destroyed_groups: float
    """Mixed groups that the gate made all correct."""
    zero_variance_before: float
    """The share of trained groups whose first waves were all correct or all wrong."""
    zero_variance_after: float
    """The same of the groups as they were trained on."""
    extra_rollouts: float
    extra_tokens: float
    extra_seconds: float


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A run with the versions and the machine that made it."""

    summary: RunSummary
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MethodSummary:
    """Means over the seeds of a method."""

    final_accuracy: float
    standard_error: float
    """Of the final accuracy, over seeds; 0 with a single one."""
    seeds: int
    means: dict[str, float]
    """The mean of every other number of `RunSummary`."""


def files(method: str) -> list[Path]:
    """Returns the files of a method such as `lens` or `grpo+reward_flips`. Raises SystemExit where one is missing."""
    found = [ROOT / "configs" / "methods" / f"{name}.yaml" for name in method.split("+")]
    for path in found:
        if not path.exists():
            raise SystemExit(f"no method {path.stem!r}: there is no {path.relative_to(ROOT)}")
    return found


def steps_of(method: str, steps: int) -> int:
    """Returns the steps of a run: as many times more as the method makes passes over the data."""
    epochs = configuration.load([ROOT / "configs" / "demo.yaml", *files(method)]).train.epochs
    return math.ceil(steps * (epochs or 1))


def command(demo: Path, folder: Path, method: str, seed: int, steps: int) -> list[str]:
    """Returns what a user would type, on two processes."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("pretrain_lens.py", "--config", "configs/demo.yaml", *map(str, files(method))),
        *(f"model.path={demo}/model", f"data.train={demo}/train.jsonl", f"data.eval=[{demo}/eval.jsonl]"),
        *(f"run.directory={folder}", f"run.seed={seed}", f"train.steps={steps}", "train.epochs="),
        *("train.save_total_limit=1", "run.save_rollout_files=false", "run.trackers=[]"),
    ]


def summarise(rows: Sequence[dict]) -> RunSummary:
    """Summarises the metrics of one finished run."""
    steps = [row for row in rows if "timing_s/step" in row]

    def total(name: str) -> float:
        return sum(row[name] for row in steps)

    def share(name: str) -> float:
        groups = total("lens/prompts")
        return sum(row[name] * row["lens/prompts"] for row in steps) / groups if groups else 0.0

    second = total("lens/purified_prompts")
    return RunSummary(
        accuracy=[row[ACCURACY] for row in rows if ACCURACY in row],
        steps=len(steps),
        sampled_tokens=total("perf/generated_tokens"),
        seconds=total("timing_s/step"),
        gate_open_rate=total("lens/rescued_prompts") / second if second else 0.0,
        destroyed_groups=total("lens/destroyed_groups"),
        zero_variance_before=share("lens/zero_variance_before"),
        zero_variance_after=share("lens/zero_variance_after"),
        extra_rollouts=total("lens/extra_rollouts"),
        extra_tokens=total("lens/extra_tokens"),
        extra_seconds=total("lens/extra_seconds"),
    )


def over_seeds(runs: Sequence[RunSummary]) -> MethodSummary:
    """Returns means over runs that differ in nothing but the seed."""
    final = [run.accuracy[-1] for run in runs]
    error = statistics.stdev(final) / math.sqrt(len(final)) if len(final) > 1 else 0.0
    names = [name for name in RunSummary.__dataclass_fields__ if name != "accuracy"]
    means = {name: statistics.fmean(getattr(run, name) for run in runs) for name in names}
    return MethodSummary(statistics.fmean(final), error, len(final), means)


def table(methods: dict[str, MethodSummary]) -> str:
    """Returns a Markdown table, the best final accuracy first."""
    lines = [
        "| method | seeds | final accuracy | steps | sampled tokens | seconds | gate open | destroyed groups | "
        "no contrast, before | after | extra rollouts | extra tokens | extra seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method in sorted(methods.items(), key=lambda item: -item[1].final_accuracy):
        m = method.means
        cells = [
            name,
            str(method.seeds),
            f"{100 * method.final_accuracy:.1f} ± {100 * method.standard_error:.1f} %",
            f"{m['steps']:.0f}",
            f"{m['sampled_tokens']:,.0f}",
            f"{m['seconds']:,.0f}",
            f"{100 * m['gate_open_rate']:.0f} %",
            f"{m['destroyed_groups']:.1f}",
            f"{100 * m['zero_variance_before']:.0f} %",
            f"{100 * m['zero_variance_after']:.0f} %",
            f"{m['extra_rollouts']:,.0f}",
            f"{m['extra_tokens']:,.0f}",
            f"{m['extra_seconds']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_finished(folder: Path, steps: int) -> bool:
    """Returns whether the run in `folder` has made its last step and evaluated it."""
    if not (folder / "metrics.jsonl").exists():
        return False
    return any(row["step"] == steps and ACCURACY in row for row in read_metrics(folder))


def train(demo: Path, folder: Path, method: str, seed: int, steps: int) -> None:
    """Makes the run unless it is finished; what it prints goes into a file beside its folder."""
    if is_finished(folder, steps):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        ended = subprocess.run(
            command(demo, folder, method, seed, steps),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if ended.returncode or not is_finished(folder, steps):
        raise SystemExit(f"{folder.name} ended with {ended.returncode}; see {log.name}. The same command goes on.")


def read_runs(out: Path, steps: dict[str, int]) -> dict[str, dict[int, MeasuredRun]]:
    """Returns the runs in the file of results, by method and seed, that have as many steps as are asked for."""
    if not out.exists():
        return {}
    found: dict[str, dict[int, MeasuredRun]] = {}
    for name, runs in json.loads(out.read_text())["runs"].items():
        read = {int(seed): MeasuredRun(RunSummary(**run["summary"]), run["environment"]) for seed, run in runs.items()}
        found[name] = {
            seed: run for seed, run in read.items() if run.summary.steps == steps.get(name, run.summary.steps)
        }
    return found


def write_runs(out: Path, runs: dict[str, dict[int, MeasuredRun]], command: str, demo: dict) -> None:
    """Writes all runs, and the means of each method over the seeds that it has."""
    content = {
        "command": command,
        "demo": demo,
        "methods": {name: asdict(over_seeds([run.summary for run in found.values()])) for name, found in runs.items()},
        "runs": {name: {seed: asdict(run) for seed, run in found.items()} for name, found in runs.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder made by python -m lens_megatron.demo")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=PAPER, help="names with commas between them (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, of two processes each")
    parsed = parser.parse_args()
    names, demo = parsed.methods.split(","), parsed.demo.expanduser().resolve()
    steps = {name: steps_of(name, parsed.steps) for name in names}
    runs = read_runs(parsed.out, steps)
    every = [(name, seed) for seed in range(parsed.seeds) for name in names if seed not in runs.get(name, {})]
    command = f"python -m benchmarks.methods {' '.join(sys.argv[1:])}"
    described = json.loads((demo / "demo.json").read_text())

    def one(job: tuple[str, int]) -> MeasuredRun:
        name, seed = job
        folder = (parsed.runs / f"{name}_s{seed}").resolve()
        train(demo, folder, name, seed, steps[name])
        made_by = json.loads((folder / "environment.json").read_text())
        return MeasuredRun(summarise(read_metrics(folder)), made_by)

    with ThreadPoolExecutor(parsed.parallel) as pool:
        for (name, seed), run in zip(every, tqdm(pool.map(one, every), total=len(every), unit="run"), strict=True):
            runs.setdefault(name, {})[seed] = run
            write_runs(parsed.out, runs, command, described)
    print(table({name: over_seeds([run.summary for run in found.values()]) for name, found in runs.items() if found}))


if __name__ == "__main__":
    main()
