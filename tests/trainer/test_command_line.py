"""What `pretrain_lens.py` answers before anything of torch is imported."""

import subprocess
import sys

import pytest
from toy_runs import ROOT, Toy, command, environment, run_program, torchrun, write_config

from lens_megatron import __version__, command_line
from lens_megatron.command_line import CommandLine
from lens_megatron.config import all_options
from lens_megatron.config import help as option_help
from lens_megatron.tools import doctor, plan


def answer(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[object, str]:
    """Exit status and what was printed."""
    with pytest.raises(SystemExit) as ended:
        command_line.parse(arguments)
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


def test_help_has_every_option_once_with_type_default_and_meaning(capsys):
    status, text = answer(capsys, "--help")
    assert status == 0 and text.startswith("usage: torchrun")
    starts = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    assert [name for name in all_options() if starts.count(name) != 1] == []
    for line in (
        "  run.directory  (path; required)",
        "  run.if_exists  (resume | restart | fail; default resume)",
        "  lens.tau  (number from 0 to 1; default 0.5)",
        "  lens.deletion_ratio  (number above 0 below 1; default 0.03)",
        "  data.eval  (list of path; default [])",
        "  model.reference_path  (path or empty; default empty)",
        "  rollout.servers  (whole number or list of text; default 1)",
        "  algorithm.dual_clip  (number above 1 or empty; default 3.0)",
        "  megatron.transformer  (mapping; default {})",
    ):
        assert line in text.splitlines(), line
    assert all(len(line) <= 120 for line in text.splitlines())
    assert all(option.meaning for section in option_help.sections() for option in section.options)


def test_help_with_a_word_shows_a_section_or_what_mentions_it(capsys):
    status, text = answer(capsys, "--help", "lens")
    assert status == 0 and text.startswith("lens:\n") and "  lens.tau  " in text and "run.directory" not in text
    _, text = answer(capsys, "--help", "CHECKPOINTS")
    assert "  train.async_save  " in text and "lens.tau" not in text, "a word of the meaning, whatever its case"
    _, text = answer(capsys, "--help", "lens.tau")
    assert text.splitlines()[0] == "lens:" and text.count("; default ") == 1, "one option"


def test_help_with_a_word_that_nothing_mentions(capsys):
    status, text = answer(capsys, "--help", "tempreature")
    assert status == 2 and "no section, option or method has 'tempreature'" in text
    assert "did you mean rollout.temperature?" in text
    assert option_help.nearest("xyzxyz") == ""


def test_help_with_the_name_of_a_method_describes_it(capsys):
    status, text = answer(capsys, "--help", "crpo")
    assert status == 0 and "  algorithm.advantage  " in text, "options that mention it"
    assert "crpo  (advantages; algorithm.advantage=crpo; LENS, arXiv 2601.21244)" in text, "and the method itself"
    status, text = answer(capsys, "--help", "purification")
    assert status == 0 and "  interference  (purification; lens.purifier=interference; needs prompt_scores" in text
    status, text = answer(capsys, "--help", "grop")
    assert status == 2 and "did you mean grpo?" in text


def test_version_and_mistakes(capsys):
    assert answer(capsys, "--version") == (0, f"lens_megatron {__version__}\n")
    status, text = answer(capsys, "lens.tau=0.4")
    assert status == 2 and "required: --config" in text
    status, text = answer(capsys, "--config", "lens.tau=0.4")
    assert status == 2 and "--config needs a file before lens.tau=0.4" in text


@pytest.mark.parametrize(
    "words",
    [
        ("--config", "a.yaml", "./b=1.yaml", "c.d=1", "e.f=g/h"),
        ("c.d=1", "--config", "a.yaml", "./b=1.yaml", "e.f=g/h"),
        ("c.d=1", "e.f=g/h", "--config", "a.yaml", "--config", "./b=1.yaml"),
    ],
)
def test_files_stand_after_config_and_overrides_anywhere(words):
    assert command_line.parse(words) == CommandLine(("a.yaml", "./b=1.yaml"), ("c.d=1", "e.f=g/h"))


@pytest.mark.parametrize("word", [(), ("lens",), ("tau",)])
def test_help_imports_no_torch(word):
    script = str(ROOT / "pretrain_lens.py")
    words = [sys.executable, "-X", "importtime", script, "--help", *word]
    shown = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert shown.returncode == 0 and "lens.tau" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "transformers", "megatron"}


def test_a_pager_that_is_left_is_no_mistake():
    words = f"{sys.executable} {ROOT / 'pretrain_lens.py'} --help | head -1"
    shown = subprocess.run(["bash", "-o", "pipefail", "-c", words], env=environment(), capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("algorithm.advantage=grop", "algorithm.advantage: unknown method 'grop'; did you mean grpo?"),
        ("selection.method=a_b:C", "selection.method: a_b:C cannot be loaded: ModuleNotFoundError"),
        ("algorithm.objective_options={a: 1}", "unknown option algorithm.objective_options.a"),
    ],
)
def test_a_mistake_about_methods_is_told_before_anything_is_read(toy: Toy, tmp_path, capsys, override, mistake):
    tree = toy.tree(tmp_path / "run", model={"path": str(tmp_path / "no_model")})  # otherwise the first to be missed
    tree["data"]["train"] = str(tmp_path / "no_data.jsonl")
    done = run_program(tree, tmp_path, 1, override, status=2)
    assert mistake in done.stderr + done.stdout and "no_model" not in done.stderr + done.stdout
    words = [str(tmp_path / "config.yaml"), override]
    for program in (plan, doctor):
        assert program.main(words) == 2
        printed = capsys.readouterr()
        assert mistake in printed.err and not printed.out


def test_plan_and_doctor_take_several_files(toy: Toy, tmp_path, capsys):
    path = write_config(toy.tree(tmp_path / "run"), tmp_path)
    more = tmp_path / "more.yaml"
    more.write_text("algorithm: {advantage: grop}\n")
    for program in (plan, doctor):
        assert program.main([str(path), str(more), "train.steps=1"]) == 2
        assert "unknown method 'grop'" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            program.main(["train.steps=1"])
        assert "give " in capsys.readouterr().err


def test_the_package_is_a_program_of_torchrun(toy: Toy, tmp_path):
    config = command(toy.tree(tmp_path / "run", train={"steps": 1}), tmp_path, 1)[-1]
    words = [*torchrun(1), "-m", "lens_megatron", "--config", config, "run.log_level=warning"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "iteration" not in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").exists()
