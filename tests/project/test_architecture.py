"""The package's plan, held by reading the source: layers of the architecture, imports, docstrings.

python tests/project/test_architecture.py    prints the sizes of modules and functions
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import fastdeq
from fastdeq import cli
from tests.loops import each

ROOT = Path(__file__).resolve().parents[2] / "fastdeq"

DATA, ENTRY = "data", "entry"
"""`data` is beside the levels; `fastdeq/__init__.py` is the entry point of the library."""

LEVELS: dict[str, int | str] = {
    "fastdeq": ENTRY,
    **dict.fromkeys(
        [
            f"fastdeq.{m}"
            for m in (
                "timer",
                "notation",
                "settings",
                "solution",
                "norms",
                "flatten",
                "rows",
                "transforms",
            )
        ],
        0,
    ),
    "fastdeq.autocast": 0,
    "fastdeq.streams": 0,
    "fastdeq.commands": 0,
    "fastdeq.extras": 0,
    "fastdeq.autodiff": 0,
    "fastdeq.solvers": 1,
    "fastdeq.krylov": 1,
    "fastdeq.compilation": 0,
    "fastdeq.history": 1,
    "fastdeq.adjoints": 2,
    "fastdeq._fixed_point": 3,
    "fastdeq.regularizers": 3,
    "fastdeq.diagnosis": 3,
    "fastdeq.nn": 4,
    "fastdeq._export": 4,
    "fastdeq.compat": 4,
    "fastdeq.data.command": 7,  # around the data sets
    "fastdeq.data": DATA,
    "fastdeq.runs.files": 0,  # atomic writing, of data sets too
    "fastdeq.runs": 5,
    "fastdeq.report": 6,
    "fastdeq.training": 7,
    "fastdeq.experiment": 8,
    "fastdeq.cluster": 9,
    "fastdeq.bench": 10,
    "fastdeq.completion": 10,
    "fastdeq.cli": 10,
    "fastdeq.__main__": 10,
}
"""A module or a package with all that is in it. A new one gets its line here."""

LIBRARY = range(5)  # the levels that need torch alone
EXTRAS = {"fastdeq.nn.neural_ode": {"torchdiffeq"}}
"""Modules of the library that need more, and what: nothing in fastdeq imports them."""

LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
LIGHTNING_PACKAGES = ("fastdeq.training", "fastdeq.data", "fastdeq.experiment")
HYDRA = {"hydra", "omegaconf"}
HYDRA_PACKAGES = ("fastdeq.experiment", "fastdeq.completion")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """A source file of the package, by its dotted name."""

    name: str
    is_package: bool
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, parts[-1] == "__init__", path.read_text(encoding="utf-8"))
    return found


MODULES = read_modules()


def in_package(name: str, package: str) -> bool:
    return name == package or (package != "fastdeq" and name.startswith(package + "."))


def level(name: str) -> int | str:
    found = [kept for package, kept in LEVELS.items() if in_package(name, package)]
    assert found, f"{name} has no level: add it or its package to LEVELS in {Path(__file__).name}"
    return found[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, hidden: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import that runs, and whether it is inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, hidden
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            for other in node.orelse:
                yield from imports(other, hidden)
        else:
            yield from imports(node, hidden or isinstance(node, (*FUNCTIONS, ast.Lambda)))


def targets(module: Module, modules: dict[str, Module]) -> set[str]:
    """Dotted names of what a module imports; `from fastdeq import nn` means fastdeq.nn."""
    found: set[str] = set()
    for node, _ in imports(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name} imports relatively: write the whole name"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "fastdeq"}


def may_import(importer: str, imported: str) -> bool:
    """The one-way rule: the same level or an earlier one; data keeps to itself."""
    one, other = level(importer), level(imported)
    if one == DATA:  # data sets need the base modules alone
        return other in (DATA, 0)
    if other == DATA:  # data sets meet the levels in experiment and training
        return isinstance(one, int) and one not in LIBRARY
    highest = max(LIBRARY)
    rank = {name: highest if kept == ENTRY else kept for name, kept in ((1, one), (2, other))}
    if other == ENTRY and (one == ENTRY or one in LIBRARY):
        return False
    return int(rank[2]) <= int(rank[1])


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of the graph as a path that ends where it starts; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if cycle := visit(target, [*path, name]):
                return cycle
        done.add(name)
        return []

    for name in graph:
        if cycle := visit(name, []):
            return cycle
    return []


def longest_chain(graph: dict[str, set[str]], first: str) -> list[str]:
    """The longest path of imports that starts at `first`; the graph has no cycle."""
    chains = [longest_chain(graph, target) for target in sorted(graph.get(first, ()))]
    return [first, *max(chains, key=len, default=[])]


def parts(modules: dict[str, Module]) -> dict[str, set[str]]:
    """What the packages and modules directly below fastdeq import of each other."""
    graph: dict[str, set[str]] = {}
    for name, module in modules.items():
        part = ".".join(name.split(".")[:2])
        others = {".".join(target.split(".")[:2]) for target in own(targets(module, modules))}
        graph[part] = graph.get(part, set()) | (others - {part})
    return graph


def definitions(module: Module) -> Iterator[tuple[str, Definition]]:
    """All functions, methods and classes with their qualified names."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(module.tree, "")


