"""mla_absorb against float64, element by element, on both halves of kv_b as they lie; its kernels in the simulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from checks import close, compiles, opcheck, roundoff, same_bits
from simulated import SCHEDULES, counters, coverage, launches, needs_simulator, schedule
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels.mla import _cuda

OP = "mla_absorb"
NAN = torch.nan
CPU = torch.device("cpu")
TILES = ("64x64", "64x128", "128x128")
KERNELS = [f"mla_absorb_{tile}_{layout}" for tile in TILES for layout in "kn"]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory, outputs among it, is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(heads: int, columns: int, depth: int, layout: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[H, N, K]` in a stack of matrices whose other rows are NaN; K is contiguous in layout "k", N in "n"."""
    rows, width = (columns, depth) if layout == "k" else (depth, columns)
    stack = torch.full((heads, rows + 16, width), NAN, dtype=dtype)
    half = stack[:, 8 : 8 + rows]
    half.copy_(torch.randn(half.shape))
    return half if layout == "k" else half.mT


def rows(tokens: int, heads: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[T, H, K]`, the first part of wider rows that are otherwise NaN."""
    x = torch.full((tokens, heads, depth + 64), NAN, dtype=dtype)[..., :depth]
    return x.copy_(torch.randn(x.shape))


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its strides, NaN between its rows; on the CPU itself."""
    if device.type == "cpu":
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.full((span,), NAN, dtype=x.dtype, device=device).as_strided(x.shape, x.stride()).copy_(x)


THREE_TF32 = 2.0**-20  # error of a product of float32 numbers that Triton makes of three of TF32


def check(x: Tensor, weight: Tensor, device: torch.device = CPU, extra: float = 0.0) -> Tensor:
    """The op into fresh memory and into a given place: float64's numbers, the same bits, and nothing else touched."""
    (tokens, heads, depth), columns = x.shape, weight.shape[1]
    wanted = torch.einsum("thk,hnk->thn", x.double(), weight.double())
    size = torch.einsum("thk,hnk->thn", x.double().abs(), weight.double().abs())
    sums = 0.0 if x.dtype == torch.float64 else depth * 2.0**-24 + extra
    bound = size * (sums + depth * 2.0**-53) + wanted.abs() * roundoff(x.dtype)
    x, weight = moved(x, device), moved(weight, device)
    got = dk.mla_absorb(x, weight)
    assert got.is_contiguous() and got.dtype == x.dtype
    close(got, wanted, bound)
    around = torch.full((tokens + 2, heads, columns + 64), NAN, dtype=x.dtype, device=device)
    out = around[1:-1, :, :columns]
    assert dk.mla_absorb(x, weight, out=out) is out
    assert same_bits(out.contiguous(), got)
    out.fill_(NAN)
    assert around.isnan().all(), "wrote outside the given place"
    return got.cpu()


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(("columns", "depth", "layout"), [(512, 128, "n"), (128, 512, "k")], ids=["uk", "uv"])
def test_the_model_s_halves(backend, device, tokens, heads, columns, depth, layout):
    check(rows(tokens, heads, depth), weights(heads, columns, depth, layout), device)


@pytest.mark.parametrize(("columns", "depth"), [(8, 8), (24, 72), (200, 136), (136, 1160), (64, 64)])
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("layout", ["k", "n"])
def test_other_sizes(backend, device, tokens, columns, depth, layout):
    check(rows(tokens, 2, depth), weights(2, columns, depth, layout), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["k", "n"])
@pytest.mark.parametrize(("tokens", "columns", "depth"), [(3, 5, 7), (4, 1, 1), (70, 33, 40)])
def test_other_dtypes_and_toy_widths(device, dtype, layout, tokens, columns, depth):
    extra = THREE_TF32 if device.type == "cuda" and dtype == torch.float32 else 0.0
    check(rows(tokens, 3, depth, dtype), weights(3, columns, depth, layout, dtype), device, extra)


@needs_simulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["k", "n"])
@pytest.mark.parametrize(("tokens", "columns", "depth"), [(3, 40, 24), (70, 33, 130)])
def test_other_dtypes_in_triton(dtype, layout, tokens, columns, depth):
    before = dk.launch_counts()["triton_mla_absorb"]
    with dk.backend("sim:triton"):
        check(rows(tokens, 3, depth, dtype), weights(3, columns, depth, layout, dtype), extra=THREE_TF32)
    assert dk.launch_counts()["triton_mla_absorb"] == before + 2


def test_no_tokens(device):
    for backend in ("eager", "sim:cuda", "sim:triton"):
        with dk.backend(backend if device.type == "cpu" else None):
            assert dk.mla_absorb(rows(0, 3, 128).to(device), weights(3, 512, 128, "n").to(device)).shape == (0, 3, 512)
            none = rows(4, 3, 128).to(device)[:, :0], weights(3, 512, 128, "n").to(device)[:0]
            assert dk.mla_absorb(*none).shape == (4, 0, 512)
    with dk.backend("eager"):
        assert (dk.mla_absorb(rows(2, 3, 0), weights(3, 8, 0, "k")) == 0).all()


def test_nan_and_infinity_stay_in_their_place(backend, device):
    x, weight = rows(70, 3, 128), weights(3, 512, 128, "n")
    x[3, 1, 7], x[69, 2, 0], weight[0, 300, 5] = NAN, torch.inf, NAN
    got = dk.mla_absorb(moved(x, device), moved(weight, device)).cpu()
    bad = torch.zeros(got.shape, dtype=torch.bool)
    bad[3, 1], bad[69, 2], bad[:, 0, 300] = True, True, True
    assert torch.equal(~got.isfinite(), bad)


def run(x: Tensor, weight: Tensor, kernel: str, out: Tensor | None = None) -> Tensor:
    """One launch of this very kernel."""
    out = torch.full((*x.shape[:2], weight.shape[1]), NAN, dtype=x.dtype) if out is None else out
    with launches(kernel):
        _cuda.mla_absorb(x, weight, out)
    return out


# The simulator has as many multiprocessors as an H100: 132.
CHOICES = [
    ("64x64", 64, 16, 512, 128),
    ("64x128", 1, 17, 512, 128),
    ("64x64", 64, 132, 64, 64),
    ("64x128", 1, 133, 64, 64),
    ("128x128", 65, 1, 128, 512),
]


@needs_simulator
@pytest.mark.parametrize("layout", ["k", "n"])
@pytest.mark.parametrize(("tile", "tokens", "heads", "columns", "depth"), CHOICES)
def test_tiles_follow_from_the_sizes(layout, tile, tokens, heads, columns, depth):
    x, weight = rows(tokens, heads, depth), weights(heads, columns, depth, layout)
    got = run(x, weight, f"mla_absorb_{tile}_{layout}")
    assert got.isfinite().all()


@needs_simulator
@pytest.mark.parametrize("layout", ["k", "n"])
def test_a_row_does_not_depend_on_its_neighbours(layout):
    """Other tokens, heads and columns, and other tiles: the same bits."""
    x, weight = rows(130, 40, 192), weights(40, 256, 192, layout)
    many = run(x, weight, f"mla_absorb_128x128_{layout}")
    assert same_bits(many, run(x, weight, f"mla_absorb_128x128_{layout}"))
    few = run(x[127:], weight, f"mla_absorb_64x128_{layout}")
    one = run(x[127:, :1], weight[:1], f"mla_absorb_64x64_{layout}")
    assert same_bits(few, many[127:]) and same_bits(one, many[127:, :1].contiguous())


@needs_simulator
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("tile", "tokens", "heads"), [("64x64", 3, 16), ("64x128", 64, 140), ("128x128", 130, 70)])
@pytest.mark.parametrize("layout", ["k", "n"])
def test_under_any_schedule(layout, tile, tokens, heads, options):
    """More tiles than multiprocessors where there are heads enough: the ring runs on across tiles."""
    x, weight = rows(tokens, heads, 128), weights(heads, 72, 128, layout)
    kernel = f"mla_absorb_{tile}_{layout}"
    plain = run(x, weight, kernel)
    close(plain, torch.einsum("thk,hnk->thn", x.double(), weight.double()), plain.double().abs() * 2**-8 + 1e-3)
    with schedule(**options):
        assert same_bits(plain, run(x, weight, kernel))


@needs_simulator
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_out_may_start_anywhere(kernel):
    """At odd addresses the kernel stores elements: the same bits, and nothing beside."""
    tokens, heads = {"64x64": (5, 2), "64x128": (63, 140), "128x128": (130, 2)}[kernel.split("_")[2]]
    x, weight = rows(tokens, heads, 64), weights(heads, 72, 64, kernel[-1])
    plain = run(x, weight, kernel)
    for stride in (73, 80):
        around = torch.full((tokens + 1, heads, stride), NAN, dtype=torch.bfloat16)
        out = around.view(-1)[1:].as_strided((tokens, heads, 72), (heads * stride, stride, 1))
        assert same_bits(run(x, weight, kernel, out).contiguous(), plain)
        out.fill_(NAN)
        assert around.isnan().all()


@needs_simulator
@pytest.mark.parametrize("start", [0, 1])
def test_heads_of_out_beyond_32_bits(start):
    """The second head lies 2^31 elements on."""
    torch.use_deterministic_algorithms(False)  # 4 GB of NaN would be 4 GB of memory
    store = torch.empty((1 << 31) + 512, dtype=torch.bfloat16)
    out = store[start:].as_strided((3, 2, 64), (72, 1 << 31, 1))
    x, weight = rows(3, 2, 64), weights(2, 64, 64, "k")
    assert same_bits(run(x, weight, "mla_absorb_64x64_k", out).contiguous(), run(x, weight, "mla_absorb_64x64_k"))


@needs_simulator
@pytest.mark.parametrize("kernel", KERNELS)
def test_budget(kernel):
    """Bytes and tensor cycles as docs/mla.md has them, every byte of the output once, no bank met twice."""
    tile, layout = kernel.split("_")[2:]
    height, width = (int(n) for n in tile.split("x"))
    heads = 140 if tile == "64x128" else 2
    with schedule(banks="1"):
        run(rows(height, heads, 128), weights(heads, width, 128, layout), kernel)
    spent = counters()
    assert spent["wgmma_cycles"] == heads * 2 * {"64x64": 128, "64x128": 256, "128x128": 512}[tile]
    assert spent["tma_read"] == heads * 2 * (height + width) * 128
    assert spent["tma_write"] == heads * height * width * 2 and spent["global_write"] == 0
    assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0


@needs_simulator
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_reach_every_block(kernel):
    tokens, heads = {"64x64": (3, 2), "64x128": (3, 140), "128x128": (130, 2)}[kernel.split("_")[2]]
    with coverage(kernel) as seen:
        for columns in (64, 72):
            x, weight = rows(tokens, heads, 128), weights(heads, columns, 128, kernel[-1])
            run(x, weight, kernel)
            run(x, weight, kernel, torch.empty(tokens, heads, columns + 1, dtype=torch.bfloat16)[..., 1:])
    assert seen.unreached() == []


@needs_simulator
@pytest.mark.parametrize("tokens", [16, 32, 64, 130])
@pytest.mark.parametrize("layout", ["k", "n"])
def test_triton_under_any_schedule(layout, tokens):
    """Every row of the table; the same bits whenever copies and products land, and every block reached."""
    x = rows(tokens, 2, 192)
    with dk.backend("sim:triton"), coverage("triton_mla_absorb") as seen:
        for columns in (128, 40):
            weight = weights(2, columns, 192, layout)
            plain = dk.mla_absorb(x, weight)
            for options in SCHEDULES.values():
                with schedule(**options):
                    assert same_bits(dk.mla_absorb(x, weight), plain)
            assert (dk.mla_absorb(x[..., :0], weight[..., :0]) == 0).all()
    assert seen.unreached() == []


def test_what_the_kernels_leave_to_others():
    x, weight = torch.zeros(2, 3, 64).bfloat16(), torch.zeros(3, 72, 64).bfloat16()
    odd = torch.zeros(2, 3, 72).bfloat16()[..., 1:65]
    for words, args in {
        "float16: the kernel computes bfloat16": (x.half(), weight.half()),
        "weight: 71 columns of 64: the kernel takes multiples of 8": (x, weight[:, 1:]),
        "weight: 72 columns of 60": (x[..., :60], weight[..., :60]),
        "weight: 72 columns of 0": (x[..., :0], weight[..., :0]),
        "x: a row does not start at a multiple of 16 bytes": (odd, weight),
        "weight: a row does not start at a multiple of 16 bytes": (x, torch.zeros(3, 64, 73).bfloat16()[..., 1:].mT),
        "a stride of 0": (x, weight[:1].expand(3, -1, -1)),
    }.items():
        assert words in str(_cuda.mla_absorb_cannot(*args))
        with dk.backend("eager"):
            assert dk.mla_absorb(*args).shape == (2, 3, args[1].shape[1])
    assert _cuda.mla_absorb_cannot(x, weight) is None
    assert _cuda.mla_absorb_cannot(x, torch.zeros(3, 64, 72).bfloat16().mT) is None
    with dk.backend("sim:cuda"), pytest.raises(RuntimeError, match="the kernel computes bfloat16"):
        dk.mla_absorb(x.half(), weight.half())


@needs_simulator
def test_rows_too_far_apart_for_triton():
    far = torch.empty(1 << 25, dtype=torch.bfloat16).as_strided((2, 1, 16), (1 << 24, 16, 1))
    weight = torch.zeros(1, 16, 16).bfloat16()
    with dk.backend("sim:triton"):
        with pytest.raises(RuntimeError, match="takes rows less than 16777216 elements apart"):
            dk.mla_absorb(far, weight)
        with pytest.raises(RuntimeError, match="mla_absorb: out: Triton takes rows less than 16777216"):
            dk.mla_absorb(torch.zeros(2, 1, 16).bfloat16(), weight, out=far)


@pytest.mark.parametrize("layout", ["k", "n"])
def test_op_contract(device, layout):
    x, weight = torch.randn(3, 2, 16, device=device).bfloat16(), torch.randn(2, 24, 16, device=device).bfloat16()
    weight = weight if layout == "k" else weight.mT.contiguous().mT
    opcheck(torch.ops.dsv3_kernels.mla_absorb.default, (x, weight))
    out = torch.zeros(3, 2, 40, device=device).bfloat16()[..., :24]
    opcheck(torch.ops.dsv3_kernels.mla_absorb_out.default, (x, weight, out))


def test_compiles():
    x, kv_b = torch.randn(3, 2, 16), torch.randn(2, 40, 32)

    def both(x):
        q = x.new_zeros(3, 2, 40)
        dk.mla_absorb(x * 2, kv_b[:, :16].mT, out=q[..., :32])
        return q, dk.mla_absorb(q[..., :32], kv_b[:, 16:])

    compiles(both, x)


X, W, OUT = torch.zeros(4, 3, 16), torch.zeros(3, 24, 16), torch.zeros(4, 3, 24)


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (TypeError, "x: got list, wanted a Tensor", {"x": []}),
        (TypeError, "x: got dtype int32", {"x": X.int()}),
        (TypeError, "weight: got NoneType, wanted a Tensor", {"weight": None}),
        (TypeError, "weight: got dtype bfloat16, wanted float32", {"weight": W.bfloat16()}),
        (TypeError, "out: got dtype float16, wanted float32", {"out": OUT.half()}),
        (ValueError, r"x: got shape \[4, 16\], wanted \[T, H, K\]", {"x": X[:, 0]}),
        (ValueError, "x: got stride 2 in the last dimension", {"x": torch.zeros(4, 3, 32)[..., ::2]}),
        (ValueError, r"weight: got shape \[2, 24, 16\], wanted \[3, N, 16\]", {"weight": W[:2]}),
        (ValueError, r"weight: got shape \[3, 24, 15\], wanted \[3, N, 16\]", {"weight": W[..., 1:]}),
        (
            ValueError,
            r"weight: got strides \[1536, 32, 2\], wanted 1 in one",
            {"weight": torch.zeros(3, 48, 32)[:, :24, ::2]},
        ),
        (ValueError, r"out: got shape \[4, 3, 23\], wanted \[4, 3, 24\]", {"out": OUT[..., 1:]}),
        (ValueError, "out: got stride 2 in the last dimension", {"out": torch.zeros(4, 3, 48)[..., ::2]}),
        (ValueError, "out: shares memory with x", {"x": OUT[..., :16]}),
        (
            ValueError,
            "out: shares memory with weight",
            {"weight": OUT.view(-1)[: 3 * 24 * 4].view(3, 24, 4), "x": X[..., :4]},
        ),
        (RuntimeError, "weight: got device meta, wanted cpu as x", {"weight": W.to("meta")}),
        (RuntimeError, "out: got device meta, wanted cpu as x", {"out": OUT.to("meta")}),
    ],
)
def test_rejects(error, words, changes):
    with pytest.raises(error, match=f"^mla_absorb: {words}"):
        dk.mla_absorb(**{"x": X, "weight": W, "out": OUT, **changes})
