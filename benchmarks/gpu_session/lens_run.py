"""Trains a few steps of LENS with the embedded engine, without a network, and says what each step took.

    python -m benchmarks.gpu_session.lens_run demo --scratch FOLDER --out FOLDER
    python -m benchmarks.gpu_session.lens_run random-1.5b --scratch FOLDER --out FOLDER [--tiny]

`demo` makes the demo as `make demo` does and trains it. `random-1.5b` trains a random model of that size, on the demo's
problems, with rewards that are as good as random: it shows that a step works and what it costs, not that it learns.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.reading import NO_DEVICE
from benchmarks.gpu_session.running import ROOT

TIMED = ("step", "gen", "ref", "update_actor", "weight_sync")
"""The phases named in the headline, as far as the run has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run that is measured."""

    model: Path
    data: Path
    steps: int
    options: tuple[str, ...] = ()
    """section.option=value, over configs/demo.yaml."""


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("demo", "random-1.5b"))
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models and data, used again")
    parser.add_argument("--out", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two steps on any device: a rehearsal")
    parsed = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not parsed.tiny:
        import lens_megatron.train  # noqa: F401, all that the run needs is there

        print(NO_DEVICE)
        return 1
    prepare = _demo if parsed.model == "demo" else _random
    training = prepare(parsed.scratch, parsed.tiny)
    rows = train(training, parsed.out / "run")
    result = {"headline": headline(rows, training.steps), "options": training.options, "steps": rows}
    (parsed.out / "result.json").write_text(json.dumps(result))
    mistakes = mistakes_of(rows, training.steps)
    print("\n".join(mistakes))
    return int(bool(mistakes))


def _demo(scratch: Path, tiny: bool) -> Training:
    """Makes the demo by its command, or with a warm-up of a few steps for a rehearsal."""
    folder = scratch / ("demo-tiny" if tiny else "demo")
    if tiny:
        _small_demo(folder)
    else:
        subprocess.run([sys.executable, "-m", "lens_megatron.demo", "--out", str(folder)], cwd=ROOT, check=True)
    return Training(model=folder / "model", data=folder, steps=2 if tiny else 10, options=_sizes(tiny))


def _random(scratch: Path, tiny: bool) -> Training:
    """Writes a random model with the demo's tokenizer and data; its reference differs a little, so that scores do."""
    import torch

    from benchmarks.training import load

    data = scratch / "demo-tiny"
    _small_demo(data)
    model = load.models_in(scratch / "models", "tiny" if tiny else "qwen2.5-1.5b", torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (model / name).write_bytes((data / "model" / name).read_bytes())
    options = (
        f"model.reference_path={model}_reference",
        "model.dtype=bfloat16",
        "reward.grader=benchmarks.gpu_session.lens_run:compute_score",
        "optimizer.lr=1e-6",
    )
    return Training(model=model, data=data, steps=2 if tiny else 10, options=("data.eval=[]", *_sizes(tiny), *options))


def _small_demo(folder: Path) -> None:
    """Makes the demo's data, and its model after hardly any training, once."""
    from lens_megatron.tools.demo.make import make
    from lens_megatron.tools.demo.warmup import WarmUp

    make(folder, WarmUp(steps=20, problems=640))


def _sizes(tiny: bool) -> tuple[str, ...]:
    if not tiny:
        return ()
    return (
        "rollout.prompts_per_step=4",
        "rollout.rollouts_per_prompt=4",
        "data.eval=[]",
        "rollout.max_response_length=8",
    )


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """A grader with verl's signature that pays for one completion in eight, whatever it says: groups are hard then."""
    return float(zlib.crc32(solution_str.encode()) % 8 == 0)


def train(training: Training, folder: Path) -> list[dict[str, Any]]:
    """Trains in one process, as a user would start it; returns the metrics of each step.

    Raises CalledProcessError if the run fails; its output is on this process's.
    """
    options = (
        f"model.path={training.model}",
        f"data.train={training.data}/train.jsonl",
        f"data.eval=[{training.data}/eval.jsonl]",
        f"run.directory={folder}",
        "run.if_exists=restart",
        f"train.steps={training.steps}",
        f"train.save_interval={training.steps}",
        "train.eval_interval=0",
        "train.eval_samples=1",
        "rollout.engine=local",
        *training.options,
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    program = (str(ROOT / "pretrain_lens.py"), "--config", str(ROOT / "configs" / "demo.yaml"))
    subprocess.run([sys.executable, *launcher, *program, *options], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "timing_s/update_actor" in row]


def headline(rows: list[dict[str, Any]], steps: int) -> str:
    """Says in a line how many steps were made, and the median seconds of their phases after the first step."""
    later = rows[1:] or rows
    medians = {phase: _median(later, f"timing_s/{phase}") for phase in TIMED}
    seconds = ", ".join(f"{phase} {value:.2f} s" for phase, value in medians.items() if value is not None)
    memory = max((row.get("perf/max_memory_allocated_gb", 0.0) for row in rows), default=0.0)
    rates = {rate: _median(rows, f"lens/{rate}_rate") for rate in ("purified", "rescued")}
    shares = ", ".join(f"{rate} {value:.2f}" for rate, value in rates.items() if value is not None)
    return f"{len(rows)} of {steps} steps; {seconds}; {memory:.1f} GB; {shares}"


def _median(rows: list[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None


def mistakes_of(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """Returns why the run does not count as done; empty if it does."""
    mistakes = [] if len(rows) == steps else [f"{len(rows)} steps were made, {steps} were to be"]
    for row in rows:
        odd = [name for name in ("actor/loss", "actor/grad_norm") if not math.isfinite(row.get(name, 0.0))]
        mistakes += [f"step {row.get('step')}: {name} is not finite" for name in odd]
    return mistakes


if __name__ == "__main__":
    sys.exit(main())
