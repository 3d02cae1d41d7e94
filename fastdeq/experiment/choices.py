"""Overrides that choose files of the configuration's groups."""

import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from fastdeq.commands import CONF
from fastdeq.experiment.keys import KEYS


def with_merged_groups(arguments: Sequence[str]) -> list[str]:
    """`scheduler={...}` as `+scheduler={...}`: Hydra then adds keys that the chosen file lacks."""
    mapping = re.compile(rf"({'|'.join(KEYS)})=\{{")
    return [f"+{word}" if mapping.match(word) else word for word in arguments]


def check_choices(arguments: Sequence[str]) -> None:
    """Raises: TypeError for a group whose choice is not a name, which Hydra refuses without the
    key; what else is wrong with the arguments is left to Hydra.
    """
    parser = OverridesParser.create()
    for word in arguments:
        try:
            override = parser.parse_override(word)
        except HydraException:  # no override, such as -m, or one that cannot be read
            continue
        group = override.key_or_group
        names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        for value in _values(override) if names else ():
            if not isinstance(value, str | dict):  # a mapping is merged into the group
                raise TypeError(f"{group} is {value!r}, but must be one of {', '.join(names)}")


def _values(override: Override) -> Iterable[object]:
    """The values of all jobs; a list chooses several files."""
    if override.is_delete():
        return ()
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return value.list
    return value if isinstance(value, list) else (value,)
