"""Every wrapper in csrc/ptx compiles for sm_90a, alone in a kernel, to the machine instruction it is named after."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools import ROOT, needs_nvcc, sass

from build_backend import images, toolchain

# wrapper: (a call, what its SASS must contain). `b`, `s` are shared addresses, `m` a tensor map, `g` global memory,
# `d` accumulators, `a` fragments, `u` a run-time integer, `f` a run-time float; `out(...)` keeps a result alive.
BF16 = r"HGMMA\.64x{n}x16\.F32\.BF16"
E4M3 = r"QGMMA\.64x{n}x32\.F32\.E4M3\.E4M3"
CALLS: dict[str, tuple[str, str]] = {
    "cvta_to_shared": ("out(ptx::cvta_to_shared(shared + u))", r"STG"),
    "mbarrier_init": ("ptx::mbarrier_init(b, 1)", r"SYNCS\.EXCH\.64"),
    "mbarrier_inval": ("ptx::mbarrier_inval(b)", r"SYNCS\.CCTL\.IV"),
    "mbarrier_arrive": ("ptx::mbarrier_arrive(b)", r"SYNCS\.ARRIVE\.TRANS64\.A1T0"),
    "mbarrier_arrive_cluster": ("ptx::mbarrier_arrive_cluster(b)", r"SYNCS\.ARRIVE\.TRANS64\.RED\.A1T0"),
    "mbarrier_arrive_release_cluster": ("ptx::mbarrier_arrive_release_cluster(b)", r"MEMBAR\.ALL\.GPU"),
    "mbarrier_arrive_expect_tx": ("ptx::mbarrier_arrive_expect_tx(b, u)", r"SYNCS\.ARRIVE\.TRANS64 "),
    "mbarrier_expect_tx": ("ptx::mbarrier_expect_tx(b, u)", r"SYNCS\.ARRIVE\.TRANS64\.RED\.A0TR"),
    "mbarrier_test_wait_parity": ("out(ptx::mbarrier_test_wait_parity(b, u))", r"SYNCS\.PHASECHK\.TRANS64 "),
    "mbarrier_try_wait_parity": ("out(ptx::mbarrier_try_wait_parity(b, u))", r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT"),
    "mbarrier_wait_parity": ("ptx::mbarrier_wait_parity(b, u)", r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT"),
    "mbarrier_wait_parity_cluster": (
        "ptx::mbarrier_wait_parity_cluster(b, u)",
        r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT[\s\S]*CCTL\.IVALL",
    ),
    "fence_proxy_async_shared": ("ptx::fence_proxy_async_shared()", r"FENCE\.VIEW\.ASYNC\.S"),
    "fence_proxy_async_global": ("ptx::fence_proxy_async_global()", r"FENCE\.VIEW\.ASYNC\.G"),
    "fence_mbarrier_init": ("ptx::fence_mbarrier_init()", r"EXIT"),  # ptxas 13.5 needs no instruction for it
    "fence_acq_rel_gpu": ("ptx::fence_acq_rel_gpu()", r"MEMBAR\.ALL\.GPU"),
    "fence_acq_rel_sys": ("ptx::fence_acq_rel_sys()", r"MEMBAR\.ALL\.SYS"),
    "ld_acquire_gpu": ("out(ptx::ld_acquire_gpu(g))", r"LDG\.E\.STRONG\.GPU[\s\S]*CCTL\.IVALL"),
    "ld_acquire_sys": ("out(ptx::ld_acquire_sys(g))", r"LDG\.E\.STRONG\.SYS[\s\S]*CCTL\.IVALL"),
    "ld_relaxed_sys": ("out(ptx::ld_relaxed_sys(g))", r"LDG\.E\.STRONG\.SYS"),
    "st_release_gpu": ("ptx::st_release_gpu(g, u)", r"MEMBAR\.ALL\.GPU[\s\S]*STG\.E\.STRONG\.GPU"),
    "st_release_sys": ("ptx::st_release_sys(g, u)", r"MEMBAR\.ALL\.SYS[\s\S]*STG\.E\.STRONG\.SYS"),
    "red_release_gpu_add": ("ptx::red_release_gpu_add(g, u)", r"MEMBAR\.ALL\.GPU[\s\S]*REDG\.E\.ADD\.STRONG\.GPU"),
    "red_release_sys_add": ("ptx::red_release_sys_add(g, u)", r"MEMBAR\.ALL\.SYS[\s\S]*REDG\.E\.ADD\.STRONG\.SYS"),
    "atom_acq_rel_gpu_add": ("out(ptx::atom_acq_rel_gpu_add(g, u))", r"ATOMG\.E\.ADD\.STRONG\.GPU"),
    "cluster_ctarank": ("out(ptx::cluster_ctarank())", r"SR_CgaCtaId|UCGACtaId|CgaCtaId"),
    "cluster_nctarank": ("out(ptx::cluster_nctarank())", r"STG"),
    "mapa": ("out(ptx::mapa(b, u))", r"PRMT|LEA"),
    "ld_shared_cluster": ("out(ptx::ld_shared_cluster(b))", r"LD\.E|LDS"),
    "st_shared_cluster": ("ptx::st_shared_cluster(b, u)", r"ST\.E|STS"),
    "st_async": ("ptx::st_async(b, u, b + 8)", r"STAS"),
    "st_async_v4": ("ptx::st_async_v4(b, f, f, f, f, b + 16)", r"STAS\.128"),
    "barrier_cluster_arrive": (
        "ptx::barrier_cluster_arrive(); ptx::barrier_cluster_wait()",
        r"MEMBAR\.ALL\.GPU[\s\S]*UCGABAR_ARV",
    ),
    "barrier_cluster_arrive_relaxed": (
        "ptx::barrier_cluster_arrive_relaxed(); ptx::barrier_cluster_wait()",
        r"UCGABAR_ARV",
    ),
    "barrier_cluster_wait": ("ptx::barrier_cluster_arrive_relaxed(); ptx::barrier_cluster_wait()", r"UCGABAR_WAIT"),
    "bar_sync": ("ptx::bar_sync(1, 64)", r"BAR\.SYNC"),
    "bar_arrive": ("ptx::bar_arrive(1, 64)", r"BAR\.ARV"),
    "elect_sync": ("if (ptx::elect_sync()) out(u)", r"ELECT"),
    "setmaxnreg_inc": ("ptx::setmaxnreg_inc<240>()", r"USETMAXREG\.TRY_ALLOC\.CTAPOOL"),
    "setmaxnreg_dec": ("ptx::setmaxnreg_dec<40>()", r"USETMAXREG\.DEALLOC\.CTAPOOL 0x28"),
    "griddepcontrol_wait": ("ptx::griddepcontrol_wait()", r"ACQBULK"),
    "griddepcontrol_launch_dependents": ("ptx::griddepcontrol_launch_dependents()", r"PREEXIT"),
    "cvt_rn_bf16x2_f32": ("out(ptx::cvt_rn_bf16x2_f32(f, f + 1))", r"F2FP\.BF16"),
    "cvt_rn_f16x2_f32": ("out(ptx::cvt_rn_f16x2_f32(f, f + 1))", r"F2FP\.F16"),
    "cvt_rn_satfinite_e4m3x2_f32": ("out(ptx::cvt_rn_satfinite_e4m3x2_f32(f, f + 1))", r"F2FP\.SATFINITE\.E4M3"),
    "cvt_rn_satfinite_e4m3x4_f32": (
        "out(ptx::cvt_rn_satfinite_e4m3x4_f32(f, f + 1, f + 2, f + 3))",
        r"F2FP\.SATFINITE\.E4M3[\s\S]*F2FP\.SATFINITE\.E4M3",
    ),
    "cvt_rn_f16x2_e4m3x2": ("out(ptx::cvt_rn_f16x2_e4m3x2(u))", r"F2FP\.F16\.E4M3"),
    "mul_rn_bf16x2": ("out(ptx::mul_rn_bf16x2(u, g[1]))", r"H(MUL|FMA)2(\.MMA)?\.BF16"),
    "max_nan_f32": ("out(ptx::max_nan_f32(f, __uint_as_float(g[1])))", r"FMNMX\.NAN"),
    "ex2_approx_ftz_f32": ("out(ptx::ex2_approx_ftz_f32(f))", r"MUFU\.EX2"),
    "stmatrix_x4": ("ptx::stmatrix_x4(s, u, u, u, u)", r"STSM\.16\.M88\.4"),
    "stmatrix_x2_trans": ("ptx::stmatrix_x2_trans(s, u, u)", r"STSM\.16\.MT88\.2"),
    "stmatrix_x4_trans": ("ptx::stmatrix_x4_trans(s, u, u, u, u)", r"STSM\.16\.MT88\.4"),
    "ldmatrix_x4": ("ptx::ldmatrix_x4(a, s); out(a[0] ^ a[1] ^ a[2] ^ a[3])", r"LDSM\.16\.M88\.4"),
    "ldmatrix_x4_trans": ("ptx::ldmatrix_x4_trans(a, s); out(a[0] ^ a[1] ^ a[2] ^ a[3])", r"LDSM\.16\.MT88\.4"),
    "prefetch_tensormap": ("ptx::prefetch_tensormap(&m)", r"UTMACCTL\.PF"),
    "cp_async_bulk_prefetch_tensor_2d": ("ptx::cp_async_bulk_prefetch_tensor_2d(&m, u, 0)", r"UTMAPF\.L2\.2D"),
    "cp_async_bulk_g2s": ("ptx::cp_async_bulk_g2s(s, g, 64, b)", r"UBLKCP\.S\.G"),
    "cp_async_bulk_s2g": ("ptx::cp_async_bulk_s2g(g, s, 64)", r"UBLKCP\.G\.S"),
    "cp_async_bulk_s2s": ("ptx::cp_async_bulk_s2s(s, s + 1024, 64, b)", r"UBLKCP\.S\.S"),
    "cp_async_bulk_commit_group": ("ptx::cp_async_bulk_commit_group()", r"UTMACMDFLUSH"),
    "cp_async_bulk_wait_group": ("ptx::cp_async_bulk_wait_group<1>()", r"DEPBAR\.LE SB0, 0x1"),
    "cp_async_bulk_wait_group_read": ("ptx::cp_async_bulk_wait_group_read<1>()", r"DEPBAR\.LE SB0, 0x1"),
    "cp_async_ca_4": ("ptx::cp_async_ca_4(s, g)", r"LDGSTS\.E "),
    "cp_async_mbarrier_arrive_noinc": ("ptx::cp_async_mbarrier_arrive_noinc(b)", r"ARRIVES\.LDGSTSBAR\.64"),
    "wgmma_fence": ("ptx::wgmma_fence()", r"WARPGROUP\.ARRIVE"),
    "wgmma_commit_group": ("ptx::wgmma_commit_group()", r"gsb0"),
    "wgmma_wait_group": ("ptx::wgmma_wait_group<1>()", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1"),
    "pin": ("float d[8]; for (float& x : d) x = f; ptx::pin(d); store(g, d)", r"STG"),
    "matrix_descriptor": ("out(ptx::matrix_descriptor(s, 16, 1024, ptx::Swizzle::k128B))", r"STG"),
}
for rank in (2, 3, 4):
    at = ", ".join(["u"] + ["0"] * (rank - 1))
    load, store, reduce = f"cp_async_bulk_tensor_{rank}d", f"cp_async_bulk_tensor_{rank}d_s2g", ""
    CALLS[f"{load}_g2s"] = (f"ptx::{load}_g2s(s, &m, b, {at})", rf"UTMALDG\.{rank}D ")
    CALLS[f"{load}_g2s_hint"] = (f"ptx::{load}_g2s_hint(s, &m, b, {at}, ptx::kEvictFirst)", rf"UTMALDG\.{rank}D ")
    CALLS[store] = (f"ptx::{store}(&m, s, {at})", rf"UTMASTG\.{rank}D ")
    if rank < 4:
        CALLS[f"{load}_g2s_multicast"] = (
            f"ptx::{load}_g2s_multicast(s, &m, b, {at}, 3)",
            rf"UTMALDG\.{rank}D\.MULTICAST",
        )
        add = f"cp_reduce_async_bulk_tensor_{rank}d_add"
        CALLS[add] = (f"ptx::{add}(&m, s, {at})", rf"UTMAREDG\.{rank}D\.ADD")
COLUMNS = (8, 16, 32, 64, 96, 128, 160, 192, 256)
MMA = {
    "wgmma_bf16_ss": ("da, db, 0", BF16, r"gdesc\[UR\d+\]"),
    "wgmma_bf16_rs": ("a, db, 0", BF16, r"R\d+, gdesc"),
    "wgmma_e4m3_ss": ("da, db, 0", E4M3, r"gdesc\[UR\d+\]"),
    "wgmma_e4m3_rs": ("a, db, 0", E4M3, r"R\d+, gdesc"),
}

PRELUDE = """
template <class T> __device__ void keep(uint32_t* g, T value) { *reinterpret_cast<volatile T*>(g + 64) = value; }
#define out(value) keep(g, value)
template <int N> __device__ __forceinline__ void store(uint32_t* g, float (&d)[N]) {
  for (int i = 0; i < N; ++i) reinterpret_cast<float*>(g)[threadIdx.x * N + i] = d[i];
}
"""


KERNEL = """
extern "C" __global__ void __launch_bounds__(256, 1)
{name}(const __grid_constant__ TensorMap m, uint32_t* g, int u, float f) {{
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), b = s + 8192;
  uint32_t a[4] = {{g[0], g[1], g[2], g[3]}};
  {body};
}}
"""
MMA_BODY = """
  float d[{c}];
  const uint64_t da = ptx::matrix_descriptor(s, 16, 1024, ptx::Swizzle::k128B), db = da + 512;
  ptx::wgmma_fence();
  ptx::{name}(d, {operands});
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  store(g, d)
"""


def headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((ROOT / "csrc" / "ptx").glob("*.cuh"))}


def wrappers() -> set[str]:
    found: set[str] = set()
    for text in headers().values():
        found |= set(re.findall(r"__device__ __forceinline__ [\w ]+?\b(\w+)\(", text))
    return found


def test_every_wrapper_is_in_the_table():
    assert wrappers() == set(CALLS) | set(MMA), "a wrapper needs a call and a mnemonic in CALLS"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    """SASS of a kernel per wrapper and shape."""
    folder: Path = tmp_path_factory.mktemp("ptx")
    lines = [f'#include "ptx/{name}"' for name in headers()] + [PRELUDE]
    lines += [KERNEL.format(name=f"call_{name}", body=call) for name, (call, _) in CALLS.items()]
    lines += [
        KERNEL.format(name=f"{name}_{n}", body=MMA_BODY.format(name=name, c=n // 2, operands=operands))
        for name, (operands, _, _) in MMA.items()
        for n in COLUMNS
    ]
    source = folder / "all.cu"
    source.write_text("\n".join(lines))
    nvcc = toolchain.find_nvcc()
    flags = [*(flag for flag in images.NVCC_FLAGS if flag != "-Icsrc"), "-diag-suppress=177"]
    status, log = toolchain.run(
        [nvcc.nvcc, *flags, f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas", "-v", "-o", folder / "all.cubin", source]
    )
    assert status == 0, log
    assert not re.search(r"C75\d\d.*'wgmma_", log), log  # a whole pipeline (below) is not repaired
    return sass(folder / "all.cubin")


@needs_nvcc
@pytest.mark.parametrize("name", CALLS)
def test_instruction(compiled, name):
    assert re.search(CALLS[name][1], compiled[f"call_{name}"]), compiled[f"call_{name}"]


@needs_nvcc
@pytest.mark.parametrize("name", MMA)
@pytest.mark.parametrize("n", COLUMNS)
def test_wgmma(compiled, name, n):
    _, mnemonic, operand = MMA[name]
    text = compiled[f"{name}_{n}"]
    found = re.findall(mnemonic.format(n=n) + r"[^;]*;", text)
    assert len(found) == 1 and re.search(operand, found[0]), text
    assert "WARPGROUP.ARRIVE" in text and "WARPGROUP.DEPBAR" in text
