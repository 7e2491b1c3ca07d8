"""The build says no: to broken sources, to code that spills or serialises, to compilers that do not serve."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from tools import ROOT, needs_nvcc

from build_backend import host, images, native, toolchain
from build_backend.toolchain import BuildError

PLAIN = 'extern "C" __global__ void {name}(float* x) {{ x[threadIdx.x] += 1.0f; }}\n'
# 64 values are alive at once; 2048 threads on an SM leave 32 registers each.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float v[64];
  x += threadIdx.x;
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("ld.volatile.global.f32 %0, [%1];" : "=f"(v[i]) : "l"(x + 1024 * i));
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("st.volatile.global.f32 [%1], %0;" ::"f"(v[i]), "l"(x + 1024 * i));
}
"""
FRAME = """
extern "C" __global__ void frame(float* x, int n) {
  float v[32];
  for (int i = 0; i < 32; ++i) v[i] = x[i];
  for (int i = 0; i < n; ++i) v[i * n % 32] += x[i];
  x[n] = v[n * 7 % 32];
}
"""
# setmaxnreg without the launch bounds that it needs: ptxas ignores it (C7508).
IGNORED = """
#include "ptx/cluster.cuh"
extern "C" __global__ void ignored(float* x) { ptx::setmaxnreg_inc<240>(); x[threadIdx.x] = 1.0f; }
"""
# An accumulator is read while its wgmma runs: ptxas waits after each one (C7514).
SERIAL = """
#include "ptx/wgmma.cuh"
extern "C" __global__ void __launch_bounds__(128) serial(float* x, uint64_t a, uint64_t b, int n) {
  float d[8];
  for (float& v : d) v = x[threadIdx.x];
  for (int i = 0; i < n; ++i) {
    ptx::wgmma_fence();
    ptx::wgmma_bf16_ss(d, a + i, b, 1);
    d[0] += 1.0f;
    ptx::wgmma_bf16_ss(d, a, b + i, 1);
    ptx::wgmma_commit_group();
  }
  ptx::wgmma_wait_group<0>();
  for (int i = 0; i < 8; ++i) x[i * 128 + threadIdx.x] = d[i];
}
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A project with room for a kernel: csrc with the shared headers only."""
    shutil.copytree(ROOT / "csrc" / "ptx", tmp_path / "csrc" / "ptx")
    (tmp_path / "csrc" / "quant").mkdir()
    (tmp_path / "dsv3_kernels").mkdir()
    return tmp_path


def write(tree: Path, name: str, text: str, folder: str = "quant") -> None:
    (tree / "csrc" / folder).mkdir(exist_ok=True)
    (tree / "csrc" / folder / f"{name}.cu").write_text(text)


@needs_nvcc
def test_a_broken_kernel_is_an_error_and_the_others_are_kept(tree):
    write(tree, "good", PLAIN.format(name="good"))
    write(tree, "broken", "this is not CUDA")
    with pytest.raises(BuildError, match=r"image broken: nvcc failed\ncsrc/quant/broken.cu\(1\): error"):
        images.build(root=tree)
    manifest = images.read_manifest(tree)
    assert set(manifest["images"]) == {"good"} and manifest["missing"] == {"broken": "its build failed"}
    assert sorted(p.name for p in images.image_dir(tree).glob("*.*")) == [
        ".lock",
        "good.cubin",
        "good.ptx",
        "manifest.json",
    ]
    # A kernel that worked and breaks takes its image with it: nothing stale is left to be shipped.
    write(tree, "good", "nor this")
    with pytest.raises(BuildError, match=r"image broken[^$]*image good"):
        images.build(root=tree)
    assert not images.read_manifest(tree)["images"] and not list(images.image_dir(tree).glob("*.cubin"))


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("spills", SPILLS, "bytes spill stores"),
        ("frame", FRAME, "bytes stack frame"),
        ("ignored", IGNORED, "C7508"),
        ("serial", SERIAL, "C75"),
        ("empty", "__device__ int nothing;\n", "no kernel in it"),
    ],
)
def test_code_that_must_not_ship(tree, name, text, words):
    write(tree, name, text)
    with pytest.raises(BuildError, match=f"image {name}: ptxas made code that must not ship: .*{words}"):
        images.build(root=tree)
    assert not list(images.image_dir(tree).glob("*.cubin"))


