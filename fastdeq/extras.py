"""The error for a package that an extra of fastdeq installs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_EXTRAS = {
    "PIL": "images",
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "hydra_plugins.hydra_optuna_sweeper": "optuna",
    "hydra_plugins.hydra_submitit_launcher": "cluster",
    "matplotlib": "plots",
    "safetensors": "safetensors",
    "submitit": "cluster",
    "tensorboard": "tensorboard",
    "torchdiffeq": "ode",
    "wandb": "wandb",
}
"""Packages with an extra of their own; the extra `experiment` installs all others."""


class MissingExtra(ImportError):
    """A package is not installed; the message names the extra of fastdeq that installs it.

    what: what needs the package, as the message says it. package: its name in Python.
    extras: all that `what` needs; none: the extra of the package.
    """

    def __init__(self, what: str, package: str, *extras: str) -> None:
        text = install(*(extras or (_EXTRAS.get(package, "experiment"),)))
        # With a name, `python -m fastdeq.data` prints one line instead of a traceback.
        super().__init__(f"{what} needs {package}: {text}", name=what)
        self.package = package


@contextmanager
def extra_for(what: str, *extras: str) -> Iterator[None]:
    """Within, MissingExtra is raised for an import of a package that is not installed."""
    try:
        yield
    except MissingExtra as error:
        raise MissingExtra(what, error.package, *extras) from None
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("fastdeq", "torch"):
            raise
        raise MissingExtra(what, package, *extras) from None


def require(what: str, package: str) -> None:
    """Raises: MissingExtra if the package is not installed."""
    if not is_installed(package):
        raise MissingExtra(what, package)


def is_installed(package: str) -> bool:
    """Whether a package or one of its modules can be imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that contains it
        return False


def install(*extras: str) -> str:
    """The command that installs extras: beside an installed fastdeq, else from the checkout, since
    fastdeq is not on a package index.
    """
    installed = any(any(Path(folder).glob("fastdeq-*.dist-info")) for folder in sys.path)
    return f'pip install "{"fastdeq" if installed else "."}[{",".join(extras)}]"'
