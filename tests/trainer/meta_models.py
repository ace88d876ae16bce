"""Builds the policy's Megatron model of configurations without memory: python meta_models.py CONFIG ...

One JSON line per model whole (TP1, PP1) and per pipeline stage at the configuration's layout: name, stage, parameters.
Run in a process of its own: it replaces the process group by torch's fake one, which has as many ranks as it is told.
"""

import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from lens_megatron.config import MegatronConfig, load
from lens_megatron.policy import platform
from lens_megatron.tools.planning.model_shape import ModelShape, read_shape

FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip


def parameters(shape: ModelShape, layout: MegatronConfig, world: int, stage: int, device: torch.device) -> int:
    """The number of parameters that one rank of `stage` holds."""
    from lens_megatron.policy.hf_weights import build_bridge
    from lens_megatron.policy.parallel import build_mesh, shut_down

    rank = stage * (world // layout.pipeline_model_parallel_size)
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    mesh = build_mesh(layout, 0, device)
    assert mesh.pp_rank == stage
    hf_config = AutoConfig.for_model(shape.model_type, **{name: getattr(shape, name) for name in FIELDS})
    hf_config.rope_theta = hf_config.rope_parameters["rope_theta"]
    bridge = build_bridge(hf_config, torch.bfloat16, mesh.tp_size, layout.sequence_parallel)
    chunks = range(mesh.vp_size) if mesh.vp_size > 1 else [None]
    count = 0
    for chunk in chunks:
        first, last = stage == 0 and not chunk, mesh.is_last_stage and chunk in (None, mesh.vp_size - 1)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = bridge._model_provider([])(pre_process=first, post_process=last, vp_stage=chunk)
        count += sum(parameter.numel() for parameter in model.parameters())
    shut_down()
    return count


def main(paths: list[str]) -> None:
    device = platform.install()
    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *ranks, **options: new_group(*ranks, **{**options, "backend": "fake"})
    done = set()
    for path in paths:
        config = load(path)
        shape, layout = read_shape(config.model.path), config.megatron
        world = config.cluster.nodes * config.cluster.gpus_per_node
        if config.model.path not in done:
            print(json.dumps([config.model.path, None, parameters(shape, MegatronConfig(), 1, 0, device)]), flush=True)
            done.add(config.model.path)
        for stage in range(layout.pipeline_model_parallel_size):
            print(json.dumps([path, stage, parameters(shape, layout, world, stage, device)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
