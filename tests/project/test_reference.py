"""The reference pages of the docs are complete: every public name, every key of conf/."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.loops import each
from tools import config_reference
from tools.docstrings import as_markdown

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
MODULES = (
    "fastdeq",
    "fastdeq.solvers",
    "fastdeq.adjoints",
    "fastdeq.nn",
    "fastdeq.regularizers",
    "fastdeq.diagnosis",
    "fastdeq.compat.torchdeq",
    "fastdeq.data",
    "fastdeq.training",
    "fastdeq.report",
)
FILES = [path for path in sorted(CONF.rglob("*.yaml")) if "hydra/help" not in path.as_posix()]


# The API


def public(module: str) -> list[str]:
    """`__all__`, or the functions and classes that a module defines."""
    imported = import_module(module)
    here = [
        name
        for name, value in vars(imported).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    return list(getattr(imported, "__all__", here))


def documentation(module: str, name: str) -> str | None:
    """The docstring of a public name; of a constant or an alias, the text below it."""
    value = getattr(import_module(module), name)
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value):
        return value.__doc__
    tree = ast.parse(inspect.getsource(import_module(module)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(one.name == name for one in node.names):
            return documentation(str(node.module), name)
    for node, below in zip(tree.body, tree.body[1:], strict=False):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in [one.id for target in targets for one in names_in(target)]:
            text = below.value if isinstance(below, ast.Expr) else None
            return text.value if isinstance(text, ast.Constant) else None  # type: ignore[return-value]
    return None


def names_in(target: ast.AST | None) -> list[ast.Name]:
    return [one for one in ast.walk(target) if isinstance(one, ast.Name)] if target else []


@each("module, name", [(module, name) for module in MODULES for name in public(module)])
def test_every_public_name_has_a_docstring(module: str, name: str) -> None:
    assert documentation(module, name), f"{module}.{name} has no docstring"


def test_every_public_module_is_on_an_api_page() -> None:
    assert set(MODULES) <= set(config_reference.documented_modules())


def test_arguments_in_docstrings_become_lists() -> None:
    text = "Solve.\n\ntol: a number,\n    above 0.\nsteps, nfe: (B,).\nRaises: ValueError [1]."
    assert as_markdown(text) == (
        "Solve.\n\n\n- **tol**: a number,\n    above 0.\n- **steps, nfe**: (B,).\n\n\n"
        "**Raises**: ValueError \\[1]."
    )


# The configuration


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return config_reference.pages()


def keys(path: Path) -> Iterator[str]:
    """The full names of the settings of a file, read without its comments."""
    text = path.read_text(encoding="utf-8")
    package = re.match(r"# @package (\S+)", text)
    group = path.parent.relative_to(CONF).as_posix().replace("/", ".")
    prefix = {"_global_": "", None: group}.get(package and package[1], package and package[1])
    tree = yaml.safe_load(text) or {}
    tree.pop("defaults", None)
    yield from leaves(tree, f"{prefix}." if prefix else "")


def leaves(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        elif name not in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_"):
            yield f"{prefix}{name}"


def shown(key: str, page: str) -> bool:
    """Whether a row is about the key, or about a mapping in one line that holds it."""
    parts = key.split(".")
    return any(f"| `{'.'.join(parts[:n])}` |" in page for n in range(1, len(parts) + 1))


@each("path", [path for path in FILES if path.parent != CONF])
def test_every_file_and_key_of_a_group_is_on_its_page(path: Path, pages: dict[str, str]) -> None:
    group = path.parent.relative_to(CONF).as_posix()
    page = pages[config_reference.address(group)]
    heading = f"\n## {group}={path.stem}\n"
    assert heading in page
    section = page.split(heading)[1].split("\n## ")[0]
    for key in keys(path):
        assert shown(key, section), key


def test_the_overview_has_every_group_and_every_key_of_the_run_itself() -> None:
    overview = config_reference.overview()
    for path in FILES:
        if path.parent != CONF:
            assert f"[`{path.parent.relative_to(CONF).as_posix()}`]" in overview
            assert f"`{path.stem}`" in overview
    tree = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))
    tree.pop("defaults")
    for key in leaves(tree, ""):
        assert shown(key, overview), key


def test_a_key_has_the_type_and_the_meaning_that_its_class_gives_it(
    pages: dict[str, str],
) -> None:
    page = pages[config_reference.address("solver")]
    (row, *_) = [line for line in page.splitlines() if line.startswith("| `solver.max_steps` ")]
    assert "`int, ≥ 1`" in row
    assert "iterations of the method" in row
    assert "`float, > 0, ≤ 1`" in page  # damping
