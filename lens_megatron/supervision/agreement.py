"""Tells all ranks what one of them has found out. Sends only tensors; functions that take no group use the world."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed import ProcessGroup

from lens_megatron.errors import UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def told_by_main(tell: Callable[[], str], device: torch.device) -> str:
    """Returns on every rank what `tell` returns on rank 0. Raises what it raises there, and ToldError elsewhere."""
    failure: Exception | None = None
    text = ""
    if torch.distributed.get_rank() == 0:
        try:
            text = tell()
        except Exception as error:  # the other ranks wait, so they must be told of every error
            failure, text = error, str(error)
    failed, text = _broadcast(failure is not None, text, device)
    if failed:
        raise failure or ToldError(text)
    return text


class ToldError(UserError):
    """Rank 0 cannot go on; the message gives its reason."""


def raise_together(failure: Exception | None, otherwise: Exception, device: torch.device) -> None:
    """Raises on every rank if any has a failure: this rank's own failure if it has one, else `otherwise`."""
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if failed.item():
        raise failure or otherwise


def together(
    attempt: Callable[[], Result], expected: type[Exception], otherwise: Exception, device: torch.device
) -> Result:
    """Returns what `attempt` returns here, once it has succeeded on every rank. A collective.

    Raises the `expected` error of this rank's attempt, or `otherwise` where only another rank's has failed. An error of
    another type is raised at once, without the other ranks.
    """
    results: list[Result] = []
    failure: Exception | None = None
    try:
        results.append(attempt())
    except expected as error:
        failure = error
    raise_together(failure, otherwise, device)
    return results[0]


def first_to_fail(failed: bool, device: torch.device) -> int | None:
    """Returns the lowest rank that has failed, or None if no rank has."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first = torch.tensor([rank if failed else world_size], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
    return int(first.item()) if first.item() < world_size else None


def shared_failure(failure: str | None, group: ProcessGroup | None, warning: str) -> str | None:
    """Returns this rank's failure, or that another rank failed, or None where all ranks of `group` succeeded.

    A collective of `group`, over the CPU. Ranks other than 0 log `warning` with their failure, as nobody else does.
    """
    failed = torch.tensor([failure is not None], dtype=torch.int32)
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX, group=group)
    if failure is not None and torch.distributed.get_rank() != 0:
        logger.warning(f"{warning}: {failure}")
    return failure or ("another rank failed" if failed.item() else None)


def _broadcast(flag: bool, text: str, device: torch.device) -> tuple[bool, str]:
    data = text.encode("utf-8", errors="backslashreplace")
    head = torch.tensor([flag, len(data)], dtype=torch.int64, device=device)
    torch.distributed.broadcast(head, 0)
    body = torch.zeros(int(head[1]), dtype=torch.uint8, device=device)
    if torch.distributed.get_rank() == 0 and data:
        body.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if len(body):
        torch.distributed.broadcast(body, 0)
    return bool(head[0]), bytes(body.cpu().numpy()).decode()
