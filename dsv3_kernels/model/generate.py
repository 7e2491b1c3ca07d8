"""Text out of a model: prefill, greedy and sampled decoding, speculation with the MTP layer, tokenizers."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from . import mtp
from .layers import Step

if TYPE_CHECKING:
    from .model import DeepSeekV3


@dataclass
class Statistics:
    """Of one `generate`: passes of the main model after the prefill, tokens drafted by the MTP layer, and accepted."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted (0 when nothing was drafted)."""
        return self.accepted / self.drafted if self.drafted else 0.0


def generate(
    model: DeepSeekV3,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    eos_id: int | None = None,
    **options: Any,
) -> Tensor | list[list[int]]:
    """Continue every prompt: an int tensor [B, S] gives [B, S + new], a list of lists (any lengths) a list of lists.

    The prompt is included. A sequence ends with `eos_id`; in a tensor the rest of its row is `eos_id` too.
    `on_tokens` is called after each step with the new tokens of each sequence. Options and errors: see `stream`.
    """
    pieces = stream(model, tokens, max_new_tokens, eos_id=eos_id, **options)
    batch = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    out = [list(prompt) for prompt in batch]
    for new in pieces:
        for row, extra in zip(out, new, strict=True):
            row.extend(extra)
        if on_tokens is not None:
            on_tokens(new)
    if not isinstance(tokens, Tensor):
        return out
    longest = max(len(row) for row in out)
    padded = [row + [eos_id or 0] * (longest - len(row)) for row in out]
    return torch.tensor(padded, dtype=tokens.dtype, device=tokens.device)


def stream(
    model: DeepSeekV3,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    speculative: bool = False,
    drafts: int = 1,
    prefill_chunk: int | None = None,
    cache_dtype: torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> Iterator[list[list[int]]]:
    """The new tokens of each sequence, step by step, as they come: a list per sequence, empty once it has ended.

    All sequences decode together. temperature 0 is greedy; else tokens are drawn from the smallest set of
    probability >= top_p. `speculative` drafts `drafts` tokens with the MTP layers and verifies them in one pass: greedy
    output is unchanged, and drawn tokens keep their distribution. Drafts deeper than the model has MTP layers are made
    by the last of them, fed with its own states. Prompts are read `prefill_chunk` tokens at
    a time (whole by default). cache_dtype: the model's, or torch.uint8 for the FP8 cache.

    ValueError: empty prompts, ids outside the vocabulary, prompt + max_new_tokens past max_position_embeddings,
    speculation without an MTP layer. TypeError for tokens or counts that are no integers, RuntimeError for tokens on
    the meta device.
    """
    op = "generate"
    _checks.integer(op, "max_new_tokens", max_new_tokens, 0)
    _checks.integer(op, "drafts", drafts, 1)
    for name, number in (("temperature", temperature), ("top_p", top_p)):
        _checks.number(op, name, number)
    for name, count, least in (("eos_id", eos_id, 0), ("prefill_chunk", prefill_chunk, 1)):
        if count is not None:
            _checks.integer(op, name, count, least)
    if isinstance(tokens, Tensor):
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: tokens: got dtype {_checks.name_of(tokens.dtype)}, wanted int64 or int32")
        if tokens.dim() != 2:
            raise ValueError(f"{op}: tokens: got shape {list(tokens.shape)}, wanted [batch, tokens]")
        if tokens.is_meta:
            raise RuntimeError(f"{op}: tokens: got device meta, wanted one that holds values")
        tokens = tokens.tolist()
    prompts = [list(prompt) for prompt in tokens]
    if not prompts or not all(prompts):
        raise ValueError(f"{op}: tokens: got an empty batch or prompt, wanted one token or more in each")
    size, limit = model.config.vocab_size, model.config.max_position_embeddings
    for prompt in prompts:
        for token in prompt:
            if not isinstance(token, int):
                raise TypeError(f"{op}: tokens: got {type(token).__name__}, wanted integers")
            if not 0 <= token < size:
                raise ValueError(f"{op}: tokens: got id {token}, wanted 0 to {size - 1}")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"{op}: tokens: a prompt of {len(prompt)} and {max_new_tokens} new tokens pass "
                f"max_position_embeddings = {limit}"
            )
    for name, value, ok, wanted in (
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
    ):
        if not ok:
            raise ValueError(f"{op}: {name}: got {value}, wanted {wanted}")
    if speculative:
        mtp.need(model, op)
    if model.group is not None and prefill_chunk is not None:
        raise ValueError(f"{op}: prefill_chunk: ranks would make different numbers of passes, wanted None with a group")
    sampler = Sampler(temperature, top_p, generator)
    depth = drafts if speculative else 0
    run = _Run(model, prompts, max_new_tokens, eos_id, sampler, depth, cache_dtype, statistics or Statistics())
    return run.steps(prefill_chunk or max(len(p) for p in prompts))


