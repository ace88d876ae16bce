"""Checkpoints that are whole or not there, exact to the bit on the same layout.

    checkpoints/iter_0000020/rank_00000.safetensors   weights, optimizer state, generators of one rank
                             state.json               step, schedule, layout
                             hf/                      the policy as a Hugging Face directory
    checkpoints/latest_checkpointed_iteration.txt     written last

Everything is written to a hidden folder, flushed, and renamed once every rank is done. safetensors and JSON only.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import ChainedOptimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lens_megatron.policy.hf_weights import export_weights
from lens_megatron.policy.model import Policy

TRACKER = "latest_checkpointed_iteration.txt"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; earlier ones are untouched."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """state.json: what resuming needs besides tensors. Data cursor and seeds are functions of `step`."""

    step: int
    """Steps done."""
    version: int
    scheduler_steps: int
    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int


def save(policy: Policy, folder: Path, step: int, *, model_path: str, keep: int) -> Path:
    """Writes and publishes the checkpoint of `step`; deletes all but the newest `keep`. A collective.

    Raises CheckpointError on every rank when any rank could not write (disk full, not writable); nothing is published.
    """
    final, temporary = folder / f"iter_{step:07d}", folder / f".writing_iter_{step:07d}"
    main = policy.mesh.rank == 0
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
    _agree(policy, _attempt(lambda: temporary.mkdir(parents=True, exist_ok=True)), temporary)
    failure = _attempt(lambda: _write_rank(policy, temporary))
    failure = _save_hf(policy, temporary / "hf", model_path) or failure
    if main and not failure:
        failure = _attempt(lambda: _write_json(temporary / "state.json", asdict(_state(policy, step))))
    _agree(policy, failure, temporary)
    if main:
        failure = _attempt(lambda: _publish(temporary, final, folder / TRACKER, step))
    _agree(policy, failure, temporary)
    if main:
        for old in published(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    torch.distributed.barrier()
    return final


def published(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("iter_*") if (path / "state.json").is_file())


def latest_whole(folder: Path, rank: int) -> Path | None:
    """The newest checkpoint whose files this rank can read to the end; None when there is none."""
    for path in reversed(published(folder)):
        try:
            read_state(path)
            with safe_open(path / f"rank_{rank:05d}.safetensors", "pt") as file:
                file.keys()
            return path
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            print(f"checkpoint {path} cannot be read ({error}); trying the one before it", flush=True)
    return None


def read_state(path: Path) -> TrainingState:
    return TrainingState(**json.loads((path / "state.json").read_text()))


def load(policy: Policy, path: Path) -> TrainingState:
    """Restores weights, optimizer, schedule, generators. Raises CheckpointError for another layout or other tensors."""
    state = read_state(path)
    now = _state(policy, state.step)
    layout = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    for name in layout:
        if getattr(state, name) != getattr(now, name):
            raise CheckpointError(
                f"checkpoint {path} was written with {name}={getattr(state, name)}, this run has {getattr(now, name)}; "
                "resume with the same layout, or start a new run from its hf/ folder"
            )
    _materialise_optimizer(policy)
    with safe_open(path / f"rank_{policy.mesh.rank:05d}.safetensors", "pt") as file, torch.no_grad():
        targets = dict(_tensors(policy))
        missing = sorted(set(targets) ^ set(file.keys()))
        if missing:
            raise CheckpointError(f"checkpoint {path}: tensors differ from this run's: {', '.join(missing[:5])}")
        for name, target in targets.items():
            target.copy_(file.get_tensor(name))
        torch.set_rng_state(targets["rng.torch"])
    policy.version = state.version
    policy.scheduler.num_steps = 0
    policy.scheduler.step(increment=state.scheduler_steps)
    return state


def _state(policy: Policy, step: int) -> TrainingState:
    mesh = policy.mesh
    return TrainingState(step, policy.version, policy.scheduler.num_steps, mesh.world_size, mesh.tp_size, mesh.pp_size)


def _tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that training changes, by a name that is the same in every process of this rank."""
    for chunk, model in enumerate(policy.models()):
        for name, parameter in model.named_parameters():
            yield f"model.{chunk}.{name}", parameter.data
    for number, optimizer in enumerate(_torch_optimizers(policy)):
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                yield f"optimizer.{number}.{g}.{p}.main", parameter.data
                for key, value in sorted(optimizer.state[parameter].items()):
                    if isinstance(value, Tensor):
                        yield f"optimizer.{number}.{g}.{p}.{key}", value
    yield "rng.torch", torch.get_rng_state()


def _torch_optimizers(policy: Policy) -> list[torch.optim.Optimizer]:
    megatron = policy.optimizer
    chain = megatron.chained_optimizers if isinstance(megatron, ChainedOptimizer) else [megatron]
    return [optimizer.optimizer for optimizer in chain if optimizer.optimizer is not None]


def _materialise_optimizer(policy: Policy) -> None:
    """Adam makes its state at the first step; a fresh one needs the tensors before they can be filled."""
    for optimizer in _torch_optimizers(policy):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not optimizer.state[parameter]:
                    optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def _write_rank(policy: Policy, folder: Path) -> None:
    path = folder / f"rank_{policy.mesh.rank:05d}.safetensors"
    _materialise_optimizer(policy)
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in _tensors(policy)}, path)
    _flush(path)


def _save_hf(policy: Policy, folder: Path, model_path: str) -> str | None:
    """Streams the policy into safetensors shards of at most 4 GB; rank 0 writes. Returns what went wrong."""
    main = policy.mesh.rank == 0
    limit, shard, size, shards, failure = 4 << 30, {}, 0, [], None

    def flush_shard() -> str | None:
        nonlocal shard, size
        if not shard:
            return None
        shards.append(list(shard))
        path = folder / f"model-{len(shards):05d}.safetensors"
        result = _attempt(lambda: (save_file(shard, path, metadata={"format": "pt"}), _flush(path)))
        shard, size = {}, 0
        return result

    if main:
        failure = _attempt(lambda: folder.mkdir(exist_ok=True))
    for name, tensor in export_weights(policy.bridge, policy.chunks):
        if main and not failure:
            shard[name] = tensor.cpu().clone().contiguous()
            size += tensor.numel() * tensor.element_size()
            failure = flush_shard() if size >= limit else None
    if main and not failure:
        failure = flush_shard() or _attempt(lambda: _finish_hf(folder, shards, model_path))
    return failure


def _finish_hf(folder: Path, shards: list[list[str]], model_path: str) -> None:
    """Final file names, index, and the small files of the original directory."""
    index = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"model-{number:05d}.safetensors").rename(folder / name)
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for path in Path(model_path).iterdir():
        small = path.suffix in (".json", ".txt", ".model", ".jinja") and "index.json" not in path.name
        if path.is_file() and small:
            shutil.copyfile(path, folder / path.name)


def _publish(temporary: Path, final: Path, tracker: Path, step: int) -> None:
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(final.parent)
    partial = tracker.with_name(f".{tracker.name}")
    partial.write_text(f"{step}\n")
    _flush(partial)
    partial.rename(tracker)
    _flush(tracker.parent)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _attempt(action) -> str | None:
    """Runs `action`; returns the message of an input/output failure instead of raising, so that ranks can agree."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _agree(policy: Policy, failure: str | None, temporary: Path) -> None:
    """Raises on every rank if any rank failed, and removes the half-written folder."""
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=policy.mesh.device)
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if failed.item():
        if policy.mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint not written to {temporary.parent}: {failure or 'another rank failed'}; "
            "the checkpoints before it are untouched. Free space or permissions, then start the same command again"
        )
