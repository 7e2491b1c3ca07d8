"""What only a GPU shows: graphs that are captured and replayed, streams, and which backend a free choice takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from checks import same_bits
from torch import Tensor

import dsv3_kernels as dk

pytestmark = pytest.mark.gpu
FIRST_CALL = """
import torch
import dsv3_kernels as dk
x = torch.ones(4, 256, device="cuda", dtype=torch.bfloat16)
assert "quantize_1x128_bf16" in dk.preload("cuda")
graph = torch.cuda.CUDAGraph()
with dk.backend("cuda"), torch.cuda.graph(graph):
    q, scale = dk.quantize_1x128(x)
graph.replay()
torch.cuda.synchronize()
print(q.float().unique().tolist(), scale.shape)
"""


def tokens(seed: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(70, 384, generator=generator).to(device, torch.bfloat16),)


def product(seed: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(70, 384, generator=generator), torch.randn(264, 384, generator=generator)
    with dk.backend("eager"):
        return tuple(t.to(device) for t in (*dk.quantize_1x128(a), *dk.quantize_128x128(b)))


CASES = {"quantize_1x128": (tokens, dk.quantize_1x128), "fp8_gemm": (product, dk.fp8_gemm)}


def launches(op: str) -> int:
    return sum(count for name, count in dk.launch_counts().items() if name.startswith(f"{op}_"))


def several(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", CASES)
def test_a_captured_graph_replays_with_the_bits_of_the_plain_call(op):
    make, call = CASES[op]
    inputs, before = make(0, "cuda"), launches(op)
    dk.preload("cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with dk.backend("cuda"):
        with torch.cuda.graph(graph):
            captured = several(call(*inputs))
        assert (count := launches(op)) > before
        for seed in (1, 2, 1):
            fresh = make(seed, "cuda")
            for static, new in zip(inputs, fresh, strict=True):
                static.copy_(new)
            for tensor in captured:
                tensor.copy_(torch.full(tensor.shape, torch.nan, device="cuda"))
            graph.replay()
            torch.cuda.synchronize()
            assert launches(op) == count, "a replay needs no launch of ours"
            assert same_bits(captured, several(call(*fresh)))
            count = launches(op)


def test_the_first_call_of_a_process_may_be_captured():
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True)
    assert done.stdout == "[448.0] torch.Size([4, 2])\n", done.stderr


@pytest.mark.parametrize("op", CASES)
def test_a_launch_keeps_to_the_stream_of_its_caller(op):
    """The inputs arrive late on the side stream: a launch on any other would read what they were before."""
    make, call = CASES[op]
    inputs, fresh = make(0, "cuda"), make(1, "cuda")
    stream = torch.cuda.Stream()
    with dk.backend("cuda"):
        wanted = call(*fresh)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for late, new in zip(inputs, fresh, strict=True):
                late.copy_(new)
            result = call(*inputs)
        stream.synchronize()
    assert same_bits(result, wanted)


@pytest.mark.parametrize("op", CASES)
def test_a_free_choice_launches_the_kernel(op):
    make, call = CASES[op]
    inputs, before = make(0, "cuda"), launches(op)
    assert dk.is_supported(op, "cuda", "cuda") and dk.explain(op, *inputs).backend == "cuda"
    result = call(*inputs)
    assert launches(op) > before
    count = launches(op)
    with dk.backend("eager"):
        call(*inputs)
    assert launches(op) == count
    with dk.backend("cuda"):
        assert same_bits(call(*inputs), result)
