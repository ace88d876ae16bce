"""Files that versions up to 0.1.0 wrote are read."""

from pathlib import Path

import records

from lens_megatron.rollout import replay
from lens_megatron.rollout.unfinished import UnfinishedGroups

GROUP = records.group("1000", "0110")


def old_line() -> str:
    """A group as version 0.1.0 saved it: what is now called purified was called rescued."""
    return replay.to_json(GROUP).replace('"origin": "purified"', '"origin": "rescued"')


def test_saved_rollouts_of_an_older_version_are_read(tmp_path: Path):
    assert old_line().count('"rescued"') == len(GROUP.rescue)
    replay.replay_path(str(tmp_path), 1).write_text(old_line())
    assert replay.read_groups(str(tmp_path), 1, count=1, vocab_size=100) == [GROUP]


def test_unfinished_groups_of_an_older_version_are_kept(tmp_path: Path):
    (tmp_path / "step_000001_00000_of_00001.jsonl").write_text(old_line())
    assert UnfinishedGroups(tmp_path, 0, 1).read(1, [GROUP.prompt], version=0) == {0: GROUP}
