"""A real GPU: device memory in one allocation of CuPy's, copies by its DMA engines.

The only file that imports CuPy; what of it needs no GPU is in devices/cupy_plan.py, and docs/gpu.md
says how to run it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from devices.cupy_plan import UNDER_WAY, copy_runs, staging_blocks
from devices.dma_fence import DmaFence
from devices.driver import Driver
from devices.ops import DeviceError
from mm.array import ProcessArray
from mm.errors import InvalidArgument, NoDevice, OutOfMemory, TimedOut
from mm.locking import read_poll_timeout
from mm.machine import Machine
from mm.memparse import Size, format_size
from mm.memremap import devm_memunmap_pages
from mm.mmzone import PageStack
from mm.page_cache import set_page_dirty
from mm.typing import PAGE_SHIFT, PAGE_SIZE, Addresses, Indices, Mask, Payload, Pfns
from mm.vectors import ascending, every, places, some, stretches

try:
    import cupy
    from cupy.cuda import runtime
except ImportError as missing:
    raise ImportError(
        f"CuPy is missing ({missing}); install it with: pip install 'hmm-migrate[cupy]', or where "
        f"CUDA is 12: pip install cupy-cuda12x"
    ) from missing

_HOST_REGISTER_PORTABLE: Final = 1  # pinned for all GPUs
_pinned: dict[int, int] = {}  # address of memory that is pinned -> devices that want it so


class CudaFence(DmaFence):
    """Signals when a stream has come as far as it was when the fence was made.

    keep: buffers that the copy uses until then.
    """

    def __init__(self, what: str, stream: Any, keep: object = None) -> None:
        super().__init__(what)
        self._event = cupy.cuda.Event(disable_timing=True)
        self._event.record(stream)
        self._keep = keep

    def is_signaled(self) -> bool:
        """Ask the GPU, until it has been heard of."""
        if not self._signaled:
            try:
                done = bool(self._event.done)
            except runtime.CUDARuntimeError as error:
                self.signal(error=DeviceError(f"{self.what}: {error}"))
            else:
                if done:
                    self.signal()
        if self._signaled:
            self._keep = None
        return self._signaled

    def _sleep(self, timeout: float) -> bool:
        return read_poll_timeout(self.is_signaled, timeout)


class CupyDevice(Driver):
    """GPU number *device*, of whose memory this device has *memory* bytes.

    The machine's memory is pinned, so that the GPU reads and writes it by itself. Kernels of run()
    get CuPy arrays; where an array's pages follow one another in device memory these are views.
    Raises NoDevice where there is no driver or no GPU, OutOfMemory where memory cannot be had or
    pinned, InvalidArgument for a GPU that there is not.
    """

    engines = 2  # one for each direction

    def __init__(
        self,
        machine: Machine,
        memory: Size = "64MiB",
        kind: str = "private",
        *,
        device: int | str = 0,
        name: str | None = None,
        chunk: Size | None = None,
        neighbours: Size = PAGE_SIZE,
    ) -> None:
        self._gpu = open_gpu(device)
        name = name or f"cupy{self.count(machine)}"
        super().__init__(machine, memory, kind, name=name, chunk=chunk, neighbours=neighbours)
        self._free = PageStack(self.npages)
        self._free.push(np.arange(self.npages)[::-1])
        if machine.mem.payload is not None:
            try:
                self._take_memory(machine.mem.payload[: machine.mem.max_pfn])
            except BaseException:
                devm_memunmap_pages(self.mem, self.zone)
                raise

    def _take_memory(self, system: Payload) -> None:
        """The device's memory, its streams, and *system* pinned."""
        nbytes = self.npages << PAGE_SHIFT
        with self._gpu:
            try:
                block = cupy.cuda.Memory(nbytes)
            except (cupy.cuda.memory.OutOfMemoryError, runtime.CUDARuntimeError) as error:
                free, total = runtime.memGetInfo()
                raise OutOfMemory(
                    f"{self.name}: wanted {format_size(nbytes)} of device memory, "
                    f"{format_size(free)} of {format_size(total)} are free; open it with a smaller "
                    f"memory="
                ) from error
            pointer = cupy.cuda.MemoryPointer(block, 0)
            vram: Any = cupy.ndarray((self.npages, PAGE_SIZE), dtype=np.uint8, memptr=pointer)
            self._in = cupy.cuda.Stream(non_blocking=True)
            self._out = cupy.cuda.Stream(non_blocking=True)
            self._unpin = weakref.finalize(self, pin_memory(self.name, system))
        self.memory = vram
        self._words: Any = vram.view(np.uint64)  # a thread of a kernel moves eight bytes

    def allocate(self, npages: int) -> Indices:
        """Free pages, lowest first and in a row where they are."""
        return ascending(self._free.pop(npages)[::-1])

    def free(self, pages: Indices) -> None:
        """Those freed last are used first."""
        self._free.push(ascending(pages)[::-1])

    def copy_in(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence:
        """By DMA: a run at a time, or gathered in buffers and dealt out by a kernel."""
        what = f"{self.name}: copy_in of {pages.size} pages from PFN {rows[0]:#x} on"
        with self._cuda(what):
            runs = copy_runs(pages, rows)
            for run in runs:
                to, frm = self._at(run.page), system[run.row].ctypes.data
                runtime.memcpyAsync(to, frm, run.nbytes, runtime.memcpyHostToDevice, self._in.ptr)
            if not runs:
                return self._stage_in(what, pages, system, rows)
            return CudaFence(what, self._in, keep=system)

    def _stage_in(self, what: str, pages: Indices, system: Payload, rows: Pfns) -> DmaFence:
        """A block is gathered while the one before is on its way; the fence of the last one."""
        under_way: deque[DmaFence] = deque()
        for block in staging_blocks(pages.size):
            if len(under_way) == UNDER_WAY:
                oldest = under_way.popleft()
                try:
                    oldest.wait(self.timeout)
                except TimedOut:
                    return under_way[-1]  # the kernels that wait write to these pages some day
            host = pinned_buffer(pages[block].size)
            np.take(system, rows[block], axis=0, out=host, mode="clip")
            with self._in:
                words = cupy.empty((host.shape[0], PAGE_SIZE // 8), dtype=np.uint64)
                to, frm = words.data.ptr, host.ctypes.data
                runtime.memcpyAsync(to, frm, host.nbytes, runtime.memcpyHostToDevice, self._in.ptr)
                self._words[cupy.asarray(pages[block])] = words
            under_way.append(CudaFence(what, self._in, keep=(host, words)))
        return under_way[-1]

    def copy_out(self, pages: Indices, system: Payload, rows: Pfns) -> DmaFence | None:
        """The same way back; scattered pages are there when it returns."""
        what = f"{self.name}: copy_out of {pages.size} pages to PFN {rows[0]:#x} on"
        with self._cuda(what):
            runs = copy_runs(pages, rows)
            for run in runs:
                to, frm = system[run.row].ctypes.data, self._at(run.page)
                runtime.memcpyAsync(to, frm, run.nbytes, runtime.memcpyDeviceToHost, self._out.ptr)
            if runs:
                return CudaFence(what, self._out, keep=system)
            self._stage_out(what, pages, system, rows)
            return None

    def _stage_out(self, what: str, pages: Indices, system: Payload, rows: Pfns) -> None:
        """A block is dealt out while the next one is on its way; nobody's DMA ends in *system*."""
        under_way: deque[tuple[DmaFence, Payload, slice]] = deque()
        for block in staging_blocks(pages.size):
            host = pinned_buffer(pages[block].size)
            with self._out:
                words = cupy.take(self._words, cupy.asarray(pages[block]), axis=0)
                to, frm = host.ctypes.data, words.data.ptr
                runtime.memcpyAsync(to, frm, host.nbytes, runtime.memcpyDeviceToHost, self._out.ptr)
            under_way.append((CudaFence(what, self._out, keep=(host, words)), host, block))
            if len(under_way) == UNDER_WAY:
                self._deal_out(*under_way.popleft(), system, rows)
        while under_way:
            self._deal_out(*under_way.popleft(), system, rows)

    def _deal_out(
        self, fence: DmaFence, host: Payload, block: slice, system: Payload, rows: Pfns
    ) -> None:
        fence.wait(self.timeout)
        system[rows[block]] = host

    def clear(self, pages: Indices) -> None:
        """By a kernel. What is copied in later comes after it, even if it hangs."""
        what = f"{self.name}: clear of {pages.size} pages"
        with self._cuda(what):
            with self._in:
                self._words[cupy.asarray(pages)] = 0
            CudaFence(what, self._in).wait(self.timeout)

    def power_off(self) -> None:
        """Give the memory back."""
        if self.memory is not None:
            with self._gpu:
                self._unpin()
            self.memory = self._words = None

    @contextmanager
    def _cuda(self, what: str) -> Iterator[None]:
        """Calls to this GPU; what it refuses is a DeviceError that names *what*."""
        with self._gpu:
            try:
                yield
            except (runtime.CUDARuntimeError, cupy.cuda.memory.OutOfMemoryError) as error:
                raise DeviceError(f"{what}: {error}") from error

    def _at(self, page: int) -> int:
        """Address of a page in device memory."""
        assert self.memory is not None
        return int(self._words.data.ptr) + (page << PAGE_SHIFT)

    # The device's own loads and stores, where the driver's base class expects NumPy arrays.

    def _local(self, pfns: Pfns) -> Mask:
        return (pfns >= self.zone.start_pfn) & (pfns < self.zone.end_pfn)

    def _swap_words(
        self,
        pfns: Pfns,
        addrs: Addresses,
        words: NDArray[np.uint64],
        write: Mask,
        now: Indices,
        loaded: NDArray[np.uint64],
    ) -> None:
        local = self._local(pfns)
        if not every(local):
            super()._swap_words(pfns[~local], addrs, words, write, now[~local], loaded)
        if not some(local):
            return
        which, flat = now[local], self._words.reshape(-1)
        rows = pfns[local] - self.zone.start_pfn
        at = (rows << (PAGE_SHIFT - 3)) + ((addrs[which] & (PAGE_SIZE - 1)) >> 3)
        stores = write[which]
        with self._cuda(f"{self.name}: exchange of {which.size} words"):
            loaded[which] = cupy.asnumpy(flat[cupy.asarray(at)])
            if some(stores):
                flat[cupy.asarray(at[stores])] = cupy.asarray(words[which[stores]])
        set_page_dirty(self.mem, pfns[local][stores])

    def _move_prefix(
        self,
        addr: int,
        addrs: Addresses,
        pfns: Pfns,
        move: Callable[[Payload, int, Pfns], None],
        *,
        write: bool,
    ) -> None:
        for run in stretches(pfns):
            if not self._local(pfns[run.start : run.start + 1])[0]:
                super()._move_prefix(addr, addrs[run], pfns[run], move, write=write)
                continue
            first, npages = pfns.item(run.start) - self.zone.start_pfn, run.stop - run.start
            there: Any = self.memory[first : first + npages]  # type: ignore[index]
            with self._cuda(f"{self.name}: access to {npages} pages"):
                here = cupy.asnumpy(there)
                move(here, max(addr, addrs.item(run.start)), np.arange(npages))
                if write:
                    there[...] = cupy.asarray(here)

    def _launch(
        self,
        kernel: Callable[..., Any],
        arrays: Sequence[ProcessArray],
        target: ProcessArray,
        used: Sequence[ProcessArray],
        addrs: Addresses,
        pfns: Pfns,
    ) -> None:
        what = f"{self.name}: run of a kernel on {addrs.size} pages"
        with self._cuda(what):
            super()._launch(kernel, arrays, target, used, addrs, pfns)
            CudaFence(what, cupy.cuda.get_current_stream()).wait(self.timeout)

    def _gather(self, pfns: Pfns) -> Payload:
        """The contents of *pfns* in a row, on the GPU: a view where they lie so, else a copy."""
        if self.mem.payload is None:
            raise InvalidArgument(f"{self.name}: this machine keeps no contents")
        local = self._local(pfns)
        rows = pfns - self.zone.start_pfn
        memory: Any = self.memory
        if self._in_a_row(pfns):
            return memory[rows.item(0) : rows.item(0) + rows.size]
        pages: Any = cupy.empty((pfns.size, PAGE_SIZE), dtype=np.uint8)
        if some(local):
            pages[cupy.asarray(places(local))] = memory[cupy.asarray(rows[local])]
        if not every(local):
            pages[cupy.asarray(places(~local))] = cupy.asarray(self.mem.payload[pfns[~local]])
        return pages

    def _scatter(self, pages: Payload, pfns: Pfns) -> None:
        if self._in_a_row(pfns):
            return
        contents: Any = pages
        local, memory = self._local(pfns), self.memory
        if some(local):
            rows = cupy.asarray(pfns[local] - self.zone.start_pfn)
            memory[rows] = contents[cupy.asarray(places(local))]  # type: ignore[index]
        if not every(local):
            assert self.mem.payload is not None
            self.mem.payload[pfns[~local]] = cupy.asnumpy(contents[cupy.asarray(places(~local))])

    def _in_a_row(self, pfns: Pfns) -> bool:
        return every(self._local(pfns)) and len(stretches(pfns)) == 1


def open_gpu(number: int | str) -> Any:
    """GPU *number* as CuPy's Device. Raises NoDevice where there is none, InvalidArgument."""
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise NoDevice(
            f"cupy: CUDA finds no usable driver or GPU ({error}); install NVIDIA's driver, so that "
            f"nvidia-smi lists a GPU, or open the device numpy"
        ) from error
    if not str(number).isdecimal() or int(number) >= count:
        raise InvalidArgument(
            f"cupy: device={number!r} is none of the {count} GPUs, which count from 0"
        )
    return cupy.cuda.Device(int(number))


def pinned_buffer(npages: int) -> Payload:
    """Host memory for *npages* that a GPU can copy from and to, from CuPy's pool."""
    pointer = cupy.cuda.alloc_pinned_memory(npages << PAGE_SHIFT)
    flat = np.frombuffer(pointer, dtype=np.uint8, count=npages << PAGE_SHIFT)
    return flat.reshape(npages, PAGE_SIZE)


def pin_memory(name: str, system: Payload) -> Callable[[], None]:
    """Have *system* stay where it is, for *name*; what undoes it when no device wants it any more.

    Raises OutOfMemory where the host refuses.
    """
    address = system.ctypes.data
    if address not in _pinned:
        try:
            runtime.hostRegister(address, system.nbytes, _HOST_REGISTER_PORTABLE)
        except runtime.CUDARuntimeError as error:
            raise OutOfMemory(
                f"{name}: {format_size(system.nbytes)} of the machine's memory cannot be pinned "
                f"({error}); boot it with smaller nodes=, or allow more locked memory (ulimit -l)"
            ) from error
    _pinned[address] = _pinned.get(address, 0) + 1

    def unpin() -> None:
        _pinned[address] -= 1
        if not _pinned[address]:
            del _pinned[address]
            runtime.hostUnregister(system.ctypes.data)

    return unpin
