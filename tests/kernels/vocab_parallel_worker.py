"""One rank of test_vocab_parallel.py: `vocab_parallel_worker.py RANK RANKS FOLDER` runs and saves all cases."""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from lens_kernels import (
    VocabShard,
    _tiles,
    interference_scores,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from torch import Tensor

ROWS, COLUMNS, WIDTH = 9, 40, 8
EVEN = 8  # rows that every number of ranks divides

# Per number of ranks: the shards' sizes, and the valid vocabulary size.
LAYOUTS = {
    1: {"whole": ([40], None), "padded": ([40], 33)},
    2: {"equal": ([20, 20], None), "unequal": ([31, 9], 37), "all padding": ([20, 20], 17)},
    4: {"equal": ([10, 10, 10, 10], 38), "unequal": ([17, 3, 15, 5], 33), "one column": ([1, 37, 1, 1], None)},
}


def make_inputs(valid: int | None) -> dict[str, Tensor]:
    """The whole problem, the same on every rank. Columns 0 to 9 are -inf in row 4: whole shards of it in places."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    ids = torch.randint(10, valid or COLUMNS, (ROWS,), generator=generator)
    ids[:3] = torch.tensor([0, -1, (valid or COLUMNS) - 1])
    logits, reference = randn(ROWS, COLUMNS) * 3, randn(ROWS, COLUMNS) * 3
    logits[4, :10] = -torch.inf
    logits[5] += 1e4
    logits[:, valid or COLUMNS :] = torch.nan
    old = randn(ROWS) - 3
    old[6] = torch.nan
    return {
        "ids": ids,
        "logits": logits,
        "reference": reference,
        "hidden": randn(ROWS, WIDTH),
        "weight": randn(COLUMNS, WIDTH),
        "bias": randn(COLUMNS),
        "old": old,
        "advantages": randn(ROWS),
        "temperature": torch.rand(ROWS, generator=generator) + 0.5,
    }


def vocabulary(valid: int | None, columns: slice, group: dist.ProcessGroup | None) -> dict:
    """The arguments that say which columns of the vocabulary there are."""
    if group is None:
        return {"valid_vocab_size": valid}
    shard = VocabShard.gather(columns.stop - columns.start, group, valid)
    assert shard.start == columns.start
    return {"shard": shard}


def run_case(valid: int | None, columns: slice, group: dist.ProcessGroup | None) -> tuple[dict, dict]:
    """({results every rank must share}, {gradients of this rank's columns, which lie first})."""
    given = make_inputs(valid)
    ids, old, reference = given["ids"], given["old"], given["old"].nan_to_num(-2.0) + 0.1
    settings = {"temperature": given["temperature"], **vocabulary(valid, columns, group)}
    terms = {"old_logprobs": old, "advantages": given["advantages"], "reference_logprobs": reference}
    terms |= {"kl_weights": 0.1, "entropy_weights": 0.2, "dual_clip": 3.0, "kl_limit": 0.004}
    shared, local = {}, {}

    def leaf(name):
        return given[name][..., columns].clone().requires_grad_()

    logits = leaf("logits")
    shared["logprobs"], shared["entropy"] = token_logprobs(logits, ids, return_entropy=True, **settings)
    (shared["logprobs"] + 0.5 * shared["entropy"]).sum().backward()
    local["logits"] = logits.grad.T

    logits = leaf("logits") * 1
    logits.retain_grad()
    loss = policy_loss(logits, ids, inplace_backward=True, **terms, **settings)
    (loss.loss * 0.7).backward()
    shared |= {f"loss.{name}": value for name, value in loss._asdict().items()}
    local["loss.logits"] = logits.grad.T

    both = {"reference_logits": leaf("reference").detach()}
    shared["scores"] = interference_scores(leaf("logits"), ids, **both, **settings)

    def head():
        return given["hidden"].clone().requires_grad_(), given["weight"][columns].clone().requires_grad_(), leaf("bias")

    hidden, weight, bias = head()
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, ids, bias=bias, return_entropy=True, chunk_rows=4, **settings
    )
    (logprobs + 0.5 * entropy).sum().backward()
    shared |= {"linear.logprobs": logprobs, "linear.entropy": entropy, "linear.hidden": hidden.grad}
    local |= {"linear.weight": weight.grad, "linear.bias": bias.grad}

    hidden, weight, bias = head()
    main_grad = torch.ones_like(weight)
    loss = linear_policy_loss(
        hidden, weight, ids, bias=bias, chunk_rows=4, accumulate_into=main_grad, **terms, **settings
    )
    (loss.loss * 0.7).backward()
    shared |= {f"linear_loss.{name}": value for name, value in loss._asdict().items()}
    shared["linear_loss.hidden"] = hidden.grad
    local |= {"linear_loss.weight": main_grad, "linear_loss.bias": bias.grad}
    by_tiles = run_tiles(ids, head, terms, settings)
    local |= {name: x for name, x in by_tiles.items() if name in ("tiles.weight", "tiles.bias", "tiles.loss.weight")}
    shared |= {name: x for name, x in by_tiles.items() if name not in local}
    by_rows = run_sequence_parallel(given, head, settings, group)
    local |= {name: x for name, x in by_rows.items() if x.shape != given["ids"][:EVEN].shape}
    shared |= {name: x for name, x in by_rows.items() if name not in local}
    return {k: v.detach() for k, v in shared.items()}, {k: v.detach().clone() for k, v in local.items()}


def run_tiles(ids: Tensor, head: Callable, terms: dict, settings: dict) -> dict[str, Tensor]:
    """Both linear functions over tiles of 16 columns, the results that ranks share and the others."""
    with mock.patch.object(_tiles, "TILE_COLUMNS", 16):
        hidden, weight, bias = head()
        logprobs = linear_token_logprobs(hidden, weight, ids, bias=bias, chunk_rows=4, path="tiles", **settings)
        logprobs.sum().backward()
        results = {"tiles.logprobs": logprobs, "tiles.hidden": hidden.grad, "tiles.weight": weight.grad}
        results["tiles.bias"] = bias.grad
        hidden, weight, bias = head()
        loss = linear_policy_loss(hidden, weight, ids, bias=bias, chunk_rows=4, path="tiles", **terms, **settings)
        loss.loss.backward()
    return results | {"tiles.loss": loss.loss, "tiles.loss.hidden": hidden.grad, "tiles.loss.weight": weight.grad}


def run_sequence_parallel(given: dict, head: Callable, settings: dict, group: dist.ProcessGroup | None) -> dict:
    """Both linear functions with `hidden` cut along its rows; [EVEN] results and gradients of this rank's part."""
    ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if group else (1, 0)
    mine = slice(rank * EVEN // ranks, (rank + 1) * EVEN // ranks)
    settings = settings | {"temperature": 0.8, "sequence_parallel": group is not None}
    hidden, weight, bias = head()
    logprobs = linear_token_logprobs(hidden[mine], weight, given["ids"][:EVEN], bias=bias, **settings)
    logprobs.square().sum().backward()
    results = {"by rows.logprobs": logprobs, "by rows.weight": weight.grad, "by rows.hidden": hidden.grad[mine]}
    rows = torch.tensor([6, 0, 3])  # of all ranks' hidden states
    hidden, weight, bias = head()
    terms = {"advantages": given["advantages"][rows], "entropy_weights": 0.1, "rows": rows}
    linear_policy_loss(hidden[mine], weight, given["ids"][rows], **terms, **settings).loss.backward()
    return results | {"by rows.loss.weight": weight.grad, "by rows.loss.hidden": hidden.grad[mine]}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    group = dist.new_group(list(range(ranks)))
    results = {}
    for name, (sizes, valid) in LAYOUTS[ranks].items():
        start = sum(sizes[:rank])
        results[name] = run_case(valid, slice(start, start + sizes[rank]), group)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
