"""The message for a package that an extra of fastdeq installs."""

OF_PACKAGE = {"safetensors": "safetensors", "PIL": "images", "torchdiffeq": "ode"}
"""Packages that have an extra of their own."""


def missing_package(what: str, error: ModuleNotFoundError, extra: str) -> str | None:
    """The message for `what`, which needs a package that is not installed, with the extra that
    installs it; None if the missing module is one of fastdeq itself.

    extra: that of all packages but those of `OF_PACKAGE`.
    """
    package = str(error.name).partition(".")[0]
    if package == "fastdeq":
        return None
    extra = OF_PACKAGE.get(package, extra)
    cure = f"install fastdeq with its extra {extra!r}, as the README describes"
    return f"{what} needs {package}: {cure}"
