"""Saves and loads the state of a supervised training: weights and Adam's moments as safetensors, the rest as JSON.

    FOLDER/step_00020/{weights.safetensors, moments.safetensors, state.json}

A checkpoint is there whole or not at all, and takes the place of the one before it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lens_megatron.tools.llm.folders import LlmError, whole_folder

_MOMENTS = ("exp_avg", "exp_avg_sq")


def newest_step(folder: Path) -> int:
    """Returns the number of steps that the newest checkpoint in `folder` has done, 0 without one."""
    return max((int(path.name.removeprefix("step_")) for path in _checkpoints(folder)), default=0)


def save_state(
    folder: Path, identity: str, losses: Sequence[float], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint after as many steps as there are `losses`, then removes those before it.

    Args:
        identity: what `load_state` must be given to load the checkpoint.

    Raises:
        OSError: it cannot be written; the checkpoint before it is still there.
    """
    before = _checkpoints(folder)
    named = dict(model.named_parameters())
    moments = {f"{name}.{key}": optimizer.state[p][key] for name, p in named.items() for key in _MOMENTS}
    target = folder / f"step_{len(losses):05d}"
    with whole_folder(target) as partial:
        save_file({name: parameter.detach() for name, parameter in named.items()}, partial / "weights.safetensors")
        save_file(moments, partial / "moments.safetensors")
        (partial / "state.json").write_text(json.dumps({"identity": identity, "losses": list(losses)}) + "\n")
    for path in before:
        if path != target:
            shutil.rmtree(path)


def load_state(folder: Path, identity: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Loads the newest checkpoint into a model and its fresh AdamW; returns the losses of the steps done.

    Raises:
        LlmError: the checkpoint is damaged, or is of another training.
    """
    path = folder / f"step_{newest_step(folder):05d}"
    try:
        state = json.loads((path / "state.json").read_text())
        if state["identity"] != identity:
            raise LlmError(
                f"{path} is of a training from another model, other solutions or other options; give those again, or "
                f"remove {folder} to start over"
            )
        weights, moments = load_file(path / "weights.safetensors"), load_file(path / "moments.safetensors")
        steps = torch.tensor(float(len(state["losses"])))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                optimizer.state[parameter] = {
                    "step": steps.clone(),
                    **{key: moments[f"{name}.{key}"].contiguous() for key in _MOMENTS},
                }
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise LlmError(f"{path} is damaged ({type(error).__name__}: {error}); remove {folder} to start over") from error
    return list(state["losses"])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
