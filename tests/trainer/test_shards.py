"""Any cut of a tensor reads back as any other cut; files that do not fit are named."""

import math
import random
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from lens_megatron.policy import shards
from lens_megatron.policy.shards import Piece, ShardError, ShardReader, StoredPiece


def cut(shape: tuple[int, ...], chance: random.Random, padded: bool = False) -> list[Piece]:
    """A random grid of boxes, each in a random number of runs: pieces that cover a tensor once."""
    edges = [[0, *sorted(chance.sample(range(1, n), chance.randrange(min(n, 3)))), n] for n in shape]
    pieces = []
    for spans in product(*(list(pairwise(e)) for e in edges)):
        offset, box = tuple(a for a, _ in spans), tuple(b - a for a, b in spans)
        numel = math.prod(box)
        runs = [0, *sorted(chance.sample(range(1, numel), min(numel - 1, chance.randrange(3)))), numel]
        pieces += [Piece("model/w", shape, offset, box, a, b, padded) for a, b in pairwise(runs)]
    return pieces


def values(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    box = whole[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))]
    return box.reshape(-1)[piece.start : piece.stop].clone()


def write(folder: Path, pieces: list[Piece], whole: torch.Tensor, files: int) -> tuple[StoredPiece, ...]:
    """Runs of one box go to different files, as they belong to different ranks."""
    shares: list[dict[str, Piece]] = [{} for _ in range(files)]
    for piece in pieces:
        next(share for share in shares if piece.name not in share)[piece.name] = piece
    names = [f"rank_{i:05d}.safetensors" for i in range(files)]
    for name, share in zip(names, shares, strict=True):
        shards.write_file(folder / name, [(p, values(whole, p)) for p in share.values()], {"rng/x": torch.ones(2)})
    return shards.read_pieces(folder, names)


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_is_read_as_any_other(seed: int, tmp_path: Path):
    chance = random.Random(seed)
    shape = tuple(chance.randrange(1, 9) for _ in range(chance.randrange(1, 4)))
    whole = torch.arange(math.prod(shape)).view(shape)
    with ShardReader(tmp_path, write(tmp_path, cut(shape, chance), whole, 4)) as reader:
        for piece in cut(shape, chance) + [Piece("model/w", shape, (0,) * len(shape), shape, 0, whole.numel())]:
            assert torch.equal(reader.read(piece), values(whole, piece)), piece
        assert reader.other_names("rank_00000.safetensors") == ["rng/x"]


def test_padding_is_cut_off_or_read_as_0(tmp_path: Path):
    whole = torch.arange(1, 11).view(5, 2)
    stored = write(tmp_path, cut((5, 2), random.Random(0), padded=True), whole, 3)
    padded = torch.cat([whole, torch.zeros(3, 2, dtype=torch.int64)])
    with ShardReader(tmp_path, stored) as reader:
        for first, rows in ((0, 4), (4, 4), (6, 2), (0, 8)):
            piece = Piece("model/w", (8, 2), (first, 0), (rows, 2), 0, rows * 2, True)
            assert torch.equal(reader.read(piece).long(), values(padded, piece))
        assert torch.equal(reader.read(Piece("model/w", (4, 2), (2, 0), (2, 2), 0, 4, True)), whole[2:4].view(-1))
        with pytest.raises(ShardError, match=r"model/w has shape \[5, 2\] there and \[8, 2\] here"):
            reader.read(Piece("model/w", (8, 2), (0, 0), (8, 2), 0, 16))
        with pytest.raises(ShardError, match="there is no tensor model/v"):
            reader.read(Piece("model/v", (1,), (0,), (1,), 0, 1))


def test_files_that_lack_something_are_named(tmp_path: Path):
    whole, pieces = torch.zeros(4, 4), [Piece("model/w", (4, 4), (row, 0), (1, 4), 0, 4) for row in range(3)]
    with pytest.raises(ShardError, match="pieces of model/w hold 12 elements, the tensor has 16"):
        write(tmp_path, pieces, whole, 1)
    with pytest.raises(ShardError, match="rank_00001.safetensors is missing; is the folder on a file system that all"):
        shards.read_pieces(tmp_path, ["rank_00000.safetensors", "rank_00001.safetensors"])
    with pytest.raises(ShardError, match="two pieces have one name"):
        shards.write_file(tmp_path / "x", [(pieces[0], torch.zeros(4))] * 2, {})


def test_a_piece_that_cannot_be_is_told():
    assert Piece("w", (4, 4), (0, 2), (4, 2), 0, 8).problem() is None and Piece("w", (), (), (), 0, 1).problem() is None
    for wrong in (
        Piece("w", (4, 4), (0,), (4, 4), 0, 1), Piece("w", (4,), (2,), (3,), 0, 1), Piece("w", (4,), (-1,), (2,), 0, 1),
        Piece("w", (4,), (0,), (-2,), 0, 0), Piece("w", (4,), (0,), (4,), 2, 5), Piece("w", (4,), (0,), (4,), 3, 2),
    ):  # fmt: skip
        assert wrong.problem()
