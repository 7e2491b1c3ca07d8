"""Shared by all tests: which backends a test runs on, poison, and the op checks of torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import zlib

import checks
import pytest
import rehearsal
import torch

import dsv3_kernels as dk
from dsv3_kernels import backends
from dsv3_kernels._library import OPS, module_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run on the GPU: a GPU that is missing is a failure")
    parser.addoption("--rehearse", action="store_true", help="the same on a make-believe GPU (tests/rehearsal.py)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rehearse"):
        config.option.gpu = True
    elif config.getoption("--gpu") and not torch.cuda.is_available():
        pytest.exit(f"--gpu: torch {torch.__version__} sees no GPU", returncode=1)
    for op in OPS:  # torch.ops knows an op once its module is imported, which a test must not owe to the one before it
        importlib.import_module(module_of(op))
    # Beside other workers a second thread waits for a core more often than it computes.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(max(1, min(2 if alone else 1, os.cpu_count() or 1)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` belong to `make test-gpu` alone: elsewhere they are not collected, rather than skipped; and
    there only what a GPU can decide is: these, and what asks for a device."""
    gpu, rehearse = config.getoption("--gpu"), config.getoption("--rehearse")

    def belongs(item: pytest.Item) -> bool:
        marked = item.get_closest_marker("gpu") is not None
        if not gpu:
            return not marked
        return (marked or "device" in item.fixturenames) and not (rehearse and rehearsal.left_out(item))

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    return checks.no_skip((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    return checks.no_skip((yield))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if request.config.getoption("--gpu") else "cpu")


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest):
    with rehearsal.device() if request.config.getoption("--rehearse") else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Random numbers that are a test's own, and the same at every run, alone or among others."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def backends_of(op: str, gpu: bool) -> list[str]:
    """The backends on which `op` has an implementation that can run here."""
    names = ["eager"]
    if gpu:
        return names + [name for name in ("triton", "cuda") if getattr(OPS[op], name)]
    cpu = torch.device("cpu")
    return names + [name for name in ("sim:cuda", "sim:triton") if backends.missing(op, name, cpu) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `backend`, or `idle_backend`, runs on every backend that implements the op of its file."""
    for name in ("backend", "idle_backend"):
        if name not in metafunc.fixturenames:
            continue
        op = getattr(metafunc.module, "OP", None)
        if op not in OPS:
            raise pytest.UsageError(f"{metafunc.module.__name__} asks for `{name}` and must name its op in OP")
        metafunc.parametrize(name, backends_of(op, metafunc.config.getoption("--gpu")), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Force a backend; a kernel backend must have launched something by the end, or the test proved nothing."""
    kind = request.param.removeprefix("sim:")
    before = launched(kind)
    with dk.backend(request.param):
        yield request.param
    if kind != "eager":
        assert launched(kind) > before, f"no {kind} kernel ran on {request.param}"


@pytest.fixture
def idle_backend(request: pytest.FixtureRequest):
    """Force a backend that must not launch anything: there is nothing to do."""
    before = dk.launch_counts()
    with dk.backend(request.param):
        yield request.param
    assert dk.launch_counts() == before, f"{request.param} launched a kernel on nothing"


def launched(kind: str) -> int:
    """Launches so far of `cuda` or of `triton` kernels."""
    return sum(n for name, n in dk.launch_counts().items() if name.startswith("triton_") == (kind == "triton"))
