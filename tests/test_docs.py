"""What the pages of documentation name exists: files, links, modules, options, targets of make."""

import re
from pathlib import Path

import pytest

from lens_megatron import config

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
"""Without those of the environment, which hold a hundred times as many files."""
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))])
NOT_OPTIONS = (".py", ".yaml", ".jsonl", ".parquet", ".sbatch", ".txt")
"""Endings of file names that begin like the name of an option."""


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_links_lead_to_files(page: Path):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_files_that_are_named_exist(page: Path):
    folders = "benchmarks|configs|kernels|lens_megatron|requirements|tests"
    named = re.findall(rf"(?<![\w/.~])(?:{folders})/[\w./-]*\w", page.read_text())
    assert [name for name in named if not any((folder / name).exists() for folder in (ROOT, page.parent))] == []


def test_options_that_are_named_exist(page: Path):
    sections = "run|model|data|rollout|reward|lens|algorithm|optimizer|train|cluster|debug"
    named = set(re.findall(rf"(?<![\w./-])(?:{sections})\.[a-z]\w*", page.read_text()))
    named = {name for name in named if not name.endswith(NOT_OPTIONS)}
    assert sorted(name for name in named if name not in config.all_options()) == []


def test_targets_of_make_that_are_named_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_the_changelog_names_modules_that_exist():
    rows = re.findall(
        r"^\| `lens_megatron\..*\| `(lens_megatron\.[a-z_.]+\b)", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert len(rows) > 25
    paths = [ROOT.joinpath(*name.rstrip(".").split(".")) for name in rows]
    assert [path for path in paths if not path.is_dir() and not path.with_suffix(".py").exists()] == []


def test_the_walk_of_one_step_has_ten_files_at_most():
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) <= 10
    assert rows[0][1] == "lens_megatron/step.py" and rows[-1][1] == "lens_megatron/policy/optimizer_step.py"
    assert all((ROOT / path).is_file() for _, path in rows)
