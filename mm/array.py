"""A NumPy-like array whose elements are memory of a process; every access may fault.

What is read comes back as an ordinary array, a copy. An assignment stores through the page
tables. `np.asarray(a)` reads all of it.
"""

from __future__ import annotations

from math import prod
from types import EllipsisType, NoneType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from mm.sched import IDLE, Task, running
from mm.types import MmStruct
from mm.typing import Addresses
from mm.uaccess import copy_from_user, copy_to_user, gather_from_user, scatter_to_user

_BASIC: Final = (int, np.integer, slice, EllipsisType, NoneType)


class ProcessArray:
    """*shape* elements of *dtype* at *addr* of an address space, in C order."""

    def __init__(
        self,
        mm: MmStruct,
        addr: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        task: Task = IDLE,
    ) -> None:
        self.mm = mm
        self.addr: Final = addr
        self.shape: Final = shape
        self.dtype: Final = dtype
        self._task = task

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<ProcessArray {self.shape} {self.dtype} at {self.addr:#x} of {self.mm.name}>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("memory of a process can only be copied out")
        return np.asarray(self[...], dtype=dtype)

    def __getitem__(self, key: Any) -> Any:
        """The elements that *key* selects, as `numpy.ndarray.__getitem__` would."""
        chosen = self._select(key)
        raw = np.empty(prod(chosen.shape) * self.dtype.itemsize, dtype=np.uint8)
        with running(self._task):
            if chosen.contiguous:
                copy_from_user(self.mm, chosen.start, raw)
            else:
                raw = gather_from_user(self.mm, chosen.byte_addresses(self.dtype))
        elements = raw.view(self.dtype).reshape(chosen.shape)
        return elements if chosen.shape else elements[()]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Store *value*, cast and broadcast, as `numpy.ndarray.__setitem__` would."""
        chosen = self._select(key)
        elements = np.empty(chosen.shape, dtype=self.dtype)
        elements[...] = value
        raw = elements.reshape(-1).view(np.uint8)
        with running(self._task):
            if chosen.contiguous:
                copy_to_user(self.mm, chosen.start, raw)
            else:
                scatter_to_user(self.mm, chosen.byte_addresses(self.dtype), raw)

    def _select(self, key: Any) -> _Selection:
        """What *key* selects, by letting NumPy index an array of the same layout."""
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, _BASIC) and not isinstance(part, bool) for part in parts):
            numbers = np.arange(self.size).reshape(self.shape)[key]
            addrs = self.addr + np.asarray(numbers) * self.dtype.itemsize
            return _Selection(self.addr, addrs.shape, contiguous=False, addrs=addrs)
        # No element of this array is ever looked at: its memory ends after the first.
        strides = [prod(self.shape[i + 1 :]) * self.dtype.itemsize for i in range(len(self.shape))]
        layout = as_strided(np.empty(1, dtype=self.dtype), self.shape, strides)
        view = layout[parts if Ellipsis in parts else (*parts, Ellipsis)]
        origin = layout.__array_interface__["data"][0]
        start = self.addr + view.__array_interface__["data"][0] - origin
        if view.flags.c_contiguous:
            return _Selection(start, view.shape, contiguous=True, addrs=None)
        addrs = np.full(view.shape, start, dtype=np.int64)
        for axis, (extent, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
            steps = np.arange(extent, dtype=np.int64) * stride
            addrs += steps.reshape((-1,) + (1,) * (view.ndim - axis - 1))
        return _Selection(start, view.shape, contiguous=False, addrs=addrs)


class _Selection(NamedTuple):
    """Elements of an array: one stretch from *start*, or one address each."""

    start: int
    shape: tuple[int, ...]
    contiguous: bool
    addrs: Addresses | None

    def byte_addresses(self, dtype: np.dtype[Any]) -> Addresses:
        """The address of every byte of every element, in order."""
        assert self.addrs is not None
        return (self.addrs.reshape(-1, 1) + np.arange(dtype.itemsize)).reshape(-1)
