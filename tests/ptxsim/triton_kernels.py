"""Kernels whose PTX comes from Triton's code generator, compiled for sm_90a without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl
from simulator import Simulator
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass
class Compiled:
    ptx: str
    name: str
    threads: int
    shared: int
    num_params: int
    scratch: int

    def launch(self, sim: Simulator, *args, grid=1) -> None:
        """Runs on numpy arrays; the scratch buffers that Triton appends are made here."""
        kernel = sim.load(self.ptx, self.name)
        rest = [np.uint64(0)] * (self.num_params - len(args))
        if self.scratch and rest:
            programs = grid if isinstance(grid, int) else int(np.prod(grid))
            rest[0] = np.zeros(self.scratch * programs + 128, np.uint8)
            shift = -rest[0].ctypes.data % 128
            rest[0] = rest[0][shift : shift + self.scratch * programs]
        kernel.launch(*args, *rest, grid=grid, block=self.threads, shared=self.shared)


@functools.cache
def _compile(fn, signature: tuple, constants: tuple, warps: int, stages: int) -> Compiled:
    signature, constants = dict(signature), dict(constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(
        fn=fn, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    ptx = made.asm["ptx"]
    head = ptx[ptx.index(".entry") :]
    head = head[: head.index(")")]
    return Compiled(
        ptx,
        made.metadata.name,
        32 * made.metadata.num_warps,
        made.metadata.shared,
        head.count(".param"),
        made.metadata.global_scratch_size,
    )


def compile_kernel(fn, signature: dict, constants: dict, warps: int = 4, stages: int = 3) -> Compiled:
    return _compile(fn, tuple(signature.items()), tuple(constants.items()), warps, stages)


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def elementwise(x, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=1.0)
    if OP == "exp":
        v = tl.exp(v)
    elif OP == "log":
        v = tl.log(v)
    elif OP == "sin":
        v = tl.sin(v)
    elif OP == "sigmoid":
        v = tl.sigmoid(v)
    elif OP == "erf":
        v = tl.erf(v)
    elif OP == "sqrt":
        v = tl.sqrt_rn(v)
    elif OP == "divide":
        v = tl.div_rn(1.0, v)
    elif OP == "floor":
        v = tl.floor(v)
    tl.store(out + i, v, mask=i < n)


@triton.jit
def cast(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    v = tl.load(x + row + i, mask=i < columns, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + row + i, e / tl.sum(e, 0), mask=i < columns)


@triton.jit
def layer_norm(x, w, b, out, columns, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    v = tl.load(x + row + i, mask=i < columns, other=0.0)
    mean = tl.sum(v, 0) / columns
    d = tl.where(i < columns, v - mean, 0.0)
    r = 1 / tl.sqrt(tl.sum(d * d, 0) / columns + eps)
    tl.store(
        out + row + i, d * r * tl.load(w + i, mask=i < columns) + tl.load(b + i, mask=i < columns), mask=i < columns
    )


@triton.jit
def cumsum(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.cumsum(tl.load(x + i), 0))


@triton.jit
def sort(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.sort(tl.load(x + i)))


@triton.jit
def argmax(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.argmax(tl.load(x + tl.program_id(0) * BLOCK + i), 0))


@triton.jit
def histogram(x, out, BLOCK: tl.constexpr, BINS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.arange(0, BINS), tl.histogram(tl.load(x + i), BINS))


@triton.jit
def scatter_add(x, index, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(index + i), tl.load(x + i))


@triton.jit
def transpose(x, out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(out + c[:, None] * R + r[None, :], tl.trans(v))


@triton.jit
def random(out, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.randint(seed, i))


@triton.jit
def divide_int(x, y, q, r, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(q + i, a // b)
    tl.store(r + i, a % b)


@triton.jit
def ticket(counter, lock, total, BLOCK: tl.constexpr):
    """Every program takes the lock: needs forward progress among CTAs."""
    t = tl.atomic_add(counter, 1)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    i = tl.arange(0, BLOCK)
    tl.store(total + i, tl.load(total + i) + t)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """a [M, K], b [N, K], c [M, N], all row-major. Rows past the end are never loaded: they hold anything."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=c.dtype.element_ty)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None])
        y = tl.load(b + n[None, :] * K + k[:, None], mask=(n < N)[None, :])
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_int8(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        acc += tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + n[None, :] * K + k[:, None]))
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def matmul_nk(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """b [K, N] row-major: the transposed operand of wgmma."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0)
        y = tl.load(b + k[:, None] * N + n[None, :], mask=(n < N)[None, :], other=0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_tma(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Device-made tensor descriptors: TMA loads and a TMA store."""
    da = tl.make_tensor_descriptor(a, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    db = tl.make_tensor_descriptor(b, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    dc = tl.make_tensor_descriptor(c, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(da.load([m, k]), db.load([n, k]).T, acc)
    dc.store([m, n], acc.to(c.dtype.element_ty))


@triton.jit
def attention(q, k, v, out, S, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    m, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    x = tl.load(q + m[:, None] * D + d[None, :], mask=(m < S)[:, None], other=0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for n0 in range(0, S, BN):
        n = n0 + tl.arange(0, BN)
        s = tl.dot(x, tl.load(k + n[None, :] * D + d[:, None], mask=(n < S)[None, :], other=0)) * scale
        s = tl.where((n < S)[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(
            p.to(v.dtype.element_ty), tl.load(v + n[:, None] * D + d[None, :], mask=(n < S)[:, None], other=0), acc
        )
        top = new
    tl.store(out + m[:, None] * D + d[None, :], acc / total[:, None], mask=(m < S)[:, None])
