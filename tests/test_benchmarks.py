"""The benchmark suite runs, times no wrong answer, and writes what its readers expect. Speed is not tested."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import score_precision
from benchmarks.operators import campaign, catalog, figures, results, roof, shapes, tables, timing, verify
from benchmarks.operators.peers import Package, Peer, import_alone, one_rank_group
from benchmarks.operators.results import Status

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
OPERATORS = {operator.name: operator for operator in catalog.OPERATORS}
ROW = {"peer", "version", "note", "status", "reason"}
MEASURED_ROW = ROW | {"peak_extra_bytes", "seconds", "host_seconds", "host_hidden", "rate", "roof_fraction"}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """The roof and the caches' flush at full size are most of a tiny case's time."""
    monkeypatch.setitem(roof.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(timing.CACHE_BYTES, "cpu", 1 << 20)


def tiny(operator: catalog.Operator, *peers: Peer, dtype: torch.dtype = torch.float32) -> campaign.Case:
    """Ours, and the peers given or those that need no compiler."""
    chosen = peers or tuple(peer for peer in operator.peers if peer.name != "torch.compile")
    operator = replace(operator, peers=(operator.peers[0], *(peer for peer in chosen if peer != operator.peers[0])))
    return campaign.Case(operator=operator, shape=operator.shapes("tiny")[0], dtype=dtype, device=CPU)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_peer_that_runs_here_agrees_with_ours(name):
    case = campaign.run_case(tiny(OPERATORS[name]), rounds=2)
    status = {row["peer"]: row["status"] for row in case["rows"]}
    assert status["lens_kernels"] == status["PyTorch eager"] == Status.MEASURED
    assert set(status.values()) <= {Status.MEASURED, Status.ABSENT, Status.INAPPLICABLE}, case["rows"]
    assert case["comparison"] == asdict(results.compare(case["rows"], "lens_kernels"))
    for row in case["rows"]:
        if row["status"] == Status.MEASURED:
            assert MEASURED_ROW <= set(row)
            assert row["roof_fraction"] == pytest.approx(case["roof_seconds"] / row["seconds"]["median"])
            assert len(row["seconds"]["rounds"]) == 2
            assert row["host_seconds"] is None and row["host_hidden"] == 1  # the device is the host
        else:
            assert set(row) == ROW and row["reason"]


@pytest.mark.parametrize("factor, of", [(1.01, "value"), (float("nan"), "value"), (1.01, "gradient")])
def test_a_wrong_peer_is_named_and_not_timed(factor, of):
    operator = OPERATORS["policy_loss"]
    right = operator.peers[0].forward

    def wrong(inputs):
        loss = right(inputs)
        # `value`: off by the factor. `gradient`: the loss is right, its derivative is off.
        return loss * factor + (1 - factor) if of == "value" else loss * factor - (loss * (factor - 1)).detach()

    row = campaign.run_case(tiny(operator, Peer(name="wrong", forward=wrong, inplace=True)), rounds=2)["rows"][1]
    assert row["status"] == Status.WRONG and "differs from lens_kernels" in row["reason"] and "seconds" not in row


def test_a_peer_that_rounds_each_row_may_be_off_by_half_a_unit_and_others_may_not():
    """bfloat16 has 8 significant bits, so that half a unit in the last place is at most 2**-8 of a number."""
    operator = OPERATORS["token_logprobs_backward"]
    eager = next(peer for peer in operator.peers if peer.name == "PyTorch eager")
    shift = replace(eager, name="shifted", forward=lambda inputs: eager.forward(inputs) * (1 + 2**-9))
    rounds = replace(shift, name="rounding", rounds_rows=True)
    too_far = replace(rounds, name="far", forward=lambda inputs: eager.forward(inputs) * (1 + 2**-7))
    rows = campaign.run_case(tiny(operator, shift, rounds, too_far, dtype=torch.bfloat16), rounds=2)["rows"]
    assert [row["status"] for row in rows] == [Status.MEASURED, Status.WRONG, Status.MEASURED, Status.WRONG]


def test_a_wrong_operator_of_ours_stops_its_case():
    operator = OPERATORS["token_logprobs"]
    broken = replace(operator.peers[0], forward=lambda inputs: operator.peers[0].forward(inputs) + 0.01)
    with pytest.raises(AssertionError, match="token_logprobs of lens_kernels is off from float64"):
        campaign.run_case(tiny(replace(operator, peers=(broken,))), rounds=2)


def test_a_peer_that_fails_costs_only_its_own_row():
    def fail(inputs):
        raise RuntimeError("no such kernel")

    absent = Peer(name="absent", forward=fail, module="no_such_package.ops", distribution="no-such-package")
    case = tiny(OPERATORS["token_logprobs"], Peer(name="broken", forward=fail), absent)
    rows = campaign.run_case(case, rounds=2)["rows"]
    assert [row["status"] for row in rows] == [Status.MEASURED, Status.FAILED, Status.ABSENT]
    assert rows[1]["reason"] == "RuntimeError: no such kernel"
    assert rows[2]["reason"] == "not installed: pip install no-such-package"


def test_a_module_is_found_behind_parents_that_cannot_be_imported(tmp_path, monkeypatch):
    inner = tmp_path / "needs_ray" / "utils"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("import no_such_package")
    (inner / "__init__.py").write_text("import no_such_package")
    (inner / "kernel.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    peer = Peer(name="peer", forward=lambda inputs: None, module="needs_ray.utils.kernel")
    assert [peer.obstacle(CPU, torch.float32, 520), peer.obstacle(CPU, torch.float32, 520)] == [None, None]
    assert import_alone(peer.module).answer == 42
    missing = replace(peer, module="needs_ray.utils.missing").obstacle(CPU, torch.float32, 520)
    assert missing.status == Status.ABSENT and missing.reason.startswith("not importable: ModuleNotFound")


def test_a_peer_is_absent_if_an_installation_would_help_and_inapplicable_if_not(monkeypatch):
    """What the device rules out comes first, since nothing that could be installed would change it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    here = Peer(name="peer", forward=lambda inputs: None)
    missing = (Package("no_such_package", "no-such-package"),)
    hopper = replace(here, needs_cuda="its kernels are CuTe", majors=(9, 10), extras=missing)
    assert here.obstacle(CPU, dtype, 520) is None and here.obstacle(cuda, dtype, 520) is None
    assert replace(here, extras=missing).obstacle(cuda, dtype, 520) == (
        Status.ABSENT,
        "not installed: pip install no-such-package",
    )
    assert replace(here, too_old="absent before torch 9").obstacle(cuda, dtype, 520) == (
        Status.ABSENT,
        "absent before torch 9",
    )
    assert replace(hopper, majors=(8,)).obstacle(cuda, dtype, 520).status == Status.ABSENT
    assert hopper.obstacle(cuda, dtype, 520) == (
        Status.INAPPLICABLE,
        "its kernels are for compute capability 9.x, 10.x; this device has 8.0",
    )
    assert hopper.obstacle(CPU, dtype, 520) == (Status.INAPPLICABLE, "needs CUDA: its kernels are CuTe")
    assert replace(here, unsupported="no weights").obstacle(CPU, dtype, 520) == (Status.INAPPLICABLE, "no weights")
    whole_tiles = replace(here, vocab_multiple=256)
    assert whole_tiles.obstacle(CPU, dtype, 512) is None
    assert whole_tiles.obstacle(CPU, dtype, 520).reason == "V must be a multiple of 256, and this case has 520"
    bfloat16_only = replace(here, dtypes=(dtype,))
    assert bfloat16_only.obstacle(CPU, dtype, 520) is None
    assert bfloat16_only.obstacle(CPU, torch.float32, 520).status == Status.INAPPLICABLE


