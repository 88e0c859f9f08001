"""A CuPy without a GPU, for what devices/cupy_device.py does with one.

Arrays refuse to become NumPy arrays by themselves, as CuPy's do. Asynchronous copies happen when
somebody asks the event behind them for the second time, and not before.
"""

import ctypes
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import ClassVar

import numpy as np

MEMORY = 64 << 20  # of the GPU
GPUS = 2


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class Array:
    """cupy.ndarray, as far as it is used."""

    def __init__(self, shape, dtype=float, memptr=None):
        self.host = memptr.memory.host.view(dtype).reshape(shape)

    @classmethod
    def of(cls, host):
        array = cls.__new__(cls)
        array.host = host
        return array

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getitem__(self, key):
        _current().drain()
        return Array.of(self.host[_key(key)])

    def __setitem__(self, key, value):
        _current().drain()
        assert isinstance(value, (Array, int, float)), "only a CuPy array may be stored"
        self.host[_key(key)] = value.host if isinstance(value, Array) else value

    def __mul__(self, other):
        return Array.of(self.host * other)

    def __add__(self, other):
        return Array.of(self.host + other.host)

    def view(self, dtype):
        return Array.of(self.host.view(dtype))

    def reshape(self, *shape):
        found = self.host.reshape(*shape)
        assert np.shares_memory(found, self.host)
        return Array.of(found)

    @property
    def shape(self):
        return self.host.shape

    @property
    def data(self):
        return _Pointer(self.host.ctypes.data)


class _Pointer:
    def __init__(self, ptr):
        self.ptr = ptr


def _key(key):
    assert isinstance(key, (Array, slice, int, type(...))), "indices are CuPy arrays"
    return key.host if isinstance(key, Array) else key


class Stream:
    """Copies that nobody has waited for are in `pending`."""

    by_ptr: ClassVar = {}
    stack: ClassVar = []

    def __init__(self, non_blocking=False):
        self.pending = []
        self.ptr = id(self)
        Stream.by_ptr[self.ptr] = self

    def __enter__(self):
        Stream.stack.append(self)

    def __exit__(self, *exc):
        Stream.stack.pop()

    def drain(self, upto=None):
        while self.pending and (upto is None or upto in self.pending):
            self.pending.pop(0)()


NULL = Stream()


def _current():
    return Stream.stack[-1] if Stream.stack else NULL


class Event:
    hang = False  # no event is ever done
    fail = False  # or the GPU says that it is broken

    def __init__(self, disable_timing=False):
        self.looks = 0

    def record(self, stream):
        self.stream, self.mark = stream, lambda: None
        stream.pending.append(self.mark)

    @property
    def done(self):
        if Event.fail:
            raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access")
        self.looks += 1
        if self.looks > 1 and not Event.hang:
            self.stream.drain(self.mark)
        return self.mark not in self.stream.pending


class Device:
    def __init__(self, number):
        self.id = number

    def __enter__(self):
        pass

    def __exit__(self, *exc):
        pass


class Memory:
    used = 0

    def __init__(self, nbytes):
        if Memory.used + nbytes > MEMORY:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.host = np.full(nbytes, 0xA5, dtype=np.uint8)
        self.nbytes = nbytes
        Memory.used += nbytes

    def __del__(self):
        Memory.used -= getattr(self, "nbytes", 0)


class MemoryPointer:
    def __init__(self, memory, offset):
        self.memory = memory


class Runtime(ModuleType):
    """cupy.cuda.runtime; `gpus` may be a number, or an error to raise."""

    CUDARuntimeError = CUDARuntimeError
    gpus = GPUS
    refuses_to_pin = False
    copies = 0

    def __init__(self, name):
        super().__init__(name)
        self.memcpyHostToDevice, self.memcpyDeviceToHost = 1, 2
        self.registered = {}

    def getDeviceCount(self):  # noqa: N802 - CuPy's name
        if isinstance(self.gpus, Exception):
            raise self.gpus
        return self.gpus

    def memGetInfo(self):  # noqa: N802
        return MEMORY - Memory.used, MEMORY

    def hostRegister(self, ptr, size, flags):  # noqa: N802
        if self.refuses_to_pin or ptr in self.registered:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.registered[ptr] = size

    def hostUnregister(self, ptr):  # noqa: N802
        del self.registered[ptr]

    def memcpyAsync(self, dst, src, size, kind, stream):  # noqa: N802
        self.copies += 1
        Stream.by_ptr[stream].pending.append(lambda: ctypes.memmove(dst, src, size))


def modules():
    """What goes into sys.modules."""
    cupy, cuda, runtime = ModuleType("cupy"), ModuleType("cupy.cuda"), Runtime("runtime")
    memory = ModuleType("memory")
    memory.OutOfMemoryError = OutOfMemoryError
    cuda.memory, cuda.runtime, cuda.Memory, cuda.MemoryPointer = (
        memory,
        runtime,
        Memory,
        MemoryPointer,
    )
    cuda.Stream, cuda.Event, cuda.Device = Stream, Event, Device
    cuda.get_current_stream = _current
    cuda.alloc_pinned_memory = lambda nbytes: bytearray(nbytes + 4096)  # pools round up
    cupy.cuda, cupy.ndarray = cuda, Array
    cupy.empty = lambda shape, dtype=float: Array.of(np.full(shape, 0x5A, dtype=dtype))
    cupy.asarray = lambda host: Array.of(np.array(host))
    cupy.asnumpy = lambda array: array.host.copy()
    cupy.take = lambda array, index, axis: array[index]
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime}


@contextmanager
def installed():
    """The module devices.cupy_device with this CuPy under it."""
    fakes = modules()
    before = {name: sys.modules.pop(name, None) for name in [*fakes, "devices.cupy_device"]}
    sys.modules.update(fakes)
    try:
        from devices import cupy_device  # noqa: PLC0415 - only now can it be imported

        yield cupy_device
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        Event.hang = Event.fail = False
        if hasattr(sys.modules["devices"], "cupy_device"):
            del sys.modules["devices"].cupy_device
