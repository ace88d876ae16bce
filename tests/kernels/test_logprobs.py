"""token_logprobs against the float64 oracle of the same (already rounded) logits."""

import pytest
import torch
from kernel_oracle import assert_near, assert_rows_near, statistics
from lens_kernels import token_logprobs
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("backend")

# One ulp of the dtype the gradient is rounded to, relative to the row's maximum.
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def make(shape, dtype=torch.float32, scale=3.0):
    logits = (torch.randn(shape) * scale).to(dtype)
    return logits, torch.randint(0, shape[-1], shape[:-1])


def check(logits, ids, d_logprobs=None, d_entropy=None, **options):
    """Values and the gradient of sum(g * logprobs + e * entropy), ours against the oracle's."""
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].to(logits.device)
    d_logprobs = torch.randn(ids.shape) if d_logprobs is None else d_logprobs
    d_entropy = torch.randn(ids.shape) if d_entropy is None else d_entropy
    exact = logits.detach().double().requires_grad_()
    expected = statistics(exact, ids, **options)
    (expected[0] * d_logprobs + expected[1] * d_entropy).sum().backward()

    ours = logits.detach().requires_grad_()
    logprobs, entropy = token_logprobs(ours, ids, return_entropy=True, **options)
    assert_near(logprobs, expected[0].detach())
    assert_near(entropy, expected[1].detach(), 5e-6)
    (logprobs * d_logprobs + entropy * d_entropy).sum().backward()
    assert ours.grad.dtype == logits.dtype
    assert_rows_near(ours.grad, exact.grad, GRADIENT_TOLERANCE[logits.dtype])
    return ours.grad


@pytest.mark.parametrize(
    ("columns", "dtype"),  # one column; off any block; vocabularies
    [
        (1, torch.float32),
        (7, torch.bfloat16),
        (127, torch.float16),
        (32000, torch.float32),
        (32000, torch.float16),
        (50257, torch.float32),
        (50257, torch.bfloat16),
    ],
)
def test_matches_oracle(columns, dtype):
    logits, ids = make((5, columns), dtype)
    ids[3] = -100
    grad = check(logits, ids)
    assert grad[3].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_worse_than_pytorch(dtype, request):
    """Error bar: PyTorch's float32 log_softmax of the same logits, in value and gradient."""
    if dtype == torch.bfloat16 and "interpreter" in request.node.callspec.id:
        pytest.skip("Triton's interpreter truncates to bfloat16 where GPUs round to nearest")
    logits, ids = make((32, 32000), dtype)
    exact = logits.double().requires_grad_()
    expected = statistics(exact, ids)[0]
    expected.sum().backward()
    theirs = logits.float().clone().requires_grad_()
    their_logprobs = torch.log_softmax(theirs, -1).gather(-1, ids[:, None])[:, 0]
    their_logprobs.sum().backward()
    ours = logits.clone().requires_grad_()
    logprobs = token_logprobs(ours, ids)
    logprobs.sum().backward()

    def error(actual, wanted):
        return (actual.double() - wanted).abs().max().item()

    assert error(logprobs, expected.detach()) <= error(their_logprobs, expected.detach()) + 1e-6
    assert error(ours.grad, exact.grad) <= error(theirs.grad.to(dtype), exact.grad) + 1e-7


@pytest.mark.parametrize("columns", [128256, 151936, 152064])
def test_matches_oracle_at_the_vocabularies_of_the_lens_models(columns):
    """Llama 3, Qwen 2.5 and 3, and the padding that Megatron and others add to it."""
    logits, ids = make((2, columns), torch.bfloat16)
    check(logits, ids, valid_vocab_size=columns - 7)


@pytest.mark.parametrize("valid", [None, 9000, 3])
def test_rows_split_among_programs(valid, monkeypatch):
    """What the kernels do where there are few rows: here 8 blocks in 4 pieces, some of them masked or padding."""
    monkeypatch.setattr("lens_kernels._statistics.multiprocessors", lambda device: 2)
    logits, ids = make((2, 30000))
    logits[1, 4096 : 3 * 4096] = -torch.inf
    ids %= 3
    check(logits, ids, temperature=torch.tensor([0.5, 2.0]), valid_vocab_size=valid)


