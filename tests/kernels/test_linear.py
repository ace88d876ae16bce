"""linear_token_logprobs and linear_policy_loss against the float64 head and oracle."""

import math

import pytest
import torch
from kernel_oracle import assert_near, statistics, token_losses
from lens_kernels import linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs

pytestmark = pytest.mark.usefixtures("backend")

WIDTH = 16
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What rounding a tensor to a dtype changes at most, relative to its norm; for float32 what long sums change."""


def make(tokens, columns, dtype=torch.float32):
    hidden = torch.randn(tokens, WIDTH).to(dtype)
    weight, bias = (torch.randn(columns, WIDTH) * 0.5).to(dtype), torch.randn(columns).to(dtype)
    return hidden, weight, bias, torch.randint(0, columns, (tokens,))


def make_terms(shape, logprobs):
    return {
        "old_logprobs": logprobs + torch.randn(shape) * 0.5,
        "advantages": torch.randn(shape),
        "reference_logprobs": logprobs + torch.randn(shape) * 0.3,
        "policy_weights": torch.rand(shape),
        "kl_weights": torch.rand(shape),
        "entropy_weights": torch.rand(shape) * 0.1,
    }


def leaves(*tensors, double=False):
    return [x.detach().clone().to(torch.float64 if double else x.dtype).requires_grad_() for x in tensors]


def gradient_bounds(dtype, path, *, as_is, passes_again):
    """Bounds of the relative error of the gradients of hidden states, weight and bias, in the Frobenius norm.

    Each result is rounded to its operand's dtype, which changes it by UNIT at most. Before that half-precision operands
    cost roundings to bfloat16, float16 operands too: each changes an entry by 2**-8 at most and by 0.43 of that in the
    root mean square, which leaves room for sums of entries that cancel. Errors are independent, so n of them add up to
    2**-8 * sqrt(n). What is rounded:
    as chunks   nothing on a CPU. On a GPU, which multiplies halves as they are (`as_is`), the logits' gradient, and
                beside it a float16 factor, because a product has factors of one dtype. The bias's factors are ones.
    as tiles    the exponentials; the gradient that an entropy term or a soft cap makes of them (`passes_again`); for
                weight and bias the factors per row, with the hidden states; on a GPU a float16 weight.
    """
    if dtype == torch.float32:
        return (UNIT[dtype],) * 3
    float16_factor = int(as_is and dtype == torch.float16)
    if path == "tiles":
        first = 1 + int(passes_again)
        roundings = first + float16_factor, first + 1, first + 1
    else:
        roundings = (1 + float16_factor, 1 + float16_factor, 1) if as_is else (0, 0, 0)
    return tuple(UNIT[dtype] + 2**-8 * math.sqrt(count) for count in roundings)


def assert_gradients(ours, exact, path="auto", *, as_is=None, passes_again=True):
    """Relative Frobenius norm: GEMM sums have no per-entry bound."""
    hidden = ours[0]
    as_is = hidden.is_cuda if as_is is None else as_is
    path = ("tiles" if hidden.is_cuda else "chunks") if path == "auto" else path
    bounds = gradient_bounds(hidden.dtype, path, as_is=as_is, passes_again=passes_again)
    for mine, theirs, bound in zip(ours, exact, bounds[: len(ours)], strict=True):
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < bound, f"relative error {error} for shape {tuple(mine.shape)}, allowed {bound}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [7, 127, 32000])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_logprobs_match_oracle(columns, dtype, chunk_rows, monkeypatch):
    """A tiny weight block makes the half-precision upcast take several blocks, the last of them short."""
    monkeypatch.setattr("lens_kernels._products.BLOCK_ELEMENTS_CPU", 50 * WIDTH if columns < 1000 else 1 << 22)
    hidden, weight, bias, ids = make(10, columns, dtype)
    ids[5] = -1
    exact = leaves(hidden, weight, bias, double=True)
    settings = {"temperature": torch.rand(10) + 0.5, "valid_vocab_size": columns}
    expected = statistics(exact[0] @ exact[1].T + exact[2], ids, **settings)
    ours = leaves(hidden, weight, bias)
    result = linear_token_logprobs(
        ours[0], ours[1], ids, bias=ours[2], return_entropy=True, chunk_rows=chunk_rows, **settings
    )
    g, e = torch.randn(10), torch.randn(10)
    for actual, wanted in zip(result, expected, strict=True):
        assert_near(actual, wanted.detach(), 1e-5)
    (expected[0] * g + expected[1] * e).sum().backward()
    (result[0] * g + result[1] * e).sum().backward()
    assert_gradients(ours, exact)
    assert ours[0].grad[5].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [7, 127, 32000])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_loss_matches_oracle(columns, dtype, chunk_rows):
    hidden, weight, bias, ids = make(10, columns, dtype)
    terms = make_terms((10,), linear_token_logprobs(hidden, weight, ids, bias=bias))
    exact = leaves(hidden, weight, bias, double=True)
    logprobs, entropy = statistics(exact[0] @ exact[1].T + exact[2], ids)
    losses, ratio, kl = token_losses(logprobs, entropy, **terms)
    ids[5] = -1
    kept = ids >= 0
    (losses[kept].sum() * 0.3).backward()
    ours = leaves(hidden, weight, bias)
    result = linear_policy_loss(ours[0], ours[1], ids, bias=ours[2], chunk_rows=chunk_rows, **terms)
    (result.loss * 0.3).backward()
    torch.testing.assert_close(result.loss.double(), losses[kept].sum().detach(), rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(
        (result.logprobs, result.ratio, result.kl, result.entropy), (logprobs, ratio, kl, entropy), strict=True
    ):
        assert_near(actual, torch.where(kept, wanted.detach(), 0), 2e-5)
        assert not actual.requires_grad
    assert_gradients(ours, exact)


@pytest.mark.usefixtures("multiplied_as_on_a_gpu", "nearest_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["chunks", "tiles"])
@pytest.mark.parametrize("columns", [7, 127])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_the_roundings_of_a_gpu(dtype, path, columns, entropy):
    """Float16 gradients are as exact as bfloat16 makes them: past the 2**-11 of their own rounding."""
    hidden, weight, bias, ids = make(40, columns, dtype)
    terms = make_terms((40,), linear_token_logprobs(hidden, weight, ids, bias=bias))
    terms["entropy_weights"] = torch.full((40,), entropy) if entropy else None
    exact = leaves(hidden, weight, bias, double=True)
    logprobs, entropies = statistics(exact[0] @ exact[1].T + exact[2], ids)
    token_losses(logprobs, entropies, **(terms | {"entropy_weights": entropy}))[0].sum().backward()
    ours = leaves(hidden, weight, bias)
    linear_policy_loss(*ours[:2], ids, bias=ours[2], chunk_rows=16, path=path, **terms).loss.backward()
    assert_gradients(ours, exact, path, as_is=True, passes_again=entropy > 0)
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.grad.double() - theirs.grad).norm() > 2**-11 * theirs.grad.norm()


def test_equals_the_path_from_logits():
    """Same loss, flags and gradients as policy_loss on the materialised float32 logits, [S, B, H] shapes included."""
    hidden, weight, _, ids = make(12, 33)
    hidden, ids = hidden.view(4, 3, WIDTH), ids.view(4, 3)
    terms = make_terms((4, 3), linear_token_logprobs(hidden, weight, ids)) | {"advantages": torch.randn(3)}
    settings = {"dual_clip": 1.5, "kl_limit": 0.02, "temperature": 0.8, "valid_vocab_size": 33}
    ours, theirs = leaves(hidden, weight), leaves(hidden, weight)
    mine = linear_policy_loss(ours[0], ours[1], ids, chunk_rows=5, **terms, **settings)
    other = policy_loss(theirs[0] @ theirs[1].T, ids, **terms, **settings)
    mine.loss.backward()
    other.loss.backward()
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("picked", [[7, 0, 3], [2, 2, 9, 2], []])
def test_rows_pick_what_needs_a_head(picked):
    """Unpicked rows are never read (NaN there); a row named twice gets both gradients."""
    hidden, weight, _, _ = make(10, 20)
    rows = torch.tensor(picked, dtype=torch.long)
    ids = torch.randint(0, 20, rows.shape)
    unused = torch.ones(10, dtype=torch.bool)
    unused[rows] = False
    hidden[unused] = torch.nan
    terms = make_terms(rows.shape, torch.full(rows.shape, -3.0))
    exact = leaves(hidden.nan_to_num(), weight, double=True)
    logprobs, entropy = statistics(exact[0][rows] @ exact[1].T, ids)
    token_losses(logprobs, entropy, **terms)[0].sum().backward()
    ours = leaves(hidden.view(2, 5, WIDTH), weight)
    result = linear_policy_loss(ours[0], ours[1], ids, rows=rows, chunk_rows=2, **terms)
    result.loss.backward()
    assert_near(result.logprobs, logprobs.detach(), 1e-5)
    torch.testing.assert_close(ours[0].grad.view(10, WIDTH).double(), exact[0].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1].grad.double(), exact[1].grad, rtol=1e-4, atol=1e-6)
    assert ours[0].grad.view(10, WIDTH)[unused].eq(0).all()

    again = leaves(hidden.nan_to_num(), weight)
    linear_token_logprobs(again[0], again[1], ids, rows=rows, chunk_rows=2).square().sum().backward()
    exact = leaves(hidden.nan_to_num(), weight, double=True)
    statistics(exact[0][rows] @ exact[1].T, ids)[0].square().sum().backward()
    torch.testing.assert_close(again[0].grad.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[1].grad.double(), exact[1].grad, rtol=1e-4, atol=1e-5)


def test_ignored_rows_with_nan_hidden_states_harm_nobody():
    hidden, weight, _, ids = make(6, 20)
    hidden[2], ids[2] = torch.nan, -1
    ours = leaves(hidden, weight)
    result = linear_policy_loss(ours[0], ours[1], ids, advantages=1.0)
    result.loss.backward()
    assert result.loss.isfinite() and ours[1].grad.isfinite().all() and ours[0].grad[2].eq(0).all()


def test_gradient_survives_a_second_backward():
    hidden, weight, _, ids = make(6, 20)
    ours = leaves(hidden, weight)
    loss = linear_policy_loss(ours[0], ours[1], ids, advantages=1.0).loss
    (loss * 3).backward(retain_graph=True)
    first = [x.grad.clone() for x in ours]
    (loss * 3).backward()
    for x, once in zip(ours, first, strict=True):
        assert x.grad.equal(2 * once)


def test_objective_of_ones_own():
    """Any function of (logprobs, entropy, slice); here with per-row data picked by the slice."""
    hidden, weight, _, ids = make(11, 20)
    ids[4] = -1
    scale = torch.randn(11)

    def objective(logprobs, entropy, part):
        return scale[part].to(logprobs.dtype) * logprobs.square() + 0.2 * entropy.exp()

    exact = leaves(hidden, weight, double=True)
    logprobs, entropy = statistics(exact[0] @ exact[1].T, ids)
    kept = ids >= 0
    wanted = objective(logprobs, entropy, slice(0, 11))[kept].sum()
    (wanted * 2).backward()
    ours = leaves(hidden, weight)
    result = linear_policy_loss(ours[0], ours[1], ids, objective=objective, chunk_rows=4)
    (result.loss * 2).backward()
    torch.testing.assert_close(result.loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert result.ratio is None and result.clipped is None and result.kl is None
    assert_gradients(ours, exact)


@pytest.mark.parametrize("objective", [lambda lp, h, part: lp, lambda lp, h, part: h, lambda lp, h, part: lp.detach()])
def test_objectives_that_ignore_a_statistic(objective):
    hidden, weight, _, ids = make(5, 20)
    exact = leaves(hidden, weight, double=True)
    losses = objective(*statistics(exact[0] @ exact[1].T, ids), slice(0, 5))
    ours = leaves(hidden, weight)
    linear_policy_loss(ours[0], ours[1], ids, objective=objective).loss.backward()
    if losses.requires_grad:
        losses.sum().backward()
        assert_gradients(ours, exact)
    else:
        assert all(x.grad.eq(0).all() for x in ours)


def test_objective_that_couples_a_chunks_rows_and_multiplies_matrices():
    """Ignored rows' losses must not reach the others' gradient, nor autocast round the objective's own products."""
    hidden, weight, _, ids = make(6, 20)
    mix = torch.randn(6, 6)

    def objective(logprobs, entropy, part):
        return (mix.to(logprobs.dtype) @ logprobs[:, None])[:, 0]

    ids[1] = -1
    exact = leaves(hidden, weight, double=True)
    wanted = objective(*statistics(exact[0] @ exact[1].T, ids), slice(0, 6))[ids >= 0].sum()
    wanted.backward()
    ours = leaves(hidden, weight)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        loss = linear_policy_loss(ours[0], ours[1], ids, objective=objective, precision="float32").loss
    loss.backward()
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert_gradients(ours, exact)


