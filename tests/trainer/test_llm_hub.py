"""`model.path` as the name of a model on the hub: found in the hub's cache, without a network."""

import shutil
from pathlib import Path

import pytest
import yaml
from toy_runs import Toy, run_ranks, write_config

from lens_megatron.config import from_tree
from lens_megatron.data.model_files import ModelError
from lens_megatron.data.model_hub import local_model, with_local_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with the toy as owner/tiny, and no network."""
    model = tmp_path / "hub" / "models--owner--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(toy.model, model / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_name_is_found_in_the_cache(cache: Path):
    there = str(cache / "models--owner--tiny" / "snapshots" / COMMIT)
    assert local_model("owner/tiny") == there
    assert local_model("owner/tiny@main", download=False) == there


def test_a_folder_comes_before_a_name(cache: Path):
    Path("owner/tiny").mkdir(parents=True)
    assert local_model("owner/tiny") == "owner/tiny"


@pytest.mark.parametrize("path", ["/models/none", "./owner/none", "a/b/c", "none", "..", "owner/.hidden", "a b/c"])
def test_what_can_be_no_name_stays_as_it_is(path: str):
    assert local_model(path) == path


@pytest.mark.parametrize("name", ["owner/none", "owner/tiny@other"])
def test_without_a_network_the_message_names_folder_model_and_remedy(cache: Path, name: str):
    with pytest.raises(ModelError) as raised:
        local_model(name, "model.reference_path")
    said = str(raised.value)
    assert said.startswith(f"model.reference_path {name}: there is no folder {Path.cwd() / name}")
    assert f"hf download {name.partition('@')[0]} --local-dir" in said


def test_both_models_of_a_configuration(cache: Path, toy: Toy, tmp_path: Path):
    asked = from_tree(toy.tree(tmp_path / "run", model={"path": "owner/tiny", "reference_path": "owner/tiny@main"}))
    found = with_local_models(asked)
    assert found.model.path == found.model.reference_path and found.model.path.endswith(COMMIT)
    assert found.train == asked.train
    local = from_tree(toy.tree(tmp_path / "run"))
    assert with_local_models(local) is local


def test_a_run_keeps_the_name(cache: Path, toy: Toy, tmp_path: Path):
    tree = toy.tree(tmp_path / "run", model={"path": "owner/tiny"}, train={"steps": 1})
    program = Path(__file__).with_name("hub_run.py")
    run_ranks(1, program, "--config", write_config(tree, tmp_path), variables={"TEST_HUB_CACHE": str(cache)})
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["path"] == "owner/tiny"
    assert list(tmp_path.glob("run/checkpoints/iter_*/hf/tokenizer.json"))
