"""Answers, on a GPU, what the design of the linear loss depends on; each question is a program of its own.

    python -m benchmarks.gpu_questions paths --out FOLDER     # chunks or tiles of logits: time and memory of the loss
    python -m benchmarks.gpu_questions l2 --out FOLDER            # is a tile of logits in the L2 cache when it is read?
    python -m benchmarks.gpu_questions dw --out FOLDER        # the product of the weight's gradient, alone and added
    python -m benchmarks.gpu_questions dlogits --out FOLDER   # the kernel that writes dlogits beside a plain copy

It writes FOLDER/result.json. `--tiny` runs the same code on any device, at sizes whose seconds mean nothing. All times
on a GPU are of replayed CUDA graphs, or of calls launched behind a sleeping device, so that launches cost nothing.
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_session.reading import NO_DEVICE

REPEATS = 7
_SLEEP_CYCLES = 20_000_000
"""About 10 ms at 2 GHz, in which the host can launch what is timed."""
_TILES_IN_A_ROW = 16
"""Tiles that one graph computes, so that the time of their reads is more than the noise of the products'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes that all questions share."""

    rows: int
    vocab: int
    hidden: int
    tiles: tuple[int, ...]
    """Columns of a tile."""
    flush_bytes: int
    """Larger than every cache."""
    piece_bytes: int
    """Fits half of the L2 cache, and a tile is a whole number of them."""


REAL = Sizes(
    rows=4096, vocab=128256, hidden=4096, tiles=(1024, 2048, 4096), flush_bytes=512 << 20, piece_bytes=16 << 20
)
TINY = Sizes(rows=16, vocab=256, hidden=32, tiles=(32, 64), flush_bytes=1 << 16, piece_bytes=1 << 11)


