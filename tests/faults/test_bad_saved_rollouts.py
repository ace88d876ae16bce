"""Saved rollouts that a run cannot load."""

import gzip
import json
import os

import pytest
from refusals import Accepted, Trainer

from lens_megatron.reward.types import GradeStatus
from lens_megatron.rollout import replay
from lens_megatron.types import Group, Origin, Prompt, Rollout


def group(place: int = 0) -> dict:
    rollout = Rollout((5, 6), (-0.5, -0.25), True, Origin.NATIVE, 0, 1.0, GradeStatus.CORRECT)
    prompt = Prompt(place, (1, 2, 3), (False, True, True), "12", "5 + 7 = ?", "train")
    return json.loads(replay.to_json(Group(prompt, (rollout,) * 4)))


def changed(*path: str | int, value: object) -> bytes:
    """Four saved groups, the last one with `value` at `path`."""
    rows = [group(place) for place in range(4)]
    node = rows[-1]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


WHOLE = changed("prompt", "index", value=3)
PURIFIED = {"token_ids": [1, 2], "deleted": [2], "scores": [0.0, 0.1, 0.2]}
REPLAYS = {
    "empty": (b"", "holds 0 groups, rollout.prompts_per_step asks for 4"),
    "one too few": (WHOLE[: WHOLE.rindex(b"\n", 0, -1) + 1], "holds 3 groups, rollout.prompts_per_step asks for 4"),
    "too many": (WHOLE * 2, "holds 8 groups"),
    "truncated": (WHOLE[:-100], ":4: not a saved group"),
    "binary": (bytes(range(256)), ":1: not a saved group"),
    "gzip": (gzip.compress(WHOLE), ":1: not a saved group"),
    "utf16": (WHOLE.decode().encode("utf-16"), ":1: not a saved group"),
    "list": (b"[]\n" * 4, ":1: not a saved group"),
    "null": (b"null\n" * 4, ":1: not a saved group"),
    "number": (b"1e999\n" * 4, ":1: not a saved group"),
    "deep": (b"[" * 100_000 + b"\n", ":1: not a saved group"),
    "no prompt": (b'{"purified": null}\n', "it has no 'prompt'"),
    "blank line": (b"\n" + WHOLE, ":1: not a saved group"),
    "prompt of text": (changed("prompt", value="text"), ":4: not a saved group"),
    "unknown key": (changed("prompt", "colour", value=1), ":4: not a saved group"),
    "text for tokens": (changed("prompt", "token_ids", value=["a", "b", "c"]), "are no token ids"),
    "no tokens": (changed("prompt", "token_ids", value=[]), "are no token ids"),
    "negative token": (changed("prompt", "token_ids", value=[1, -2, 3]), "are no token ids"),
    "fraction of a token": (changed("prompt", "token_ids", value=[1, 2.5, 3]), "are no token ids"),
    "token beyond": (changed("prompt", "token_ids", value=[1, 10**6, 3]), "token 1000000 is beyond"),
    "mask too short": (changed("prompt", "eligible", value=[True]), "eligible has 1 entries for 3 tokens"),
    "mask of numbers": (changed("prompt", "eligible", value=[0, 1, 1]), "no booleans"),
    "answer of null": (changed("prompt", "answer", value=None), "not all text"),
    "index of text": (changed("prompt", "index", value="3"), "is no row"),
    "index below zero": (changed("prompt", "index", value=-1), "is no row"),
    "no rollouts": (changed("native", value=[]), "native: no rollouts"),
    "rollout of null": (changed("native", 0, value=None), ":4: not a saved group"),
    "no completion": (changed("native", 0, "token_ids", value=[]), "native[0]: token_ids"),
    "huge token": (changed("native", 0, "token_ids", value=[5, 10**30]), "is beyond the model's vocabulary"),
    "log_probs too short": (changed("native", 1, "log_probs", value=[-1.0]), "native[1]: 1 log_probs for 2 tokens"),
    "log_probs not finite": (changed("native", 1, "log_probs", value=[-1.0, float("nan")]), "not finite"),
    "log_probs of text": (changed("native", 1, "log_probs", value=["a", "b"]), "native[1]"),
    "reward not finite": (changed("native", 2, "reward", value=float("inf")), "native[2]: reward inf"),
    "reward of null": (changed("native", 2, "reward", value=None), "native[2]: reward None"),
    "reward of truth": (changed("native", 2, "reward", value=True), "native[2]: reward True"),
    "unknown status": (changed("native", 3, "status", value="splendid"), "'splendid' is not a valid GradeStatus"),
    "unknown origin": (changed("native", 3, "origin", value="mars"), "'mars' is not a valid Origin"),
    "other origin": (changed("native", 3, "origin", value="purified"), "origin is purified, expected native"),
    "version of text": (changed("native", 3, "weight_version", value="1"), "weight_version"),
    "finished of text": (changed("native", 3, "finished", value="yes"), "finished no boolean"),
    "rescue without purified": (changed("rescue", value=[{**group()["native"][0], "origin": "purified"}]), "rescue"),
    "purified of text": (changed("purified", value="text"), ":4: not a saved group"),
    "purified without scores": (changed("purified", value={**PURIFIED, "scores": []}), "purified: 0 scores"),
    "purified scores not finite": (changed("purified", value={**PURIFIED, "scores": [0, 1, float("nan")]}), "scores"),
    "deleted beyond": (changed("purified", value={**PURIFIED, "deleted": [7]}), "are no positions of the prompt"),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_saved_rollouts(trainer: Trainer, name: str):
    content, fragment = REPLAYS[name]
    for step in (1, 2):
        replay.replay_path(str(trainer.folder), step).write_bytes(content)
    message = trainer.refusal(f"debug.load_rollouts={trainer.folder}")
    assert "step_000001.jsonl" in message and fragment in message


def test_saved_rollouts_that_are_good_but_too_few(trainer: Trainer):
    replay.replay_path(str(trainer.folder), 1).write_bytes(WHOLE)
    message = trainer.refusal(f"debug.load_rollouts={trainer.folder}")
    assert "has no step_000002.jsonl, train.steps is 2; the folder holds 1 steps" in message
    with pytest.raises(Accepted):
        trainer.refusal(f"debug.load_rollouts={trainer.folder}", "train.steps=1")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "sparse"])
def test_saved_rollouts_that_are_no_file(trainer: Trainer, kind: str):
    path = replay.replay_path(str(trainer.folder), 1)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "sparse":
            path.touch()
            os.truncate(path, 100 << 30)
    assert str(path) in trainer.refusal(f"debug.load_rollouts={trainer.folder}", "train.steps=1")
