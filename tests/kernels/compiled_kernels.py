"""Compiles every Triton kernel as a launch would, for GPUs that need not be there, and reads the machine code.

    python tests/kernels/compiled_kernels.py      # prints a table; --json for one object per kernel

The operators run on meta tensors, so Triton specialises on the true dtypes, strides and alignments, and its launch is
replaced by its own "warm-up", which compiles and stops. Not for a process that has TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}
LOADS = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")
STORES = re.compile(r"st\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")
MASKED = re.compile(r"^\s*@\S+ (?:ld|st)\.global.*$", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", re.MULTILINE)


class Code(NamedTuple):
    """One compiled kernel. Bits are those of its widest global load and store.

    Bytes are what the 16-byte accesses without a mask move per logit: those of the blocks within a row, which are all
    blocks but a row's last and that of its target.
    """

    kernel: str
    case: str
    architecture: int
    registers: int  # per thread
    spilled_bytes: int  # of local memory per thread
    instructions: int  # in all, also of the paths that few blocks take
    load_bits: int
    store_bits: int
    read_bytes: float
    written_bytes: float
    barriers_in_loops: int


class CompileOnly:
    """Stands in for Triton's driver: a GPU of a given compute capability that can be compiled for and nothing else."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # keys Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


def widest(pattern: re.Pattern, ptx: str) -> int:
    return max((int(count or 1) * int(bits) for count, bits in pattern.findall(ptx)), default=0)


def loop_body(ptx: str) -> str:
    """The lines between a label and a later branch back to it."""
    lines = ptx.splitlines()
    labels = {line.strip().split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\s*\$\w+:", line)}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if jump and labels[jump.group(1)] <= i:
            inside.update(range(labels[jump.group(1)], i))
    return "\n".join(lines[i] for i in sorted(inside))


def bytes_per_element(pattern: re.Pattern, ptx: str, elements: int) -> float:
    """Of the 16-byte accesses without a mask of one thread, whose share of a block of columns is `elements`."""
    body = MASKED.sub("", loop_body(ptx) or ptx)
    wide = [1 for count, bits in pattern.findall(body) if int(count or 1) * int(bits) == 128]
    return 16 * len(wide) / elements


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of local memory per thread, instructions), by the cuobjdump that Triton ships."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", "--dump-sass", file.name], text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    return int(usage.group(1)), int(usage.group(2)) + int(usage.group(3)), len(INSTRUCTION.findall(text))


def read_code(kernel: str, case: str, architecture: int, compiled: Any) -> Code:
    from lens_kernels import _dlogits, _statistics

    ptx = compiled.asm["ptx"]
    vector = 4 if "float32" in case or "hidden" in case else 8
    elements = {
        "row_statistics": _statistics.UNROLL * vector,
        "write_dlogits": _dlogits.BLOCK // (32 * _dlogits.WARPS),
    }.get(kernel, math.inf)
    usage = resource_usage(compiled.asm["cubin"])
    widths = widest(LOADS, ptx), widest(STORES, ptx)
    moved = bytes_per_element(LOADS, ptx, elements), bytes_per_element(STORES, ptx, elements)
    return Code(kernel, case, architecture, *usage, *widths, *moved, loop_body(ptx).count("bar.sync"))