# ---- timing -------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None) -> float:
    """Returns the median seconds of `work`; `before` runs untimed before each call.

    On a GPU the device sleeps while the host launches, so that the host's time is not in it.
    """
    taken = []
    for _ in range(2):
        work()
    for _ in range(REPEATS):
        before()
        if device.type != "cuda":
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def graphed(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns `work` captured as a CUDA graph, whose launches have no gaps; on a CPU `work` itself."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Multiplies [M, K] by [K, N] into float32 `out`, as the head does: bfloat16 operands as they are on a GPU."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def added_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Adds the product [M, K] x [K, N] to float32 `total`, in place."""
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return torch.addmm(total, a.float(), b.float(), out=total)


# ---- the questions ------------------------------------------------------------------------------------------------


def ask_l2(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Estimates which share of a tile [rows, columns] of float32 logits a read right after its product finds in L2.

    All reads are sums of pieces of `piece_bytes`, so that each has the same costs beside its bytes: of one piece again
    and again, which L2 holds; of pieces in a rotation larger than L2; and of a tile's pieces right after its product,
    which is the time of a graph of products and reads less that of a graph of the products alone.
    """
    piece = sizes.piece_bytes // 4
    rotation = torch.ones(sizes.flush_bytes // sizes.piece_bytes, piece, device=device)
    near = seconds_of(graphed(partial(_read, rotation[:1].expand(len(rotation), -1)), device), device) / len(rotation)
    far = seconds_of(graphed(partial(_read, rotation), device), device) / len(rotation)
    hidden = torch.randn(sizes.rows, sizes.hidden, device=device, dtype=torch.bfloat16)
    found = []
    for columns in sizes.tiles:
        weight = torch.randn(_TILES_IN_A_ROW, columns, sizes.hidden, device=device, dtype=torch.bfloat16)
        tile = torch.empty(sizes.rows, columns, device=device)
        alone, with_read = (
            seconds_of(graphed(partial(_products, hidden, weight, tile, reads), device), device)
            for reads in (None, tile.view(-1, piece))
        )
        after = (with_read - alone) / (len(weight) * tile.numel() / piece)
        found.append(
            {
                "columns": columns,
                "tile_bytes": 4 * tile.numel(),
                "piece_seconds": {"after_product": after, "from_memory": far, "from_l2": near},
                "product_flop_per_s": 2 * len(weight) * tile.numel() * sizes.hidden / alone,
                "l2_hit_share": hit_share(after, far, near),
            }
        )
    shown = ", ".join(f"{f['columns']} columns ({f['tile_bytes'] >> 20} MiB): {f['l2_hit_share']:.0%}" for f in found)
    return {"headline": f"share of a tile read from L2: {shown}", "rows": sizes.rows, "tiles": found}


def _read(pieces: Tensor) -> None:
    for piece in pieces:
        piece.sum()


def _products(hidden: Tensor, weights: Tensor, tile: Tensor, reads: Tensor | None) -> None:
    """Writes one tile after the other into the same buffer, and reads each if `reads` has the buffer's pieces."""
    for weight in weights:
        product(hidden, weight.T, tile)
        if reads is not None:
            _read(reads)


def hit_share(read: float, far: float, near: float) -> float:
    """Returns the share of a read that L2 served, between 0 and 1, from the seconds of three equal reads.

    Example: 6 from memory, 2 from L2: a read that takes 3 was served by L2 to three quarters.
    """
    return min(1.0, max(0.0, (far - read) / (far - near))) if far > near else 0.0


def ask_dw(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Times dW [V, H] = D^T h with K = half and all of `rows`: written (beta 0), and added to a sum (beta 1)."""
    weight = torch.randn(sizes.vocab, sizes.hidden, device=device, dtype=torch.bfloat16)
    total = torch.zeros(sizes.vocab, sizes.hidden, device=device)
    found = []
    for count in (sizes.rows // 2, sizes.rows):
        gradient = torch.randn(count, sizes.vocab, device=device, dtype=torch.bfloat16) / sizes.rows
        hidden = torch.randn(count, sizes.hidden, device=device, dtype=torch.bfloat16)
        logits = torch.empty(count, sizes.vocab, device=device)
        operations = 2 * count * sizes.vocab * sizes.hidden
        works = {
            "beta_0": partial(product, gradient.T, hidden, total),
            "beta_1": partial(added_product, total, gradient.T, hidden),
            "logits": partial(product, hidden, weight.T, logits),
        }
        seconds = {name: seconds_of(work, device) for name, work in works.items()}
        found.append({"k": count, "seconds": seconds, "flop_per_s": {n: operations / s for n, s in seconds.items()}})
    shown = ", ".join(
        f"K {f['k']}: " + ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in f["flop_per_s"].items())
        for f in found
    )
    return {"headline": f"TFLOP/s of the weight's gradient and of the logits: {shown}", "products": found}


def ask_dlogits(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Times the backward of token_logprobs on bfloat16 logits, which reads and writes as much as a copy of them."""
    from lens_kernels import token_logprobs

    logits = torch.randn(sizes.rows, sizes.vocab, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, sizes.vocab, (sizes.rows,), device=device)
    upstream, target = torch.randn(sizes.rows, device=device), torch.empty_like(logits)
    logprobs = token_logprobs(logits, ids)

    def backward() -> Tensor:
        return torch.autograd.grad(logprobs, logits, upstream, retain_graph=True)[0]

    works = {"backward": backward, "copy": lambda: target.copy_(logits.detach())}
    flush = torch.empty(sizes.flush_bytes, device=device, dtype=torch.int8)
    seconds = {name: seconds_of(work, device, before=flush.zero_) for name, work in works.items()}
    share = seconds["copy"] / seconds["backward"]
    moved = 2 * logits.numel() * logits.itemsize
    headline = f"backward of the log-probabilities at {share:.2f} of copy_, {moved / seconds['copy'] / 1e12:.2f} TB/s"
    return {"headline": headline, "seconds": seconds, "bytes": moved}


def ask_paths(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Times forward and backward of linear_policy_loss on each of its paths, at twice `rows`, beside three products."""
    from lens_kernels import linear_policy_loss

    rows = 2 * sizes.rows
    hidden = torch.randn(rows, sizes.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(sizes.vocab, sizes.hidden, device=device, dtype=torch.bfloat16).div_(8).requires_grad_()
    ids = torch.randint(0, sizes.vocab, (rows,), device=device)
    row = torch.randn(rows, device=device)
    paths: dict[str, dict[str, Any]] = {}
    for name, options in _paths(linear_policy_loss).items():

        def step(options: dict[str, Any] = options) -> tuple[Tensor, ...]:
            loss = linear_policy_loss(
                hidden, weight, ids, advantages=row, reference_logprobs=row - 9, kl_weights=0.04, **options
            ).loss
            return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

        paths[name] = _cost(step, device)
    seconds = _three_products(hidden, weight, device)
    for path in paths.values():
        path["of_three_products"] = seconds / path["seconds"]
    first = next(iter(paths.values()))["norms"]
    for path in paths.values():
        path["differs_from_first"] = max(abs(a - b) / abs(b) for a, b in zip(path["norms"], first, strict=True))
    shown = ", ".join(f"{name} {path['of_three_products']:.2f} of three products" for name, path in paths.items())
    missing = "" if len(paths) > 1 else "; this version of linear_policy_loss has no argument `path`: one path only"
    return {"headline": f"T {rows}: {shown}{missing}", "products_seconds": seconds, "paths": paths}


def _paths(function: Callable) -> dict[str, dict[str, Any]]:
    """Returns the options that choose each path of `function`; one without options where it has no such argument."""
    if "path" not in inspect.signature(function).parameters:
        return {"the only path": {}}
    return {name: {"path": name} for name in ("chunks", "tiles")}


def _cost(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> dict[str, Any]:
    """Returns seconds, peak bytes and the norms of what `step` returns, which tell a wrong path from a fast one."""
    norms = [float(value.float().norm()) for value in step()]
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": seconds_of(step, device), "peak_extra_bytes": peak, "norms": norms}


def _three_products(hidden: Tensor, weight: Tensor, device: torch.device) -> float:
    """Returns the seconds of the three products of a linear loss by torch.mm, with bfloat16 results."""
    with torch.no_grad():
        logits = torch.mm(hidden, weight.T)
        works = (
            lambda: torch.mm(hidden, weight.T, out=logits),
            lambda: torch.mm(logits, weight),
            lambda: torch.mm(logits.T, hidden),
        )
        return sum(seconds_of(work, device) for work in works)


QUESTIONS = {"paths": ask_paths, "l2": ask_l2, "dw": ask_dw, "dlogits": ask_dlogits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=tuple(QUESTIONS))
    parser.add_argument("--out", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on any device: a rehearsal")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() and not chosen.tiny:
        import lens_kernels  # noqa: F401, all that a question needs is there

        raise SystemExit(NO_DEVICE)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = QUESTIONS[chosen.question](TINY if chosen.tiny else REAL, device)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "result.json").write_text(json.dumps(result))
    print(result["headline"])


if __name__ == "__main__":
    main()
