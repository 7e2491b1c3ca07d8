"""Which backend a call takes: forced, nested, across threads and compiled graphs, and what is said about it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import same_bits
from torch import Tensor

import dsv3_kernels as dk
from dsv3_kernels import _simulator, backends
from dsv3_kernels._library import OPS
from dsv3_kernels.quant import _eager

CPU = torch.device("cpu")
needs_simulator = pytest.mark.skipif(_simulator.missing() is not None, reason=str(_simulator.missing()))


def launched() -> int:
    return sum(dk.launch_counts().values())


def in_a_thread(function):
    """What `function()` returns or raises, run by another thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


@pytest.fixture
def process_wide(monkeypatch):
    """Set the backend of the process for one test."""

    def force(name):
        monkeypatch.setenv("DSV3_KERNELS_BACKEND", name)
        backends._process_wide.cache_clear()

    yield force
    monkeypatch.undo()
    backends._process_wide.cache_clear()


@pytest.fixture
def eager_rms_norm(monkeypatch):
    """The backend that was forced at each eager call of rms_norm and of its backward."""
    seen = []

    def watched(name):
        right = getattr(_eager, name)
        monkeypatch.setattr(_eager, name, lambda *args: (seen.append((name, backends.forced())), right(*args))[1])

    watched("rms_norm")
    watched("rms_norm_backward")
    backends._function.cache_clear()
    yield seen
    monkeypatch.undo()
    backends._function.cache_clear()


def test_blocks_nest_and_restore():
    assert backends.forced() is None
    with dk.backend("eager"):
        with dk.backend("sim"):
            assert backends.forced() == "sim"
            with dk.backend(None):
                assert backends.forced() is None
            assert backends.forced() == "sim"
        assert backends.forced() == "eager"
        with pytest.raises(KeyError), dk.backend("triton"):
            raise KeyError
        assert backends.forced() == "eager"
    assert backends.forced() is None


def test_a_block_is_its_threads_own():
    with dk.backend("cuda"):
        assert in_a_thread(backends.forced) is None
        assert isinstance(in_a_thread(lambda: dk.quantize_1x128(torch.ones(1, 128))), tuple)
        with pytest.raises(RuntimeError):
            dk.quantize_1x128(torch.ones(1, 128))


@pytest.mark.parametrize("name", ["opencl", "", "CUDA", "sim:eager"])
def test_unknown_names(name, process_wide):
    with pytest.raises(ValueError, match=f"^backend: got '{name}', wanted one of eager, triton, cuda, sim, "):
        dk.backend(name).__enter__()
    assert backends.forced() is None
    if name:
        process_wide(name)
        with pytest.raises(ValueError, match=f"^DSV3_KERNELS_BACKEND: got '{name}', wanted one of eager"):
            dk.quantize_1x128(torch.ones(1, 128))


def test_the_environment_steers_and_a_block_goes_before_it(process_wide):
    x = torch.randn(2, 128)
    process_wide("cuda")
    with pytest.raises(RuntimeError, match=r"^quantize_1x128: backend 'cuda' cannot serve this call"):
        dk.quantize_1x128(x)
    with pytest.raises(RuntimeError):
        in_a_thread(lambda: dk.quantize_1x128(x))
    with dk.backend("eager"):
        dk.quantize_1x128(x)


@pytest.mark.parametrize(
    ("op", "name", "words"),
    [
        ("quantize_1x128", "cuda", r"\(cuda: needs a CUDA device, got cpu\)"),
        ("dequantize", "triton", r"\(triton: no Triton kernel for this op yet\)"),
        ("dequantize", "cuda", r"\(cuda: no CUDA kernel for this op yet\)"),
        ("dequantize", "sim", r"\(sim:triton: no Triton kernel for this op yet\)"),
        ("dequantize", "sim:cuda", r"\(sim:cuda: no CUDA kernel for this op yet\)"),
    ],
)
def test_a_forced_backend_that_cannot_serve(op, name, words, monkeypatch):
    monkeypatch.setitem(OPS, "dequantize", type(OPS["dequantize"])("quant"))  # whatever kernels it has by now
    q, scale = dk.quantize_1x128(torch.ones(2, 128))
    calls = {
        "quantize_1x128": lambda: dk.quantize_1x128(torch.ones(2, 128)),
        "dequantize": lambda: dk.dequantize(q, scale),
    }
    with (
        dk.backend(name),
        pytest.raises(RuntimeError, match=f"^{op}: backend '{name}' cannot serve this call {words}$"),
    ):
        calls[op]()


@needs_simulator
def test_sim_is_the_cuda_kernel_where_there_is_one():
    x, before = torch.randn(3, 200), dk.launch_counts()["quantize_1x128_f32"]
    with dk.backend("sim"):
        assert dk.explain("quantize_1x128", x, False, "k").backend == "sim:cuda"
        simulated = dk.quantize_1x128(x)
    assert dk.launch_counts()["quantize_1x128_f32"] == before + 1
    assert same_bits(simulated, dk.quantize_1x128(x)) and dk.launch_counts()["quantize_1x128_f32"] == before + 1


@needs_simulator
def test_sim_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setenv("DSV3_KERNELS_DRIVER", str(tmp_path / "gone.so"))
    with dk.backend("sim"), pytest.raises(RuntimeError, match=r"sim:cuda: DSV3_KERNELS_DRIVER names .*gone\.so, which"):
        dk.quantize_1x128(torch.ones(1, 128))


