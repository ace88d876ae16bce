"""lens-eval with vLLM's CPU build in this process. Skipped where it is not installed."""

import json
from pathlib import Path

import pytest
from toy_runs import Toy
from vllm_models import needs_vllm, save

from lens_megatron.tools.evaluate.main import main

pytestmark = [needs_vllm, pytest.mark.slow]


def test_vllm_samples_as_the_protocol_says(toy: Toy, tmp_path: Path):
    """With top-k 1 both engines draw the most probable tokens, so their samples are the same ones."""
    model, texts = tmp_path / "model", []
    model.mkdir()
    save(toy, model, tied=True)
    (tmp_path / "one.yaml").write_text("{template: '{problem}', max_tokens: 8, top_k: 1, samples: 2}")
    for engine in ("local", "vllm"):
        out = tmp_path / engine
        words = ["--model", str(model), "--benchmarks", "mine", "--data", f"mine={toy.eval}", "--engine", engine]
        words += ["--protocol", str(tmp_path / "one.yaml"), "--out", str(out), "--limit", "4", "--generated", "0"]
        assert main([*words, "--workers", "1"]) == 0
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 4 * 2
        texts.append({(s["problem"], s["sample"]): s["text"] for s in samples})
        assert all((s["certainty"] is None) == (engine == "vllm") for s in samples)
    assert texts[0] == texts[1]
