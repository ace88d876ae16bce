"""A toy policy that trains on fixed samples under any layout, and one rank of test_checkpoint.py's world of two.

    checkpoint_policy.py visit FOLDER       visits LAYOUTS in turn, on the ranks that it finds itself on
    checkpoint_policy.py half PORT FOLDER   saves, then writes half of a second save and waits to be killed

Results are written as safetensors and JSON into FOLDER.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from chosen import objective
from records import rollout, training_rows
from safetensors.torch import save_file

from lens_megatron.batch import pack
from lens_megatron.config import from_tree
from lens_megatron.policy import checkpoint, platform, shards
from lens_megatron.policy.checkpoint import CheckpointWriter
from lens_megatron.policy.export import export_weights
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.policy.parallel import build_mesh, shut_down
from lens_megatron.types import LossScale, Sample

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2, "use_distributed_optimizer": True},
    "dp2": {},
    "dp2_distributed_optimizer": {"use_distributed_optimizer": True},
}
"""Layouts of two ranks, in the order in which a checkpoint is handed on from one to the next."""
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "eos_token_id": 0,
    "bos_token_id": None,
}
"""The sizes of a small Qwen3 model whose vocabulary is padded under tensor parallelism."""
PAIRS = [((1, 5, 9), (3, 7)), ((2, 8, 100), (4, 5, 6, 7)), ((2, 8, 17), (129,)), ((40, 41), (9, 9, 2))]
ADVANTAGES = [1.5, -0.5, 2.0, -1.0]


def config(folder: Path, layout: dict, dtype: str = "float32"):
    return from_tree(
        {
            "run": {"directory": "unused"},
            "model": {"path": str(folder / "model"), "dtype": dtype},
            "data": {"train": "unused"},
            "rollout": {"max_response_length": 8},
            "lens": {"enabled": False},
            "algorithm": {"kl_coef": 0.0},
            "optimizer": {"lr": 1e-2, "lr_decay_style": "linear"},
            "megatron": layout,
        }
    )


def train_step(policy: Policy, algorithm) -> float:
    """One update on this data-parallel rank's share of the samples; returns the loss, the same on every rank."""
    mesh, rows = policy.mesh, []
    for (prompt, response), advantage in list(zip(PAIRS, ADVANTAGES, strict=True))[mesh.dp_rank :: mesh.dp_size]:
        rows.append(Sample(prompt, prompt, rollout(True, tokens=response), advantage, 1.0))
    scale = LossScale(sum(len(response) for _, response in PAIRS), len(PAIRS), 0)
    batches = pack.pack(
        training_rows(rows, [torch.full((len(r.rollout.token_ids),), -2.0) for r in rows]),
        scale=scale,
        algorithm=algorithm,
        max_response_length=8,
        parts=[range(len(rows))[: len(rows) // 2], range(len(rows))[len(rows) // 2 :]],
        device=mesh.device,
        layout=policy.layout,
    )
    return optimizer_step(policy, batches, scale, objective(algorithm), algorithm, temperature=1.0).loss


def writer(policy: Policy, folder: Path, root: Path, **options) -> CheckpointWriter:
    given = {"keep_last": 9, "keep_best": 0, "background": False} | options
    return CheckpointWriter(policy, folder, model_path=str(root / "model"), **given)


def exported(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export_weights(policy)}


def visit(name: str, source: Path, previous: Path, root: Path, device: torch.device) -> None:
    """Under layout `name`: loads `source`, steps, saves; then loads what the layout before it saved."""
    built = config(root, LAYOUTS[name])
    mesh = build_mesh(built.megatron, 0, device)
    policy = build_policy(built, mesh)
    with writer(policy, root / name, root) as saver:
        checkpoint.resume(policy, source)
        before = exported(policy)
        loss = train_step(policy, built.algorithm)
        saver.save(2)
    after, lr = exported(policy), policy.optimizer.param_groups[0]["lr"]
    checkpoint.resume(policy, previous)
    handed_on = exported(policy)
    if mesh.rank == 0:
        for when, weights in {"before": before, "after": after, "handed_on": handed_on}.items():
            save_file(weights, root / f"{name}.{when}.safetensors")
        (root / f"{name}.json").write_text(json.dumps({"loss": loss, "lr": lr}))


def run_rank(root: Path) -> None:
    device, previous, port = platform.install(), root / "one", int(os.environ["MASTER_PORT"])
    for number, name in enumerate(LAYOUTS):
        os.environ["MASTER_PORT"] = str(port + number)  # a rank could still find the store of the world before
        platform.init_process_group(device)
        visit(name, root / "one", previous, root, device)
        previous = root / name
        shut_down()


def save_half(root: Path) -> None:
    device, built = platform.install(), config(root, {})
    platform.init_process_group(device)
    policy = build_policy(built, build_mesh(built.megatron, 0, device))
    saver = writer(policy, root / "half", root, background=True)
    saver.save(1)
    saver.poll(wait=True)
    train_step(policy, built.algorithm)

    def write_half(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata=metadata)
        os.truncate(path, path.stat().st_size // 2)
        print("half written", flush=True)
        time.sleep(600)

    shards.save_file = write_half
    saver.save(2)


if __name__ == "__main__":
    if sys.argv[1] == "half":
        save_half(Path(sys.argv[2]))
    else:
        run_rank(Path(sys.argv[2]))
