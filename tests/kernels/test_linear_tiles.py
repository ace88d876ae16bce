"""The path that takes the vocabulary in tiles, against float64: the two kernels alone, then both linear functions."""

import pytest
import torch
from kernel_oracle import assert_near, statistics, token_losses
from lens_kernels import VocabShard, _tiles, linear_policy_loss, linear_token_logprobs
from lens_kernels._tile_gradient import tile_gradient
from lens_kernels._tiles import TileSums, update_tile
from lens_kernels._vocab_parallel import SoftmaxTotals, TokenRows, merge_statistics
from test_linear import WIDTH, leaves, make, make_terms
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("backend", "nearest_bfloat16")

COLUMNS = 16  # of a tile


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(_tiles, "TILE_COLUMNS", COLUMNS)


def run_tiles(logits, rows, dtype, *, with_entropy=True):
    """Statistics [1, K, n] and sums of tiles of float32 logits [n, V]; what a tile does not reach is NaN."""
    count, columns = logits.shape
    stats = torch.full((1, 4 if with_entropy else 3, count), torch.nan)
    kept = torch.full((count, -(-columns // COLUMNS) * COLUMNS), torch.nan, dtype=dtype)
    slopes = None if rows.softcap is None else torch.full_like(kept, torch.nan)
    sums = TileSums(stats[0], torch.full((2, count), torch.nan), kept, slopes)
    buffer = torch.full((count, COLUMNS), torch.nan)
    for start in range(0, columns, COLUMNS):
        tile = buffer[:, : min(COLUMNS, columns - start)]
        tile.copy_(logits[:, start : start + COLUMNS])
        update_tile(tile, start, rows, sums)
    return stats, sums


def gradient(logits, rows, dtype, g, e=None, totals=None):
    """(log-probabilities, entropies, gradient [n, V]) of one shard by tiles."""
    stats, sums = run_tiles(logits, rows, dtype)
    merged = merge_statistics(stats, rows)
    result = tile_gradient(sums, logits.shape[1], rows, merged.softmax if totals is None else totals, g, e)
    assert result.matrix.dtype == dtype
    return merged.logprobs, merged.softmax.asked_entropy(), result.matrix.double() * result.factor.double()[:, None]


def exact_gradient(logits, ids, g, e=None, softcap=None, **settings):
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    logprobs, entropy = statistics(capped, ids, **settings)
    loss = (logprobs * g.double()).sum() + (0 if e is None else (entropy * e.double()).sum())
    loss.backward()
    return logprobs.detach(), entropy.detach(), leaf.grad.nan_to_num()


def hard_logits():
    """Rows that the tiles must not stumble over, and what is hard about each."""
    logits = torch.randn(9, 5 * COLUMNS - 3) * 3
    logits[0] += torch.arange(logits.shape[1]) // COLUMNS * 3000.0  # every tile jumps: a mend each
    logits[1] += torch.arange(logits.shape[1]) // COLUMNS * 35.0  # a mend every second tile
    logits[2] -= torch.arange(logits.shape[1]) // COLUMNS * 3000.0  # falls: what follows counts for nothing
    logits[3, : 2 * COLUMNS] = -torch.inf  # no finite logit in the first tiles
    logits[4, 3 * COLUMNS :] = -torch.inf
    logits[5] += 1e4
    logits[6, 40] = logits[6].max() + 80  # p = 1
    logits[7] = torch.nan  # ignored
    logits[8, COLUMNS - 1] += 41.0  # 2**60 above the rest of the first tile, where E begins
    ids = torch.tensor([70, 20, 3, 35, 0, 76, 40, -1, 50])
    return logits, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", ["log-probability", "entropy"])
def test_gradient_of_hard_rows(dtype, terms):
    logits, ids = hard_logits()
    columns = logits.shape[1]
    tau = torch.tensor([1.0, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 0.9])
    rows = TokenRows(ids, tau, None, VocabShard(0, columns, columns - 2))
    g, e = torch.randn(9), torch.randn(9) if terms == "entropy" else None
    settings = {"temperature": tau, "valid_vocab_size": columns - 2}
    exact = exact_gradient(logits.nan_to_num(nan=0.0, neginf=-torch.inf), ids, g, e, **settings)
    found = gradient(logits, rows, dtype, g, e)
    for actual, expected in zip(found[:2], exact[:2], strict=True):
        assert_near(actual, expected, 2e-6)
    assert found[2].isfinite().all() and found[2][7].eq(0).all() and found[2][:, -2:].eq(0).all()
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    largest = exact[2].abs().amax(1, keepdim=True)
    assert ((found[2] - exact[2]).abs() <= tolerance * largest + 1e-12).all()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_softcap(with_entropy):
    logits = torch.randn(6, 40) * 8
    ids = torch.tensor([0, 39, 17, -1, 20, 33])
    rows = TokenRows(ids, torch.full((6,), 0.7), 10.0, VocabShard(0, 40, 40))
    g, e = torch.randn(6), torch.randn(6) if with_entropy else None
    exact = exact_gradient(logits, ids, g, e, softcap=10.0, temperature=0.7)
    found = gradient(logits, rows, torch.float32, g, e)
    for actual, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3 * 2**-8)])
