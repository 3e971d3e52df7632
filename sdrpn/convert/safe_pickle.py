"""Read pickles of plain values and numpy arrays without executing code.

A pickle can call any function of any module. Only the few that numpy arrays are pickled with are
allowed here, and each is replaced by a stand-in that validates its arguments, since numpy's own
functions trust theirs.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DTYPE_KINDS = "biuf"
"""Allowed dtype kinds: booleans, integers, floats."""

PLAIN_TYPES = (str, bytes, bytearray, int, float, type(None), np.ndarray, np.generic)
"""Allowed types of values, beside lists, tuples, sets and dicts of them."""


class Refused(ValueError):
    """A pickle that needs more than plain values and arrays."""


class _DType:
    """Stand-in for numpy.dtype: kind and size of a number, such as f4, and its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        try:
            self.dtype = np.dtype(code) if isinstance(code, str) else None
        except TypeError:
            self.dtype = None
        if self.dtype is None or self.dtype.kind not in DTYPE_KINDS:
            raise Refused(f"an array of {code!r}, which are not plain numbers")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise Refused("a number type in an unknown format")
        assert self.dtype is not None
        self.dtype = self.dtype.newbyteorder(state[1])  # "|" leaves it as it is


class _Array:
    """Stand-in for a numpy array until its state is set."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("an array in an unknown format")
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, bool(fortran))


def _array(data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    valid = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or not valid:
        raise Refused("an array in an unknown format")
    assert dtype.dtype is not None
    if len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise Refused(f"an array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray:
    return _array(data, dtype, shape, order == "F")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return _array(data, dtype, (), fortran=False)[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """Decode bytes as written by protocols below 3."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text in an unusual encoding")
    return text.encode("latin1")


def _ndarray(*_: Any) -> Any:
    raise Refused("an array in an unknown format")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    # `core` in numpy 1, `_core` in numpy 2.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        hint = ""
        if module.split(".")[0] == "torch":
            hint = "; save its torch tensors as numpy arrays"
        raise Refused(f"{module}.{name}, which is not allowed in a pickle of plain arrays{hint}")


def load(path: Path) -> Any:
    """Load a pickle of numbers, text, lists, tuples, sets, dicts and numpy arrays.

    Raises:
        ValueError: If the file is damaged, too large for memory, or needs anything else.
    """
    with open(path, "rb") as file:
        try:
            return _finished(_Unpickler(file).load(), {})
        except Refused as error:
            raise ValueError(f"{path} is refused: it contains {error}") from None
        except MemoryError:
            raise ValueError(f"{path} does not fit into memory") from None
        except Exception as error:  # a damaged pickle can raise any type
            problem = str(error) or type(error).__name__
            raise ValueError(f"{path} cannot be read as a pickle: {problem}") from None


def _finished(value: Any, seen: dict[int, Any]) -> Any:
    """Replace stand-ins by their arrays in nested containers; shared objects stay shared."""
    if id(value) not in seen:
        seen[id(value)] = _unwrapped(value, seen)
    return seen[id(value)]


def _unwrapped(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        if value.array is None:
            raise Refused("an array in an unknown format")
        return value.array
    if isinstance(value, dict):
        return {_finished(k, seen): _finished(v, seen) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_finished(v, seen) for v in value)
    if not isinstance(value, PLAIN_TYPES):
        raise Refused(f"a {type(value).__name__}, which is not a plain value")
    return value
