"""Trains the demo checkpoint: a small DeepSeek-V3 with the released head geometry, on bytes of the King James Bible.

    python -m dsv3_kernels.model.pretrain --out DIR

Everything is a function of the seed: each weight is drawn from (seed, released name), each batch from (seed, step).
Written to DIR: the checkpoint in the released FP8 layout, train.jsonl (a line each ten steps) and curve.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import corpus, train
from .config import Config
from .model import DeepSeekV3
from .weights import initialise

STEPS = 3000
PEAK_RATE = 3e-3
WARM_UP = 100
STEADY = 0.2  # share of the steps at the peak rate; then a straight line down
LONG = 0.8  # share of the steps on short windows; then the context is extended
SHORT_BATCH, LONG_BATCH = (16, 256), (8, 512)  # windows, bytes each
BALANCE_ALPHA, BIAS_SPEED, MTP_WEIGHT = 1e-4, 1e-3, 0.3
HELD_OUT_BYTES = 32768  # of the held-out text, for the records


def config() -> Config:
    """4 heads of the released geometry (latent 512, rope 64, nope and value 128), 1 dense and 2 MoE layers, MTP."""
    return Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        q_lora_rank=160,
        max_position_embeddings=512,
        num_nextn_predict_layers=1,
    )


def rate(step: int, steps: int) -> float:
    """Learning rate: a linear warm-up, a plateau, a line down to 2% of the peak."""
    done = step / steps
    return PEAK_RATE * min((step + 1) / WARM_UP, 1.0) * (1.0 if done < STEADY else max(0.02, (1 - done) / (1 - STEADY)))


def batches(text: Tensor, steps: int) -> Iterator[Tensor]:
    """Windows [B, S] at random places of the text."""
    generator = torch.Generator().manual_seed(1234)
    for step in range(steps):
        count, width = SHORT_BATCH if step < LONG * steps else LONG_BATCH
        starts = torch.randint(len(text) - width, (count,), generator=generator)
        yield torch.stack([text[start : start + width] for start in starts.tolist()])


def optimizer(model: DeepSeekV3) -> torch.optim.AdamW:
    """AdamW as published (section 4.2), weight decay on matrices only."""
    parameters = dict(model.named_parameters())
    decayed = {name for name, p in parameters.items() if p.ndim > 1 and "embed_tokens" not in name}
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def as_tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


@torch.no_grad()
def bits_per_byte(model: DeepSeekV3, text: bytes, width: int = LONG_BATCH[1], batch: int = 8) -> float:
    """Mean -log2 p of every byte of `text` but the first of each window of `width`."""
    tokens = as_tokens(text)
    windows = list(tokens[: len(tokens) // width * width].view(-1, width).split(batch))
    if len(tokens) % width > 1:
        windows.append(tokens[len(tokens) // width * width :][None])
    bits, count = 0.0, 0
    for window in windows:
        logits = model(window)[:, :-1]
        targets = window[:, 1:]
        bits -= logits.log_softmax(-1).gather(-1, targets[..., None]).double().sum().item() / math.log(2)
        count += targets.numel()
    return bits / count


def run(model: DeepSeekV3, text: bytes, *, steps: int = STEPS, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """Train in place; yields a record after every step. `stop` ends after so many of the `steps` scheduled."""
    adam = optimizer(model)
    began = time.perf_counter()
    model.train()
    for step, tokens in enumerate(batches(as_tokens(text), steps)):
        if step == stop:
            break
        for group in adam.param_groups:
            group["lr"] = rate(step, steps)
        total, parts = train.loss(model, tokens, mtp_weight=MTP_WEIGHT, recipe="bf16", balance_alpha=BALANCE_ALPHA)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        loads = train.update_bias(model, BIAS_SPEED)
        yield {
            "step": step,
            "main": parts["main"].item(),
            "mtp": parts["mtp"].item(),
            "lr": rate(step, steps),
            "grad_norm": norm.item(),
            "seconds": round(time.perf_counter() - began, 1),
            "load": [_imbalance(load) for load in loads],
        }
    model.eval()


def _imbalance(counts: Tensor) -> float:
    """Tokens of the busiest expert over the mean."""
    return round(float(counts.max() / counts.float().mean()), 2)


def plot(log: Path, picture: Path) -> None:
    """The loss curve of a train.jsonl."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text().splitlines()]
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for key, label in (("main", "next byte"), ("mtp", "MTP: the byte after it")):
        axes.plot(
            [r["step"] for r in records], [r[key] / math.log(2) for r in records], label=f"training, {label}", lw=1
        )
    held = [r for r in records if "heldout_bpb" in r]
    axes.plot([r["step"] for r in held], [r["heldout_bpb"] for r in held], "o-", ms=3, label="held out, next byte")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 5))
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint, log and curve to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    text, held_out = corpus.split()
    model = DeepSeekV3(config())
    initialise(model, options.seed)
    with (options.out / "train.jsonl").open("w") as log:
        for record in run(model, text, steps=options.steps):
            last = record["step"] == options.steps - 1
            if (record["step"] + 1) % 200 == 0 or last:
                record["heldout_bpb"] = bits_per_byte(model.eval(), held_out[:HELD_OUT_BYTES])
                model.train()
            if record["step"] % 10 == 0 or "heldout_bpb" in record:
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(json.dumps(record), flush=True)
    model.save_pretrained(options.out, weights="fp8")
    plot(options.out / "train.jsonl", options.out / "curve.png")


if __name__ == "__main__":
    main()
