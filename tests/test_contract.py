"""The shape of the project: who imports whom, how long things may grow, which names must not exist."""

import ast
from pathlib import Path

import pytest

from lens_megatron import config

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [*ROOT.glob("lens_megatron/**/*.py"), *ROOT.glob("kernels/lens_kernels/*.py"), ROOT / "pretrain_lens.py"]
)
TESTS = sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
OWNERS = {
    "megatron": "lens_megatron/policy/",
    "mbridge": "lens_megatron/policy/",
    "vllm": "lens_megatron/rollout/",
    "math_verify": "lens_megatron/reward/",
    "yaml": ("lens_megatron/config/files.py", "lens_megatron/output/run_folder.py"),
    "matplotlib": "lens_megatron/output/report.py",
    "altair": "lens_megatron/tools/report/",
    "vl_convert": "lens_megatron/tools/report/",
    "jinja2": ("lens_megatron/data/", "lens_megatron/tools/report/"),
    "tensorboard": "lens_megatron/output/tensorboard_events.py",
    "wandb": "lens_megatron/output/trackers/",
    "trackio": "lens_megatron/output/trackers/",
    "scipy": "lens_megatron/tools/compare/paired.py",
}
ROOMS = ["errors", "seeds", "files", "records", "reward", "types", "results", "config", "supervision", "data",
         "algorithms", "command_line", "batch", "rollout", "evaluation", "policy", "output", "run", "phases", "step",
         "build", "train", "tools"]  # fmt: skip
"""Lowest first: a module imports from its own room and from rooms before it."""
COMMANDS = {"__main__", "plan", "doctor", "report", "demo", "evaluate", "llm", "compare"}
"""`python -m lens_megatron.NAME`; nothing imports them."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in SOURCES}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_keeps_to_its_place(path: Path):
    relative, own = str(path.relative_to(ROOT)), room(name_of(path))
    if relative.startswith("lens_megatron/") and path.name != "__init__.py":
        assert own in ROOMS or own in COMMANDS, f"{relative} stands in no room; give it one in ROOMS"
    for name in imports(path):
        top = name.split(".")[0]
        if top in OWNERS:
            assert relative.startswith(OWNERS[top]), f"{relative} imports {top}, which belongs to {OWNERS[top]}"
        if relative.startswith("kernels/"):
            assert top not in ("lens_megatron", "megatron", "vllm", "transformers"), f"{relative} imports {top}"
        if top == "lens_megatron" and relative.startswith("lens_megatron/") and own not in COMMANDS and room(name):
            assert room(name) not in COMMANDS, f"{relative} imports the command {name}"
            assert ROOMS.index(room(name)) <= ROOMS.index(own), f"{relative} imports {name}, a higher room"


def test_no_circles():
    graph = {name_of(path): {name for name in imports(path) if name in MODULES} for path in SOURCES}
    graph = {name: {other for other in found if other != name} for name, found in graph.items()}
    for package in [name for name in graph if any(other.startswith(name + ".") for other in graph)]:
        # `from package import module` names the package too; what its __init__ imports does not lead back.
        graph[package] = {other for other in graph[package] if not other.startswith(package + ".")}
    while leaves := [name for name, found in graph.items() if not found & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"modules that import each other in a circle are among {sorted(graph)}"


def test_no_two_public_classes_share_a_name():
    """A name that is read in a message or a signature says which class is meant, whatever was imported."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path):
    relative, limit = path.relative_to(ROOT), 400 if path in SOURCES else 500
    text = path.read_text()
    assert len(text.splitlines()) <= limit, f"{relative} has {len(text.splitlines())} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.body[0].lineno + 1  # signatures give a shape per line
            assert length <= 60, f"{relative}: {node.name} has {length} lines"


def test_the_step_stays_readable():
    tree = ast.parse((ROOT / "lens_megatron" / "step.py").read_text())
    assert sum(isinstance(node, ast.If) for node in ast.walk(tree)) <= 2
    assert len((ROOT / "pretrain_lens.py").read_text().splitlines()) <= 80


def test_no_package_is_called_kernels():
    # Hugging Face's library of that name is imported by transformers; a package of ours would hide it.
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "tests" / "kernels" / "__init__.py").exists()


def test_options_stay_few_and_every_configuration_loads():
    theirs = ("megatron.", "vllm.")  # under their own names: design decision 11 counts ours
    assert sum(not name.startswith(theirs) for name in config.all_options()) <= 110
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        config.load(path)


def test_readme_stays_short_and_names_every_room():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 250
    for path in ROOT.glob("lens_megatron/*"):
        name = path.name + "/" if path.is_dir() else path.name
        if path.suffix == ".py" and path.stem not in {"__init__", *COMMANDS} or (path / "__init__.py").exists():
            assert name in readme, f"README's file tree lacks {name}"
