"""Exports the policy as a Hugging Face directory: all ranks stage it to host memory, each writes its share alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lens_megatron.files import flush
from lens_megatron.policy.checked_files import FileRecord, save_file, write_file
from lens_megatron.policy.export import export_weights
from lens_megatron.policy.model import Policy

MAX_SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class StagedExport:
    """This rank's share of the exported tensors, and the names of all of them."""

    own: dict[str, dict[str, Tensor]]
    """{file: {name: copy in host memory}} of the files that this rank writes."""
    weight_map: dict[str, str]
    """{name: file} of the whole policy."""
    total_bytes: int
    small_files: Mapping[str, bytes]
    """Configuration and tokenizer files of the model that training began with, by name; only the main rank has them."""
    is_main: bool
    """True on the rank that also writes the small files and the index of shards."""


def stage(policy: Policy, small_files: Mapping[str, bytes], max_shard_bytes: int = MAX_SHARD_BYTES) -> StagedExport:
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
        small_files,
        rank == 0,
    )


def write(export: StagedExport, folder: Path) -> dict[str, FileRecord]:
    """Writes this rank's share and waits until it is on the disk; returns what the files hold. Raises OSError."""
    folder.mkdir(exist_ok=True)
    written = {
        name: save_file(tensors, folder / name, metadata={"format": "pt"}) for name, tensors in export.own.items()
    }
    if export.is_main:
        small = dict(export.small_files)
        if len(set(export.weight_map.values())) > 1:
            index = {"metadata": {"total_size": export.total_bytes}, "weight_map": export.weight_map}
            small["model.safetensors.index.json"] = json.dumps(index, indent=1).encode() + b"\n"
        written |= {name: write_file(folder / name, content) for name, content in small.items()}
    flush(folder)
    return written
