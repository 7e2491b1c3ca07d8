"""Three programs that ask the GPU what the design of the decode kernels rests on (docs/bench.md).

Compiled on demand into build/micro by the package's build, never shipped. Each checks what it computed before it gives
figures, and runs in the simulator, too, where it proves itself and its cycles mean nothing. `python -m bench.micro`
compiles them, and runs them where there is a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from build_backend import images, toolchain

from ..launch import READ, READ_WRITE, WRITE, Buffer, Kernel, multiprocessors, tensor_map
from ..machine import ROOT
from ..overhead import Unavailable

HERE, OUT = Path(__file__).parent, ROOT / "build" / "micro"
REPETITIONS = 5


class Wrong(RuntimeError):
    """A program computed something else than it should: its figures mean nothing."""


def probes(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """{name: measurement}; each returns figures with their units in their names."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for operand in ("ss", "rs"):
        for fill in ("idle", "fill"):
            found[f"m64n64k16 {operand} {fill}"] = functools.partial(wgmma_operands, device, operand, fill)
    for path in ("shipped", "bits", "intrinsics", "nothing"):
        found[f"e4m3 to bf16 {path}"] = functools.partial(e4m3_to_bf16, device, path)
    for ctas in ("alone", "pair"):
        found[f"72 KB tiles from L2 {ctas}"] = functools.partial(l2_tiles, device, ctas)
    return {f"micro {name}": probe for name, probe in found.items()}


def compiled(name: str) -> Path:
    """The image of `<name>.cu`, without its ending. Unavailable where it is stale and nothing compiles it."""
    source, record = HERE / f"{name}.cu", OUT / f"{name}.json"
    files = [OUT / f"{name}{ending}" for ending in (".ptx", ".cubin")]
    if all(file.is_file() for file in (record, *files)):
        found = json.loads(record.read_text())
        if found["source_hash"] == images.source_hash(source):
            return OUT / name
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.BuildError as error:
        raise Unavailable(str(error)) from None
    if nvcc is None:
        raise Unavailable("no nvcc, and build/micro has no image of this source")
    OUT.mkdir(parents=True, exist_ok=True)
    entry = images.compile_image(name, source, nvcc, OUT)
    with tempfile.NamedTemporaryFile("w", dir=OUT, suffix=".tmp", delete=False) as file:
        json.dump(entry, file)
    os.replace(file.name, record)  # whole, for whoever reads it meanwhile
    return OUT / name


def wgmma_operands(
    device: torch.device, operand: str, fill: str, *, turns: int = 2000, ctas: int | None = None
) -> dict[str, Any]:
    """Cycles of an SM per m64n64k16 with A in shared memory ("ss") or registers ("rs"); 32 is full rate."""
    panels, threads = 8, 288
    numbers = _random(device, (1 + panels) * 64, 64, values=3).sub(1).bfloat16()
    a, b = numbers[:64], numbers[64:]
    d = torch.full((2, 128, 32), torch.nan, device=device)
    spans, count = _spans(device, ctas)
    maps = [tensor_map(t, (64, len(t)), (64,), (64, 64), swizzle=128) for t in (a, b)]
    params = struct.pack("<128s128s2QI108x", *maps, d.data_ptr(), spans.data_ptr(), turns)
    kernel = Kernel(compiled("wgmma_operands"), f"wgmma_{operand}_{fill}", device, shared_bytes=73864)
    buffers = [(a, READ), (b, READ), (d, WRITE), (spans, WRITE)]
    cycles, seconds = _measure(kernel, count, threads, params, buffers, spans)

    # Thread 32 w + l of a warpgroup has rows 16 w + l / 4 (+ 8), columns 8 j + 2 (l mod 4) (+ 1).
    product = turns * (a.double() @ b.double().unflatten(0, (panels, 64)).sum(0).T)
    rows = product.view(4, 2, 8, 8, 4, 2).permute(0, 2, 4, 3, 1, 5).reshape(128, 32)
    _check(f"wgmma_{operand}_{fill}", d, rows.float().expand(2, -1, -1))
    products = 2 * panels * 4 * turns
    filled = {"fill_gbs": count * turns * panels * 8192 / seconds / 1e9} if fill == "fill" else {}
    return {
        "wgmma_cycles": cycles / products,
        "all_tflops": 2 * 64 * 64 * 16 * products * count / seconds / 1e12,
        **filled,
    }


