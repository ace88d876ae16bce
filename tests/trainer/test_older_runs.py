"""Shows what becomes of the files that versions up to 0.1.0 wrote."""

from pathlib import Path

import pytest
import records
import yaml

from lens_megatron.config import Config, from_tree
from lens_megatron.output import run_folder
from lens_megatron.output.run_folder import RunFolderError
from lens_megatron.rollout import replay
from lens_megatron.rollout.unfinished import UnfinishedGroups
from lens_megatron.types import StepPrompt

GROUP = records.group("1000", "0110")


def old_line() -> str:
    """A group as version 0.1.0 saved it: what is now called purified was called rescued."""
    return replay.to_json(GROUP).replace('"origin": "purified"', '"origin": "rescued"')


def test_saved_rollouts_of_an_older_version_are_read(tmp_path: Path):
    assert old_line().count('"rescued"') == len(GROUP.rescue)
    replay.replay_path(str(tmp_path), 1).write_text(old_line())
    assert replay.read_groups(str(tmp_path), 1, count=1, vocab_size=100) == [GROUP]


def test_unfinished_groups_of_an_older_version_are_sampled_again(tmp_path: Path):
    # They have no place in the step, by which seeds go now, so nothing says which of two equal prompts they are of.
    (tmp_path / "step_000001_00000_of_00001.jsonl").write_text(old_line())
    assert UnfinishedGroups(tmp_path, 0, 1).read(1, [StepPrompt(0, GROUP.prompt, GROUP.purified)], version=0) == {}


def configured(folder: Path, **algorithm: float) -> Config:
    model, data = {"path": "model"}, {"train": "train.jsonl"}
    return from_tree({"run": {"directory": str(folder)}, "model": model, "data": data, "algorithm": algorithm})


def test_a_run_from_before_the_registries_goes_on(tmp_path: Path):
    run_folder.take(configured(tmp_path), {"world_size": 1}).lease.release()
    recorded = tmp_path / "config.yaml"
    options = yaml.safe_load(recorded.read_text())
    for section, names in run_folder.BEFORE_THE_OPTION.items():
        for name in names.keys() - {"kl_limit"}:
            del options[section][name]
    del options["selection"]
    recorded.write_text(yaml.safe_dump(options))
    assert run_folder.check(configured(tmp_path))
    with pytest.raises(RunFolderError, match=r"with other options: algorithm\.mask_truncated;"):
        run_folder.check(configured(tmp_path, mask_truncated=True))


def test_a_run_from_before_kl_limit_goes_on_with_the_limit_that_it_had(tmp_path: Path):
    run_folder.take(configured(tmp_path), {"world_size": 1}).lease.release()
    recorded = tmp_path / "config.yaml"
    options = yaml.safe_load(recorded.read_text())
    del options["algorithm"]["kl_limit"]
    recorded.write_text(yaml.safe_dump(options))
    with pytest.raises(RunFolderError, match=r"with other options: algorithm\.kl_limit;"):
        run_folder.check(configured(tmp_path))
    assert run_folder.check(configured(tmp_path, kl_limit=10.0))