def log_of(*lines: str) -> str:
    head = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\nptxas info    : Function properties for k\n"
    return head + "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n" + "\n".join(lines)


def test_every_code_is_found_in_the_log():
    used = "ptxas info    : Used 168 registers, used 2 barriers, 1024 bytes smem"
    assert images.check_ptxas("k", log_of(used)) == {
        "k": {"registers": 168, "barriers": 2, "shared": 1024, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    }
    for code in range(7504, 7521):
        with pytest.raises(BuildError, match=f"C{code}"):
            images.check_ptxas("k", log_of(f"ptxas info    : (C{code}) Potential Performance Loss: ..."))
    for code in (7503, 7521):
        images.check_ptxas("k", log_of(f"ptxas info    : (C{code}) something else"))
    # A device function that was not inlined is not an entry, and spills all the same.
    with pytest.raises(BuildError, match="8 bytes spill loads"):
        images.check_ptxas("k", log_of("    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads"))


@needs_nvcc
def test_images_are_rebuilt_when_a_header_changes_and_reused_otherwise(tree, monkeypatch):
    write(tree, "one", '#include "ptx/convert.cuh"\n' + PLAIN.format(name="one"))
    write(tree, "two", PLAIN.format(name="two"), folder="gemm")
    images.build(root=tree)
    compiled = []
    compile_image = images.compile_image
    monkeypatch.setattr(images, "compile_image", lambda name, *a: compiled.append(name) or compile_image(name, *a))
    images.build(root=tree)
    assert compiled == [] and images.stale(tree) == []
    header = tree / "csrc" / "ptx" / "convert.cuh"
    header.write_text(header.read_text() + "// changed\n")
    assert images.stale(tree) == ["one"]
    images.build(root=tree)
    assert compiled == ["one"]
    # An image that is not what the manifest says is not trusted.
    (images.image_dir(tree) / "two.cubin").write_bytes(b"something else")
    assert images.stale(tree) == ["two"]
    # One that is gone from the sources goes from the package.
    (tree / "csrc" / "gemm" / "two.cu").unlink()
    images.build(root=tree)
    assert set(images.read_manifest(tree)["images"]) == {"one"}
    assert not (images.image_dir(tree) / "two.ptx").exists()


def test_two_kernels_of_one_name(tree):
    write(tree, "same", PLAIN.format(name="a"))
    write(tree, "same", PLAIN.format(name="b"), folder="mla")
    with pytest.raises(BuildError, match="two kernels named same"):
        images.sources(tree)


def test_an_image_that_nobody_knows(tree):
    with pytest.raises(BuildError, match="no such image: none"):
        images.build(["none"], tree)


# Where the compiler comes from.


@pytest.fixture
def search(monkeypatch):
    """A machine without any compiler of its own."""
    for name in ("DSV3_KERNELS_NVCC", "DSV3_KERNELS_BUILD", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(toolchain, "_package_index_nvcc", lambda: None)
    monkeypatch.setattr(toolchain, "find_nvcc", toolchain.find_nvcc.__wrapped__)
    return monkeypatch


def fake_nvcc(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.7'\n")
    (folder / "ptxas").write_text("#!/bin/sh\n")
    for tool in (nvcc, folder / "ptxas"):
        tool.chmod(0o755)
    return nvcc


def test_the_order_of_the_search(search, tmp_path):
    assert toolchain.find_nvcc() is None
    places = ["path/bin", "home/bin", "package/bin", "named"]
    on_path, home, package, named = (fake_nvcc(tmp_path / place, "13.5") for place in places)
    search.setenv("PATH", f"{on_path.parent}:/bin:/usr/bin")
    assert (toolchain.find_nvcc().nvcc, toolchain.find_nvcc().origin) == (on_path, "PATH")
    search.setenv("CUDA_HOME", str(home.parent.parent))
    assert (toolchain.find_nvcc().nvcc, toolchain.find_nvcc().origin) == (home, "CUDA_HOME")
    search.setattr(toolchain, "_package_index_nvcc", lambda: package)
    assert (toolchain.find_nvcc().nvcc, toolchain.find_nvcc().origin) == (package, "package index")
    search.setenv("DSV3_KERNELS_NVCC", str(named))
    found = toolchain.find_nvcc()
    assert (found.nvcc, found.origin, found.version) == (named, "DSV3_KERNELS_NVCC", "13.5.7")


def test_compilers_that_do_not_serve(search, tmp_path):
    search.setenv("DSV3_KERNELS_NVCC", str(tmp_path / "none"))
    with pytest.raises(BuildError, match=r"DSV3_KERNELS_NVCC: .*none is not a file"):
        toolchain.find_nvcc()
    search.setenv("PATH", "/bin:/usr/bin")
    search.setenv("DSV3_KERNELS_NVCC", str(fake_nvcc(tmp_path / "old", "12.9")))
    with pytest.raises(BuildError, match=r"is nvcc 12\.9\.7; these kernels need 13\.0"):
        toolchain.find_nvcc()
    lonely = fake_nvcc(tmp_path / "lonely", "13.0")
    (lonely.parent / "ptxas").unlink()
    search.setenv("DSV3_KERNELS_NVCC", str(lonely))
    with pytest.raises(BuildError, match="no ptxas beside"):
        toolchain.find_nvcc()


def test_without_a_compiler_the_rest_installs_and_says_why(search, tree):
    write(tree, "one", PLAIN.format(name="one"))
    manifest = images.build(root=tree)
    assert manifest["images"] == {} and "no nvcc: set DSV3_KERNELS_NVCC" in manifest["missing"]["one"]
    assert native.reason_against() == "no C++ compiler: install g++"  # PATH is empty
    native.build(root=tree)
    assert images.read_manifest(tree)["host"] == "not built: no C++ compiler: install g++"


def test_with_nvcc_a_missing_part_is_an_error(search, tree, tmp_path):
    nvcc = fake_nvcc(tmp_path / "cuda", "13.5")
    search.setattr(toolchain, "find_nvcc", lambda: toolchain.Nvcc(nvcc, nvcc, "13.5.7", "PATH"))
    assert native.wanted()
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        native.build(root=tree)


def test_python_only_on_purpose(search, tree):
    search.setenv("DSV3_KERNELS_BUILD", "python")
    write(tree, "one", PLAIN.format(name="one"))
    native.build(root=tree)
    manifest = images.read_manifest(tree)
    assert manifest["host"] == manifest["missing"]["one"] == "not built: DSV3_KERNELS_BUILD=python"
    search.setenv("DSV3_KERNELS_BUILD", "cuda")
    with pytest.raises(BuildError, match="DSV3_KERNELS_BUILD is 'cuda'; it takes 'auto' or 'python'"):
        native.build(root=tree)


def test_what_a_build_asks_the_index_for(search):
    hooks = pytest.importorskip("build_backend.hooks")
    search.setattr(images, "stale", lambda: ["quantize_1x128"])
    assert hooks._native_requirements() == [toolchain.PYBIND11, *toolchain.NVCC_PARTS]
    search.setenv("DSV3_KERNELS_NVCC", "/somewhere/nvcc")
    assert hooks._native_requirements() == [toolchain.PYBIND11]
    search.delenv("DSV3_KERNELS_NVCC")
    search.setattr(images, "stale", list)  # images built elsewhere: no compiler is needed
    assert hooks._native_requirements() == [toolchain.PYBIND11]
    search.setenv("DSV3_KERNELS_BUILD", "python")
    assert hooks._native_requirements() == []
    search.delenv("DSV3_KERNELS_BUILD")
    search.setattr(sys, "platform", "darwin")
    assert hooks._native_requirements() == []


def test_a_host_file_that_does_not_compile(tmp_path):
    (tmp_path / "csrc" / "host").mkdir(parents=True)
    (tmp_path / "dsv3_kernels").mkdir()
    (tmp_path / "csrc" / "host" / "bindings.cpp").write_text("int main() { return nothing; }\n")
    with pytest.raises(BuildError, match=r"compiling csrc/host/bindings\.cpp failed"):
        host.build(tmp_path)
    assert not host.module_path(tmp_path).exists()


def test_jobs_are_limited_by_memory_and_by_hand(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert toolchain.jobs(1e9) == 1
    assert 1 <= toolchain.jobs(1e-9) <= 4096
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain.jobs(1.0) == 3
