"""Compares LENS with GRPO on the demo over several seeds: accuracy before and after, seconds per phase, peak memory.

    python benchmarks/demo_seeds.py --demo ~/.cache/lens_megatron/demo --runs runs/seeds --out results.json

Runs in --runs that are finished are not repeated. The others go one after the other, in two processes each, like the
demo.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from lens_megatron.output.metrics import read_metrics
from lens_megatron.output.report import PHASES
from lens_megatron.output.run_folder import environment

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"lens": (), "grpo": ("lens.enabled=false", "algorithm.advantage=grpo")}
ACCURACY = "val-core/eval/acc/mean@2"


def command(demo: Path, folder: Path, seed: int, options: tuple[str, ...]) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("pretrain_lens.py", "--config", "configs/demo.yaml", f"model.path={demo}/model"),
        *(f"data.train={demo}/train.jsonl", f"data.eval=[{demo}/eval.jsonl]"),
        *(f"run.directory={folder}", f"run.seed={seed}", *options),
    ]


def measure(folder: Path) -> dict:
    """Summarises the metrics of one finished run."""
    rows = read_metrics(folder)
    steps = [row for row in rows if "timing_s/step" in row]
    curve = [row[ACCURACY] for row in rows if ACCURACY in row]
    seconds = {
        phase: round(statistics.median(row[f"timing_s/{phase}"] for row in steps if f"timing_s/{phase}" in row), 3)
        for phase in PHASES
        if any(f"timing_s/{phase}" in row for row in steps)
    }
    return {
        "steps": len(steps),
        "accuracy": curve,
        "extra_rollouts": sum(row["lens/extra_rollouts"] for row in steps),
        "rescued_prompts": sum(row["lens/rescued_prompts"] for row in steps),
        "median_seconds": seconds,
        "peak_gib_of_rank_0": round(max(row["perf/cpu_memory_used_gb"] for row in steps), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder made by python -m lens_megatron.demo")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = {}
    for name in tqdm([f"{method}_s{seed}" for seed in range(arguments.seeds) for method in METHODS], unit="run"):
        method, seed = name.split("_s")
        folder = arguments.runs / name
        if not (folder / "summary.txt").exists():
            line = command(arguments.demo, folder, int(seed), METHODS[method])
            subprocess.run(
                line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        results[name] = measure(folder)
    demo = json.loads((arguments.demo / "demo.json").read_text())
    content = {"command": " ".join(sys.argv), "environment": environment(), "demo": demo, "runs": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    for name, result in results.items():
        print(f"{name}: {100 * result['accuracy'][0]:.1f} % -> {100 * result['accuracy'][-1]:.1f} %")


if __name__ == "__main__":
    main()