def launches() -> Iterator[tuple[str, Any]]:
    """(name of the case, a call that launches kernels), on meta tensors in shapes of the LENS models."""
    import torch
    from lens_kernels import VocabShard, linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs
    from lens_kernels._chunk import gradient_buffer
    from lens_kernels._dlogits import write_dlogits
    from lens_kernels._vocab_parallel import SoftmaxTotals, TokenRows

    rows, columns = 64, 151936
    ids = torch.zeros(rows, dtype=torch.int64, device="meta")
    row = torch.zeros(rows, device="meta")

    def every_term(dtype: torch.dtype, size: int, view: Callable = lambda x: x[3:], **settings: float) -> None:
        logits = view(torch.empty(rows + 3, size, dtype=dtype, device="meta")).requires_grad_()
        terms = {"old_logprobs": row, "advantages": row, "reference_logprobs": row, "dual_clip": 3.0, "kl_limit": 10.0}
        weights = {"policy_weights": row, "kl_weights": row, "entropy_weights": row, "temperature": row + 1}
        policy_loss(logits, ids, **terms, **weights, **settings).loss.backward()

    def logprobs_only(dtype: torch.dtype, inplace: bool) -> None:
        leaf = torch.empty(rows, columns, dtype=dtype, device="meta", requires_grad=True)
        token_logprobs(leaf * 1, ids, inplace_backward=inplace).sum().backward()

    def from_hidden() -> None:
        hidden = torch.empty(rows, 64, device="meta", requires_grad=True)
        weight = torch.empty(columns, 64, device="meta", requires_grad=True)
        linear_token_logprobs(hidden, weight, ids).sum().backward()

    def in_tiles(entropy: bool, softcap: float | None = None) -> None:
        hidden = torch.empty(rows, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        weight = torch.empty(columns, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        terms = {"advantages": row, "entropy_weights": row if entropy else None, "temperature": row + 1}
        linear_policy_loss(hidden, weight, ids, path="tiles", logit_softcap=softcap, **terms).loss.backward()

    def packed() -> None:  # what bfloat16 hidden states launch on a GPU
        logits = torch.empty(rows, columns, device="meta")
        totals = SoftmaxTotals(row, row, row)
        packed = gradient_buffer(logits, torch.bfloat16)
        write_dlogits(packed, logits, TokenRows(ids, None, None, VocabShard(0, columns, columns)), totals, row, row)

    def under_torch_compile() -> None:  # which hides from the host where rows begin
        with mock.patch("lens_kernels._rows._misplacement", lambda x: None):
            every_term(torch.bfloat16, columns)

    yield "bfloat16 logits, log-probs", functools.partial(logprobs_only, torch.bfloat16, False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"{name} logits, all terms", functools.partial(every_term, dtype, columns)
    yield "float32 hidden states", from_hidden
    yield "bfloat16 hidden states", packed
    yield "tiles of bfloat16 hidden", functools.partial(in_tiles, False)
    yield "tiles, with entropy", functools.partial(in_tiles, True)
    yield "tiles, entropy and soft cap", functools.partial(in_tiles, True, 30.0)
    yield "bfloat16 logits, in place", functools.partial(logprobs_only, torch.bfloat16, True)
    bfloat16_terms = functools.partial(every_term, torch.bfloat16)
    yield "bfloat16 logits, soft cap", functools.partial(bfloat16_terms, columns, logit_softcap=30.0)
    yield "bfloat16 logits, V 32008", functools.partial(bfloat16_terms, 32008)
    yield "bfloat16 logits, V 50257", functools.partial(bfloat16_terms, 50257, lambda x: x[:rows])
    yield "bfloat16 V 50257, later rows", functools.partial(bfloat16_terms, 50257)
    yield "bfloat16 V 50257 of 50258", functools.partial(bfloat16_terms, 50258, lambda x: x[:rows, :-1])
    yield "bfloat16, torch.compile", under_torch_compile
    yield "float32 logits, V 50257", functools.partial(every_term, torch.float32, 50257)


def compile_all(architectures: tuple[int, ...]) -> list[Code]:
    os.environ["LENS_KERNELS_BACKEND"] = "triton"
    import triton
    from triton.runtime.jit import JITFunction

    seen: dict[tuple[int, int], Code] = {}
    run = JITFunction.run
    case = ""

    def compile_only(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        compiled = run(kernel, *args, **(kwargs | {"warmup": True}))
        architecture = triton.runtime.driver.active.architecture
        if (architecture, id(compiled)) not in seen:
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            seen[architecture, id(compiled)] = read_code(name, case, architecture, compiled)

    JITFunction.run = compile_only  # this process exists to compile
    for architecture in architectures:
        triton.runtime.driver.set_active(CompileOnly(architecture))
        for case, launch in launches():  # noqa: B007, compile_only reads it
            launch()
    return list(seen.values())


def main() -> None:
    codes = compile_all(tuple(ARCHITECTURES))
    if "--json" in sys.argv:
        print(json.dumps([code._asdict() for code in codes]))
        return
    headers = "registers", "spilled", "instr", "load bits", "store bits", "B/elem read", "written", "barriers"
    print(f"{'kernel':16}{'case':30}{'GPU':>6}" + "".join(f"{header:>13}" for header in headers))
    for kernel, case, architecture, *numbers in codes:
        print(f"{kernel:16}{case:30}{ARCHITECTURES[architecture]:>6}" + "".join(f"{n:>13g}" for n in numbers))


if __name__ == "__main__":
    main()