@pytest.mark.parametrize("name", ["policy_loss", "token_logprobs_backward"])
def test_megatrons_fused_loss_agrees_with_ours_in_a_group_of_one_rank(name):
    """It is the one peer that returns bfloat16 gradients whatever it gets, so that no float32 case can hold it."""
    (megatron,) = (peer for peer in OPERATORS[name].peers if peer.distribution == "megatron-core")
    with torch.compiler.set_stance("force_eager"):
        rows = campaign.run_case(tiny(OPERATORS[name], megatron, dtype=torch.bfloat16), rounds=2)["rows"]
    assert [row["status"] for row in rows] == [Status.MEASURED] * 2, rows
    assert not torch.distributed.is_initialized()


def test_a_group_of_one_rank_is_made_once_and_taken_away_again():
    with one_rank_group(CPU), one_rank_group(CPU):
        assert torch.distributed.get_world_size() == 1
    assert not torch.distributed.is_initialized()


def row(peer: str, milliseconds: float | None = None, status: Status = Status.MEASURED, reason: str = "") -> dict:
    if milliseconds is None:
        return {"peer": peer, "status": status, "reason": reason}
    return {"peer": peer, "status": status, "reason": "", "seconds": campaign.spread([milliseconds / 1e3] * 3)}


def verdict(*rows: dict) -> str:
    return tables.verdict({"comparison": asdict(results.compare(list(rows), "ours"))})


