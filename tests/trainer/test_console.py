"""What a rank shows of the project's messages, and where."""

import logging

import pytest
from toy_runs import Toy
from tqdm import tqdm

from lens_megatron import train
from lens_megatron.config import from_tree
from lens_megatron.output import console

logger = logging.getLogger("lens_megatron.somewhere")
servers = logging.getLogger("lens_megatron.rollout.servers.pool")


def log_all() -> None:
    logger.debug("debugged")
    logger.info("told")
    servers.info("server 1: dead")
    logger.warning("warned")
    logger.error("failed")


@pytest.mark.parametrize(
    ("rank", "level", "lines"),
    [
        ("0", "info", ["told", "server 1: dead", "warning: warned", "error: failed"]),
        ("0", "debug", ["debugged", "told", "server 1: dead", "warning: warned", "error: failed"]),
        ("0", "warning", ["warning: warned", "error: failed"]),
        ("0", "error", ["error: failed"]),
        ("3", "info", ["rank 3: server 1: dead", "rank 3: warning: warned", "rank 3: error: failed"]),
        ("3", "debug", ["rank 3: server 1: dead", "rank 3: warning: warned", "rank 3: error: failed"]),
        ("3", "error", ["rank 3: error: failed"]),
    ],
)
def test_rank_0_shows_messages_and_other_ranks_what_only_they_know(rank, level, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with console.messages_on_console():
        console.set_level(level)
        log_all()
    assert capsys.readouterr().out.splitlines() == lines


def test_outside_the_block_nothing_is_left_behind(capsys):
    with console.messages_on_console():
        pass
    log_all()
    assert capsys.readouterr().out == "" and logging.getLogger("lens_megatron").handlers == []


def test_half_a_character_and_a_broken_message_end_nothing(capsys):
    with console.messages_on_console():
        logger.info("file \udc80")
        logger.info("%d steps", "many")
        logger.info("after")
    assert capsys.readouterr().out.splitlines() == ["file \\udc80", "after"]


def test_a_progress_bar_is_drawn_anew_below_a_message(capsys, monkeypatch):
    with console.messages_on_console(), tqdm(total=2, desc="sampling", mininterval=0) as bar:
        bar.update(1)
        bar_drawn = capsys.readouterr().err
        logger.info("told")
        shown = capsys.readouterr()
    assert "sampling:  50%" in bar_drawn and shown.out == "told\n"
    cleared, redrawn = shown.err.rsplit("\r", 1)
    assert not cleared.strip() and redrawn.startswith("sampling:  50%")


def test_the_option_sets_the_level_of_a_run(toy: Toy, tmp_path, capsys, monkeypatch):
    assert from_tree(toy.tree(tmp_path / "run")).run.log_level == "info"
    monkeypatch.setattr(train, "train", lambda config: log_all())
    for level, lines in (("info", 4), ("error", 1)):
        (tmp_path / "config.yaml").write_text(str(toy.tree(tmp_path / "run", run={"log_level": level})))
        assert train.main(["--config", str(tmp_path / "config.yaml"), f"run.directory={tmp_path / 'run'}"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines
