"""One image per `.cu`: nvcc makes the PTX, ptxas turns that very file into the cubin, the manifest records both.

An image whose recorded source hash matches is taken as it is, wherever it was built; building needs no compiler then.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import toolchain
from .toolchain import ROOT, BuildError, Nvcc, note

ARCH = "sm_90a"
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--expt-relaxed-constexpr",
    "-Icsrc",
)
PTXAS_FLAGS = ("-O3", "-v", "-warn-spills", "-warn-lmem-usage", f"-arch={ARCH}")
FORMAT = 2
GIB_PER_JOB = 1.0

# setmaxnreg ignored (04 to 08), wgmma serialised or repaired (09 to 20): right results, a fraction of the speed.
_REJECTED_CODES = re.compile(r"\(?C75(?:0[4-9]|1\d|20)\)?")


def image_dir(root: Path = ROOT) -> Path:
    """Where images lie: in the source tree, so that an editable install finds them."""
    return root / "dsv3_kernels" / "images"


def sources(root: Path = ROOT) -> dict[str, Path]:
    """{image name: .cu file}. The name is the file's, so no two may share it."""
    found: dict[str, Path] = {}
    for path in sorted((root / "csrc").glob("*/*.cu")):
        if path.stem in found:
            raise BuildError(f"two kernels named {path.stem}: {found[path.stem]} and {path}")
        found[path.stem] = path
    return found


def _closure(path: Path, root: Path, seen: dict[Path, bytes]) -> None:
    """Adds a file and everything of this project that it includes."""
    seen[path] = data = path.read_bytes()
    for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', data, re.M):
        for folder in (path.parent, root / "csrc"):
            header = (folder / name.decode()).resolve()
            if header.is_file():
                if header not in seen:
                    _closure(header, root, seen)
                break