def test_strided_ids():
    """Every second id of a larger tensor, as labels shifted within a batch are."""
    logits, _ = make((6, 11))
    check(logits, torch.randint(0, 11, (12,))[::2])
    check(logits.view(2, 3, 11), torch.randint(0, 11, (3, 2)).T)


def test_several_row_chunks(monkeypatch):
    """Chunks of 2 rows over 7: a wrong offset between chunks would mix rows."""
    monkeypatch.setattr("lens_kernels._rows.CHUNK_ELEMENTS", 20)
    logits, ids = make((7, 10))
    check(logits, ids, temperature=torch.rand(7) + 0.5)


@pytest.mark.parametrize("shape", [(0, 7), (1, 7), (3, 0, 7), (2, 3, 7), (7,)])
def test_leading_shapes(shape):
    logits, ids = make(shape)
    check(logits, ids)


def test_all_rows_ignored_and_nothing_read():
    logits = torch.full((3, 5), torch.nan, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.full((3,), -1), return_entropy=True)
    (logprobs + entropy).sum().backward()
    assert logprobs.tolist() == entropy.tolist() == [0.0, 0.0, 0.0]
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("temperature", [0.7, 2, torch.tensor([0.5, 1.0, 1.7, 3.0]), torch.tensor([[0.6]])])
def test_temperature(temperature):
    shape = (2, 4, 33)
    check(*make(shape), temperature=temperature)


def test_padded_vocabulary_is_never_read():
    """NaN and +inf in the padding must not reach any result, and its gradient is exactly 0."""
    logits, ids = make((4, 12))
    ids %= 9
    clean = check(logits, ids, d_logprobs=torch.ones(4), d_entropy=torch.ones(4), valid_vocab_size=9)
    logits[:, 9], logits[:, 10:] = torch.nan, torch.inf
    dirty = logits.requires_grad_()
    logprobs, entropy = token_logprobs(dirty, ids, return_entropy=True, valid_vocab_size=9)
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(dirty.grad, clean)
    assert dirty.grad[:, 9:].eq(0).all()


def test_target_in_the_padding_has_probability_zero():
    """An error of the caller's (see LENS_KERNELS_CHECK_IDS), but the padding's gradient stays exactly 0."""
    logits = torch.randn(2, 12, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([10, 3]), valid_vocab_size=9)
    logprobs.sum().backward()
    assert logprobs[0] == -torch.inf and logprobs[1].isfinite()
    assert logits.grad[:, 9:].eq(0).all() and logits.grad[:, :9].ne(0).all()


def test_minus_infinity():
    """Masked tokens, the first 5 columns among them, and a masked target (log-probability -inf)."""
    logits, ids = make((4, 20))
    logits[:, :5] = -torch.inf
    ids[:] = torch.tensor([5, 19, 7, 8])
    check(logits, ids)
    assert token_logprobs(logits, torch.tensor([0, 5, 6, 7])).isneginf().tolist() == [True, False, False, False]


def test_row_of_only_minus_infinity_is_nan_as_in_pytorch():
    assert token_logprobs(torch.full((1, 4), -torch.inf), torch.tensor([0])).isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_ten_thousand(temperature):
    logits, ids = make((6, 50))
    logits += torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 3e4])[:, None]
    check(logits, ids, temperature=temperature)


def test_probability_one():
    """Target 80 above the rest: log-probability 0, gradient and entropy 0 without NaN."""
    logits = torch.zeros(1, 100)
    logits[0, 3] = 80.0
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([3]), return_entropy=True)
    (logprobs + entropy).sum().backward()
    assert logprobs.item() == 0.0
    assert 0 <= entropy.item() < 1e-30
    assert logits.grad.abs().max() < 1e-30