def test_ours_is_ahead_only_of_peers_that_were_all_timed():
    inapplicable = row("hopper's", status=Status.INAPPLICABLE, reason="this device is no Hopper")
    complete = row("ours", 2), row("slow", 6), row("quick", 3), inapplicable
    assert verdict(*complete) == "Ours is ahead of every peer: the best one, quick, takes 1.50 times the time of ours."
    assert verdict(row("ours", 4), row("quick", 3)) == (
        "Ours is not ahead: the best peer, quick, takes 0.75 times the time of ours."
    )
    for status in (Status.FAILED, Status.ABSENT, Status.WRONG, Status.SKIPPED):
        text = verdict(*complete, row("untimed", status=status, reason="why"))
        assert "best" not in text and "ahead" not in text and "every" not in text
        assert f"untimed ({status}: why)" in text and "quick, takes 1.50 times" in text and "hopper" not in text
    assert verdict(row("ours", status=Status.SKIPPED), row("quick", 3)) == "Ours is compared with no peer."


def test_the_quickest_peer_is_compared_round_by_round():
    """By hand: ratios 3, 1 and 2, whose median is 2. The ratio of the medians would be 3 / 2."""
    ours = row("ours", 0) | {"seconds": campaign.spread([1.0, 3.0, 2.0])}
    peer = row("peer", 0) | {"seconds": campaign.spread([3.0, 3.0, 4.0])}
    assert results.compare([ours, peer], "ours") == results.Comparison(quickest="peer", ratio=2.0, not_timed=())


def test_the_device_sleeps_longer_than_the_host_needs():
    def host_of(seconds: float, waits: bool = False):
        def sample(pause: float) -> timing.Sample:
            tried.append(pause)
            host = seconds + pause if waits else seconds
            return timing.Sample(seconds=1e-3, host_seconds=host, hidden=host < pause)

        return sample

    for seconds, want in ((1e-4, 5e-4), (4e-4, 1e-3), (6e-3, 9e-3)):
        tried: list[float] = []
        assert timing.choose_pause(host_of(seconds)) == pytest.approx(want)
        assert len(tried) <= 4  # the first call is for warming up
    tried = []
    assert timing.choose_pause(host_of(1e-4, waits=True)) == timing.LONGEST_PAUSE


def test_a_star_marks_a_peer_that_the_sleep_does_not_hide():
    seconds = campaign.spread([3e-4] * 3)
    row = {"host_seconds": seconds, "host_hidden": 0.95}
    assert tables._host(row) == "0.30"
    assert tables._host(row | {"host_hidden": 0.85}) == "0.30*"
    assert tables._host(row | {"host_seconds": None}) == "-"


def test_the_shapes_of_one_rank_among_eight_are_measured_second():
    for which in ("quick", "standard", "full"):
        cases = campaign.cases(which, torch.bfloat16, CPU)
        first, second = cases[: len(OPERATORS)], cases[len(OPERATORS) : 2 * len(OPERATORS)]
        assert [case.operator.name for case in first] == [case.operator.name for case in second] == list(OPERATORS)
        assert {case.shape.tensor_parallel for case in first} == {1}
        assert {case.shape.tensor_parallel for case in second} == {8}
        assert len(set(map(str, cases))) == len(cases)


def test_the_roof_takes_the_quicker_of_two_ways_for_each_part():
    """By hand: logits at 2 and 4 per second, dH at 1, dW at 2; a third of 12 each takes 1 + 4 + 2 seconds."""
    runner = timing.Runner(run=lambda: None)
    parts = {"rounded": "logits", "float32": "logits", "dH": "dH", "dW": "dW", "for information": ""}
    roofs = {name: roof.Roof(runner=runner, amount=4, part=part) for name, part in parts.items()}
    seconds = {"rounded": [2.0], "float32": [9.0, 1.0, 1.0], "dH": [4.0], "dW": [2.0], "for information": [1e-9]}
    assert roof.roof_seconds(roofs, seconds, work=12) == pytest.approx(7)


