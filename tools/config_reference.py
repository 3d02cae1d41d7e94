"""The configuration reference of the docs: a page per group of conf/.

A key's default and meaning come from the YAML file and its comments; its type, its range and, where
the file says nothing, its meaning come from the class that `_target_` names.
"""

import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

CONF = Path(__file__).parents[1] / "conf"
DOCS = Path(__file__).parents[1] / "docs"
HIDDEN = ("hydra/help",)
"""Groups without a page: the text of --help."""

_SPECIAL = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_SIGNS = {"above": ">", "at least": "≥", "at most": "≤"}


@dataclass(frozen=True)
class Key:
    """One setting of a file: its full name, default as it is written, meaning and type."""

    name: str
    default: str
    meaning: str = ""
    type: str = ""


@dataclass(frozen=True)
class File:
    """What one file of conf/ sets.

    about: its first comment. keys: its own, those of the files that it includes, and those of
    train.yaml below its group, with the keys that Hydra reads (`_target_`). chosen: what it chooses
    from other groups, by group.
    """

    path: Path
    about: str
    keys: tuple[Key, ...]
    chosen: dict[str, str]

    @property
    def targets(self) -> dict[str, str]:
        """The class that a mapping builds, by the mapping's name; several for one are possible."""
        suffix = "_target_"
        found = {key.name: key.default for key in self.keys if key.name.endswith(suffix)}
        return {name.removesuffix(suffix).rstrip("."): target for name, target in found.items()}

    def settings(self) -> list[Key]:
        """The keys that can be set, with the types and meanings that classes know."""
        names = [key.name for key in self.keys]
        shown = [
            key
            for key in self.keys
            if key.name.split(".")[-1] not in _SPECIAL
            and not any(name.startswith(f"{key.name}.") for name in names)
        ]
        return [_annotated(key, self.targets) for key in shown]


def _annotated(key: Key, targets: dict[str, str]) -> Key:
    place, _, name = key.name.rpartition(".")
    target = targets.get(place, "${")
    if "${" in target:
        return key
    kind, meaning = argument(target, name)
    return replace(key, type=kind, meaning=key.meaning or meaning)