def source_hash(path: Path, root: Path = ROOT, *, recipe: Sequence[str] = NVCC_FLAGS + PTXAS_FLAGS) -> str:
    """SHA-256 over the recipe, the file and the project headers it includes, by their paths in the project."""
    seen: dict[Path, bytes] = {}
    root = root.resolve()
    _closure(path.resolve(), root, seen)
    digest = hashlib.sha256(json.dumps([FORMAT, *recipe]).encode())
    for name, data in sorted((file.relative_to(root).as_posix(), data) for file, data in seen.items()):
        digest.update(f"\0{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def read_manifest(root: Path = ROOT) -> dict[str, Any]:
    try:
        manifest = json.loads((image_dir(root) / "manifest.json").read_text())
    except (OSError, ValueError):
        manifest = {}
    if manifest.get("format") != FORMAT:
        manifest = {"format": FORMAT, "arch": ARCH, "images": {}}
    return manifest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_current(name: str, path: Path, root: Path, manifest: dict[str, Any]) -> bool:
    entry, folder = manifest["images"].get(name), image_dir(root)
    try:
        return (
            entry is not None
            and entry["source_hash"] == source_hash(path, root)
            and entry["ptx_hash"] == _sha256(folder / f"{name}.ptx")
            and entry["cubin_hash"] == _sha256(folder / f"{name}.cubin")
        )
    except (OSError, KeyError):
        return False


def stale(root: Path = ROOT) -> list[str]:
    """Names of the images that are missing or do not belong to the sources as they are now."""
    manifest = read_manifest(root)
    return [name for name, path in sources(root).items() if not _is_current(name, path, root, manifest)]


def _localise(ptx: str, root: Path) -> str:
    """Makes the debug paths relative: the same source then gives the same PTX, and the same hash, on every machine."""

    def relative(match: re.Match[str]) -> str:
        path = Path(match[2])
        inside = path.is_relative_to(root)
        return f'{match[1]}"{path.relative_to(root).as_posix() if inside else "cuda/" + path.name}"'

    return re.sub(r'^(\s*\.file\s+\d+\s+)"([^"]+)"', relative, ptx, flags=re.M)


def _without_lines(ptx: str) -> str:
    """The same code without line numbers: with them ptxas embeds the PTX text, two thirds of a cubin."""
    ptx = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{.*?^\s*\}\s*$", "", ptx, flags=re.M | re.S)
    return re.sub(r"^\s*\.(?:loc|file)\s[^\n]*\n", "", ptx, flags=re.M)


def parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    """{kernel: registers, static shared memory, stack frame, spills (bytes)} from the output of `ptxas -v`."""
    kernels: dict[str, dict[str, int]] = {}
    for block in re.split(r"(?=Compiling entry function ')", log)[1:]:
        name = re.match(r"Compiling entry function '([^']+)'", block)[1]

        def number(pattern: str, text: str = block) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        kernels[name] = {
            "registers": number(r"Used (\d+) registers"),
            "barriers": number(r"used (\d+) barriers"),
            "shared": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
        }
    return kernels


def check_ptxas(name: str, log: str) -> dict[str, dict[str, int]]:
    """The log's figures; BuildError for spills, stack frames, ignored setmaxnreg and serialised wgmma."""
    kernels = parse_ptxas(log)
    faults = [line.strip() for line in log.splitlines() if _REJECTED_CODES.search(line)]
    # Device functions that were not inlined have figures of their own, so the whole log is searched, not the entries.
    for amount, what in re.findall(r"\b(\d+) bytes (stack frame|spill stores|spill loads)", log):
        if int(amount):
            faults.append(f"{amount} bytes {what}")
    if not kernels:
        faults.append("no kernel in it")
    if faults:
        raise BuildError(f"image {name}: ptxas made code that must not ship: " + "; ".join(faults) + f"\n{log}")
    return kernels


def compile_image(name: str, path: Path, nvcc: Nvcc, out: Path, root: Path = ROOT) -> dict[str, Any]:
    """Writes `<out>/<name>.ptx` and `.cubin` and returns the manifest's entry; nothing is replaced on failure."""
    recorded = source_hash(path, root)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as folder:
        ptx, cubin = Path(folder) / f"{name}.ptx", Path(folder) / f"{name}.cubin"
        source = path.resolve().relative_to(root.resolve())
        status, nvcc_log = toolchain.run([nvcc.nvcc, *NVCC_FLAGS, "-ptx", "-o", ptx, source], cwd=root)
        if status:
            raise BuildError(f"image {name}: nvcc failed\n{nvcc_log}")
        ptx.write_text(_localise(ptx.read_text(), root.resolve()))
        bare = Path(folder) / "bare.ptx"
        bare.write_text(_without_lines(ptx.read_text()))
        status, log = toolchain.run([nvcc.ptxas, *PTXAS_FLAGS, "-o", cubin, bare], cwd=root)
        if status:
            raise BuildError(f"image {name}: ptxas failed\n{log}")
        kernels = check_ptxas(name, log)
        if recorded != source_hash(path, root):
            raise BuildError(f"image {name}: its sources changed while it was compiled")
        entry = {
            "source": source.as_posix(),
            "source_hash": recorded,
            "ptx_hash": _sha256(ptx),
            "cubin_hash": _sha256(cubin),
            "nvcc": nvcc.version,
            "kernels": kernels,
            "log": [line for line in log.splitlines() if "Compile time" not in line],
        }
        for file in (ptx, cubin):
            os.replace(file, out / file.name)
    return entry


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One build at a time per source tree."""
    import fcntl  # not on Windows, where only this module's hashes are of use

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    temporary = out / ".manifest.json"
    temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, out / "manifest.json")


def record(root: Path = ROOT, *, host: str, missing: str = "") -> None:
    """Notes in the manifest why the host module is missing ("" where it is built) and, for all images, why they are."""
    with _locked(image_dir(root)):
        manifest = read_manifest(root)
        manifest["host"] = host
        if missing:
            manifest["missing"] = dict.fromkeys(sources(root), missing)
        _write_manifest(image_dir(root), manifest)


def build(names: Sequence[str] | None = None, root: Path = ROOT) -> dict[str, Any]:
    """Brings the images up to date (all of them, or those named) and returns the manifest.

    With a compiler a failure is an error, raised after the others are done and recorded. Without one, what is missing
    stays missing and the manifest's "missing" says why.
    """
    out = image_dir(root)
    with _locked(out):
        manifest = read_manifest(root)
        wanted = sources(root)
        if unknown := set(names or ()) - set(wanted):
            raise BuildError(f"no such image: {', '.join(sorted(unknown))}; there are: {', '.join(wanted)}")
        todo = [name for name in wanted if not _is_current(name, wanted[name], root, manifest)]
        if names is not None:
            todo = [name for name in todo if name in names]
        nvcc = toolchain.find_nvcc() if todo else None
        failures: list[BuildError] = []
        if todo and nvcc:
            note(f"nvcc {nvcc.version} ({nvcc.origin}): compiling {', '.join(todo)}")
            results = toolchain.in_parallel(
                todo, lambda name: compile_image(name, wanted[name], nvcc, out, root), GIB_PER_JOB
            )
            for name, result in zip(todo, results, strict=True):
                if isinstance(result, BuildError):
                    failures.append(result)
                    manifest["images"].pop(name, None)
                else:
                    manifest["images"][name] = result
        for name in set(manifest["images"]) - set(wanted):
            del manifest["images"][name]
        for name in [n for n in wanted if not _is_current(n, wanted[n], root, manifest)]:
            manifest["images"].pop(name, None)
        for file in out.iterdir():
            if file.suffix in (".ptx", ".cubin") and file.stem not in manifest["images"]:
                file.unlink()
        reason = "its build failed" if nvcc else "no nvcc: set DSV3_KERNELS_NVCC or CUDA_HOME, or install one"
        manifest["missing"] = {name: reason for name in wanted if name not in manifest["images"]}
        _write_manifest(out, manifest)
    if failures:
        raise BuildError("\n\n".join(str(failure) for failure in failures))
    return manifest