def test_every_module_has_a_level():
    without = [name for name in MODULES if not any(in_package(name, known) for known in LEVELS)]
    assert not without, f"add to LEVELS: {without}"


def test_a_module_imports_only_its_own_level_and_earlier_ones():
    wrong = [
        f"{name} (level {level(name)}) imports {target} (level {level(target)})"
        for name, module in MODULES.items()
        for target in sorted(own(targets(module, MODULES)))
        if not may_import(name, target)
    ]
    assert not wrong, "; ".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: own(targets(module, MODULES)) for name, module in MODULES.items()}
    cycle = find_cycle(graph)
    assert not cycle, " → ".join(cycle)


def test_the_parts_of_the_package_form_at_most_ten_layers_without_a_cycle():
    graph = parts(MODULES)
    cycle = find_cycle(graph)
    assert not cycle, " → ".join(cycle)
    chain = longest_chain(graph, "fastdeq.experiment")
    assert len(chain) <= 10, " → ".join(chain)


def test_no_import_is_hidden_in_a_function():
    hidden = [
        f"{name}: {ast.unparse(node)}"
        for name, module in MODULES.items()
        for node, inside in imports(module.tree)
        if inside
    ]
    assert not hidden, f"move to the top: {hidden}"


def roots(module: Module) -> set[str]:
    """The packages that a module imports from."""
    return {target.split(".")[0] for target in targets(module, MODULES)}


IMPORTERS = {"fastdeq", "fastdeq.cli", "fastdeq.compilation"}
"""They import by name what is asked for: a public name of the library and the package of a
subcommand, from a table at their top, and the part of torch that compiles. Nothing else imports so
late.
"""


def test_modules_are_imported_by_name_in_three_places_alone():
    found = {name for name, module in MODULES.items() if "import_module" in module.text}
    assert found == IMPORTERS


def test_the_tables_of_names_lead_to_modules_that_exist():
    for module in (*fastdeq._MODULES, *(module for module, _ in cli.COMMANDS.values())):
        assert module in MODULES, module


def test_the_library_needs_torch_alone():
    allowed = set(sys.stdlib_module_names) | {"torch", "fastdeq"}
    foreign = {
        name: sorted(found)
        for name, module in MODULES.items()
        if level(name) in LIBRARY or level(name) == ENTRY
        if (found := roots(module) - allowed - EXTRAS.get(name, set()))
    }
    assert not foreign, f"the library imports {foreign}"


def test_nothing_imports_a_module_that_needs_an_extra():
    wrong = {
        name: sorted(found)
        for name, module in MODULES.items()
        if (found := targets(module, MODULES) & set(EXTRAS))
    }
    assert not wrong, f"imports that need an extra: {wrong}"