def e4m3_to_bf16(device: torch.device, path: str, *, turns: int = 20003, ctas: int | None = None) -> dict[str, Any]:
    """Cycles that 128 threads take for 512 codes. `turns` is 3 more than a multiple of 8, so that three of four tiles
    count in the exclusive or."""
    if turns % 8 != 3:
        raise ValueError(f"e4m3_to_bf16: turns is 3 more than a multiple of 8, got {turns}")
    codes = _random(device, 4, 128, 16, values=254).byte()
    codes += (codes >= 127).byte()  # 0x7F and 0xFF are NaN
    folded = torch.zeros(128, 8, dtype=torch.int32, device=device)
    spans, count = _spans(device, ctas)
    scale = 2.0**-3
    params = struct.pack("<3QfI", codes.data_ptr(), folded.data_ptr(), spans.data_ptr(), scale, turns)
    kernel = Kernel(compiled("e4m3_to_bf16"), f"e4m3_{path}", device)
    buffers = [(codes, READ), (folded, WRITE), (spans, WRITE)]
    cycles, _ = _measure(kernel, count, 128, params, buffers, spans)

    if path == "nothing":
        words = codes.view(torch.int32).repeat(1, 1, 2)
    else:
        words = (codes.view(torch.float8_e4m3fn).float() * scale).bfloat16().view(torch.int32)
    _check(f"e4m3_{path}", folded, words[0] ^ words[1] ^ words[2])
    return {"per_512_cycles": cycles / (turns * 128 * 16 / 512)}


def l2_tiles(
    device: torch.device, ctas: str, *, turns: int = 2000, tiles: int = 64, grid: int | None = None
) -> dict[str, Any]:
    """Bandwidth at which every SM gets 72 KB tiles from L2, copied for itself or one half each for a pair."""
    cluster = {"alone": 1, "pair": 2}[ctas]
    data = _random(device, tiles * 64, 576, values=2**15).short().view(torch.bfloat16)
    spans, count = _spans(device, grid)
    if count % cluster:
        raise ValueError(f"l2_tiles: {count} CTAs are no pairs")
    folded = torch.zeros(count, 2, dtype=torch.int32, device=device)
    image = tensor_map(data, (576, tiles * 64), (576,), (64, 64 // cluster), swizzle=128)
    params = struct.pack("<128s2Q2I104x", image, folded.data_ptr(), spans.data_ptr(), tiles, turns)
    kernel = Kernel(compiled("l2_tiles"), f"l2_tiles_{ctas}", device, shared_bytes=147488, cluster=cluster)
    buffers = [(data, READ), (folded, READ_WRITE), (spans, WRITE)]
    cycles, seconds = _measure(kernel, count, 128, params, buffers, spans, folded)

    words = data.view(torch.int32).view(tiles, -1)
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        odd = words[:, 2 * half :]
        words = torch.cat([words[:, :half] ^ words[:, half : 2 * half], odd], 1)
    last = torch.tensor([turns - 1 - (turns - 1 - place) % 2 for place in range(2)], device=device)
    at = (torch.arange(count, device=device)[:, None] // cluster + last) % tiles
    _check(f"l2_tiles_{ctas}", folded, words[:, 0][at])
    size = 64 * 576 * 2 * turns
    return {"received_gbs": count * size / seconds / 1e9, "each_sm_bpc": size / cycles}


def _random(device: torch.device, *shape: int, values: int) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randint(values, shape, generator=random).to(device)


def _spans(device: torch.device, ctas: int | None) -> tuple[Tensor, int]:
    """Begin, end (ns) and cycles of each CTA; one CTA per SM unless said otherwise."""
    count = ctas or multiprocessors(device)
    return torch.zeros(count, 3, dtype=torch.int64, device=device), count


def _measure(
    kernel: Kernel,
    ctas: int,
    threads: int,
    params: bytes,
    buffers: list[Buffer],
    spans: Tensor,
    cleared: Tensor | None = None,
) -> tuple[float, float]:
    """Median over repetitions of the CTAs' median cycles, and of the seconds from the first begin to the last end."""
    cycles, seconds = [], []
    for _ in range(1 + REPETITIONS if spans.is_cuda else 1):
        if cleared is not None:
            cleared.zero_()
        kernel.launch((ctas, 1, 1), threads, [params], buffers)
        begin, end, counts = spans.cpu().unbind(1)
        cycles.append(float(counts.median()))
        seconds.append(max(float(end.max() - begin.min()) * 1e-9, 1e-9))
    return median(cycles[-REPETITIONS:]), median(seconds[-REPETITIONS:])


def _check(name: str, got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        raise Wrong(f"{name}: {int((got != wanted).sum())} of {wanted.numel()} results are wrong")
