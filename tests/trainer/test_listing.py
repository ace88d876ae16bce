"""What `python -m lens_megatron.algorithms` says of the methods."""

import pytest
from toy_runs import ROOT

from lens_megatron.algorithms import __main__ as program
from lens_megatron.algorithms import listing, registry
from lens_megatron.algorithms.registry import Kind
from lens_megatron.config import all_options


def answer(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    status = program.main(arguments)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_without_a_word_it_lists_every_method_file_and_closed_table(capsys):
    status, text = answer(capsys)
    assert status == 0
    heads = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2:3].strip()]
    for kind in Kind:
        assert f"{kind} ({listing.CHOSEN_BY[kind][0]}): " in text
        assert [name for name in registry.names(kind) if name not in heads] == []
    assert [file.name for file in listing.files() if f"{file.name}.yaml" not in heads] == []
    assert [name for name in listing.CLOSED if f"    {name} " not in text] == []
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_options_that_it_names_exist():
    named = {option for chosen in listing.CHOSEN_BY.values() for option in chosen} | set(listing.CLOSED)
    assert {name for name in named if not name.endswith("{name}")} <= set(all_options())


def test_a_method_with_its_kind_needs_and_paper(capsys):
    status, text = answer(capsys, "interference")
    assert status == 0 and text.startswith(
        "interference  (purification; lens.purifier=interference; needs prompt_scores; LENS, arXiv 2601.21244)\n"
        "  Deletes the k = ceil(gamma * n) eligible tokens with the highest scores, all at once.\n"
        "    lens.purifier_options.score  (interference | signed | surprisal | smoothed; default interference)\n"
    )


def test_a_kind_has_its_own_methods_only(capsys):
    status, text = answer(capsys, "Advantages")
    assert status == 0 and "  grpo  (advantages; " in text and "interference" not in text


def test_an_unknown_name_gets_a_near_one(capsys):
    assert answer(capsys, "interferense") == (
        2,
        "error: no method and no kind of methods is called 'interferense'; did you mean interference?\n",
    )
    status, text = answer(capsys, "xyzxyz")
    assert status == 2 and "known: " in text and "every_prompt" in text


def test_the_page_is_what_the_program_prints(capsys):
    status, text = answer(capsys, "--markdown")
    assert status == 0
    assert (ROOT / "docs" / "METHODS.md").read_text() == text, (
        "write it anew: python -m lens_megatron.algorithms --markdown > docs/METHODS.md"
    )
