"""The policy as a Hugging Face directory: staged to host memory by all ranks together, written by each on its own."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lens_megatron.policy.export import export_weights
from lens_megatron.policy.model import Policy

MAX_SHARD_BYTES = 2 << 30
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, slots=True)
class StagedExport:
    """This rank's share of the export; the names of all."""

    own: dict[str, dict[str, Tensor]]
    """{file: {name: copy in host memory}} of the files that this rank writes."""
    weight_map: dict[str, str]
    """{name: file} of the whole policy."""
    total_bytes: int
    model_path: str
    """Where the configuration and the tokenizer come from."""
    is_main: bool
    """Of the rank that writes what is there once."""


def stage(policy: Policy, model_path: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> StagedExport:
    """Gathers the policy under Hugging Face names. A collective. Shards go around the ranks, so that none holds all."""
    rank, ranks = policy.mesh.rank, policy.mesh.world_size
    own: dict[int, dict[str, Tensor]] = {}
    shard_of: dict[str, int] = {}
    shard, size, total = 0, 0, 0
    for name, tensor in export_weights(policy):
        count = tensor.numel() * tensor.element_size()
        if size and size + count > max_shard_bytes:
            shard, size = shard + 1, 0
        size, total = size + count, total + count
        shard_of[name] = shard
        if shard % ranks == rank:
            own.setdefault(shard, {})[name] = tensor.to("cpu", copy=True).contiguous()
    files = ["model.safetensors"]
    if shard:
        files = [f"model-{i + 1:05d}-of-{shard + 1:05d}.safetensors" for i in range(shard + 1)]
    return StagedExport(
        {files[i]: tensors for i, tensors in own.items()},
        {name: files[i] for name, i in shard_of.items()},
        total,
        model_path,
        rank == 0,
    )


def write(export: StagedExport, folder: Path) -> list[Path]:
    """Writes this rank's share; returns the files. Raises OSError or SafetensorError."""
    folder.mkdir(exist_ok=True)
    for name, tensors in export.own.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    written = [folder / name for name in export.own]
    if not export.is_main:
        return written
    if len(set(export.weight_map.values())) > 1:
        index = {"metadata": {"total_size": export.total_bytes}, "weight_map": export.weight_map}
        written.append(folder / "model.safetensors.index.json")
        written[-1].write_text(json.dumps(index, indent=1) + "\n")
    for path in Path(export.model_path).iterdir():
        if path.is_file() and path.suffix in _SMALL_FILES and "index.json" not in path.name:
            written.append(folder / path.name)
            shutil.copyfile(path, written[-1])
    return written
