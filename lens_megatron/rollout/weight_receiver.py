"""The server's end of `weight_transfer.GlooLink`, inside vLLM's workers. Nothing of the trainer imports this."""

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from lens_megatron.rollout.weight_transfer import address_towards, gloo_group, packed_bytes, unpack


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer's store is, and how many the group has: the trainer and this server's workers."""

    host: str
    port: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one bucket, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightReceiver(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """vLLM makes one per worker, and calls it for the endpoints of the same names."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    supports_draft_weight_update = False
    group: ProcessGroupGloo | None = None
    updating = False

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        timeout = timedelta(seconds=init_info.timeout_s)
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout, wait_for_workers=False)
        host, rank = address_towards(init_info.host, init_info.port), 1 + self.parallel_config.rank
        self.group = gloo_group(host, store, rank, init_info.world_size, timeout)

    def start_weight_update(self) -> None:
        if self.updating:
            raise RuntimeError("an earlier update broke off, and left layers half loaded; restart this server")
        self.updating = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        # A new one each time: vLLM keeps the tensors until it has all of a layer.
        packed = torch.empty(packed_bytes(update_info.shapes, dtypes), dtype=torch.uint8)
        self.group.broadcast(packed, 0).wait()
        tensors = unpack(packed, update_info.shapes, dtypes)
        self.model.load_weights(zip(update_info.names, tensors, strict=True))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.hf_text_config.tie_word_embeddings:
            pack_tied_head(self.model)
        self.updating = False

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class then waits for an accelerator

    def shutdown(self) -> None:
        self.group = None


def pack_tied_head(model: torch.nn.Module) -> None:
    """On a CPU vLLM multiplies by a packed copy of a head, and does not renew that of one tied to the embedding."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