def test_a_gemm_of_the_roof_keeps_its_logits_within_4_gib():
    assert roof.gemm_rows(shapes.Shape(rows=8192, sequence=2048, vocab=128256)) == 8192
    capped = roof.gemm_rows(shapes.Shape(rows=32768, sequence=2048, vocab=152064))
    assert capped == 6912 and capped % roof.GEMM_ROWS == 0  # 7061 rows would fit
    assert roof.gemm_rows(shapes.Shape(rows=1 << 20, sequence=2048, vocab=1 << 24)) == roof.GEMM_ROWS


def test_memory_of_the_chunked_path_does_not_grow_with_the_logits():
    """By hand: 4096 rows of V 2048 are 32 MiB of float32 logits; eager holds them and their log-softmax, ours a chunk
    of 256 rows (2 MiB) and the temporaries of 1 << 20 elements."""
    operator = OPERATORS["linear_token_logprobs"]
    shape = shapes.Shape(rows=4096, sequence=512, vocab=2048, hidden=8)
    case = replace(tiny(operator, operator.peers[1]), shape=shape)
    ours, eager = (row["peak_extra_bytes"] / 2**20 for row in campaign.run_case(case, rounds=2)["rows"])
    assert 64 <= eager < 66 and ours < 16


def test_the_least_work_of_each_operator():
    shape = shapes.Shape(rows=8, sequence=4, vocab=1000, hidden=10, tensor_parallel=8)
    assert str(shape) == "T8-V1000-H10-TP8"
    work = {name: operator.work(shape, torch.bfloat16) for name, operator in OPERATORS.items()}
    assert work == {
        "token_logprobs": 16_000,  # 8 * 1000 elements of 2 bytes
        "token_logprobs_backward": 48_000,
        "policy_loss": 48_000,
        "interference_scores": 32_000,
        "linear_token_logprobs": 160_000,  # 2 * 8 * 1000 * 10
        "linear_policy_loss": 480_000,
        "linear_cross_entropy": 480_000,
    }


def test_nan_exceeds_every_bound():
    assert verify.Difference(value=float("nan"), gradient=0.0).exceeds(verify.FLOAT32)
    assert not verify.Difference(value=0.0, gradient=0.0).exceeds(verify.FLOAT32)


def test_the_suite_writes_json_and_figures(tmp_path):
    """The command of the Makefile, one operator of it; the peers that are not installed skip by name."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--shapes=tiny", "--rounds=2"]
    chosen = ["-k", "interference_scores and not compile", f"--out={tmp_path}", "--device=cpu"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, *chosen], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("operators_cpu_*.json")
    content = json.loads(path.read_text())
    assert content["schema"] == results.SCHEMA
    keys = {"date", "command", "commit", "uncommitted_changes", "device", "versions", "settings", "total_seconds"}
    assert set(content["environment"]) == keys
    assert {"name", "threads"} <= set(content["environment"]["device"])
    (case,) = content["cases"]
    assert case["shape"] == {"T": 20, "V": 520, "H": 0, "TP": 1}
    (figure,) = figures.draw(path)
    assert figure.stat().st_size > 1000
    assert tables.verdict(case) in done.stdout and tables.verdict(case) in tables.markdown(case)
    assert "| QuACK cross entropy, twice | inapplicable: needs CUDA: its kernels are CuTe |" in tables.markdown(case)


def test_unrounded_logits_select_as_float64_does_and_rounded_ones_do_not():
    """Score precision: at a mean score of 0.003, as in benchmarks/NOTES.md; and at 0 there is nothing to delete."""
    precisions = score_precision.compare(score_precision.make_models(0.005, 0, vocab=2000, tokens=512))["precisions"]
    assert precisions["linear_token_logprobs"]["overlap"] == 1
    assert precisions["bf16 logits"]["overlap"] < 0.7
    step_zero = score_precision.compare(score_precision.make_models(0, 0, vocab=500, tokens=128))
    assert all(row["zero_scores"] == 128 for row in step_zero["precisions"].values())
