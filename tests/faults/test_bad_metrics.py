"""The report of runs whose metrics hold odd names, or are no metrics."""

import json
import time
from pathlib import Path

import pytest

from lens_megatron.output import report
from lens_megatron.output.metrics import read_metrics

ODD_NAMES = ("$a$ $x^{", "$\\frac{$", "a\nb\tc", "a/b", "/", "..", "x" * 5_000, "\u6570\u5b66 \U0001f600",
             "_hidden", "%s{0}", "\x1b[31mred", "a/acc/mean@1", " ")  # fmt: skip


def test_names_of_sources_in_the_report(tmp_path: Path):
    accuracies = {f"val-core/{name}/acc/mean@1": 0.5 for name in ODD_NAMES}
    rows = [{"step": step, **accuracies} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.monotonic()
    text = report.write(tmp_path)
    assert time.monotonic() - started < 60
    assert text.count("accuracy on ") == len(ODD_NAMES) == len([li for li in text.splitlines() if " before, " in li])
    assert "accuracy on a/b: 50.0 %" in text and "accuracy on a\\nb\\tc: " in text and "\x1b" not in text
    assert len(max(text.splitlines(), key=len)) < 1_000
    assert (tmp_path / "learning_curve.png").stat().st_size > 1_000
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize("content", [None, b"", b"{}\n", b"3\n", b'{"step": 0, "timing_s/step": "a"}\n', b"\xff\xfe"])
def test_the_report_of_what_is_no_run(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    status = report.main([str(tmp_path)])
    assert status == (2 if content is None or b"timing" in content else 0)
    assert "Traceback" not in capsys.readouterr().err