def groups() -> dict[str, list[Path]]:
    """The files of every group, `solver` or `hydra/launcher`, in alphabetical order."""
    found: dict[str, list[Path]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        if group not in (".", *HIDDEN):
            found.setdefault(group, []).append(path)
    return found


def read(path: Path, prefix: str | None = None) -> File:
    """What a file sets, below `prefix` where another file includes it.

    Raises: yaml.YAMLError for a file that is not YAML, ImportError for a missing `_target_`.
    """
    text = path.read_text(encoding="utf-8")
    package = re.match(r"# @package (\S+)\n", text)
    body = text[package.end() :] if package else text
    prefix = _prefix(path, package) if prefix is None else prefix
    included, chosen = _defaults(path, (yaml.safe_load(body) or {}).get("defaults", []))
    keys = {key.name: key for name in included for key in read(_file(path, name), prefix).keys}
    if prefix and path.parent != CONF:
        shared = read(CONF / "train.yaml").keys
        keys |= {key.name: key for key in shared if key.name.startswith(f"{prefix}.")}
    tree = yaml.compose(body)
    for key in _Source(body).keys(tree, prefix) if tree and tree.value else []:
        meaning = key.meaning or (keys[key.name].meaning if key.name in keys else "")
        keys[key.name] = replace(key, meaning=meaning)
    return File(path, _about(body), tuple(keys.values()), chosen)


def _prefix(path: Path, package: re.Match[str] | None) -> str:
    if package:
        return {"_global_": ""}.get(package[1], package[1])
    return path.parent.relative_to(CONF).as_posix().replace("/", ".").strip(".")


def _about(body: str) -> str:
    """The comment at the top of the file, as Markdown."""
    lines = [line[1:] for line in body.split("\n\n")[0].splitlines() if line.startswith("#")]
    about = inspect.cleandoc("\n".join(lines))
    return re.sub(r"^(\S.*)\n    ", r"\1\n\n    ", about, flags=re.MULTILINE)


def _defaults(path: Path, listed: list[Any]) -> tuple[list[str], dict[str, str]]:
    """Files that are merged into this one, and what it chooses from other groups."""
    included, chosen = [], {}
    for entry in listed:
        if isinstance(entry, str):
            if entry != "_self_":
                included.append(entry)
            continue
        ((name, choice),) = entry.items()
        group = name.removeprefix("override ").removeprefix("optional ").lstrip("/")
        chosen[group] = "null" if choice is None else str(choice)
    here = [name for name in included if "@" not in name and _file(path, name).exists()]
    return here, chosen


def _file(path: Path, name: str) -> Path:
    folder = CONF if name.startswith("/") else path.parent
    return folder / f"{name.lstrip('/')}.yaml"


class _Source:
    """The text of a file, to read the comments that belong to a key."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()

    def keys(self, node: yaml.MappingNode, prefix: str) -> list[Key]:
        """The keys below a mapping in the order of the file."""
        found = []
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else key.value
            if key.value == "defaults" and node.start_mark.column == 0:
                continue
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                found += self.keys(value, name)
            else:
                found.append(Key(name, self._written(value), self._comment(key, value)))
        return found

    def _written(self, value: yaml.Node) -> str:
        start, end = value.start_mark, value.end_mark
        if _single(value):
            return str(self.lines[start.line][start.column : end.column].strip())
        rows = [self.lines[start.line][start.column :], *self.lines[start.line + 1 : end.line]]
        return " ".join(" ".join(rows).split())

    def _comment(self, key: yaml.ScalarNode, value: yaml.Node) -> str:
        """Behind the value, and below it in the same column; else in the lines above the key."""
        line, end = key.start_mark.line, max(value.end_mark.column, key.end_mark.column)
        behind = re.search(r"\s#\s*(.*)$", self.lines[line][end:]) if _single(value) else None
        if behind is None:
            above = self.lines[:line][::-1]
            indent = key.start_mark.column * " "
            rows = list(_while(above, lambda row: row.startswith(f"{indent}#")))
            return "" if len(rows) == line else " ".join(row.strip("# ") for row in rows[::-1])
        column = self.lines[line].index("#", end)
        below = _while(
            self.lines[line + 1 :], lambda row: row.find("#") == column and not row[:column].strip()
        )
        return " ".join([behind[1], *(row.strip("# ") for row in below)])


def _single(value: yaml.Node) -> bool:
    return bool(value.start_mark.line == value.end_mark.line)


def _while(rows: list[str], condition: Callable[[str], bool]) -> Iterator[str]:
    for row in rows:
        if not condition(row):
            return
        yield row


def argument(target: str, name: str) -> tuple[str, str]:
    """The type, with its range, and the meaning of a constructor's argument, as far as written."""
    built = _object(target)
    meaning = _described(built, name) if target.startswith("fastdeq.") else ""
    if is_dataclass(built):  # the signature of `@settings` classes is (*args, **given)
        found = [field for field in fields(built) if field.name == name]
        return (_bounded(found[0]) if found else "", meaning)
    parameter = inspect.signature(built).parameters.get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return "", ""
    return _annotation(parameter.annotation), meaning


def _bounded(field: Field[Any]) -> str:
    bounds = field.metadata.get("bounds", {})
    range_ = [f"{_SIGNS[sign]} {bound}" for sign, bound in bounds.items()]
    return ", ".join([_annotation(field.type), *range_])


def _object(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _annotation(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(_annotation(one) for one in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if annotation is types.NoneType:
        return "None"
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))


def _described(built: Any, name: str) -> str:
    """What a docstring of the class or of its bases says behind `name:`."""
    pattern = rf"(?:^|[.;] |, ){name}(?:, \w+)*: (.+?)(?=\.\n\S|\n\n|[.;] \w+: |\Z)"
    for cls in getattr(built, "__mro__", (built,)):
        found = re.search(pattern, inspect.cleandoc(cls.__doc__ or ""), re.DOTALL | re.MULTILINE)
        if found:
            return " ".join(found[1].split()).rstrip(".")
    return ""


# Pages


def pages() -> dict[str, str]:
    """Of every group a page in Markdown, by its place below docs/."""
    about = choices()
    return {address(group): _page(group, files, about) for group, files in groups().items()}


def address(group: str) -> str:
    """Where a group's page lies, below docs/."""
    return f"configuration/{group.replace('/', '_')}.md"


def choices() -> dict[str, str]:
    """What conf/train.yaml says about each group that it chooses from."""
    text = (CONF / "train.yaml").read_text(encoding="utf-8")
    rows = re.findall(r"^  - (?:optional )?([\w/]+): *[^#\n]*(?:# *(.*))?$", text, re.MULTILINE)
    return {group: comment or "" for group, comment in rows}


def overview() -> str:
    """A table of all groups, and the keys of conf/train.yaml itself."""
    about, rows = choices(), []
    for group, files in groups().items():
        names = ", ".join(f"`{path.stem}`" for path in files)
        link = f"[`{group}`]({Path(address(group)).name})"
        rows.append(f"| {link} | {_cell(about.get(group, ''))} | {names} |")
    table = ["| group | what it chooses | files |", "|---|---|---|", *rows]
    return "\n".join(
        [
            *table,
            "",
            "## Keys of the run itself",
            "",
            "Of `conf/train.yaml`:",
            "",
            *_table(read(CONF / "train.yaml")),
        ]
    )


def _page(group: str, files: list[Path], about: dict[str, str]) -> str:
    lines = [f"# {group}", ""]
    if about.get(group, "").split(",")[0] not in ("", *(path.stem for path in files)):
        lines += [f"{about[group][0].upper()}{about[group][1:]}.", ""]
    for path in files:
        lines += _section(group, read(path))
    return "\n".join(lines)


def _section(group: str, file: File) -> list[str]:
    lines = [f"## {group}={file.path.stem}", "", _text(file.about), ""]
    if file.targets:
        built = [_reference(target) for target in dict.fromkeys(file.targets.values())]
        lines += ["Builds " + ", ".join(built) + ".", ""]
    if file.chosen:
        chosen = ", ".join(f"`{name}={choice}`" for name, choice in file.chosen.items())
        lines += [f"Chooses {chosen}.", ""]
    return lines + _table(file)


def _reference(target: str) -> str:
    documented = target.rpartition(".")[0] in documented_modules()
    return f"[`{target}`][{target}]" if documented else f"`{target}`"


def documented_modules() -> list[str]:
    """The modules whose public names the API pages show."""
    pages = (DOCS / "api").glob("*.md")
    texts = [page.read_text(encoding="utf-8") for page in pages]
    return re.findall(r"^::: (\S+)", "\n".join(texts), re.MULTILINE)


def _table(file: File) -> list[str]:
    keys = file.settings()
    if not keys:
        return ["No keys.", ""]
    rows = [
        f"| `{key.name}` | {_code(key.default)} | {_code(key.type)} | {_cell(_text(key.meaning))} |"
        for key in keys
    ]
    return ["| key | value | type | meaning |", "|---|---|---|---|", *rows, ""]


def _code(text: str) -> str:
    return f"`{text}`" if text else ""  # a | in code does not end a cell


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _text(comment: str) -> str:
    """A comment as Markdown: outside of code, nothing in it is markup."""
    parts = re.split(r"(`[^`]*`|\n\n    .*)", comment, flags=re.DOTALL)
    return "".join(
        part if i % 2 else re.sub(r"[<*_\[]", r"\\\g<0>", part) for i, part in enumerate(parts)
    )
