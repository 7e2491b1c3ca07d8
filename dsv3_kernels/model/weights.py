"""Reading and writing the released checkpoint layout: safetensors shards, FP8 codes beside `weight_scale_inv`.

Everything is checked against the file headers before memory is taken, and tensors are then read one at a time:
a load that fails leaves nothing behind, and one that succeeds never holds more than the model and one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dsv3_kernels as dk

from .layers import BLOCK, Gate, Linear

if TYPE_CHECKING:
    from .model import DeepSeekV3

FP8 = torch.float8_e4m3fn
STORAGE = {"fp8": FP8, "bf16": torch.bfloat16, "float32": torch.float32}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": FP8}
_SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


# -- what the model's tensors are called in a checkpoint -------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """One released tensor and where it lies in the model's storage."""

    name: str
    module: Any
    attribute: str
    shape: tuple[int, ...]
    expert: int | None = None  # place in the stack
    part: int = 0

    @property
    def quantizable(self) -> bool:
        return isinstance(self.module, Linear) and self.module.quantizable

    @property
    def scale_name(self) -> str:
        return f"{self.name}_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return tuple(-(-n // BLOCK) for n in self.shape)

    def view(self, tensor: Tensor, unit: int = 1) -> Tensor:
        """The piece inside a tensor laid out as the module's weight (or, with unit=128, as its scales)."""
        if not isinstance(self.module, Linear):
            return tensor
        storage = self.module.weight.dtype
        start = sum(self.module.stride(i, storage) for i in range(self.part))
        rows, columns = (-(-n // unit) for n in self.shape)
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor[start // unit : start // unit + rows, :columns]


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Every released tensor of the model, the MTP layer's own ones included, its shared copies not."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            parent = path.rpartition(".")[0]
            for index, expert in enumerate(module.experts or [None]):
                where = parent if expert is None else f"{parent}.{expert}"
                for part, (name, rows) in enumerate(module.parts):
                    name = f"{where}.{name}.weight" if where else f"{name}.weight"
                    shape, place = (rows, module.columns), None if expert is None else index
                    yield Piece(name, module, "weight", shape, place, part)
        else:
            for attribute, parameter in module.named_parameters(recurse=False):
                yield Piece(f"{path}.{attribute}", module, attribute, tuple(parameter.shape))
            if isinstance(module, Gate):
                bias = module.e_score_correction_bias
                yield Piece(f"{path}.e_score_correction_bias", module, "e_score_correction_bias", tuple(bias.shape))


@torch.no_grad()
def initialise(model: DeepSeekV3, seed: int) -> None:
    """Fresh weights, each a function of the seed and its released name: norms 1, biases 0, matrices normal with
    deviation 0.02; those that write to the residual stream less."""
    for piece in pieces(model):
        target = piece.view(getattr(piece.module, piece.attribute))
        if piece.name.endswith("bias"):
            target.zero_()
        elif "norm" in piece.name.split(".")[-2]:
            target.fill_(1.0)
        else:
            inward = piece.name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if inward else 0.02
            digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            target.copy_(torch.randn(piece.shape, generator=generator) * deviation)


# -- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """A tensor in a file: where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """The headers of a checkpoint folder. ValueError or FileNotFoundError for what is missing, cut or malformed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"checkpoint: no folder {self.folder}")
        self.entries: dict[str, Entry] = {}
        if (self.folder / _INDEX).is_file():
            self._read_index()
        elif (self.folder / _SINGLE).is_file():
            self.entries = _read_header(self.folder / _SINGLE)
        else:
            raise FileNotFoundError(f"checkpoint: {self.folder} has neither {_SINGLE} nor {_INDEX}")

    def _read_index(self) -> None:
        try:
            places = json.loads((self.folder / _INDEX).read_text())["weight_map"]
            files = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint: {_INDEX} is not an index with a weight_map: {error!r}") from error
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent:
            raise FileNotFoundError(f"checkpoint: {len(absent)} of {len(files)} shards missing: {_some(absent)}")
        headers = {file: _read_header(self.folder / file) for file in files}
        for name, file in places.items():
            if name not in headers[file]:
                raise ValueError(f"checkpoint: {file} lacks {name}, which the index puts there")
            self.entries[name] = headers[file][name]

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in memory of its own."""
        entry = self.entries[name]
        dtype = {**_DTYPES, **_SCALE_DTYPES}[entry.dtype]
        out = torch.empty(entry.shape, dtype=dtype)
        if out.numel():
            with entry.file.open("rb", buffering=0) as file:
                file.seek(entry.begin)
                buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise ValueError(f"checkpoint: {entry.file.name} ended inside {name}")
                    done += count
        return out

    def check(self, wanted: list[Piece], layers: int) -> None:
        """ValueError unless every piece is there with its shape and a known dtype, and nothing unknown is.

        Tensors of layers >= `layers` that no piece names (an MTP layer that is off, its copies of embedding and head)
        are left alone.
        """
        absent = [piece.name for piece in wanted if piece.name not in self.entries]
        if absent:
            raise ValueError(f"checkpoint: {len(absent)} of {len(wanted)} tensors missing: {_some(absent)}")
        known = set()
        for piece in wanted:
            entry = self.entries[piece.name]
            known |= {piece.name, piece.scale_name}
            if entry.shape != piece.shape:
                raise ValueError(f"checkpoint: {piece.name}: got shape {list(entry.shape)}, wanted {list(piece.shape)}")
            if entry.dtype not in _DTYPES or (entry.dtype == "F8_E4M3" and len(piece.shape) != 2):
                raise ValueError(f"checkpoint: {piece.name}: got dtype {entry.dtype}, wanted {' or '.join(_DTYPES)}")
            if entry.dtype != "F8_E4M3":
                continue
            scale = self.entries.get(piece.scale_name)
            if scale is None:
                warnings.warn(
                    f"checkpoint: {piece.name} is FP8 without {piece.scale_name}: taken as scale 1", stacklevel=4
                )
            elif scale.shape != piece.scale_shape or scale.dtype not in _SCALE_DTYPES:
                raise ValueError(
                    f"checkpoint: {piece.scale_name}: got {scale.dtype} of shape {list(scale.shape)}, "
                    f"wanted F32 of shape {list(piece.scale_shape)}"
                )
        unknown = [n for n in self.entries if n not in known and not n.endswith("inv_freq") and _layer(n) < layers]
        if unknown:
            raise ValueError(f"checkpoint: {len(unknown)} tensors that this model does not have: {_some(unknown)}")


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit() else -1


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _read_header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"checkpoint: {file.name} is truncated: {size} bytes end inside its header")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: Entry(file, v["dtype"], tuple(v["shape"]), *(8 + length + at for at in v["data_offsets"]))
                for name, v in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint: {file.name} has no safetensors header: {error!r}") from error
    end = max((entry.end for entry in entries.values()), default=0)
    if end > size:
        raise ValueError(f"checkpoint: {file.name} is truncated: {size} bytes, its header describes {end}")
    return entries


def materialise(model: nn.Module, weights: str, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device its storage: unset floats, zero FP8 codes (so that padding is zero)."""
    floats = dtype if weights == "fp8" else STORAGE[weights]
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if weights == "fp8" and isinstance(module, Linear) and module.quantizable:
                shape = module.shape(FP8)
                blocks = (*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:]))
                module.scale = torch.zeros(blocks, dtype=torch.float32, device=device)
                data = torch.zeros(shape, dtype=FP8, device=device)
            else:
                data = torch.empty(parameter.shape, dtype=floats, device=device)
            setattr(module, name, nn.Parameter(data, requires_grad=weights != "fp8"))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, nn.Buffer(torch.empty_like(buffer, device=device)))


