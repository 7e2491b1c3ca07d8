"""`dsv3 demo`: a checkpoint from disk to tokens, with what each step costs, then every op against float64."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UserError, validate
from .console import GOOD, Console

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import DeepSeekV3

HELP = "load a checkpoint in the released layout, write text with it, and check every op against float64"
PACKAGED = Path(__file__).resolve().parent.parent / "model" / "demo"
PROMPT = "In the beginning "
HELD_OUT_TOKENS, WINDOW, WINDOWS_AT_ONCE = 16384, 512, 8
# Two greedy runs that sum in another order may part where the two best logits are this close, relative to the best.
TIE = {"float32": 2.0**-18, "bfloat16": 2.0**-6}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=PACKAGED,
        metavar="DIR",
        help="folder of the checkpoint (default: the packaged one)",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", default=None, metavar="TEXT", help=f"text to go on from (default: {PROMPT!r})")
    text.add_argument("--file", type=Path, metavar="FILE", help="the prompt is this file's text")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens to write (default: 256)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="of the text that is shown; 0 is greedy (default: 0.7)",
    )
    parser.add_argument(
        "--weights",
        choices=["fp8", "bf16", "float32"],
        default="float32",
        help="how matrices are kept; fp8 multiplies FP8 activations (default: float32, dequantised exactly)",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--no-validate", dest="validate", action="store_false", help="leave out the table of ops")


def run(options: argparse.Namespace) -> int:
    """Exit code 0, 1 when anything disagrees, 2 for a request that cannot be served."""
    prompt = _prompt(options)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: got {options.max_new_tokens}, wanted 1 or more")
    if not options.temperature >= 0:
        raise UserError(f"--temperature: got {options.temperature}, wanted 0 or more")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"torch is needed and cannot be imported ({error}); see `dsv3 info`") from None
    console = Console()
    model = _load(options, console)
    tokens = _encode(model, prompt, options.checkpoint)
    agree = _write(model, prompt, tokens, options, console)
    _cache_cost(model, console)
    _held_out(model, options.checkpoint, console)
    code = 0
    if options.validate:
        from ..validation import validate as results

        console.heading("Every op against float64")
        code = validate.report(results(), console)
    return code if agree else 1


def _prompt(options: argparse.Namespace) -> str:
    prompt = PROMPT if options.prompt is None else options.prompt
    if options.file is not None:
        try:
            prompt = options.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {options.file}: {error}") from None
    if not prompt:
        raise UserError(f"{'--file' if options.file else '--prompt'}: got an empty text, wanted one character or more")
    return prompt


def _load(options: argparse.Namespace, console: Console) -> DeepSeekV3:
    from ..model import DeepSeekV3

    folder = options.checkpoint
    if not (folder / "config.json").is_file():
        raise UserError(f"--checkpoint {folder}: no such folder, or no config.json in it")
    started = time.perf_counter()
    try:
        model: DeepSeekV3 = DeepSeekV3.from_pretrained(folder, device=options.device, weights=options.weights)
    except Exception as error:  # whatever a broken folder leads to, the user gets its words and no traceback
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise UserError(f"--checkpoint {folder}: {kind}{error}") from error
    seconds = time.perf_counter() - started
    config = model.config
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    layers = f"{config.num_hidden_layers} layers ({min(config.first_k_dense_replace, config.num_hidden_layers)} dense)"
    console.line(
        f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {layers}"
        f"{' + MTP' if config.num_nextn_predict_layers else ''}, {config.num_attention_heads} heads, "
        f"{config.n_routed_experts} experts, {stored / 1e6:.1f} MB on disk"
    )
    console.line(f"loaded as {options.weights} on {model.device} in {seconds:.2f} s")
    return model


def _encode(model: DeepSeekV3, prompt: str, folder: Path) -> list[int]:
    if model.tokenizer is None:
        size = model.config.vocab_size
        raise UserError(f"--checkpoint {folder}: no tokenizer.json, and a vocabulary of {size} is too small for bytes")
    tokens: list[int] = model.tokenizer.encode(prompt)
    if not tokens:
        raise UserError("--prompt: the tokenizer makes no token of it")
    return tokens


@dataclass
class Run:
    """One generation: its new tokens, when they came (seconds), and what speculation did."""

    tokens: list[int] = field(default_factory=list)
    first: float = 0.0  # until the first token: the prefill
    seconds: float = 0.0
    statistics: Any = None

    @property
    def speed(self) -> float:
        """Tokens per second after the first one."""
        return (len(self.tokens) - 1) / (self.seconds - self.first) if len(self.tokens) > 1 else 0.0


def _generate(
    model: DeepSeekV3,
    tokens: list[int],
    count: int,
    speculative: bool,
    console: Console | None = None,
    temperature: float = 0.0,
) -> Run:
    """Continue the prompt; on a `console`, the text appears as it comes. Drawn tokens are the same every time."""
    import torch

    from ..model import generate

    result, text = Run(statistics=generate.Statistics()), generate.TextStream(model.tokenizer)
    eos = model.config.eos_token_id
    started = time.perf_counter()

    def take(new: list[list[int]]) -> None:
        result.seconds = time.perf_counter() - started
        result.first = result.first or result.seconds
        result.tokens += new[0]
        if console is not None:
            console.piece(text.push(new[0]))

    try:
        model.generate(
            [tokens],
            count,
            eos_id=eos[0] if isinstance(eos, list) else eos,
            speculative=speculative,
            temperature=temperature,
            generator=torch.Generator(device=model.device).manual_seed(0) if temperature else None,
            on_tokens=take,
            statistics=result.statistics,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if console is not None:
        console.piece(text.finish() + "\n")
    return result


def _write(model: DeepSeekV3, prompt: str, tokens: list[int], options: argparse.Namespace, console: Console) -> bool:
    """Write the text; then decode greedily, plainly and by speculation: True when both gave the same tokens."""
    speculates, count = model.config.num_nextn_predict_layers > 0, options.max_new_tokens
    _generate(model, tokens, min(count, 2), speculates)  # loads what the first call has to load
    console.heading("Text")
    console.piece(prompt)
    _generate(model, tokens, count, speculates, console, options.temperature)
    plain = _generate(model, tokens, count, False)
    console.heading("Speed, decoding greedily")
    console.line(f"prefill: {len(tokens)} tokens in {plain.first * 1e3:.1f} ms")
    console.line(f"decode: {plain.speed:.1f} tokens/s")
    if not speculates:
        console.line("no MTP layer in this checkpoint: nothing to speculate with")
        return True
    drafted = _generate(model, tokens, count, True)
    stats = drafted.statistics
    ratio = f" ({drafted.speed / plain.speed:.2f} x)" if plain.speed else ""
    console.line(f"speculative decode: {drafted.speed:.1f} tokens/s{ratio}")
    console.line(
        f"MTP acceptance: {stats.acceptance:.3f} ({stats.accepted} of {stats.drafted} drafts, {stats.steps} passes)"
    )
    wrong = disagreement(model, tokens, plain.tokens, drafted.tokens)
    console.line(f"speculative and plain tokens: {wrong or 'the same ' + GOOD}")
    return wrong is None or not wrong.startswith("FAIL")


def disagreement(model: DeepSeekV3, prompt: list[int], plain: list[int], other: list[int]) -> str | None:
    """Where two greedy continuations part, in words; it starts with FAIL unless the two best logits tie there."""
    import torch

    if plain == other:
        return None
    at = next((i for i, pair in enumerate(zip(plain, other, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"FAIL: {len(plain)} and {len(other)} of them"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + plain[:at]], device=model.device))[0, -1].double()
    best, rivals = logits.max(), logits[[plain[at], other[at]]]
    gap = ((best - rivals).max() / logits.abs().max()).item()
    tie = gap <= TIE[str(model.dtype).removeprefix("torch.")]
    return f"{'a tie' if tie else 'FAIL: other ones'} from token {at} on, logits {gap:.1e} apart"


def _cache_cost(model: DeepSeekV3, console: Console) -> None:
    config = model.config
    layers, size = config.num_hidden_layers + config.num_nextn_predict_layers, model.dtype.itemsize
    latent = layers * config.latent_dim * size
    expanded = layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * size
    kind = str(model.dtype).removeprefix("torch.")
    console.heading("Cache")
    console.line(
        f"{latent} bytes per token ({layers} layers x {config.latent_dim} x {kind}); "
        f"expanded multi-head keys and values: {expanded}, {expanded / latent:.2f} times as many"
    )


def _held_out(model: DeepSeekV3, folder: Path, console: Console) -> None:
    """Bits per byte of the text that the checkpoint was not trained on, where the folder has one."""
    if (folder / "held_out.txt").is_file():
        data = (folder / "held_out.txt").read_bytes()
    elif (folder / "kjv.txt.xz").is_file():
        from ..model import corpus

        data = corpus.split()[1]
    else:
        return
    tokens = model.tokenizer.encode(data.decode(errors="replace"))[:HELD_OUT_TOKENS]
    if len(tokens) < 2:
        return
    bits, count = held_out_bits(model, tokens)
    console.heading("Held-out text")
    console.line(f"{bits:.3f} bits per byte over {count} bytes")


def held_out_bits(model: DeepSeekV3, tokens: list[int]) -> tuple[float, int]:
    """(bits per byte, bytes predicted): windows side by side, each predicted from its own first token on."""
    import torch
    import torch.nn.functional as F

    width = min(WINDOW, model.config.max_position_embeddings)
    windows = [tokens[start : start + width] for start in range(0, len(tokens), width)]
    nats, text = 0.0, 0
    with torch.no_grad():
        for length in sorted({len(w) for w in windows} - {1}, reverse=True):
            same = [w for w in windows if len(w) == length]
            for start in range(0, len(same), WINDOWS_AT_ONCE):
                batch: Tensor = torch.tensor(same[start : start + WINDOWS_AT_ONCE], device=model.device)
                logits = model(batch[:, :-1])
                nats += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            text += sum(_bytes(model.tokenizer, w[1:]) for w in same)
    return nats / math.log(2) / text, text


def _bytes(tokenizer: Any, tokens: list[int]) -> int:
    from ..model import ByteTokenizer

    return len(tokens) if isinstance(tokenizer, ByteTokenizer) else len(tokenizer.decode(tokens).encode())
