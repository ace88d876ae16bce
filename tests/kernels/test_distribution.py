"""The distribution: what it exports, what it imports, and that the README's code runs."""

import ast
import re
import sys
from pathlib import Path

import lens_kernels
import pytest

ROOT = Path(__file__).parents[2] / "kernels"
SOURCES = sorted((ROOT / "lens_kernels").glob("*.py"))


def test_exports_and_module_names():
    functions = set(lens_kernels.__all__)
    assert functions == {
        "PolicyLoss",
        "VocabShard",
        "interference_scores",
        "k3",
        "linear_policy_loss",
        "linear_token_logprobs",
        "policy_loss",
        "select_interference_tokens",
        "token_logprobs",
    }
    assert all(callable(getattr(lens_kernels, name)) for name in functions)
    assert not functions & {path.stem for path in SOURCES}


def test_version_and_types_are_those_of_the_distribution():
    """setup.py reads the version from the source, and without `py.typed` no type checker looks at the annotations."""
    setup = (ROOT / "setup.py").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", lens_kernels.__version__)
    assert "version=VERSION" in setup and '"py.typed"' in setup
    assert (ROOT / "lens_kernels" / "py.typed").exists()


def test_imports_nothing_beyond_torch_triton_and_the_standard_library():
    allowed = {"torch", "triton", "lens_kernels", *sys.stdlib_module_names}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name


LATER_THAN_3_10 = {
    "typing": {"Self", "Never", "assert_never", "assert_type", "LiteralString", "Required", "NotRequired", "Unpack"},
    "enum": {"StrEnum", "ReprEnum", "EnumCheck", "verify", "member", "nonmember"},
    "datetime": {"UTC"},
    "contextlib": {"chdir"},
}
"""Modules and names that came with Python 3.11 or later, of those that a package like this one may want."""


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "setup.py"], ids=lambda path: path.stem)
def test_sources_run_on_python_3_10(path):
    """The trainer needs 3.11 and lens_kernels does not."""
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert "tomllib" not in [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.module != "tomllib"
            assert not LATER_THAN_3_10.get(node.module, set()) & {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr not in LATER_THAN_3_10.get(node.value.id, set())
        if isinstance(node, ast.Subscript):
            items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            assert not any(isinstance(item, ast.Starred) for item in items), "x[*y] is syntax of 3.11"


def test_folder_is_not_a_package():
    """Hugging Face's `kernels` is imported by transformers; a package here would shadow it."""
    assert not (ROOT / "__init__.py").exists()


def test_readme_code_runs():
    """Both halves of "you have this, write this" in one namespace, then the assertion that they agree."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