@pytest.mark.parametrize(
    ("packages", "homes"),
    [(LIGHTNING, LIGHTNING_PACKAGES), (HYDRA, HYDRA_PACKAGES)],
    ids=["lightning", "hydra"],
)
def test_lightning_and_hydra_are_imported_by_their_packages_alone(packages, homes):
    wrong = {
        name: sorted(found)
        for name, module in MODULES.items()
        if not any(in_package(name, home) for home in homes)
        if (found := roots(module) & packages)
    }
    assert not wrong, f"only {homes} may import these: {wrong}"


def test_every_module_says_what_it_is():
    silent = [name for name, module in MODULES.items() if not ast.get_docstring(module.tree)]
    assert not silent, f"no docstring: {silent}"


def test_every_public_function_and_class_has_a_docstring():
    silent = [
        f"{name}.{node.name}"
        for name, module in MODULES.items()
        for node in module.tree.body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent, f"no docstring: {silent}"


# The rules themselves


@each(
    "importer, imported, allowed",
    [
        ("fastdeq.nn.deq", "fastdeq.solvers", True),
        ("fastdeq.solvers.loop", "fastdeq.solvers.base", True),
        ("fastdeq.solvers.loop", "fastdeq.adjoints", False),
        ("fastdeq.norms", "fastdeq", False),
        ("fastdeq.training.regression", "fastdeq", True),
        ("fastdeq", "fastdeq.nn", True),
        ("fastdeq", "fastdeq.training", False),
        ("fastdeq.runs.resuming", "fastdeq.training", False),
        ("fastdeq.report", "fastdeq.runs.reading", True),
        ("fastdeq.data.digits", "fastdeq.data.store", True),
        ("fastdeq.data.digits", "fastdeq.settings", True),
        ("fastdeq.data.digits", "fastdeq.solvers", False),
        ("fastdeq.nn", "fastdeq.data", False),
        ("fastdeq.experiment", "fastdeq.data", True),
    ],
)
def test_the_one_way_rule(importer, imported, allowed):
    assert may_import(importer, imported) == allowed


def test_the_error_for_an_unknown_module_names_the_table_of_levels():
    with pytest.raises(AssertionError, match="add it or its package to LEVELS"):
        level("fastdeq.unknown")


def test_the_reading_finds_hidden_imports_and_skips_those_for_type_checkers():
    source = """
import a
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import for_types
class C:
    def method(self):
        from b import c
"""
    found = [(ast.unparse(node), hidden) for node, hidden in imports(ast.parse(source))]
    assert found == [
        ("import a", False),
        ("from typing import TYPE_CHECKING", False),
        ("from b import c", True),
    ]


def test_a_circle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def report(modules: dict[str, Module]) -> str:
    """Sizes of modules and functions, and the share of public definitions with a docstring."""
    lines = {name: module.lines for name, module in modules.items()}
    named = [
        (f"{name}.{qualified}", node)
        for name, module in modules.items()
        for qualified, node in definitions(module)
    ]
    lengths = {
        name: (node.end_lineno or node.lineno) - node.lineno + 1
        for name, node in named
        if isinstance(node, FUNCTIONS)
    }
    public = [node for _, node in named if not node.name.startswith("_")]
    documented = sum(ast.get_docstring(node) is not None for node in public)
    largest, longest = max(lines, key=lines.__getitem__), max(lengths, key=lengths.__getitem__)
    over = sum(length > 40 for length in lengths.values())
    chain = longest_chain(parts(modules), "fastdeq.experiment")
    return "\n".join(
        (
            f"{len(modules)} modules, {sum(lines.values())} lines",
            f"lines per module   max {lines[largest]} ({largest}), "
            f"median {statistics.median(lines.values()):g}",
            f"lines per function max {lengths[longest]} ({longest}), "
            f"median {statistics.median(lengths.values()):g}, "
            f"{over} of {len(lengths)} over 40 ({over / len(lengths):.0%})",
            f"public functions, methods and classes with a docstring: "
            f"{documented} of {len(public)} ({documented / len(public):.0%})",
            f"longest chain of imports: {len(chain)}, {' → '.join(chain)}",
        )
    )


def test_the_report_can_be_printed():
    assert f"{len(MODULES)} modules" in report(MODULES)


if __name__ == "__main__":
    print(report(MODULES))
