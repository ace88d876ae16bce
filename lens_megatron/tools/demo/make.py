"""`python -m lens_megatron.demo --out DIR`: makes the demo's data and model once; says so when they are there."""

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import torch

from lens_megatron.tools.demo import DEMO_INSTRUCTION
from lens_megatron.tools.demo.problems import Problem, stream, write_jsonl
from lens_megatron.tools.demo.tokenizer import train_tokenizer
from lens_megatron.tools.demo.warmup import WarmUp, sampled_accuracy, warm_up

TRAIN_PROBLEMS, EVAL_PROBLEMS = 4000, 256
TRAIN_NOISE = {0: 0.1, 1: 0.45, 2: 0.45}
EVAL_NOISE = {1: 0.5, 2: 0.5}


def make(folder: Path, options: WarmUp | None = None) -> bool:
    """Creates `folder` with train.jsonl, eval.jsonl, model/ and demo.json; all of it or nothing.

    Returns False when it is there already. Then only data of version 0.1, which does not mark its distractors, is
    written again, with the same problems. Raises FileExistsError when `folder` holds something else.
    """
    options = options or WarmUp()
    if (folder / "demo.json").is_file():
        _mark_distractors(folder)
        return False
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and does not hold a demo; choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _fill(temporary, options)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _fill(folder: Path, options: WarmUp) -> None:
    _write_data(folder, options.seed)
    corpus = list(islice(stream("train", options.seed, {0: 1, 1: 1, 2: 1}), 4000))
    tokenizer = train_tokenizer(line for p in corpus for line in (chat_text(p), p.solution))
    model, seconds = warm_up(tokenizer, options)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    noisy = list(islice(stream("eval", options.seed, EVAL_NOISE), EVAL_PROBLEMS))
    clean = [dataclasses.replace(problem, problem=problem.core) for problem in noisy]
    measured = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "warm_up_seconds": round(seconds, 1),
        "accuracy_with_distractors": sampled_accuracy(model, tokenizer, noisy),
        "accuracy_without_distractors": sampled_accuracy(model, tokenizer, clean),
        "warm_up": dataclasses.asdict(options),
    }
    (folder / "demo.json").write_text(json.dumps(measured, indent=1) + "\n")


def _mark_distractors(folder: Path) -> None:
    """Replaces the data of a demo whose column `noise` counts the distractors instead of marking them."""
    with (folder / "train.jsonl").open(encoding="utf-8") as file:
        if isinstance(json.loads(file.readline()).get("noise"), list):
            return
    seed = json.loads((folder / "demo.json").read_text())["warm_up"]["seed"]
    with tempfile.TemporaryDirectory(prefix=".data-", dir=folder) as temporary:
        _write_data(Path(temporary), seed)
        for name in ("eval.jsonl", "train.jsonl"):  # the file that is looked at comes last
            (Path(temporary) / name).rename(folder / name)


def _write_data(folder: Path, seed: int) -> None:
    write_jsonl(folder / "train.jsonl", stream("train", seed, TRAIN_NOISE), TRAIN_PROBLEMS)
    write_jsonl(folder / "eval.jsonl", stream("eval", seed, EVAL_NOISE), EVAL_PROBLEMS)


def chat_text(problem: Problem) -> str:
    """Returns the problem and all around it, so that the roles of the chat template are single tokens."""
    return f"user\n{problem.problem}\n{DEMO_INSTRUCTION}\nassistant\n"


def main() -> int:
    """Returns the exit status: 0, also where the demo is there already."""
    parser = argparse.ArgumentParser(prog="python -m lens_megatron.demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    folder = parser.parse_args().out.expanduser()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        made = make(folder)
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    measured = json.loads((folder / "demo.json").read_text())
    print(
        f"demo model and data {'made' if made else 'are there already'}: {folder}; "
        f"{measured['parameters']:,} parameters, "
        f"accuracy {100 * measured['accuracy_without_distractors']:.0f} % clean, "
        f"{100 * measured['accuracy_with_distractors']:.0f} % with distractors"
    )
    return 0