def test_no_grad_and_frozen_operands():
    hidden, weight, _, ids = make(6, 20)
    ours = leaves(hidden, weight)
    with torch.no_grad():
        assert not linear_policy_loss(ours[0], ours[1], ids, advantages=1.0).loss.requires_grad
    trained = linear_policy_loss(ours[0], ours[1], ids, advantages=1.0).loss
    trained.backward()
    for frozen in (0, 1):
        again = leaves(hidden, weight)
        again[frozen].requires_grad_(False)
        linear_policy_loss(again[0], again[1], ids, advantages=1.0).loss.backward()
        assert again[frozen].grad is None
        assert again[1 - frozen].grad.equal(ours[1 - frozen].grad)


def test_half_precision_inputs_give_unrounded_logits():
    """Equal to token_logprobs of the float32 logits; far from that of the bfloat16 logits an LM head returns."""
    hidden, weight, _, ids = make(50, 500, torch.bfloat16)
    exact = statistics(hidden.double() @ weight.double().T, ids)[0]
    assert_near(linear_token_logprobs(hidden, weight, ids), exact, 5e-6)
    rounded = token_logprobs(hidden @ weight.T, ids).double()
    assert (rounded - exact).abs().max() > 1e-3


def test_never_a_full_logit_tensor():
    """The largest tensor any operation returns stays at chunk size (columns are not the width, nor the row count)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.dim() == 2 and 301 in x.shape and WIDTH not in x.shape:
                    Largest.elements = max(Largest.elements, x.numel())
            return out

    hidden, weight, _, ids = make(64, 301)
    ours = leaves(hidden, weight)
    with Largest():
        linear_policy_loss(ours[0], ours[1], ids, advantages=1.0, chunk_rows=8).loss.backward()
        linear_token_logprobs(ours[0], ours[1], ids, chunk_rows=8).sum().backward()
    assert Largest.elements == 8 * 301


@pytest.mark.parametrize("function", ["logprobs", "loss"])
def test_results_are_tensors_of_their_own(function):
    """A caller may change any of them in place before the backward, which must not notice."""
    hidden, weight, _, ids = make(6, 20)
    gradients = []
    for edits in (False, True):
        ours = leaves(hidden, weight)
        if function == "logprobs":
            results = linear_token_logprobs(*ours, ids, return_entropy=True, chunk_rows=4)
            loss = results[0].sum() + results[1].sum()
        else:
            loss, *results = linear_policy_loss(*ours, ids, advantages=1.0, entropy_weights=0.1)
        assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)
        if edits:
            with torch.no_grad():
                for x in results:
                    x.fill_(7.0)
        loss.backward()
        gradients.append([x.grad for x in ours])
    for plain, edited in zip(*gradients, strict=True):
        assert plain.equal(edited)