def test_slopes_near_the_cap(dtype, tolerance):
    """At 4 to 8 times the cap the slope is 1e-3 to 4e-7 of itself without a cap, and every entry must have it.

    In bfloat16 exponential, slope and product are rounded, by at most 2**-8 each. 1 - (capped / cap)**2 is wrong by a
    tenth there even in float32, because float32 holds the capped logit with an error of 5e-7.
    """
    logits = (40 + 40 * torch.rand(6, 40)) * torch.randn(6, 40).sign()
    ids = torch.tensor([0, 39, 17, -1, 20, 33])
    rows = TokenRows(ids, torch.full((6,), 0.7), 10.0, VocabShard(0, 40, 38))
    rows = rows._replace(token_ids=ids.clamp(max=37))
    g = torch.randn(6)
    settings = {"softcap": 10.0, "temperature": 0.7, "valid_vocab_size": 38}
    exact = exact_gradient(logits, rows.token_ids, g, **settings)[2]
    found = gradient(logits, rows, dtype, g)[2]
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=1e-13)
    assert found[3].eq(0).all() and found[:, 38:].eq(0).all()


@pytest.mark.parametrize("path", ["chunks", "tiles"])
def test_soft_cap_of_a_head(path):
    """Hidden states so large that most logits are near the cap, and a chunk that is cut."""
    hidden, weight, _, ids = make(10, 77)
    hidden *= 10
    ids[5], hidden[5] = -1, torch.nan
    exact = leaves(hidden.nan_to_num(), weight, double=True)
    logprobs, entropy = statistics(exact[0] @ exact[1].T, ids, logit_softcap=9.0)
    ours = leaves(hidden, weight)
    options = {"return_entropy": True, "chunk_rows": 4, "path": path, "logit_softcap": 9.0}
    result = linear_token_logprobs(*ours, ids, **options)
    g, e = torch.randn(10), torch.randn(10)
    (logprobs * g + entropy * e).sum().backward()
    (result[0] * g + result[1] * e).sum().backward()
    for actual, expected in zip(result, (logprobs, entropy), strict=True):
        assert_near(actual, expected.detach(), 1e-5)
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.grad.double() - theirs.grad).norm() < 2e-5 * theirs.grad.norm()


