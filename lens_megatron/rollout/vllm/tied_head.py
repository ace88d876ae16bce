"""Renews what vLLM derives from an output head that is tied to the embedding, and does not renew with new weights."""

import torch


def pack_tied_head(model: torch.nn.Module) -> None:
    """Packs the head of vLLM's `model` anew: on a CPU vLLM multiplies by a packed copy of its weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
