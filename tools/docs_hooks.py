"""What mkdocs calls while it builds the docs: docstrings as Markdown, and generated pages.

These are a page per group of conf/, the tables of `configuration/index.md`, CONTRIBUTING.md and
CHANGELOG.md.
"""

import sys
from pathlib import Path
from typing import Any

from griffe import Class, Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import config_reference  # noqa: E402
from tools.docstrings import as_markdown  # noqa: E402

_COPIED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page per configuration group into the navigation."""
    (section,) = [entry for entry in config.nav or [] if "Configuration" in entry]
    section["Configuration"] += [
        {group: config_reference.address(group)} for group in config_reference.groups()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    copied = {page: (ROOT / name).read_text(encoding="utf-8") for page, name in _COPIED.items()}
    for place, content in {**config_reference.pages(), **copied}.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the table of groups."""
    return markdown.replace("<!-- groups -->", config_reference.overview())


class Docstrings(Extension):
    """An extension of griffe, which reads the docstrings for mkdocstrings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Leave out what `__init__` sets and nobody documents: its arguments are shown."""
        for name, member in list(cls.members.items()):
            own = member.is_attribute and "class-attribute" not in member.labels
            if (own or name == "extra_repr") and member.docstring is None:
                del cls.members[name]
