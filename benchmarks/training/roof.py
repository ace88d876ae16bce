"""Computes model FLOPs of a batch, and measures what the machine can do."""

import time

import torch

from benchmarks.operators.results import processor
from benchmarks.training.load import SHAPES, Lengths

NOMINAL_BF16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}
"""Dense FLOP/s from NVIDIA's data sheets (SXM where there are several)."""


def forward_flops(shape: str, sizes: Lengths) -> float:
    """FLOPs of a forward pass over real tokens: matrices, causal attention (half the square), head on response tokens.

    A multiply-add counts as 2. Norms, rotary embedding and softmax are not counted, nor is anything recomputed.
    """
    model = SHAPES[shape]
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    head_dim = hidden // heads
    matrices = hidden * head_dim * (2 * heads + 2 * model["num_key_value_heads"])
    matrices += 3 * hidden * model["intermediate_size"]
    tokens, responses = sum(p + r for p, r in sizes), sum(r for _, r in sizes)
    pairs = sum((p + r) * (p + r + 1) / 2 for p, r in sizes)
    layers = model["num_hidden_layers"] * (2 * matrices * tokens + 4 * heads * head_dim * pairs)
    return layers + 2 * hidden * model["vocab_size"] * responses


def gemm_rate(device: torch.device) -> tuple[float, float]:
    """Gets (FLOP per second, FLOP per CPU second) of float32 GEMMs of 768 x 768 x 768 here and now; nominal on a GPU.

    Raises KeyError with the device's name if its nominal rate is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        rate = next((rate for part, rate in NOMINAL_BF16.items() if part in name), None)
        if rate is None:
            raise KeyError(f"no nominal FLOP/s for {name}; add it to NOMINAL_BF16")
        return rate, rate
    a, b, flops = torch.randn(768, 768), torch.randn(768, 768), 2 * 768**3
    wall = cpu = float("inf")
    for _ in range(12):
        start, start_cpu = time.perf_counter(), time.process_time()
        a @ b
        wall = min(wall, time.perf_counter() - start)
        cpu = min(cpu, time.process_time() - start_cpu)
    return flops / wall, flops / cpu


def machine() -> dict[str, str | int]:
    found = {"cpu": processor(), "threads_per_process": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
