"""A model directory with one bad file: one clear error, status 2, before the run folder is there."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toy_runs import Toy

from lens_megatron import train
from lens_megatron.data.model_files import ModelError, stored_tensors

WEIGHTS, NORM = "model.safetensors", "model.norm.weight"
Change = Callable[[Path], object]


def edit(file: str, change: Callable[[dict], object]) -> Change:
    """`change` takes the contents of a JSON file, or the tensors of a safetensors file, and changes them in place."""

    def apply(folder: Path) -> None:
        if file.endswith(".json"):
            tree = json.loads((folder / file).read_text())
            change(tree)
            (folder / file).write_text(json.dumps(tree))
            return
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


def put(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, share: float = 0.5) -> Change:
    return lambda folder: os.truncate(folder / file, int((folder / file).stat().st_size * share))


def index(weight_map: object) -> Change:
    return put("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


NOISE = random.Random(0).randbytes(3000)
CASES: dict[str, tuple[Change, str]] = {
    "weights empty": (put(WEIGHTS, b""), "model.safetensors is empty; download it again"),
    "weights truncated": (cut(WEIGHTS), "model.safetensors cannot be read as safetensors, it is truncated or damaged"),
    "weights cut in the header": (cut(WEIGHTS, 0.01), "model.safetensors cannot be read as safetensors"),
    "weights random": (put(WEIGHTS, NOISE), "model.safetensors cannot be read as safetensors"),
    "weights pickled": (put(WEIGHTS, pickle.dumps([1])), "model.safetensors is a pickle; convert it"),
    "weights of torch.save": (
        lambda folder: torch.save({"w": torch.zeros(1)}, folder / WEIGHTS), "is a pickle of torch.save; convert it"
    ),
    "weights not pulled": (put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull there"),
    "weights a web page": (put(WEIGHTS, b"<!DOCTYPE html><html>"), "is a web page; download the file itself"),
    "weights gone": (lambda folder: (folder / WEIGHTS).unlink(), "no *.safetensors file there"),
    "weights a folder": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), "model.safetensors cannot be read"
    ),
    "tensor missing": (
        edit(WEIGHTS, lambda tensors: tensors.pop(NORM)), "tensors that config.json asks for are in no weight file, mod"
    ),
    "wrong shape": (
        edit(WEIGHTS, lambda tensors: tensors.update({NORM: torch.ones(47)})),
        "model.safetensors: model.norm.weight has shape [47], config.json asks for [48]",
    ),
    "wrong type": (
        edit(WEIGHTS, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int32)})),
        "model.norm.weight is of type I32; supported: F64, F32, F16, BF16",
    ),
    "index no JSON": (put("model.safetensors.index.json", b"{"), "index.json cannot be read: JSONDecodeError"),
    "index without a map": (put("model.safetensors.index.json", b"{}"), "index.json cannot be read: KeyError"),
    "index of numbers": (index({NORM: 3}), "index.json cannot be read: TypeError"),
    "index of a file that is gone": (index({NORM: "model-2.safetensors"}), "model-2.safetensors is missing, which"),
    "index of another file": (index({"model.no": WEIGHTS}), "model.safetensors does not hold model.no, which"),
    "config empty": (put("config.json", b""), "config.json cannot be read"),
    "config truncated": (cut("config.json"), "config.json cannot be read"),
    "config random": (put("config.json", NOISE), "config.json cannot be read"),
    "config a list": (put("config.json", b"[1]"), "config.json cannot be read"),
    "config null": (put("config.json", b"null"), "config.json cannot be read"),
    "config of words": (
        edit("config.json", lambda tree: tree.update(hidden_size="wide")), "config.json cannot be read"
    ),
    "config of no layers": (
        edit("config.json", lambda tree: tree.update(num_attention_heads=0, head_dim=None)), "json cannot be read"
    ),
    "config of negative sizes": (
        edit("config.json", lambda tree: tree.update(intermediate_size=-4)), "describes a model that cannot be built"
    ),
    "config of a larger model": (
        edit("config.json", lambda tree: tree.update(intermediate_size=128)), "config.json asks for [128, 48]"
    ),
    "generation empty": (put("generation_config.json", b""), "generation_config.json cannot be read"),
    "generation truncated": (cut("generation_config.json"), "generation_config.json cannot be read"),
    "generation random": (put("generation_config.json", NOISE), "generation_config.json cannot be read"),
    "generation a list": (put("generation_config.json", b"[]"), "generation_config.json cannot be read"),
    "generation of words": (
        put("generation_config.json", b'{"eos_token_id": "end"}'), "generation_config.json: eos_token_id is 'end'"
    ),
    "generation of fractions": (
        put("generation_config.json", b'{"eos_token_id": [1.5]}'), "generation_config.json: eos_token_id is [1.5]"
    ),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer there"),
    "tokenizer empty": (put("tokenizer.json", b""), "tokenizer.json cannot be read: JSONDecodeError"),
    "tokenizer truncated": (cut("tokenizer.json"), "tokenizer.json cannot be read: JSONDecodeError"),
    "tokenizer random": (put("tokenizer.json", NOISE), "tokenizer.json cannot be read: UnicodeDecodeError"),
    "tokenizer a list": (put("tokenizer.json", b"[]"), "tokenizer.json holds a list instead of an object"),
    "tokenizer of nothing": (put("tokenizer.json", b"{}"), "no tokenizer can be read there: KeyError"),
    "tokenizer without tokens": (
        edit("tokenizer.json", lambda tree: tree["model"].update(vocab={}, merges=[])), "the tokenizer has no tokens"
    ),
    "tokenizer that panics": (
        edit("tokenizer.json", lambda tree: tree["model"].update(vocab=dict.fromkeys(tree["model"]["vocab"], 0))),
        "no tokenizer can be read there: PanicException",
    ),
    "tokenizer options gone": (
        lambda folder: (folder / "tokenizer_config.json").unlink(), "no tokenizer_config.json there, without which"
    ),
    "tokenizer options empty": (put("tokenizer_config.json", b""), "tokenizer_config.json cannot be read: JSONDecode"),
    "tokenizer options truncated": (cut("tokenizer_config.json"), "tokenizer_config.json cannot be read: JSONDecode"),
    "tokenizer options random": (put("tokenizer_config.json", NOISE), "tokenizer_config.json cannot be read: Unicode"),
    "tokenizer options a list": (put("tokenizer_config.json", b"[]"), "tokenizer_config.json holds a list instead"),
    "special tokens no JSON": (put("special_tokens_map.json", b"{"), "special_tokens_map.json cannot be read: JSON"),
    "template of bytes": (put("chat_template.jinja", NOISE), "no tokenizer can be read there: UnicodeDecodeError"),
}  # fmt: skip


def refused(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture, **paths: str) -> str:
    """What a run says that must end with status 2 and leave no folder."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(toy.tree(tmp_path / "run", model=paths)))
    assert train.main(["--config", str(config)]) == 2
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    errors = [line for line in out.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in out, out
    return errors[0]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file(case: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = shutil.copytree(toy.model, tmp_path / "model")
    if not (model / "generation_config.json").exists():
        (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    change, message = CASES[case]
    change(model)
    error = refused(toy, tmp_path, capsys, path=str(model))
    assert message in error and "model.path" in error and str(model) in error


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(("weights", "wrong", "tensor", "index", "config"))])
def test_a_bad_file_of_the_reference(case: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = shutil.copytree(toy.model, tmp_path / "reference")
    CASES[case][0](model)
    error = refused(toy, tmp_path, capsys, path=str(toy.model), reference_path=str(model))
    assert "model.reference_path" in error and str(model) in error


def test_a_reference_that_would_be_computed_as_another_model(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = shutil.copytree(toy.model, tmp_path / "reference")
    edit("config.json", lambda tree: tree.update(rms_norm_eps=1e-3))(model)
    error = refused(toy, tmp_path, capsys, path=str(toy.model), reference_path=str(model))
    assert "rms_norm_eps is 0.001, model.path has 1e-06" in error


def test_headers_may_be_anything(tmp_path: Path):
    save_file({"w": torch.zeros(4, 4)}, tmp_path / WEIGHTS)
    whole, chance = (tmp_path / WEIGHTS).read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(whole) - 64)] = chance.randrange(256)
        (tmp_path / WEIGHTS).write_bytes(damaged[: chance.randrange(len(whole) + 1)])
        with pytest.raises(ModelError):
            stored_tensors(tmp_path)