@pytest.mark.parametrize("lead", [0.0, 30.0, 100.0, 5000.0])
def test_a_shard_far_below_another(lead):
    """The other shard's logits are higher by `lead` nats; the target lies here, with a probability that may be 0."""
    logits, ids = torch.randn(4, 40), torch.tensor([3, 39, -1, 20])
    logits[1, 30:] += 40.0  # so that the exponentials themselves are large
    other = torch.randn(4, 24) + lead
    g = torch.randn(4)
    whole = exact_gradient(torch.cat([logits, other], 1), ids, g)
    totals = torch.cat([logits, other], 1).double()
    maximum = totals.amax(1).float()
    log_sum = (totals - maximum[:, None]).exp().sum(1).log().float()
    rows = TokenRows(ids, None, None, VocabShard(0, 40, 40))
    found = gradient(logits, rows, torch.bfloat16, g, totals=SoftmaxTotals(maximum, log_sum, None))[2]
    # Without the lowering row 1, whose exponentials reach 2**58, comes to 2**58 * 2**-80 = 2e-7 in place of 1e-26.
    torch.testing.assert_close(found, whole[2][:, :40], rtol=2**-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_match_oracle(dtype):
    hidden, weight, bias, ids = make(10, 77, dtype)
    ids[5], hidden[5] = -1, torch.nan
    exact = leaves(hidden.nan_to_num(), weight, bias, double=True)
    settings = {"temperature": torch.rand(10) + 0.5, "valid_vocab_size": 75}
    ids = ids.clamp(max=74)
    expected = statistics(exact[0] @ exact[1].T + exact[2], ids, **settings)
    ours = leaves(hidden, weight, bias)
    options = {"bias": ours[2], "return_entropy": True, "chunk_rows": 4, "path": "tiles"}
    result = linear_token_logprobs(ours[0], ours[1], ids, **options, **settings)
    for actual, wanted in zip(result, expected, strict=True):
        assert_near(actual, wanted.detach(), 1e-5)
    g, e = torch.randn(10), torch.randn(10)
    (expected[0] * g + expected[1] * e).sum().backward()
    (result[0] * g + result[1] * e).sum().backward()
    assert_near_gradients(ours, exact, of_hidden=3.5e-3)  # the entropy's pass rounds a second time
    assert ours[0].grad[5].eq(0).all()


def assert_near_gradients(ours, exact, of_hidden=2.5e-3):
    """Relative Frobenius norm. Half-precision heads round the logits' gradient and scaled hidden states to bfloat16."""
    bounds = (2e-6, 2e-6, 2e-6) if ours[0].dtype == torch.float32 else (of_hidden, 3.5e-3, 3.5e-3)
    for mine, theirs, bound in zip(ours, exact, bounds, strict=False):
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < bound, f"relative error {error} for shape {tuple(mine.shape)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_loss_matches_oracle(dtype, entropy):
    hidden, weight, _, ids = make(40, 77, dtype)
    ids[5] = -1
    terms = make_terms((40,), linear_token_logprobs(hidden, weight, ids))
    if not entropy:
        del terms["entropy_weights"]
    exact = leaves(hidden, weight, double=True)
    logprobs, entropies = statistics(exact[0] @ exact[1].T, ids)
    losses, ratio, kl = token_losses(logprobs, entropies, **terms)
    kept = ids >= 0
    (losses[kept].sum() * 0.3).backward()
    ours = leaves(hidden, weight)
    result = linear_policy_loss(ours[0], ours[1], ids, chunk_rows=16, path="tiles", **terms)
    (result.loss * 0.3).backward()
    torch.testing.assert_close(result.loss.double(), losses[kept].sum().detach(), rtol=1e-5, atol=1e-5)
    wanted = logprobs, ratio, kl, entropies
    for actual, expected in zip((result.logprobs, result.ratio, result.kl, result.entropy), wanted, strict=True):
        assert_near(actual, torch.where(kept, expected.detach(), 0), 2e-5)
    assert_near_gradients(ours, exact)


def test_both_paths_give_the_same_logprobs():
    hidden, weight, bias, ids = make(12, 77)
    both = [linear_token_logprobs(hidden, weight, ids, bias=bias, path=path) for path in ("chunks", "tiles")]
    torch.testing.assert_close(*both, rtol=1e-6, atol=2e-6)


class Sizes(TorchDispatchMode):
    """Records the elements of every tensor that has vocabulary columns, and of no weight."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() == 2 and WIDTH not in x.shape:
                self.largest = max(self.largest, x.numel())
        return out


def test_a_forward_alone_never_holds_more_than_a_tile(monkeypatch):
    monkeypatch.setattr(_tiles, "TILE_COLUMNS", 64)
    hidden, weight, _, ids = make(32, 701, torch.bfloat16)
    with Sizes() as sizes, torch.no_grad():
        linear_token_logprobs(hidden, weight, ids, chunk_rows=8, path="tiles")
        linear_policy_loss(hidden, weight, ids, advantages=1.0, chunk_rows=8, path="tiles")
    assert sizes.largest == 8 * 64
