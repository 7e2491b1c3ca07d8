"""`dsv3 train`: trains a model on text files, with checkpoints, a record per step and pictures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UserError
from .console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import Config
    from ..model.trainer import Trainer

HELP = "train a model on text files; under torchrun, experts are shared out and the rest is data parallel"
# Trains on two CPU cores in minutes; every size is one that FP8 products take.
TOY = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    "num_nextn_predict_layers": 1,
}
# Fields of `Options` (this file must not import torch to be listed): type, default, what it is.
FIELDS: tuple[tuple[str, type, int | float | None, str], ...] = (
    ("steps", int, 300, "optimizer steps of the whole run"),
    ("batch", int, 16, "sequences per step, over all ranks"),
    ("micro_batch", int, None, "sequences that a rank takes at once, gradients adding up in float32; all of its own"),
    ("sequence", int, 128, "tokens per sequence"),
    ("rate", float, 2.2e-4, "peak learning rate"),
    ("warm_up", int, 20, "steps to the peak rate"),
    ("weight_decay", float, 0.1, "of matrices"),
    ("clip", float, 1.0, "largest norm of the gradient"),
    ("balance_alpha", float, 1e-4, "weight of the sequence-wise balance loss"),
    ("bias_speed", float, 1e-3, "step of the routers' bias"),
    ("seed", int, 0, "of weights and batches"),
    ("expert_parallel", int, 1, "ranks that share the experts out"),
    ("save_every", int, 100, "steps between checkpoints"),
    ("keep", int, 2, "checkpoints kept"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text to train on; each file is a document")
    parser.add_argument("--separator", metavar="TEXT", help=r"also begins a document, for example '\n\n'")
    parser.add_argument("--out", type=Path, default=Path("dsv3-train"), metavar="DIR", help="default: dsv3-train")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--config", type=Path, metavar="JSON", help="config.json of a new model (default: a toy)")
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder of a model to start from")
    parser.add_argument("--recipe", choices=["fp8", "bf16", "float32"], default="fp8", help="default: fp8")
    parser.add_argument("--ramp", action="store_true", help="grow the batch from a fifth, as published")
    for name, kind, default, words in FIELDS:
        shown = "" if default is None else f" (default: {default})"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=default, metavar="N", help=words + shown)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: a GPU where there is one)")


def run(options: argparse.Namespace) -> int:
    """Exit code 0, 1 when the loss stops being a finite number, 2 for a request that cannot be served."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"torch is needed and cannot be imported ({error}); see `dsv3 info`") from None
    from ..model.trainer import NonFiniteError

    with _ranks(options, torch) as device:
        console = Console() if int(os.environ.get("RANK", "0")) == 0 else None
        try:
            trainer = _trainer(options, device)
            _describe(trainer, console)
            _loop(trainer, options.out, console)
        except NonFiniteError as error:
            print(f"dsv3 {error}", file=sys.stderr)
            return 1
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise UserError(str(error).removeprefix("train: ")) from error
    return 0


@contextlib.contextmanager
def _ranks(options: argparse.Namespace, torch: Any) -> Iterator[str]:
    """The device of this rank; under torchrun, inside a process group."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


def _trainer(options: argparse.Namespace, device: str) -> Trainer:
    from ..model.config import Config
    from ..model.trainer import Options, Trainer

    start: Config | Path = options.checkpoint or (Config.load(options.config) if options.config else Config(**TOY))  # type: ignore[arg-type]
    config = Config.load(start) if isinstance(start, Path) else start
    tokens, documents = _read(options, config)
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
    return Trainer(start, tokens, Options(**fields), documents=documents, out=options.out, device=device)


def _read(options: argparse.Namespace, config: Config) -> tuple[Tensor, Tensor]:
    """The files' tokens one after the other, and the number of each one's document."""
    import torch

    from ..model.generate import load_tokenizer

    folder = options.checkpoint or (options.config.parent if options.config else Path())
    tokenizer = load_tokenizer(folder, config.vocab_size) if folder != Path() else load_tokenizer("", config.vocab_size)
    if tokenizer is None:
        raise UserError(
            f"a vocabulary of {config.vocab_size} is too small for bytes, and {folder} has no tokenizer.json"
        )
    separator = (options.separator or "").encode().decode("unicode_escape")
    pieces: list[str] = []
    for file in options.files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}") from None
        pieces += [part for part in (text.split(separator) if separator else [text]) if part]
    ids = [tokenizer.encode(piece) for piece in pieces]
    if not any(ids):
        raise UserError(f"{', '.join(map(str, options.files))}: no text in there")
    documents = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(i) for i in ids]))
    return torch.tensor([token for i in ids for token in i]), documents


def _describe(trainer: Trainer, console: Console | None) -> None:
    if console is None:
        return
    config, o = trainer.config, trainer.options
    count = sum(p.numel() for p in trainer.model.parameters())
    console.line(
        f"{count / 1e6:.1f} M parameters{' on this rank' if trainer.world > 1 else ''}, "
        f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts, "
        f"MTP depth {config.num_nextn_predict_layers}; recipe {o.recipe}"
    )
    console.line(
        f"{len(trainer.tokens)} tokens; {o.steps} steps of {o.batch} x {o.sequence} on {trainer.world} rank(s), "
        f"{trainer.model.device}"
    )
    if trainer.step:
        console.line(f"going on after step {trainer.step}")


def _loop(trainer: Trainer, out: Path, console: Console | None) -> None:
    """Runs to the end; rank 0 shows, records and draws."""
    if console is None:
        for _ in trainer.run():
            pass
        return
    from ..model import plots

    out.mkdir(parents=True, exist_ok=True)
    log = out / "metrics.jsonl"
    records = _records(log, trainer.step)
    # What a killed run recorded after its last checkpoint is computed, and recorded, again.
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    with log.open("a") as file, console.progress(trainer.options.steps, trainer.step) as advance:
        for record in trainer.run():
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            advance(
                record["step"],
                f"loss {record['main']:.3f}  mtp {record['mtp']:.3f}  norm {record['grad_norm']:.2f}  "
                f"load {max(record['load'], default=1.0):.2f}  {record['tokens'] / record['seconds']:.0f} tokens/s",
            )
    console.line(f"{log}: a record per step; checkpoints beside it")
    try:
        plots.training(records, out / "training.png")
    except RuntimeError as error:
        console.line(str(error))
    else:
        console.line(f"{out / 'training.png'}: losses and expert load")


def _records(log: Path, until: int) -> list[dict[str, Any]]:
    if not log.is_file():
        return []
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last one
    return [record for record in map(json.loads, lines) if record["step"] <= until]
