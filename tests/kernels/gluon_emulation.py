"""Run a Gluon kernel for Hopper on a CPU: its Python source, with threads for the groups of warps.

What is asynchronous on a GPU is so here, and late: a copy clears its destination at once and fills it after a random
delay, and a product reads shared memory when it is waited for and must find what lay there when it was started.
Barriers keep phases, arrivals and bytes. A wait that does not end is an error.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace

import torch
from triton.language import constexpr
from triton.runtime.jit import JITFunction

PATIENCE = 5.0
MAX_DELAY = 0.002


class Value(torch.Tensor):
    """A tensor of a kernel, with a layout."""

    type = SimpleNamespace(layout=None)


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, tensor: torch.Tensor, offset=0) -> None:
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def __sub__(self, offset) -> Pointer:
        return Pointer(self.tensor, self.offset - offset)

    def at(self, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = self.tensor.as_strided((self.tensor.untyped_storage().size() // self.tensor.element_size(),), (1,), 0)
        at, mask = torch.broadcast_tensors(value(self.offset).long(), value(True if mask is None else mask))
        return flat, at, mask


def load(pointer: Pointer, mask=None, other=0) -> Value:
    flat, at, mask = pointer.at(mask)
    return value(torch.where(mask, flat[torch.where(mask, at, 0)], torch.tensor(other, dtype=flat.dtype)))


def store(pointer: Pointer, x, mask=None) -> None:
    flat, at, mask = pointer.at(mask)
    flat[at[mask]] = torch.broadcast_to(x, at.shape)[mask].to(flat.dtype)


class Barrier:
    def __init__(self) -> None:
        self.changed, self.phase, self.count, self.pending, self.bytes = threading.Condition(), 0, 0, 0, 0

    def update(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            if self.pending < 0:
                raise RuntimeError("a barrier got more arrivals than its count")
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def wait(self, parity) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != int(parity), PATIENCE):
                raise TimeoutError("a wait for a barrier does not end")


class Memory:
    """A block of shared memory, or an array of such."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i) -> Memory:
        return Memory(self.data[int(i)])

    def permute(self, order) -> Memory:
        return Memory(self.data.permute(order))

    def store(self, x) -> None:
        self.data.copy_(x)

    def load(self, layout) -> Value:
        return value(self.data.clone())


class Barriers:
    def __init__(self, count: int) -> None:
        self.items = [Barrier() for _ in range(count)]

    def index(self, i) -> Barrier:
        return self.items[int(i)]


class Descriptor:
    """Tiles of a matrix, zero outside."""

    def __init__(self, matrix: torch.Tensor, block: list[int]) -> None:
        self.matrix, self.block, self.dtype, self.layout = matrix, block, matrix.dtype, None
        self.block_type = SimpleNamespace(nbytes=block[0] * block[1] * matrix.element_size())

    def copy(self, corner: list, barrier: Barrier, memory: Memory) -> None:
        memory.data.fill_(float("nan"))
        row, column = (int(x) for x in corner)

        def finish() -> None:
            time.sleep(random.random() * MAX_DELAY)
            part = self.matrix[row : row + self.block[0], column : column + self.block[1]]
            memory.data.zero_()
            memory.data[: part.shape[0], : part.shape[1]] = part
            barrier.update(0, -self.block_type.nbytes)

        threading.Thread(target=finish).start()


class Product:
    """A product of matrices that was started."""

    def __init__(self, a, b: Memory, acc, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.seen = [x.data.clone() for x in (a, b) if isinstance(x, Memory)]
        self.result = None

    def finish(self) -> None:
        found = [x.data for x in (self.a, self.b) if isinstance(x, Memory)]
        if not all(torch.equal(x, y) for x, y in zip(found, self.seen, strict=True)):
            raise RuntimeError("shared memory changed while a product read it, or was read before it was filled")
        a = self.a.data if isinstance(self.a, Memory) else self.a
        product = a.float() @ self.b.data.float()
        self.result = value(product + self.acc if self.use_acc else product)


class Thread(threading.local):
    def __init__(self) -> None:
        self.products: list[Product] = []


_thread = Thread()


def warpgroup_mma(a, b: Memory, acc, *, use_acc: bool = True, is_async: bool = False):
    product = Product(a, b, acc, use_acc)
    _thread.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps=()):
    while len(_thread.products) > num_outstanding:
        _thread.products.pop(0).finish()
    if any(x.result is None for x in deps):
        raise RuntimeError("the result of a product is read before it has ended")
    results = tuple(x.result for x in deps)
    return results[0] if len(results) == 1 else results


def warp_specialize(functions: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
    errors = []

    def run(function: Callable, args: tuple) -> None:
        try:
            function(*args)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=part) for part in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _language(program: int, programs: int) -> SimpleNamespace:
    def allocate(dtype, shape: list[int], layout):
        return Barriers(shape[0]) if dtype == torch.int64 else Memory(torch.full(shape, float("nan"), dtype=dtype))

    def of_pair(function: Callable) -> Callable:
        return lambda a, b: value(function(torch.as_tensor(a), torch.as_tensor(b)))

    def layout(*args, **kwargs) -> None:
        return None

    return SimpleNamespace(
        program_id=lambda axis: program, num_programs=lambda axis: programs, load=load, store=store,
        where=lambda c, a, b: value(torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b))),
        arange=lambda a, b, layout=None: value(torch.arange(a, b)), maximum=of_pair(torch.maximum),
        minimum=of_pair(torch.minimum), max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2, log2=torch.log2, full=lambda shape, x, dtype, layout: value(torch.full(shape, x, dtype=dtype)),
        zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)), convert_layout=lambda x, layout: x,
        allocate_shared_memory=allocate, static_range=range, warp_specialize=warp_specialize, constexpr=lambda x: x,
        NVMMASharedLayout=SimpleNamespace(get_default_for=layout), NVMMADistributedLayout=layout,
        DotOperandLayout=layout, SliceLayout=layout, BlockedLayout=layout, int32=torch.int32, int64=torch.int64,
        float32=torch.float32,
    )  # fmt: skip


def emulate(kernel: JITFunction, module: ModuleType, program: int, programs: int, args: tuple, kwargs: dict) -> None:
    """Run one program of a kernel of `module`; tensors are pointers, descriptors such of this file."""
    language = _language(program, programs)
    shim = dict(
        gl=language, tl=language, warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
        fence_async_shared=lambda: None, _copy_tile=Descriptor.copy,
        mbarrier=SimpleNamespace(
            wait=Barrier.wait, arrive=lambda barrier, count: barrier.update(count, 0),
            expect=lambda barrier, size: barrier.update(1, size), init=Barrier.init, MBarrierLayout=lambda: None,
        ),
    )  # fmt: skip

    def plain(function: FunctionType) -> FunctionType:
        names = {
            name: x.value if isinstance(x, constexpr) else plain(x.fn) if isinstance(x, JITFunction) else x
            for name, x in function.__globals__.items()
            if name in function.__code__.co_names
        }
        return FunctionType(function.__code__, {**names, **shim, "__builtins__": __builtins__}, function.__name__)

    def passed(x):
        if isinstance(x, torch.Tensor):
            return Pointer(x, x.storage_offset())
        return value(torch.tensor(x, dtype=torch.int32)) if isinstance(x, int) else x

    run = plain(kernel.fn)
    run(*(passed(x) for x in args), **kwargs)