@torch.no_grad()
def fill(model: DeepSeekV3, checkpoint: Checkpoint) -> None:
    """Read every piece, in file order, into storage that `materialise` made."""
    pow2 = model.config.pow2_scale
    order = {piece.name: piece for piece in pieces(model)}
    for name in sorted(order, key=lambda n: (checkpoint.entries[n].file, checkpoint.entries[n].begin)):
        piece = order[name]
        data = checkpoint.read(name)
        target = piece.view(getattr(piece.module, piece.attribute))
        if data.dtype != FP8 and target.dtype != FP8:
            target.copy_(data)
            continue
        data = data.to(target.device)
        if data.dtype == FP8:
            stored = piece.scale_name in checkpoint.entries
            scale = checkpoint.read(piece.scale_name).float() if stored else torch.ones(piece.scale_shape)
            scale = scale.to(target.device)
            if target.dtype != FP8:
                target.copy_(dk.dequantize(data, scale, dtype=torch.float32))
                continue
        else:
            data, scale = dk.quantize_128x128(data.float(), pow2_scale=pow2)
        target.copy_(data)
        piece.view(piece.module.scale, BLOCK).copy_(scale)


# -- writing ---------------------------------------------------------------------------------------------------------
def save(model: DeepSeekV3, folder: str | Path, weights: str, max_shard_bytes: int) -> None:
    """Write config.json and shards, one shard in memory at a time; the folder changes only when all is written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        floats = STORAGE[weights]
        if weights == "fp8":  # an FP8 model keeps its other tensors as they are; others get the released bfloat16
            floats = model.lm_head.weight.dtype if model.weights == "fp8" else torch.bfloat16
        _write_shards(model, partial, weights == "fp8", floats, max_shard_bytes)
        model.config.saved_as(weights == "fp8", str(floats).removeprefix("torch.")).save(partial)
        for old in [*folder.glob("model*.safetensors"), folder / _INDEX]:
            old.unlink(missing_ok=True)
        for new in sorted(partial.iterdir(), reverse=True):
            os.replace(new, folder / new.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(model: DeepSeekV3, folder: Path, fp8: bool, floats: torch.dtype, limit: int) -> None:
    named = [(piece.name, piece) for piece in pieces(model)]
    shared = {piece.name: piece for _, piece in named}
    for depth in range(model.config.num_nextn_predict_layers):
        prefix = f"model.layers.{model.config.num_hidden_layers + depth}."
        named.append((f"{prefix}embed_tokens.weight", shared["model.embed_tokens.weight"]))
        named.append((f"{prefix}shared_head.head.weight", shared["lm_head.weight"]))
    shards: list[list[tuple[str, Piece]]] = [[]]
    size = total = 0
    for name, piece in named:
        one_byte = fp8 and piece.quantizable
        count = math.prod(piece.shape) * (1 if one_byte else floats.itemsize)
        count += 4 * math.prod(piece.scale_shape) if one_byte else 0
        if shards[-1] and size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, piece))
        size += count
        total += count
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, piece in shard:
            tensors |= _export(name, piece, fp8, floats, model.config.pow2_scale)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _export(name: str, piece: Piece, fp8: bool, floats: torch.dtype, pow2_scale: bool) -> dict[str, Tensor]:
    """The piece as it goes into a file: one tensor, or codes and scales."""
    data = piece.view(getattr(piece.module, piece.attribute).detach())
    scale = piece.view(piece.module.scale, BLOCK) if data.dtype == FP8 else None
    if fp8 and piece.quantizable:
        if scale is None:
            data, scale = dk.quantize_128x128(data.float().contiguous(), pow2_scale=pow2_scale)
        return {name: for_file(data), f"{name}_scale_inv": for_file(scale)}
    if scale is not None:
        data = dk.dequantize(data.contiguous(), scale.contiguous(), dtype=torch.float32)
    return {name: for_file(data if piece.attribute == "e_score_correction_bias" else data.to(floats))}


def for_file(tensor: Tensor) -> Tensor:
    return tensor.cpu().clone(memory_format=torch.contiguous_format)
