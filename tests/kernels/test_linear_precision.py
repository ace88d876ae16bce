"""What the linear functions multiply: `precision`, autocast, TF32."""

import contextlib

import pytest
import torch
from kernel_oracle import statistics
from lens_kernels import _products, linear_policy_loss, linear_token_logprobs
from test_linear import leaves, make
from torch.utils._python_dispatch import TorchDispatchMode

ERRORS = {"bfloat16": (3e-4, 3e-2), "bfloat16x2": (1e-6, 2e-4), "bfloat16x3": (0.0, 3e-6), "float32": (0.0, 2e-6)}
"""Bounds of the relative error of operands that bfloat16 does not hold; the lower one shows that something is split."""


class Products(TorchDispatchMode):
    """Records the dtypes of the factors of every matrix product, and whether TF32 might have rounded them."""

    def __init__(self):
        super().__init__()
        self.factors, self.rounding = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            factors = args if func.overloadpacket is torch.ops.aten.mm else args[1:]
            self.factors.append(tuple(x.dtype for x in factors[:2]))
            self.rounding.add(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["chunks", "tiles"])
@pytest.mark.parametrize("precision", ERRORS)
def test_error_of_each_precision(precision, path):
    hidden, weight, _, ids = make(24, 70)
    exact = leaves(hidden, weight, double=True)
    logprobs, entropy = statistics(exact[0] @ exact[1].T, ids)
    (logprobs.sum() - 0.1 * entropy.sum()).backward()
    ours = leaves(hidden, weight)
    with Products() as products:
        result = linear_policy_loss(
            *ours, ids, objective=lambda lp, h, part: lp - 0.1 * h, precision=precision, path=path
        )
        result.loss.backward()
    # 1, 3 or 6 products for each of logits and two gradients, of which tiles have one (70 columns fill no second).
    assert len(products.factors) == 3 * {"bfloat16x2": 3, "bfloat16x3": 6}.get(precision, 1)
    low, high = ERRORS[precision]
    for actual, expected in zip(
        (result.logprobs, ours[0].grad, ours[1].grad), (logprobs.detach(), exact[0].grad, exact[1].grad), strict=True
    ):
        error = (actual.double() - expected).norm() / expected.norm()
        assert low <= error < high, f"{precision}: relative error {error}"


def test_a_bfloat16_operand_has_one_part():
    hidden, weight, _, ids = make(6, 20)
    with Products() as products:
        linear_token_logprobs(hidden.bfloat16(), weight, ids, precision="bfloat16x3")
        linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), ids, precision="bfloat16x3")
    assert len(products.factors) == 3 + 1


def test_split_parts_add_up():
    x = torch.randn(50, 7) * 10.0 ** torch.randint(-20, 20, (50, 7))
    for parts, bound in ((1, 2.0**-8), (2, 2.0**-16), (3, 2.0**-23)):
        split = _products.split(x, _products.Precision(torch.bfloat16, parts))
        assert len(split) == parts and all(part.dtype == torch.bfloat16 for part in split)
        assert ((sum(part.double() for part in split) - x).abs() <= bound * x.abs()).all()


def test_autocast_chooses_the_operands_and_never_rounds_the_logits():
    """Master weights in float32 under autocast are multiplied as a bfloat16 model's would be."""
    hidden, weight, _, ids = make(6, 200)
    halves = leaves(hidden.bfloat16(), weight.bfloat16())
    expected = linear_token_logprobs(*halves, ids)
    expected.sum().backward()
    ours = leaves(hidden, weight)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert linear_token_logprobs(*halves, ids).equal(expected)
        found = linear_token_logprobs(*ours, ids)
        mixed = linear_token_logprobs(hidden, halves[1], ids)
        in_full = linear_token_logprobs(hidden, weight, ids, precision="float32")
    found.sum().backward()
    assert found.equal(expected) and mixed.equal(expected)
    assert in_full.equal(linear_token_logprobs(hidden, weight, ids))
    for mine, half in zip(ours, halves, strict=True):
        assert mine.grad.dtype == torch.float32 and mine.grad.bfloat16().equal(half.grad)


def test_a_gpu_multiplies_half_precision_as_it_is(monkeypatch):
    """On meta tensors, which have shapes and dtypes alone: on the CPU every factor is turned to float32."""
    monkeypatch.setattr(_products, "multiplies_as_is", lambda device: True)
    for dtype, gradient in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)):
        hidden = torch.empty(8, 16, dtype=dtype, device="meta")
        weight = torch.empty(32, 16, dtype=dtype, device="meta")
        with Products() as products:
            parts = [_products.split(x, _products.Precision(dtype, 1)) for x in (hidden, weight)]
            _products.multiply_logits(*parts, torch.empty(8, 32, device="meta"))
            d_logits = (torch.empty(8, 32, dtype=gradient, device="meta"),)
            _products.multiply_d_hidden(d_logits, parts[1], torch.empty(8, 16, device="meta"))
            _products.multiply_d_weight(d_logits, parts[0], torch.empty(32, 16, device="meta"), first=True)
        assert products.factors == [(dtype, dtype), (gradient, gradient), (gradient, gradient)]


@pytest.mark.parametrize("how", ["allow_tf32", "fp32_precision", "nothing"])
def test_tf32_is_off_inside_and_comes_back(how):
    matmul = torch.backends.cuda.matmul
    hidden, weight, _, ids = make(4, 20)

    def fails(logprobs, entropy, part):
        raise KeyError("the objective's own error")

    before, expected = torch.get_float32_matmul_precision(), matmul.fp32_precision if how == "nothing" else "tf32"
    try:
        if how == "allow_tf32":
            matmul.allow_tf32 = True
        elif how == "fp32_precision":
            matmul.fp32_precision = "tf32"
        allowed = matmul.fp32_precision
        with Products() as products:
            linear_token_logprobs(hidden, weight, ids)
        assert products.factors and "tf32" not in products.rounding
        assert matmul.fp32_precision == allowed
        with pytest.raises(KeyError):
            linear_policy_loss(hidden, weight, ids, objective=fails)
        assert matmul.fp32_precision == allowed == expected
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("fails", [False, True])
def test_bfloat16_in_float32s_place_is_off_inside_and_comes_back(fails):
    """oneDNN multiplies float32 on a CPU as bfloat16 where the user allows it."""
    matmul = torch.backends.mkldnn.matmul
    hidden, weight, _, ids = make(4, 20)
    inside = []

    def objective(logprobs, entropy, part):
        inside.append(matmul.fp32_precision)
        if fails:
            raise KeyError("the objective's own error")
        return logprobs

    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            linear_policy_loss(hidden, weight, ids, objective=objective)
        assert inside == ["ieee"] and matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_the_older_way_to_forbid_tf32():
    """PyTorch 2.8 has one setting for all, which a failing objective must leave as it was."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(KeyError), contextlib.contextmanager(_products._float32_as_it_is_before_torch_29)():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_mixed_operands_are_refused_outside_autocast():
    hidden, weight, _, ids = make(4, 20)
    message = "precision: got 'auto' with hidden torch.float32 and weight torch.bfloat16, need one dtype for both, or"
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(hidden, weight.bfloat16(), ids)
    with pytest.raises(ValueError, match="precision: got 'tf32', need one of auto, bfloat16, bfloat16x2"):
        linear_policy_loss(hidden, weight, ids, advantages=1.0, precision="tf32")