@dataclass
class Sampler:
    temperature: float
    top_p: float
    generator: torch.Generator | None

    def probabilities(self, logits: Tensor) -> Tensor:
        p = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # the set keeps the token that reaches top_p
            kept = ordered.masked_fill(before >= self.top_p, 0.0)
            p = torch.zeros_like(p).scatter(-1, index, kept / kept.sum(-1, keepdim=True))
        return p

    def draw(self, p: Tensor) -> Tensor:
        return torch.multinomial(p, 1, generator=self.generator).squeeze(-1)

    def __call__(self, logits: Tensor) -> Tensor:
        """[N, V] -> [N]"""
        return logits.argmax(-1) if self.temperature == 0 else self.draw(self.probabilities(logits))

    def verify(self, logits: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
        """logits [B, n + 1, V] after (token, n drafts) -> (drafts accepted [B], tokens [B, n + 1], good up to the one
        after the accepted drafts).

        A draft is a point mass: it is accepted with its probability p, else the token comes from p without it
        (arXiv:2211.17192), so that accepted and redrawn tokens together follow p.
        """
        n = draft.shape[1]
        if self.temperature == 0:
            tokens = logits.argmax(-1)
            return (tokens[:, :n] == draft).cumprod(1).sum(1), tokens
        p = self.probabilities(logits)
        chance = p[:, :n].gather(2, draft[..., None]).squeeze(2)
        good = torch.rand(chance.shape, device=p.device, generator=self.generator) < chance
        rest = p[:, :n].scatter(2, draft[..., None], 0.0) + torch.finfo(p.dtype).tiny  # all zero where p(draft) is 1
        drawn = self.draw(torch.cat([rest, p[:, n:]], dim=1).flatten(0, 1)).view(-1, n + 1)
        tokens = torch.cat([torch.where(good, draft, drawn[:, :n]), drawn[:, n:]], dim=1)
        return good.long().cumprod(1).sum(1), tokens


class _Run:
    """State of one generation. The host learns of tokens once per step, after the step's work is queued."""

    def __init__(
        self,
        model: DeepSeekV3,
        prompts: list[list[int]],
        max_new: int,
        eos: int | None,
        sampler: Sampler,
        drafts: int,
        cache_dtype: torch.dtype | None,
        statistics: Statistics,
    ) -> None:
        from .model import PagedLatentCache

        self.model, self.prompts, self.sampler, self.drafts = model, prompts, sampler, drafts
        self.eos, self.statistics = eos, statistics
        self.left = [max_new] * len(prompts)
        # A verifying pass, and drafts after it, write past the last token kept.
        capacities = [len(p) + max_new + 2 * drafts for p in prompts]
        dtype = cache_dtype or model.dtype
        self.cache = PagedLatentCache(model.config, capacities, dtype=dtype, device=model.device)
        self.token = torch.zeros(len(prompts), dtype=torch.int64, device=model.device)
        self.draft = self.token[:, None].repeat(1, drafts)

    def steps(self, chunk: int) -> Iterator[list[list[int]]]:
        if not self._going():
            return
        with torch.no_grad():
            self._prefill(chunk)
            new = [[token] for token in self.token.tolist()]
        while True:
            yield [self._keep(b, tokens) for b, tokens in enumerate(new)]
            if not self._going():
                return
            with torch.no_grad():
                new = self._verify() if self.drafts else self._decode()

    def _going(self) -> bool:
        """Whether a sequence takes more tokens, here or on another rank of the experts' group."""
        going = any(self.left)
        if self.model.group is not None:
            flag = torch.tensor(int(going), device=self.model.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.model.group)
            going = bool(flag)
        return going

    def _keep(self, b: int, tokens: list[int]) -> list[int]:
        """What sequence b still takes of its new tokens."""
        if not self.left[b]:
            return []
        tokens = tokens[: self.left[b]]
        self.left[b] -= len(tokens)
        if self.eos is not None and self.eos in tokens:
            tokens = tokens[: tokens.index(self.eos) + 1]
            self.left[b] = 0
        return tokens

    def _step(self, tokens: Tensor) -> Step:
        """A pass over [B, 1 + drafts] tokens. Sequences that have ended rest at length 1, out of the others' way."""
        lengths = [n if self.left[b] else 1 for b, n in enumerate(self.cache.lengths)]
        if lengths != self.cache.lengths:
            self.cache.set_lengths(lengths)
        self.statistics.steps += 1
        return self.model.step(tokens, cache=self.cache)

    def _advance(self, counts: list[int], seqlens: Tensor) -> None:
        self.cache.set_lengths([n + new for n, new in zip(self.cache.lengths, counts, strict=True)], seqlens)

    def _prefill(self, chunk: int) -> None:
        model, lengths = self.model, [len(p) for p in self.prompts]
        longest, depth = max(lengths), self._modules()
        padded = [p + [0] * (longest + 1 + depth - len(p)) for p in self.prompts]
        tokens = torch.tensor(padded, device=model.device)
        state = torch.zeros(len(lengths), model.config.hidden_size, dtype=model.dtype, device=model.device)
        for start in range(0, longest, chunk):
            width = min(chunk, longest - start)
            counts = [min(max(n - start, 0), width) for n in lengths]
            step = model.step(tokens[:, start : start + width], seq_lens=counts, cache=self.cache)
            normed, residual = model.hidden(step)
            ends = [b for b, n in enumerate(lengths) if start < n <= start + width]
            rows = [sum(counts[: b + 1]) - 1 for b in ends]
            if ends:
                self.token[ends] = self.sampler(model.head(normed[rows]))
                tokens[ends, [lengths[b] for b in ends]] = self.token[ends]
            hidden = model.feed(normed, residual)
            for k in range(1, depth + 1):
                follow = tokens[:, start + k : start + k + width].reshape(-1)
                hidden = self._predict(k, hidden, follow if step.rows is None else follow[step.rows], step)
                if ends:
                    state[ends] = hidden[rows]
                    self.draft[ends, k - 1] = model.head(hidden[rows]).argmax(-1)
                    tokens[ends, [lengths[b] + k for b in ends]] = self.draft[ends, k - 1]
            self.cache.set_lengths([min(n, start + width) for n in lengths], step.seqlens)
        self._deepen(state)

    def _modules(self) -> int:
        """MTP layers that draft."""
        return min(self.drafts, self.model.config.num_nextn_predict_layers)

    def _predict(self, k: int, hidden: Tensor, follow: Tensor, step: Step) -> Tensor:
        """MTP layer k on the rows of a pass: same places, slots and lengths, its own layer of the cache."""
        return mtp.layers(self.model)[k - 1].predict(hidden, self.model.embed(follow, step.dtype), step)

    def _deepen(self, hidden: Tensor) -> None:
        """Drafts beyond the MTP layers: the last layer goes on from its own state [B, H], a token at a time.

        What it writes to the cache lies past the tokens kept; the next verifying pass writes over it.
        """
        depth, cache, model = self._modules(), self.cache, self.model
        if self.drafts == depth:
            return
        lengths, seqlens = cache.lengths, cache.seqlens.clone()
        last = model.config.max_position_embeddings - 1
        for k in range(depth, self.drafts):
            past = k - depth
            cache.set_lengths([min(n + past, last) for n in lengths], (seqlens + past).clamp(max=last))
            step = model.step(self.draft[:, k - 1 : k].contiguous(), cache=cache)
            hidden = self._predict(depth, hidden, self.draft[:, k - 1], step)
            self.draft[:, k] = model.head(hidden).argmax(-1)
        cache.set_lengths(lengths, seqlens)

    def _decode(self) -> list[list[int]]:
        step = self._step(self.token[:, None])
        self.token = self.sampler(self.model.head(self.model.hidden(step)[0]))
        self._advance(step.lengths, step.seqlens)
        return [[token] for token in self.token.tolist()]

    def _verify(self) -> list[list[int]]:
        model, batch = self.model, len(self.left)
        active = [b for b in range(batch) if self.left[b]]
        room = model.config.max_position_embeddings - 1 - max((self.cache.lengths[b] for b in active), default=1)
        draft = self.draft[:, : max(1, min(self.drafts, room))]
        width = draft.shape[1] + 1
        step = self._step(torch.cat([self.token[:, None], draft], dim=1))
        normed, residual = model.hidden(step)
        accepted, tokens = self.sampler.verify(model.head(normed).view(batch, width, -1), draft)
        # Rows past the accepted drafts mean nothing: the next step writes over them.
        follow, hidden = tokens, model.feed(normed, residual)
        drafts = []
        for k in range(1, self._modules() + 1):
            hidden = self._predict(k, hidden, follow.reshape(-1), step)
            state = hidden.view(batch, width, -1)[torch.arange(batch, device=model.device), accepted]
            drafts.append(model.head(state).argmax(-1))
            follow = torch.cat([follow[:, 1:], follow[:, :1]], dim=1).scatter(1, accepted[:, None], drafts[-1][:, None])
        self.token = tokens.gather(1, accepted[:, None]).squeeze(1)
        self.draft[:, : len(drafts)] = torch.stack(drafts, dim=1)
        seqlens = self.cache.seqlens + 1 + accepted
        # Where the last layer drafts on, the host need not know yet how much was accepted: a bound is enough.
        before = self.cache.lengths
        if self.drafts > len(drafts):
            self._advance([width] * batch, seqlens)
            self._deepen(state)
        counts, new = (1 + accepted).tolist(), tokens.tolist()
        self.statistics.drafted += (width - 1) * len(active)
        self.statistics.accepted += sum(counts[b] - 1 for b in active)
        self.cache.set_lengths([n + count for n, count in zip(before, counts, strict=True)], seqlens)
        return [row[:count] for row, count in zip(new, counts, strict=True)]


# -- text ------------------------------------------------------------------------------------------------------------
class ByteTokenizer:
    """Token i is byte i."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, file: str | Path) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=True).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        self.tokenizer.save(str(Path(folder, "tokenizer.json")))


def load_tokenizer(folder: str | Path, vocab_size: int) -> ByteTokenizer | FileTokenizer | None:
    """The folder's tokenizer.json, else bytes where they fit the vocabulary, else None."""
    file = Path(folder, "tokenizer.json")
    if file.is_file():
        return FileTokenizer(file)
    return ByteTokenizer() if vocab_size >= 256 else None


class TextStream:
    """Tokens in, text out, never half a character: what may still change is held back until the next token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace") if isinstance(tokenizer, ByteTokenizer) else None
        self.tokens: list[int] = []
        self.shown = ""

    def push(self, tokens: Sequence[int]) -> str:
        if self.bytes is not None:
            return self.bytes.decode(bytes(t for t in tokens if t < 256))
        self.tokens.extend(tokens)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def finish(self) -> str:
        """What was held back."""
        if self.bytes is not None:
            return self.bytes.decode(b"", final=True)
        return self.tokenizer.decode(self.tokens)[len(self.shown) :]
