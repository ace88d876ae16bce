"""Groups <-> JSON lines and bytes: for `debug.save_rollouts` / `load_rollouts`, and for exchange between ranks."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, Rollout, Status


class ReplayError(ValueError):
    """Saved rollouts that are not there or cannot be read; the message names file and line."""


def to_json(group: Group) -> str:
    """One line. Floats keep every bit (repr round-trips)."""
    purified = group.purified
    return json.dumps(
        {
            "prompt": _prompt(group.prompt),
            "native": [_rollout(r) for r in group.native],
            "purified": purified
            and {"token_ids": purified.token_ids, "deleted": purified.deleted, "scores": purified.scores},
            "rescue": [_rollout(r) for r in group.rescue],
        }
    )


def from_json(line: str) -> Group:
    """Raises ValueError or KeyError when the line is not a group."""
    row = json.loads(line)
    purified = row["purified"]
    return Group(
        prompt=Prompt(**{**row["prompt"], **_tuples(row["prompt"], "token_ids", "eligible")}),
        native=tuple(map(_read_rollout, row["native"])),
        purified=purified and PurifiedPrompt(**_tuples(purified, "token_ids", "deleted", "scores")),
        rescue=tuple(map(_read_rollout, row["rescue"])),
    )


def _prompt(prompt: Prompt) -> dict:
    return {name: getattr(prompt, name) for name in Prompt.__slots__}


def _rollout(rollout: Rollout) -> dict:
    return {name: getattr(rollout, name) for name in Rollout.__slots__}


def _read_rollout(row: dict) -> Rollout:
    kept = {"origin": Origin(row["origin"]), "status": Status(row["status"])}
    return Rollout(**{**row, **kept, **_tuples(row, "token_ids", "log_probs")})


def _tuples(row: dict, *names: str) -> dict:
    return {name: tuple(row[name]) for name in names}


def replay_path(folder: str, step: int) -> Path:
    return Path(folder) / f"step_{step:06d}.jsonl"


def read_groups(folder: str, step: int) -> list[Group]:
    """The groups of `step`. Raises ReplayError."""
    path = replay_path(folder, step)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        saved = len(list(Path(folder).glob("step_*.jsonl")))
        raise ReplayError(
            f"debug.load_rollouts: {path} cannot be read ({error.strerror}); the folder holds {saved} steps, "
            "lower train.steps or save more with debug.save_rollouts"
        ) from error
    groups = []
    for number, line in enumerate(lines, start=1):
        try:
            groups.append(from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ReplayError(f"{path}:{number}: not a saved group: {error}") from error
    return groups


def exchange(groups: Iterable[Group], group: ProcessGroup) -> list[list[Group]]:
    """Gives every rank of `group` the groups of every rank, in rank order. Only tensors travel."""
    world = torch.distributed.get_world_size(group)
    own = list(groups)
    if world == 1:
        return [own]
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    payload = torch.frombuffer(bytearray("\n".join(map(to_json, own)).encode() or b"\n"), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    torch.distributed.all_gather(sizes, size, group=group)
    longest = int(max(sizes))
    padded = torch.nn.functional.pad(payload, (0, longest - payload.numel()))
    buffers = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(buffers, padded, group=group)
    texts = [bytes(b[: int(n)].cpu().tolist()).decode() for b, n in zip(buffers, sizes, strict=True)]
    return [[from_json(line) for line in text.splitlines() if line] for text in texts]


def interleave(parts: Sequence[Sequence[Group]]) -> list[Group]:
    """Undoes `items[rank::world]`: the first of every part, then the second, ..."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]
