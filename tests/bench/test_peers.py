"""Rivals from prebuilt images: the manifest, the loader, and what the launching side gives their kernels.

The images are stand-ins of our own (rivals.cu): the rivals' parameters, plain arithmetic, so that a wrong pointer,
size, stride, box, struct or grid makes a wrong result.
"""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from simulated import needs_simulator, schedule

import dsv3_kernels as dk
from bench import bench_gemm, bench_mla, cases, launch, peer_deep_gemm, peer_flash_mla, peers, run
from bench.bench_quant import normal
from bench.machine import ROOT
from build_backend import images, toolchain

CPU = torch.device("cpu")
SMS = 132  # the simulator's
GEMM = {"peer": "deep_gemm", "version": "abc", "threads": 128, "block": [32, 32, 128], "shared_bytes": 14336}
MLA = {"peer": "flash_mla", "version": "def"}
MANIFESTS = {
    "gemm": GEMM
    | {"kernel": "fp8_gemm_nt", "symbol": "rival_gemm", "sizes": {"N": 96, "K": 208, "M": [1, 70], "SMs": SMS}},
    "contiguous": GEMM
    | {
        "kernel": "m_grouped_fp8_gemm_nt_contiguous",
        "symbol": "rival_contiguous",
        "sizes": {"N": 160, "K": 256, "G": 3, "SMs": SMS},
    },
    "masked": GEMM
    | {
        "kernel": "m_grouped_fp8_gemm_nt_masked",
        "symbol": "rival_masked",
        "sizes": {"N": 160, "K": 256, "G": 3, "M": 30, "SMs": SMS},
    },
    "accumulate": GEMM
    | {"kernel": "fp8_gemm_nt_accumulate", "symbol": "rival_accumulate", "sizes": {"N": 96, "K": 384, "SMs": SMS}},
    "k_grouped": GEMM
    | {
        "kernel": "k_grouped_fp8_gemm_nt_contiguous",
        "symbol": "rival_k_grouped",
        "sizes": {"M": 64, "N": 96, "G": 3, "SMs": SMS},
    },
    "plan": MLA | {"kernel": "get_mla_metadata", "symbol": "rival_plan", "threads": 32, "shared_bytes": 4096},
    "decode": MLA | {"kernel": "splitkv_mla", "symbol": "rival_decode", "threads": 64, "shared_bytes": 147456},
    "combine": MLA
    | {"kernel": "combine", "symbol": "rival_combine", "threads": 256, "shared_bytes": 0, "sizes": {"splits": 32}},
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The stand-ins' image, without its ending."""
    out = tmp_path_factory.mktemp("rivals")
    images.compile_image("rivals", ROOT / "tests" / "bench" / "rivals.cu", toolchain.find_nvcc(), out)
    return out / "rivals"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_PEERS", str(tmp_path))
    return tmp_path


@pytest.fixture
def rivals(compiled, folder):
    """A folder with every stand-in; returns it."""
    for name, manifest in MANIFESTS.items():
        (folder / f"{name}.json").write_text(json.dumps(manifest))
        for ending in (".ptx", ".cubin"):
            (folder / f"{name}{ending}").symlink_to(compiled.with_suffix(ending))
    return folder


def write(folder, name="gemm", **changes):
    """A manifest with fields changed, or left out where None."""
    fields = {key: value for key, value in (MANIFESTS["gemm"] | changes).items() if value is not None}
    (folder / f"{name}.json").write_text(json.dumps(fields))


# The manifest


def test_without_a_folder_a_rival_is_not_installed(monkeypatch, folder):
    monkeypatch.setenv("BENCH_PEERS", str(folder / "nowhere"))
    assert peers.images() == [] and peers.versions() == {}
    with pytest.raises(ImportError, match="deep_gemm is not installed, and none of its 0 images of fp8_gemm_nt in"):
        peers.find("deep_gemm", "fp8_gemm_nt", M=1)


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("BENCH_PEERS", raising=False)
    assert peers.folder() == ROOT / "build" / "peers"


def test_an_image_is_found_by_its_sizes(folder):
    write(folder, "a", sizes={"N": 576, "M": [1, 8]})
    write(folder, "b", sizes={"N": 576, "M": 16})
    write(folder, "c", sizes={}, kernel="other")
    write(folder, "d", peer="flash_mla", version="xyz")
    assert peers.find("deep_gemm", "fp8_gemm_nt", N=576, M=8, K=512).path == folder / "a"
    assert peers.find("deep_gemm", "fp8_gemm_nt", N=576, M=16).path == folder / "b"
    assert peers.find("deep_gemm", "other", M=5).path == folder / "c"
    with pytest.raises(peers.NoImage, match=r"none of its 2 images of fp8_gemm_nt in .* is for N = 576, M = 9"):
        peers.find("deep_gemm", "fp8_gemm_nt", N=576, M=9)
    assert peers.versions() == {"deep_gemm": ["abc"], "flash_mla": ["xyz"]}
    with pytest.raises(ValueError, match="image a is for M = 1, 8, got 9"):
        peers.read(folder / "a.json").check(N=576, M=9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"symbol": None}, "gemm.json: symbol is missing, wanted str"),
        ({"threads": "128"}, "threads is '128', wanted int"),
        ({"early": 1}, "early is 1, wanted bool"),
        ({"sizes": [1]}, r"sizes is \[1\], wanted dict"),
        ({"stages": 4}, "stages is no field of an image"),
    ],
)
def test_a_wrong_manifest(folder, changes, words):
    write(folder, **changes)
    with pytest.raises(ValueError, match=words):
        peers.images()


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[]", "holds no object")])
def test_a_manifest_that_is_none(folder, text, words):
    (folder / "gemm.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        peers.images()


# The loader


@needs_simulator
def test_a_missing_image(rivals):
    (rivals / "gemm.ptx").unlink()
    with pytest.raises(RuntimeError, match=r"the image .*gemm\.ptx is missing"):
        peers.read(rivals / "gemm.json").load(CPU)


@needs_simulator
def test_a_symbol_that_is_not_there(rivals):
    write(rivals, symbol="rival_gem")
    with pytest.raises(RuntimeError, match=r"gemm\.ptx, kernel rival_gem: .*the module has no kernel 'rival_gem'"):
        peers.read(rivals / "gemm.json").load(CPU)


@needs_simulator
def test_an_image_that_is_none(rivals):
    (rivals / "gemm.ptx").unlink()
    (rivals / "gemm.ptx").write_text("no PTX")
    with pytest.raises(RuntimeError, match="cuLibraryLoadData failed"):
        peers.read(rivals / "gemm.json").load(CPU)


@needs_simulator
def test_parameters_of_another_version(rivals):
    kernel = peers.read(rivals / "gemm.json").load(CPU)
    words = r"kernel gemm takes parameters of \[8, 8, 4, 4, 4, 128, 128, 128, 128\] bytes, its launcher has \[8, 16\]"
    with pytest.raises(ValueError, match=words):
        kernel.launch((1, 1, 1), 128, [bytes(8), bytes(16)], [])
    write(rivals, kernel="fp8_gemm_nt_accumulate")  # taken for another of the rival's kernels
    (rivals / "accumulate.json").unlink()
    a, b = dk.quantize_1x128(normal(CPU, 70, 208)), dk.quantize_1x128(normal(CPU, 96, 208))
    with pytest.raises(ValueError, match="takes parameters of"):
        peer_deep_gemm.accumulate(*a, *b, torch.zeros(70, 96))()


@needs_simulator
def test_more_shared_memory_than_the_image_has(rivals):
    kernel = peers.read(rivals / "plan.json").load(CPU)
    with pytest.raises(ValueError, match="kernel plan: 4100 bytes of shared memory, its image has 4096"):
        kernel.launch((1, 1, 1), 32, [bytes(80)], [], shared_bytes=4100)


@needs_simulator
def test_a_launch_that_fails_names_the_kernel(rivals):
    kernel = peers.read(rivals / "plan.json").load(CPU)
    with pytest.raises(RuntimeError, match=r"kernel plan, grid \(0, 1, 1\), 32 threads, 4096 bytes: cuLaunchKernelEx"):
        kernel.launch((0, 1, 1), 32, [bytes(80)], [])


def test_no_driver(monkeypatch):
    monkeypatch.setattr(launch._simulator, "missing", lambda: "the simulator is not built")
    with pytest.raises(RuntimeError, match="the simulator is not built"):
        launch.driver_of(CPU)
    with pytest.raises(RuntimeError, match=r"bench: no driver: .*nowhere\.so"):
        launch.Driver("nowhere.so")


# What the kernels get

TIMINGS = pytest.mark.parametrize("timing", ["early", "late"])


def twice(call, check):
    """The call's outputs, checked, and the same bits again."""
    first = [t.clone() for t in as_tuple(call())]
    assert check() is None
    assert all(torch.equal(a, b) for a, b in zip(first, as_tuple(call()), strict=True))


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@needs_simulator
@TIMINGS
@pytest.mark.parametrize("m", [1, 70])
def test_gemm(rivals, m, timing):
    case = bench_gemm.fp8_gemm(m, 96, 208)
    inputs = case.make(CPU)
    inputs[-1].fill_(torch.nan)
    with schedule(timing=timing):
        twice(peer_deep_gemm.gemm(*inputs), lambda: case.check(inputs, inputs[-1]))


@needs_simulator
def test_gemm_of_scales_in_another_layout(rivals):
    case = bench_gemm.fp8_gemm(70, 96, 208)
    a, a_scale, b, b_scale, out = case.make(CPU)
    rows, columns = a_scale.contiguous(), b_scale.mT.contiguous().mT
    twice(peer_deep_gemm.gemm(a, rows, b, columns, out), lambda: case.check((a, a_scale, b, b_scale), out))


@needs_simulator
@TIMINGS
def test_contiguous(rivals, timing):
    case = bench_gemm.fp8_grouped_gemm(3, 512, 160, 256)
    a, a_scale, b, b_scale, _, out = case.make(CPU)
    offsets = torch.tensor([0, 128, 128, 384], dtype=torch.int32)  # an empty group, rows past the end
    out.fill_(torch.nan)
    inputs = a, a_scale, b, b_scale, offsets, out
    with schedule(timing=timing):
        call = peer_deep_gemm.contiguous(*inputs)
        call()
    assert case.check(inputs, out) is None and out[384:].isnan().all()


@needs_simulator
def test_contiguous_groups_start_at_tiles(rivals):
    a, a_scale, b, b_scale, _, out = bench_gemm.fp8_grouped_gemm(3, 384, 160, 256).make(CPU)
    offsets = torch.tensor([0, 100, 128, 384], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"groups start at multiples of 128 rows, got offsets \[0, 100, 128, 384\]"):
        peer_deep_gemm.contiguous(a, a_scale, b, b_scale, offsets, out)


@needs_simulator
@TIMINGS
def test_masked(rivals, timing):
    case = bench_gemm.fp8_masked_gemm(3, 64, 30, 160, 256)
    inputs = case.make(CPU)
    inputs[4].copy_(torch.tensor([40, 0, 9]))
    inputs[-1].zero_()
    with schedule(timing=timing):
        twice(peer_deep_gemm.masked(*inputs, 30), lambda: case.check(inputs, inputs[-1]))


@needs_simulator
@TIMINGS
def test_accumulate(rivals, timing):
    case = bench_gemm.weight_gradient(70, 96, 384)
    inputs = case.make(CPU)
    with schedule(timing=timing):
        call = peer_deep_gemm.accumulate(*inputs)
        once = call().clone()
        assert torch.equal(call(), 2 * once)
    inputs[-1].copy_(once)
    assert case.check(inputs, inputs[-1]) is None


@needs_simulator
@TIMINGS
def test_k_grouped(rivals, timing):
    case = bench_gemm.fp8_grouped_wgrad(3, 600, 64, 96, accumulate=True)
    inputs = case.make(CPU)
    with schedule(timing=timing):
        assert case.check(inputs, peer_deep_gemm.k_grouped(*inputs)()) is None


@needs_simulator
def test_k_grouped_wants_whole_blocks(rivals):
    *operands, _, out = bench_gemm.fp8_grouped_wgrad(3, 600, 64, 96, accumulate=True).make(CPU)
    for bounds in ([0, 100, 256, 384], [0, 0, 0, 0]):
        offsets = torch.tensor(bounds, dtype=torch.int32)
        with pytest.raises(ValueError, match="groups of K are multiples of 128 and not all empty"):
            peer_deep_gemm.k_grouped(*operands, offsets, out)


@needs_simulator
@TIMINGS
@pytest.mark.parametrize(("heads", "queries"), [(4, 1), (5, 2), (66, 1)])
def test_flash_mla(rivals, heads, queries, timing):
    case = bench_mla.mla_decode(2, 140, heads, queries)
    inputs = case.make(CPU)
    with schedule(timing=timing, sms="4"):
        call = peer_flash_mla.decode(*inputs[:4], bench_mla.SCALE)
        twice(call, lambda: case.check(inputs, call()))


@needs_simulator
def test_flash_mla_wants_its_pages(rivals):
    q, cache, table, seqlens = bench_mla.mla_decode(2, 200, 4).make(CPU)[:4]
    with pytest.raises(ValueError, match=r"a bfloat16 cache of pages \[64, 576\], got torch.bfloat16"):
        peer_flash_mla.decode(q, cache.view(-1, 32, 576), table, seqlens, 0.1)


@needs_simulator
def test_an_image_for_another_number_of_sms(rivals):
    inputs = bench_gemm.fp8_gemm(70, 96, 208).make(CPU)
    with schedule(sms="114"), pytest.raises(peers.NoImage, match="M = 70, N = 96, K = 208, SMs = 114"):
        peer_deep_gemm.gemm(*inputs)


@needs_simulator
@pytest.mark.parametrize("block", [None, [32, 32, 64]])
def test_an_image_of_deep_gemm_says_its_tile(rivals, block):
    write(rivals, block=block)
    with pytest.raises(ValueError, match=r"image gemm: block is \[M, N, 128\], got \["):
        peer_deep_gemm.gemm(*bench_gemm.fp8_gemm(70, 96, 208).make(CPU))


# An installed package goes before images


def test_an_installed_deep_gemm(monkeypatch):
    calls = []
    names = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked")
    library = types.ModuleType("deep_gemm")
    for name in (*names, "k_grouped_fp8_gemm_nt_contiguous"):
        setattr(library, name, lambda *args, name=name, **options: calls.append((name, args[2], options)))
    monkeypatch.setitem(sys.modules, "deep_gemm", library)
    for case, make in (
        (bench_gemm.fp8_gemm(2, 96, 208), peer_deep_gemm.gemm),
        (bench_gemm.fp8_grouped_gemm(2, 512, 96, 256), peer_deep_gemm.contiguous),
        (bench_gemm.fp8_masked_gemm(2, 64, 30, 96, 256), lambda *inputs: peer_deep_gemm.masked(*inputs, 30)),
        (bench_gemm.weight_gradient(70, 96, 384), peer_deep_gemm.accumulate),
        (bench_gemm.fp8_grouped_wgrad(2, 300, 64, 96, accumulate=True), peer_deep_gemm.k_grouped),
    ):
        inputs = case.make(CPU)
        assert make(*inputs)() is inputs[-1] and calls[-1][1] is inputs[-1]
    assert [name for name, _, _ in calls] == [*names, names[0], "k_grouped_fp8_gemm_nt_contiguous"]
    assert calls[3][2]["c"] is calls[3][1] and calls[4][2]["c"] is calls[4][1]


def test_an_installed_flash_mla(monkeypatch):
    library = types.ModuleType("flash_mla")
    library.get_mla_metadata = lambda seqlens, rows, heads: (("plan", rows, heads), None)
    library.flash_mla_with_kvcache = lambda q, cache, *rest, **options: (cache.shape, torch.zeros(2, 4, 3))
    monkeypatch.setitem(sys.modules, "flash_mla", library)
    inputs = bench_mla.mla_decode(2, 200, 4).make(CPU)
    shape, lse = peer_flash_mla.decode(*inputs[:4], 0.1)()
    assert shape == (8, 64, 1, 576) and lse.shape == (2, 3, 4)


# The runner


@needs_simulator
def test_the_runner_checks_rivals(rivals, tmp_path, monkeypatch):
    """A rival at hand becomes a side; one that is wrong, or fails, is a note; one that is missing is nothing."""
    runner = run.Run(tmp_path / "bench.jsonl", CPU, quick=True)
    case = bench_gemm.fp8_gemm(70, 96, 208)
    inputs = case.make(CPU)

    def wrong(*inputs):
        call = peer_deep_gemm.gemm(*inputs)
        return lambda: call().mul_(2)

    found = {"deep_gemm": peer_deep_gemm.gemm, "twice": wrong, "other": lambda *inputs: peers.find("other", "x")}
    found["broken"] = lambda *inputs: int("x")
    case = cases.Case(**{**vars(case), "peers": found, "checked": ("deep_gemm", "twice")})
    calls, notes = runner.rivals(case, inputs)
    assert list(calls) == ["deep_gemm"] and list(notes) == ["twice", "broken"]
    assert "elements are off" in notes["twice"]["error"] and "ValueError: invalid literal" in notes["broken"]["error"]
    assert case.check(inputs, calls["deep_gemm"]()) is None


def test_the_head_of_a_run_names_the_images(rivals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.machine, "ceilings", lambda device, budget=0.3: {"copy_gbs": 10.0})

    def head(name):
        runner = run.Run(tmp_path / name, CPU, quick=True)
        runner.cases([bench_gemm.fp8_gemm(1, 16, 128, cpu=True)], run.Console())
        return runner.results()[0]

    assert head("a.jsonl")["peer_images"] == {"deep_gemm": ["abc"], "flash_mla": ["def"]}
    write(rivals, threads=None)
    words = f"bench: {rivals / 'gemm.json'}: threads is missing, wanted int"
    assert head("b.jsonl")["peer_images"] == {"error": words}
    assert f"peer images: {words}" in capsys.readouterr().out


def test_checked_rivals_are_rivals():
    for case in cases.collect():
        assert set(case.checked) <= {*case.peers, "deep_gemm", "zero_, deep_gemm", "flash_mla"}, case.key
