"""The host module against a driver that does nothing: what is launched, how often, and which words errors have."""

from __future__ import annotations

import ctypes.util
import multiprocessing
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch
from tools import ROOT, NullDriver

import dsv3_kernels as dk
from dsv3_kernels import _host, backends
from dsv3_kernels.quant import _cuda

E4M3 = torch.float8_e4m3fn
INVALID_VALUE, CAPTURE_UNSUPPORTED = 1, 900


@pytest.fixture(scope="module")
def library() -> NullDriver:
    return NullDriver()


@pytest.fixture
def driver(library):
    library.reset()
    _host.reset_launch_counts()
    with _host.use_driver(library.path):
        yield library


def tensors(rows=5, columns=300, dtype=torch.bfloat16):
    return (
        torch.zeros(rows, columns, dtype=dtype),
        torch.zeros(rows, columns, dtype=E4M3),
        torch.zeros(rows, -(-columns // 128)),
    )


def launch(x, q, scale, pow2=False):
    _cuda.quantize_1x128(x, pow2, "k", q, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (8, 1024), (9, 1025), (3, 7168), (5, 300)])
def test_grid_and_parameters(driver, dtype, rows, columns):
    x, q, scale = tensors(rows, columns, dtype)
    launch(x, q, scale, pow2=True)
    (got,) = driver.launches
    chunks = -(-columns // (512 if dtype == torch.float32 else 1024))
    vectors = columns % (16 // x.element_size()) == 0
    assert got.kernel == "quantize_1x128_" + {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert got.grid == (-(-rows // 8) * chunks, 1, 1) and got.block == (256, 1, 1)
    assert (got.shared, got.cluster, got.programmatic, got.stream) == (0, 1, False, 0)
    assert struct.unpack("<8q3I4x", got.params) == (
        *(x.data_ptr(), q.data_ptr(), scale.data_ptr()),
        *(rows, columns, columns, scale.stride(0), 1),
        *(chunks, vectors, 1),
    )


def test_vectors_only_where_every_row_is_aligned(driver):
    store, q, scale = torch.zeros(4, 264, dtype=torch.bfloat16), torch.zeros(1025, dtype=E4M3), torch.zeros(4, 2)
    aligned = q[:1024].view(4, 256)
    cases = [
        (store[:, :256], aligned, True),  # stride 264 = 33 * 8
        (store[:, 4:260], aligned, False),  # rows start 8 bytes off
        (store[:, :256], q[1:].view(4, 256), False),  # codes start 1 byte off
        (store.view(-1)[: 4 * 257].view(4, 257)[:, :256], aligned, False),  # odd stride
        (store.view(-1)[:256].view(1, 256), aligned[:1], True),  # one row: its stride does not matter
    ]
    for x, codes, vectors in cases:
        driver.reset()
        launch(x, codes, scale[: x.shape[0]])
        assert struct.unpack("<8q3I4x", driver.launches[0].params)[9] == vectors


def test_buffers_cover_the_tensors_and_no_more(driver):
    store = torch.zeros(6, 400, dtype=torch.bfloat16)
    x, q, scale = store[1:5, :300], torch.zeros(4, 300, dtype=E4M3), torch.zeros(3, 8)[:, :4].t()
    launch(x, q, scale)
    assert driver.buffers == [
        (x.data_ptr(), (3 * 400 + 300) * 2, 1),
        (q.data_ptr(), 1200, 2),
        (scale.data_ptr(), (3 + 2 * 8 + 1) * 4, 2),
    ]


@pytest.mark.parametrize(("rows", "columns"), [(0, 256), (3, 0), (0, 0)])
def test_nothing_to_do_launches_nothing(driver, rows, columns):
    launch(*tensors(rows, columns))
    assert driver.launches == [] and sum(_host.launch_counts().values()) == 0


def test_launches_are_counted_by_kernel(driver):
    for dtype, times in ((torch.float32, 2), (torch.bfloat16, 3)):
        for _ in range(times):
            launch(*tensors(dtype=dtype))
    counts = {name: count for name, count in _host.launch_counts().items() if count}
    assert counts == {"quantize_1x128_f32": 2, "quantize_1x128_bf16": 3}
    assert set(_host.launch_counts()) == set(_host.kernels())
    _host.reset_launch_counts()
    assert not any(_host.launch_counts().values())


def test_three_dimensions_and_strides_that_no_single_one_describes(driver):
    x = torch.zeros(2, 3, 256, dtype=torch.bfloat16)
    launch(x, torch.zeros(2, 3, 256, dtype=E4M3), torch.zeros(2, 3, 2))
    assert struct.unpack("<8q3I4x", driver.launches[0].params)[3:6] == (6, 256, 256)
    launch(torch.zeros(128), torch.zeros(128, dtype=E4M3), torch.zeros(1))
    assert struct.unpack("<8q3I4x", driver.launches[1].params)[3:5] == (1, 128)
    launch(x.transpose(0, 1), torch.zeros(3, 2, 256, dtype=E4M3), torch.zeros(3, 2, 2))
    params = struct.unpack("<8q3I4x", driver.launches[2].params)
    assert params[0] != x.data_ptr() and params[3:6] == (6, 256, 256)  # a copy


def test_the_context_is_set_for_the_call_and_put_back(driver):
    def calls():
        return driver.calls("cuCtxPushCurrent_v2"), driver.calls("cuCtxPopCurrent_v2")

    launch(*tensors())
    assert calls() == (1, 1) and driver.launches[0].context == 0xC000
    driver.library.cuCtxPushCurrent_v2(0xC000)  # current already: left alone
    launch(*tensors())
    assert calls() == (2, 1)
    driver.library.cuCtxPushCurrent_v2(0xBAD)  # somebody else's
    launch(*tensors())
    assert calls() == (4, 2) and driver.launches[2].context == 0xC000
    for _ in range(2):
        assert driver.library.cuCtxPopCurrent_v2(bytes(8)) == 0


def test_loading_happens_once_and_under_relaxed_capture():
    """In a process of its own, since a driver's libraries are loaded once per process; threads race for the first."""
    script = f"""
import sys, threading
sys.path[:0] = [{str(ROOT / "tests" / "build")!r}]
from tools import NullDriver
from dsv3_kernels import _host
driver = NullDriver()
def work():
    with _host.use_driver(driver.path):
        for _ in range(20):
            _host.quantize_1x128(0, 0, 0, 8, 128, 128, 1, 8, False, 1, -1, 0)
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
names = ["cuInit", "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuDevicePrimaryCtxRetain",
         "cuThreadExchangeStreamCaptureMode"]
print([driver.calls(n) for n in names], len(driver.launches), _host.launch_counts()["quantize_1x128_bf16"])
with _host.use_driver(driver.path):
    _host.preload(-1)
print(driver.calls("cuLibraryLoadData") == len({{k["image"] for k in _host.kernels().values()}}),
      driver.calls("cuLibraryGetKernel") == len(_host.kernels()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout.splitlines() == ["[1, 1, 1, 1, 1, 2] 160 160", "True True"], result.stdout + result.stderr


def test_a_failed_launch_says_what_was_launched_and_counts_nothing(driver):
    launch(*tensors())
    driver.fail("cuLaunchKernelEx", INVALID_VALUE)
    with pytest.raises(RuntimeError) as caught:
        launch(*tensors(9))
    assert str(caught.value) == (
        "quantize_1x128: cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE (invalid argument); "
        "kernel quantize_1x128_bf16, grid (2, 1, 1), block (256, 1, 1), cluster 1, dynamic shared memory 0 bytes, "
        "device -1"
    )
    assert _host.launch_counts()["quantize_1x128_bf16"] == 1
    launch(*tensors())  # and nothing is broken afterwards
    assert _host.launch_counts()["quantize_1x128_bf16"] == 2


def test_errors_during_a_capture_and_unknown_errors(driver):
    driver.fail("cuLaunchKernelEx", CAPTURE_UNSUPPORTED)
    with pytest.raises(RuntimeError, match=r"call dsv3_kernels\.preload\(device\) before the capture"):
        launch(*tensors())
    driver.fail("cuCtxGetCurrent", 4711)
    with pytest.raises(RuntimeError, match=r"quantize_1x128: cuCtxGetCurrent failed: CUDA error 4711 \(no text\)"):
        launch(*tensors())


def test_no_driver():
    x, q, scale = tensors()
    with pytest.raises(RuntimeError, match="quantize_1x128: a CUDA kernel runs on CPU tensors only in the simulator"):
        launch(x, q, scale)
    if _host.driver_info()["error"]:
        assert "no NVIDIA driver: libcuda.so.1" in _host.driver_info()["error"]
        with pytest.raises(RuntimeError, match=r"no NVIDIA driver: libcuda\.so\.1"):
            _host.preload(0)


def test_a_drop_in_that_is_none(tmp_path, driver):
    x, q, scale = tensors()
    with _host.use_driver(str(tmp_path / "none.so")), pytest.raises(RuntimeError, match="does not load"):
        launch(x, q, scale)
    libc = ctypes.util.find_library("c")
    with _host.use_driver(libc), pytest.raises(RuntimeError, match="lacks cuInit, cuDriverGetVersion"):
        launch(x, q, scale)
    launch(x, q, scale)  # the driver outside both blocks is back
    assert len(driver.launches) == 1
    with pytest.raises(RuntimeError, match="takes CPU tensors, got CUDA tensors"):
        _host.preload(0)


def test_the_environment_names_a_driver_for_cpu_tensors(library, monkeypatch):
    library.reset()
    monkeypatch.setenv("DSV3_KERNELS_DRIVER", library.path)
    launch(*tensors())
    assert len(library.launches) == 1


def test_a_driver_belongs_to_its_thread(driver):
    caught = []

    def other():
        try:
            launch(*tensors())
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "only in the simulator" in caught[0] and driver.launches == []


def _child(connection):
    try:
        launch(*tensors())
        connection.send("launched")
    except RuntimeError as error:
        connection.send(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told(driver):
    launch(*tensors())
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(there,))
    process.start()
    assert here.poll(20) and "this process was forked after its parent had used the GPU" in here.recv()
    process.join()
    launch(*tensors())  # the parent goes on
    assert len(driver.launches) == 2


def best_of(function, limit, calls=1000) -> float:
    """Microseconds of this thread's processor time per call: the best repeat, of at least nine. A machine that others
    keep busy is slower for seconds on end, so repeats go on, at most half a minute, while the best is over `limit`."""
    best, started, repeats = float("inf"), time.monotonic(), 0
    while repeats < 9 or (best >= limit and time.monotonic() - started < 30):
        start = time.thread_time()
        for _ in range(calls):
            function()
        best = min(best, (time.thread_time() - start) / calls * 1e6)
        repeats += 1
        time.sleep(0.1 if repeats > 9 else 0)
    return best


def test_host_time(driver, monkeypatch):
    """The launcher takes at most 3 us, the whole out op, with a backend chosen, at most 8."""
    driver.record(False)
    x = torch.zeros(64, 7168, dtype=torch.bfloat16)
    q, scale = dk.quantize_1x128(x)
    pointers = (x.data_ptr(), q.data_ptr(), scale.data_ptr(), 64, 7168, 7168, 1, 64, False, 1, -1, 0)
    assert best_of(lambda: _host.quantize_1x128(*pointers), 3) < 3
    monkeypatch.setattr(backends, "implementation", lambda op, args: ("cuda", _cuda.quantize_1x128))
    op = torch.ops.dsv3_kernels.quantize_1x128_out.default
    with torch.no_grad():
        assert best_of(lambda: op(x, False, "mn", q, scale), 8) < 8


def test_early_launches_are_asked_for_by_a_block_of_a_thread(driver):
    """Only kernels that wait for their predecessor may start before it ends, and only inside the block."""
    from dsv3_kernels.gemm import _cuda as gemm

    codes, scales = torch.zeros(8, 128, dtype=torch.uint8).view(E4M3), torch.zeros(8, 1)
    out = torch.zeros(8, 8, dtype=torch.bfloat16)

    def multiply():
        gemm.fp8_gemm(codes, scales, codes, scales, None, out.dtype, "auto", None, out)

    multiply()
    with dk.early_launches():
        multiply()
        launch(*tensors())  # a kernel that does not wait
        with dk.early_launches():
            multiply()
        multiply()

        def elsewhere():
            with _host.use_driver(driver.path):
                multiply()

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    multiply()
    assert [got.programmatic for got in driver.launches] == [False, True, False, True, True, False, False]
