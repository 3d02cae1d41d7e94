"""Pickles of arrays, read without running what else they may name.

A pickle is a program, which may call whatever it names. The reader finds only the few names that an
array is made with, as Python 2 and every NumPy since have written them.
"""

import io
import pickle
import re
from typing import Any, final

import numpy as np

from fastdeq.data.store import one_line


class PickleRefusedError(pickle.UnpicklingError):
    """A pickle that names something which is not part of an array."""


@final
class _NumberType:
    """``numpy.dtype`` for numbers alone; an object without attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, code: str | bytes, align: object = False, copy: object = False) -> Any:
        # align and copy are 0 and 1 in old pickles, which NumPy itself warns about.
        name = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or not re.fullmatch("[<>=|]?[biuf][0-9]+", name):
            raise PickleRefusedError(f"it holds an array of {name!r}")
        return np.dtype(name, copy=True)  # the pickle sets its byte order next


@final
class _FromBuffer:
    """What protocol 5 makes contiguous arrays with, likewise without attributes."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: Any, shape: Any, order: Any) -> Any:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # wherever this NumPy keeps it
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _NumberType(),
    # How Python 3 writes bytes for Python 2. For text alone, unlike the function that it names.
    ("_codecs", "encode"): str.encode,
}


def read_pickle(content: bytes) -> Any:
    """Return what is pickled; strings of Python 2 become bytes.

    Raises ValueError, with the reason in one line, for a pickle that is damaged or that names
    anything beside NumPy arrays of numbers and plain containers.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except PickleRefusedError as error:
        raise ValueError(f"{error}, which is not part of such a file: not read") from None
    except Exception as error:  # damage makes a pickle raise anything: its documentation says so
        raise ValueError(f"not a readable pickle ({one_line(error)}): get it again") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Anything else is refused unseen, never imported.
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise PickleRefusedError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        raise PickleRefusedError("it asks for something outside of it")
