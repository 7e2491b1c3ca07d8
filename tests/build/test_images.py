"""The images that ship: complete, made from these sources, and clean machine code."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess

import pytest
from tools import ROOT, needs_disassembler, needs_nvcc, sass

from build_backend import images, toolchain
from dsv3_kernels import _host, _images

IMAGES = _images.images()
KERNELS = _host.kernels()
SHARED_LIMIT = 232448  # bytes per CTA on compute capability 9.0 (CUDA programming guide, technical specifications)

# PTX instruction: the SASS it must have become.
MNEMONICS = {
    r"wgmma\.mma_async[\w.]*\.f32\.(?:bf16|f16)": r"HGMMA",
    r"wgmma\.mma_async[\w.]*\.e4m3": r"QGMMA",
    r"cp\.async\.bulk\.tensor\.\dd\.shared": r"UTMALDG",
    r"cp\.async\.bulk\.tensor\.\dd\.global": r"UTMASTG",
    r"setmaxnreg\.inc": r"USETMAXREG\.TRY_ALLOC",
    r"setmaxnreg\.dec": r"USETMAXREG\.DEALLOC",
}


@functools.cache
def entries(image: str) -> dict[str, str]:
    """{kernel: its PTX, head and body}."""
    text = IMAGES[image].ptx.read_text()
    return {re.match(r"\w+", part)[0]: part for part in re.split(r"\.visible \.entry ", text)[1:]}


@functools.cache
def machine_code(image: str) -> dict[str, str]:
    return sass(IMAGES[image].cubin)


def test_nothing_is_missing_or_stale():
    assert _images.missing() == {}
    assert images.stale() == []
    assert set(IMAGES) == set(images.sources())


@pytest.mark.parametrize("image", IMAGES.values(), ids=lambda i: i.name)
def test_files_are_the_recorded_ones(image):
    assert hashlib.sha256(image.ptx.read_bytes()).hexdigest() == image.ptx_hash
    assert hashlib.sha256(image.cubin.read_bytes()).hexdigest() == image.cubin_hash
    assert (ROOT / image.source).is_file() and image.nvcc


def test_images_are_small():
    assert sum(image.cubin.stat().st_size for image in IMAGES.values()) <= 4 << 20
    assert not [image.name for image in IMAGES.values() if b".visible .entry" in image.cubin.read_bytes()]


def test_the_table_of_kernels_is_what_the_images_hold():
    in_table = {name: row["image"] for name, row in KERNELS.items()}
    in_images = {kernel: image.name for image in IMAGES.values() for kernel in image.kernels}
    assert in_table == in_images


@pytest.mark.parametrize("kernel", KERNELS)
def test_launch_bounds_shared_memory_and_parameters(kernel):
    row = KERNELS[kernel]
    ptx = entries(row["image"])[kernel]
    head = ptx.partition("{")[0]
    assert re.search(r"\.(?:max|req)ntid (\d+)", head)[1] == str(row["threads"])
    assert row["shared_bytes"] + IMAGES[row["image"]].kernels[kernel]["shared"] <= SHARED_LIMIT
    parameters = re.findall(r"\.param \.align \d+ \.b8 \w+\[(\d+)\]", head)
    assert len(parameters) == 1 and int(parameters[0]) <= 4096
    assert row["cluster"] >= 1 and row["tile"]
    if cluster := re.search(r"\.reqnctapercluster (\d+)", head):
        assert int(cluster[1]) == row["cluster"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spill_was_recorded(kernel):
    figures = IMAGES[KERNELS[kernel]["image"]].kernels[kernel]
    assert figures["registers"] > 0
    assert figures["stack"] == figures["spill_stores"] == figures["spill_loads"] == 0


@needs_disassembler
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code(kernel):
    image = KERNELS[kernel]["image"]
    code, ptx = machine_code(image)[kernel], entries(image)[kernel]
    assert not re.findall(r"\b(?:LDL|STL)\b", code)
    for instruction, mnemonic in MNEMONICS.items():
        if re.search(instruction, ptx):
            assert re.search(mnemonic, code), f"{instruction} did not become {mnemonic}"


@needs_disassembler
@pytest.mark.parametrize("kernel", [name for name, row in KERNELS.items() if row["image"] == "quantize_1x128"])
def test_quantize_1x128_moves_vectors_and_divides_without_the_special_unit(kernel):
    code = machine_code("quantize_1x128")[kernel]
    assert len(re.findall(r"LDG\.E\.128", code)) == 4  # all of a warp's loads, before the first result is stored
    vectors = re.findall(r"STG\.E\.64" if "f32" not in kernel else r"STG\.E desc", code)
    assert len(vectors) >= 4
    assert code.rindex("LDG.E.128") < code.index("STG.E")
    assert "F2FP.SATFINITE.E4M3" in code and "FMNMX.NAN" in code and "UFMNMX" not in code
    # A reciprocal per block (with the slow half of each), none per element, of which there are 16 or 32 a lane.
    assert len(re.findall(r"MUFU\.RCP", code)) < 16


@needs_nvcc
def test_the_same_source_gives_the_same_ptx(tmp_path):
    nvcc = toolchain.find_nvcc()
    if nvcc.version != IMAGES["quantize_1x128"].nvcc:
        pytest.skip(f"the image is of nvcc {IMAGES['quantize_1x128'].nvcc}, this is {nvcc.version}")
    source = images.sources()["quantize_1x128"]
    entry = images.compile_image("quantize_1x128", source, nvcc, tmp_path)
    assert entry["ptx_hash"] == IMAGES["quantize_1x128"].ptx_hash
    assert str(ROOT) not in (tmp_path / "quantize_1x128.ptx").read_text()


@pytest.mark.parametrize("exact", [True, False])
def test_division_by_products_has_the_bits_of_ieee_division(tmp_path, exact):
    """And without its corrections, a reciprocal and a product, it has not: the check can fail."""
    header = (ROOT / "csrc" / "quant" / "divide.h").read_text()
    if not exact:
        first, last = header.index("  float negated ="), header.rindex("  return fmaf(")
        header = header[:first] + "  return quotient;" + header[header.index(";", last) + 1 :]
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "divide.h").write_text(header)
    program = tmp_path / "check"
    source = ROOT / "tests" / "build" / "divide_check.cpp"
    subprocess.run([toolchain.find_cxx(), "-std=c++17", "-O2", f"-I{tmp_path}", source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    cases, mismatches = map(int, re.search(r"(\d+) cases, (\d+) mismatches", result.stdout).groups())
    assert cases > 10**7
    assert (mismatches == 0) is exact, result.stdout
