"""What runs on an accelerator: every launch and every operation that moves data, counted on tensors without memory."""

import ast
from pathlib import Path

import lens_kernels
import pytest
import torch
from lens_kernels import (
    _backend,
    _crpo,
    _dlogits,
    _statistics,
    _tile_gradient,
    _tiles,
    _vocab_parallel,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from torch.utils._python_dispatch import TorchDispatchMode

TAKE_MEMORY = {"empty", "empty_like", "new_empty"}
MAKE_VIEWS = {"view", "reshape", "expand", "detach", "as_strided", "alias", "slice", "unsqueeze"}
ROWS, COLUMNS = 6, 50
SOURCES = sorted(Path(lens_kernels.__file__).parent.glob("*.py"))


class Operations(TorchDispatchMode):
    """Appends the names of PyTorch's operations to a list, but for those that only make a view or take memory."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in TAKE_MEMORY | MAKE_VIEWS:
            self.names.append(name)
        return function(*args, **kwargs or {})


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels and operations, in the order in which they would run."""
    monkeypatch.setenv("LENS_KERNELS_BACKEND", "triton")
    names = []
    for module in (_statistics, _vocab_parallel, _crpo, _dlogits, _tiles, _tile_gradient):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: names.append(kernel.__name__))
    with Operations(names):
        yield names


def on_meta():
    logits = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="meta", requires_grad=True)
    ids, row = torch.empty(ROWS, dtype=torch.int64, device="meta"), torch.empty(ROWS, device="meta")
    return logits, ids, row


@pytest.mark.parametrize("spread", ["rows", "numbers", "one element"])
def test_the_policy_loss_takes_four_launches(launched, spread):
    """Statistics; merge and loss; the sum; the gradient. Nothing scales it, copies a result or spreads a number."""
    logits, ids, row = on_meta()
    value = {"rows": row, "numbers": 0.5, "one element": row[:1].view(())}[spread]
    upstream = torch.empty((), device="meta")
    launched.clear()
    weights = {"advantages": value, "policy_weights": value, "kl_weights": value, "entropy_weights": value}
    result = policy_loss(logits, ids, old_logprobs=row, reference_logprobs=row, **weights)
    assert launched == ["_row_statistics_kernel", "_merge_and_evaluate_kernel", "sum"]
    torch.autograd.grad(result.loss, logits, upstream)
    assert launched[3:] == ["_write_dlogits_kernel"]


def test_log_probabilities_take_three_launches(launched):
    logits, ids, row = on_meta()
    launched.clear()
    logprobs, entropy = token_logprobs(logits, ids, return_entropy=True, temperature=row)
    torch.autograd.grad((logprobs, entropy), logits, (row, row))
    assert launched == ["_row_statistics_kernel", "_merge_kernel", "_write_dlogits_kernel"]


def operations_of_a_head(launched, path, rows, chunk_rows, function=linear_policy_loss, gradient=True):
    """What the forward and backward from hidden states run; a value that the host read would be an error here."""
    hidden, weight = (
        torch.empty(n, 16, dtype=torch.bfloat16, device="meta", requires_grad=gradient) for n in (rows, COLUMNS)
    )
    ids, row = torch.empty(rows, dtype=torch.int64, device="meta"), torch.empty(rows, device="meta")
    launched.clear()
    terms = {"advantages": row, "entropy_weights": 0.1} if function is linear_policy_loss else {}
    result = function(hidden, weight, ids, path=path, chunk_rows=chunk_rows, temperature=row, **terms)
    if gradient:
        result = result if isinstance(result, torch.Tensor) else result.loss
        torch.autograd.grad(result, (hidden, weight), torch.empty(result.shape, device="meta"))
    return list(launched)


@pytest.mark.parametrize("path", ["chunks", "tiles"])
@pytest.mark.parametrize("function", [linear_policy_loss, linear_token_logprobs])
def test_a_head_launches_as_often_for_any_number_of_rows_in_a_chunk(launched, monkeypatch, path, function):
    """And reads no value on the host. Two chunks launch what one does twice, two tiles likewise."""
    monkeypatch.setattr(_tiles, "TILE_COLUMNS", 32)  # 50 columns are two tiles
    few, many, two = (operations_of_a_head(launched, path, *size, function) for size in ((6, 6), (600, 600), (12, 6)))
    assert few == many
    logits = {"chunks": ["mm", "_row_statistics_kernel"], "tiles": ["mm", "_update_tile_kernel"] * 2}[path]
    gradient = [{"chunks": "_write_dlogits_kernel", "tiles": "_tile_gradient_kernel"}[path], "mm", "mm"]
    for found, chunks in ((few, 1), (two, 2)):
        kernels = [name.replace("addmm_", "mm") for name in found if name.endswith(("mm", "mm_", "_kernel"))]
        if function is linear_policy_loss:
            assert kernels == (logits + ["_merge_and_evaluate_kernel"] + gradient) * chunks
        else:  # all chunks are merged at once, and the backward forms their logits again
            assert kernels == logits * chunks + ["_merge_kernel"] + (logits + gradient) * chunks


@pytest.mark.parametrize("function", [linear_policy_loss, linear_token_logprobs])
def test_a_forward_alone_makes_no_gradient(launched, function):
    names = operations_of_a_head(launched, "tiles", 6, 6, function, gradient=False)
    assert "_update_tile_kernel" in names and "_tile_gradient_kernel" not in names and names.count("mm") == 1


def _launches(path):
    """(names of the kernels that the file defines, those it launches, the lines that launch without `launch`)."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    kernels = {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list)
    }
    launched, direct = set(), []
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
            launched |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} & kernels
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            direct.append(f"{path.name}:{node.lineno}")
    return kernels, launched, direct


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_is_launched_on_the_device_of_its_tensors(path):
    """`launch` sets the device; a kernel called past it would run on whichever device is current."""
    kernels, launched, direct = _launches(path)
    assert launched == {name for name in kernels if name.startswith("_") and name.endswith("_kernel")}
    assert path.name == "_backend.py" or direct == []


def test_launch_sets_the_device_of_the_tensors(monkeypatch):
    entered = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: entered.append((grid, arguments, options))

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    device = torch.device("cuda", 1)
    _backend.launch(Kernel(), 3, device, "x", warps=8)
    assert entered == [device, ((3,), ("x",), {"num_warps": 8}), "left"]
    entered.clear()
    _backend.launch(Kernel(), 0, device, "x")
    assert entered == [], "an empty grid is an error of CUDA"
    _backend.launch(Kernel(), 2, torch.device("cpu"))
    assert entered == [((2,), (), {"num_warps": 4})]