def test_gradient_of_only_entropy_and_only_logprobs():
    logits, ids = make((3, 9))
    check(logits, ids, d_logprobs=torch.zeros(3))
    check(logits, ids, d_entropy=torch.zeros(3))
    only = logits.clone().requires_grad_()
    token_logprobs(only, ids, return_entropy=True)[1].sum().backward()
    exact = logits.double().requires_grad_()
    statistics(exact, ids)[1].sum().backward()
    assert_rows_near(only.grad, exact.grad, 2e-6)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),  # Megatron's [S, B, V] seen as [B, S, V]: leading axes cannot be merged
        lambda x: x[:, :, 3:20],  # row stride larger than the row
        lambda x: x[::2, 1:],
        lambda x: x[:2].transpose(1, 2),  # columns are not adjacent
        lambda x: x[:1].expand(4, -1, -1),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts(view, inplace):
    base = torch.randn(6, 4, 25)
    inplace = inplace and view(base).stride(0) != 0  # expanded logits refuse it, see test_errors
    ids = torch.randint(0, view(base).shape[-1], view(base).shape[:-1])
    exact = view(base).double().requires_grad_()
    expected, _ = statistics(exact, ids)
    expected.square().sum().backward()
    ours = view(base.clone()).detach().requires_grad_()
    logprobs = token_logprobs(ours, ids, inplace_backward=inplace)
    logprobs.square().sum().backward()
    assert_near(logprobs, expected.detach())
    assert_rows_near(ours.grad, exact.grad, 4e-6)


def test_expanded_and_strided_upstream_gradients():
    logits, ids = make((6, 11))
    for upstream in (torch.tensor(2.0).expand(6), torch.randn(12)[::2]):
        ours = logits.clone().requires_grad_()
        token_logprobs(ours, ids).backward(upstream)
        exact = logits.double().requires_grad_()
        statistics(exact, ids)[0].backward(upstream.double())
        assert_rows_near(ours.grad, exact.grad, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_into_the_logits(dtype):
    base, ids = make((4, 30), dtype)
    ids[1] = -1
    plain, ours = base.clone().requires_grad_(), base.clone().requires_grad_()
    token_logprobs(plain, ids).sum().backward()
    logits = ours * 1  # a non-leaf, as the output of an LM head is
    token_logprobs(logits, ids, inplace_backward=True).sum().backward()
    assert ours.grad.equal(plain.grad)
    assert logits.detach().equal(plain.grad)


def test_inplace_backward_refuses_a_second_use():
    base, ids = make((4, 30))
    logits = base.requires_grad_() * 1
    first = token_logprobs(logits, ids, inplace_backward=True).sum()
    second = token_logprobs(logits, ids, inplace_backward=True).sum()
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True: the logits were changed"):
        second.backward()
    with pytest.raises(RuntimeError, match="inplace_backward=True: the logits were changed"):
        first.backward()


def test_bit_equal_runs_and_no_grad():
    logits, ids = make((8, 1000))
    first = token_logprobs(logits.requires_grad_(), ids)
    with torch.no_grad():
        second = token_logprobs(logits, ids)
    assert first.equal(second)
    assert first.requires_grad and not second.requires_grad


def test_activation_checkpointing_and_autocast():
    logits, ids = make((8, 100), torch.bfloat16)
    plain, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = token_logprobs(plain, ids)
    expected.sum().backward()
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        logprobs = checkpoint(token_logprobs, ours, ids, use_reentrant=False)
        logprobs.sum().backward()
    assert logprobs.equal(expected)
    assert ours.grad.equal(plain.grad)


def test_results_may_be_edited_in_place():
    """Clamping or scaling a result in place is a user's right, has a gradient, and must not change the other's."""
    logits, ids = make((2, 3, 9))
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(ours, ids, return_entropy=True)
    assert logprobs.untyped_storage().data_ptr() != entropy.untyped_storage().data_ptr()
    logprobs.clamp_(max=-1.5)
    entropy.mul_(2)
    (logprobs + entropy).sum().backward()
    logprobs, entropy = token_logprobs(plain, ids, return_entropy=True)
    (logprobs.clamp(max=-1.5) + 2 * entropy).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    alone = token_logprobs(logits.clone().requires_grad_(), ids)
    alone.clamp_(max=-1.5).sum().backward()


@pytest.mark.parametrize("logit_softcap", [3.0, 30])
def test_soft_cap(logit_softcap):
    """c * tanh(z / c) before the temperature: logits near 0, around the cap, far beyond it, and masked ones."""
    logits, ids = make((6, 33))
    logits *= torch.tensor([0.01, 1.0, 3.0, 10.0, 100.0, 1.0])[:, None]
    logits[5, :7] = -torch.inf  # the cap makes -c of it
    check(logits, ids, temperature=0.7, logit_softcap=logit_softcap, valid_vocab_size=33)