@needs_simulator
def test_a_compiled_graph_reads_the_backend_when_it_runs():
    compiled_calls = []

    def keep(graph, inputs):
        compiled_calls.append(graph)
        return graph.forward

    def call(x: Tensor):
        return dk.quantize_1x128(x)

    torch._dynamo.reset()
    compiled, x, counts = torch.compile(call, fullgraph=True, backend=keep), torch.randn(2, 128), [launched()]
    for name in ("eager", "sim", None):
        with dk.backend(name):
            compiled(x)
        counts.append(launched())
    with dk.backend("cuda"), pytest.raises(RuntimeError, match=r"^quantize_1x128: backend 'cuda' cannot serve"):
        compiled(x)
    assert len(compiled_calls) == 1, "compiled again"
    assert [b - a for a, b in itertools.pairwise(counts)] == [0, 1, 0]


def test_backward_in_another_thread_takes_the_backend_of_its_forward(eager_rms_norm):
    x, weight = torch.randn(2, 8, requires_grad=True), torch.ones(8)
    with dk.backend("eager"):
        loss = dk.rms_norm(x, weight, 1e-6).sum()
    in_a_thread(loss.backward)
    assert eager_rms_norm == [("rms_norm", "eager"), ("rms_norm_backward", "eager")] and x.grad is not None
    free = dk.rms_norm(x, weight, 1e-6).sum()
    with dk.backend("eager"):
        in_a_thread(free.backward)
    assert eager_rms_norm[2:] == [("rms_norm", None), ("rms_norm_backward", None)]
    assert backends.forced() is None


def test_explain():
    said = dk.explain("quantize_1x128", torch.ones(1, 128), False, "k")
    assert (said.op, said.backend, said.reason, said.kernels) == ("quantize_1x128", "eager", "CPU tensors", ())
    assert said.passed_over["cuda"] == "needs a CUDA device, got cpu" and set(said.passed_over) == {"cuda", "triton"}
    text = str(said).splitlines()
    assert text[0] == "quantize_1x128: eager (CPU tensors)" and text[1] == "  not cuda: needs a CUDA device, got cpu"
    assert str(dk.explain("quantize_1x128")) == str(said)
    with dk.backend("cuda"), pytest.raises(RuntimeError, match=r"^quantize_1x128: backend 'cuda' cannot serve"):
        dk.explain("quantize_1x128")
    with pytest.raises(ValueError, match=r"^explain: op: got 'fp9_gemm', wanted one of quantize_1x128, "):
        dk.explain("fp9_gemm")


def test_explain_lists_the_kernels_of_the_op_alone(monkeypatch):
    names = ["quantize_1x128_bf16", "quantize_1x128_both_bf16", "quantize_1x1280_bf16", "fp8_gemm_128", "fp8_gemm"]
    monkeypatch.setattr(backends, "_host_kernels", lambda: tuple(names))
    assert backends._kernels_of("quantize_1x128") == ("quantize_1x128_bf16",)
    assert backends._kernels_of("quantize_1x128_both") == ("quantize_1x128_both_bf16",)
    assert (
        backends._kernels_of("fp8_gemm") == backends._kernels_of("fp8_gemm_accumulate") == ("fp8_gemm_128", "fp8_gemm")
    )
    assert backends._kernels_of("rope") == ()


@needs_simulator
def test_every_kernel_belongs_to_an_op_with_kernels():
    owned = {op: backends._kernels_of(op) for op in OPS}
    assert {op for op, kernels in owned.items() if kernels} == {op for op, row in OPS.items() if row.cuda}
    assert {kernel for kernels in owned.values() for kernel in kernels} == set(backends._host_kernels())
    with dk.backend("sim"):
        said = dk.explain("quantize_1x128")
    assert said.kernels == backends._kernels_of("quantize_1x128") and f"\n  kernel {said.kernels[0]}" in str(said)


def test_is_supported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for op in OPS:
        assert dk.is_supported(op, "cpu") and dk.is_supported(op, CPU, "eager")
        assert not dk.is_supported(op, "cuda") and not dk.is_supported(op, "cuda", "eager")
    assert not dk.is_supported("quantize_1x128", "cpu", "cuda") and not dk.is_supported("quantize_1x128", "meta")
    assert not dk.is_supported("quantize_1x128", "cuda", "cuda")
    assert dk.is_supported("quantize_1x128", "cpu", "sim") == (_simulator.missing() is None)
    monkeypatch.setitem(OPS, "dequantize", type(OPS["dequantize"])("quant"))  # whatever kernels it has by now
    assert not dk.is_supported("dequantize", "cpu", "sim")
    with pytest.raises(ValueError, match=r"^is_supported: op: got 'fp9_gemm'"):
        dk.is_supported("fp9_gemm", "cpu")
    with pytest.raises(ValueError, match=r"^backend: got 'opencl'"):
        dk.is_supported("quantize_1x128", "cpu", "opencl")


def test_is_supported_on_gpus_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0) if device.index == 1 else (8, 0))
    monkeypatch.setattr(backends, "_host_missing", lambda: None)
    assert dk.is_supported("quantize_1x128", "cuda:1", "cuda") and not dk.is_supported(
        "quantize_1x128", "cuda:0", "cuda"
    )
    assert dk.is_supported("quantize_1x128", "cuda:0") and not dk.is_supported("quantize_1x128", "cuda:2")
    assert backends.missing("quantize_1x128", "cuda", torch.device("cuda:2")).endswith("got cuda:2 where torch sees 2")


def test_preload_needs_a_gpu(monkeypatch):
    with pytest.raises(RuntimeError, match=r"^preload: needs a CUDA device, got cpu$"):
        dk.preload("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^preload: needs a CUDA device, got cuda where torch sees 0$"):
        dk.preload("cuda")
