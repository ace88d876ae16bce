"""Receives weights of `weight_transfer.SocketLink` inside vLLM's workers. The trainer never imports this module."""

import socket
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from lens_megatron.rollout.servers.weight_transfer import packed_bytes, unpack
from lens_megatron.rollout.vllm.tied_head import pack_tied_head
from lens_megatron.supervision import channel


@dataclass
class SocketInitInfo(WeightTransferInitInfo):
    """Says where the trainer listens, and holds the secret by which both ends recognise each other."""

    address: str | list
    secret: str
    """The bytes of the secret as hexadecimal digits."""
    timeout_s: float


@dataclass
class SocketUpdateInfo(WeightTransferUpdateInfo):
    """Says what one bucket holds: the names, types and shapes of its tensors, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class SocketWeightReceiver(WeightTransferEngine[SocketInitInfo, SocketUpdateInfo]):
    """vLLM makes one per worker, and calls it for the endpoints of the same names."""

    init_info_cls = SocketInitInfo
    update_info_cls = SocketUpdateInfo
    supports_draft_weight_update = False
    connection: socket.socket | None = None
    updating = False

    def init_transfer_engine(self, init_info: SocketInitInfo) -> None:
        self.shutdown()
        secret, worker = bytes.fromhex(init_info.secret), self.parallel_config.rank
        self.connection = channel.call(init_info.address, secret, worker, init_info.timeout_s)

    def start_weight_update(self) -> None:
        if self.updating:
            raise RuntimeError("an earlier update broke off, and left layers half loaded; restart this server")
        self.updating = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SocketUpdateInfo) -> None:
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        # A new one each time: vLLM keeps the tensors until it has all of a layer.
        packed = torch.empty(packed_bytes(update_info.shapes, dtypes), dtype=torch.uint8)
        if self.connection is None:
            raise RuntimeError("weights were announced before the trainer connected; call /init_weight_transfer_engine")
        channel.receive_into(self.connection, packed.numpy().data)
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
        if self.connection is not None:
            self.connection.close()
            self.connection = None
