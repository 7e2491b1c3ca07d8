"""Layers of DeepSeek-V3 (arXiv:2412.19437, section 2.1), each a few calls of the library's ops.

Tokens of all sequences lie packed in one dimension: x is [T, hidden]. Module paths are the released parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsv3_kernels as dk

from .config import Config

if TYPE_CHECKING:
    from ..parallel import ExpertParallel
    from .fp8 import Recipe
    from .model import PagedLatentCache

BLOCK = 128  # rows and columns that share one FP8 weight scale
LATENT_NORM_EPS = 1e-6  # fixed in the released code, whatever rms_norm_eps says
PREFIX_CHUNK = 16384  # cached tokens expanded to keys and values at a time, over all sequences


def round_up(n: int, unit: int = BLOCK) -> int:
    return -(-n // unit) * unit


class Quantized(NamedTuple):
    """A float tensor beside its FP8 codes and 1x128 scales, made once and used by several GEMMs."""

    x: Tensor
    q: Tensor
    scale: Tensor


@dataclass
class Step:
    """What every layer of one forward pass shares. B sequences, T packed new tokens; on the device unless said."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, of the rotary embedding
    cos_sin: Tensor  # [P, rope] float32
    lengths: list[int]  # new tokens per sequence, on the host
    cu_seqlens: Tensor  # [B + 1] int32 over the new tokens
    dtype: torch.dtype  # of the residual stream
    fp8: Recipe | None = None  # float weights, products in FP8: training
    rows: Tensor | None = None  # [T] place of each token in the padded [B, S]; None when nothing is padded
    cache: PagedLatentCache | None = None
    slots: Tensor | None = None  # [T] int64: where the new tokens go in the cache
    prefix: list[int] | None = None  # cached tokens per sequence before this pass, on the host
    seqlens: Any = None  # [B] int32: cached tokens after this pass
    absorbed: bool = False  # attention in the latent space: a few queries against the cache
    plan: Any = None  # mla_decode_plan, shared by the layers
    routing: list[Tensor] | None = None  # [T, K] per MoE layer: experts to replay
    chosen: list[Tensor] | None = None  # filled with the experts of each MoE layer
    tape: list[Phase] | None = None  # filled with the pieces of each block, for a backward pass piece by piece

    def again(self, function: Callable[..., Any], *inputs: Any, attention: bool = False) -> Any:
        """function(*inputs), computed a second time in backward where the recipe wants that: see `Recipe.again`."""
        if self.fp8 is None or not torch.is_grad_enabled():
            return function(*inputs)
        return self.fp8.again(function, *inputs, attention=attention)

    def cut(self, *tensors: Any) -> tuple[Any, ...]:
        """Where a phase begins: other names for what it reads, so that autograd, asked for the gradients of these, does
        not go on to what made them and finds one of them above another. Without a tape the tensors themselves."""
        return tensors if self.tape is None else tuple(None if t is None else t.view_as(t) for t in tensors)

    def note(
        self,
        sources: tuple[Any, ...],
        inputs: tuple[Any, ...],
        outputs: tuple[Any, ...],
        *modules: nn.Module | None,
        exchange: str = "",
    ) -> None:
        """Put a phase on the tape, where there is one; `inputs` is what `cut` made of `sources`."""
        if self.tape is not None:
            pairs = [(s, t) for s, t in zip(sources, inputs, strict=True) if t is not None and t.requires_grad]
            parameters = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
            self.tape.append(Phase(pairs, [t for t in outputs if t is not None], parameters, exchange))

    def summed(self, update: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a norm reads: both, or, where backward computes the norm again, their sum, so that one is kept."""
        if residual is None or self.fp8 is None:
            return update, residual
        return update + residual, None


@dataclass
class Phase:
    """A piece of a pass between two exchanges: autograd goes from `outputs` to `inputs` and to the parameters."""

    inputs: list[tuple[Tensor, Tensor]]  # (the tensor, its name inside the phase)
    outputs: list[Tensor]
    parameters: list[Any]
    exchange: str = ""  # that its backward starts


class Norm(nn.Module):
    """RMSNorm, with the residual addition before it and the quantisation after it where asked for."""

    def __init__(self, size: int, eps: float, pow2_scale: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.pow2_scale = pow2_scale

    def forward(self, x: Tensor, residual: Tensor | None = None, *, quantize: bool = False) -> Any:
        """x -> normed; with `residual`: (norm(x + residual), x + residual). `quantize` makes normed a Quantized."""
        if not quantize or self.pow2_scale:
            out = dk.rms_norm(x, self.weight, self.eps, residual=residual)
            if not quantize:
                return out
            normed, total = out if residual is not None else (out, None)
            packed = Quantized(normed, *dk.quantize_1x128(normed, pow2_scale=True))
        else:
            q, scale, normed, total = dk.rms_norm_quantize_1x128(x, self.weight, self.eps, residual=residual)
            packed = Quantized(normed, q, scale)
        return packed if residual is None else (packed, total)


class Linear(nn.Module):
    """y = x W^T with W kept as float, or as FP8 codes with 128x128 scales.

    `parts` are the released matrices stacked along the rows, (name, rows) each. `experts`, where not empty, makes it a
    stack with a matrix for each. In FP8 each of several parts, and the columns where `pad_columns` says so, take a
    multiple of 128: scale blocks of stacked matrices would straddle otherwise. The padding is zero.
    """

    scale: Tensor | None

    def __init__(
        self,
        columns: int,
        *parts: tuple[str, int],
        experts: range = range(0),
        fp8: bool = False,
        pad_columns: bool = False,
    ) -> None:
        super().__init__()
        self.columns, self.parts, self.experts = columns, parts, experts
        self.quantizable, self.pad_columns = fp8, pad_columns
        self.quantize_activations = False
        self.pow2_scale = False
        self.weight = nn.Parameter(torch.empty(self.shape(torch.float32)))
        self.register_buffer("scale", None)

    def stride(self, part: int, dtype: torch.dtype) -> int:
        """Rows that a part takes in storage."""
        rows = self.parts[part][1]
        return round_up(rows) if dtype == torch.float8_e4m3fn and len(self.parts) > 1 else rows

    def shape(self, dtype: torch.dtype) -> tuple[int, ...]:
        rows = sum(self.stride(i, dtype) for i in range(len(self.parts)))
        padded = dtype == torch.float8_e4m3fn and self.pad_columns
        columns = round_up(self.columns) if padded else self.columns
        return (len(self.experts), rows, columns) if self.experts else (rows, columns)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The parts of an output, without the padding between them."""
        parts = y.split([self.stride(i, self.weight.dtype) for i in range(len(self.parts))], dim=-1)
        return tuple(part[..., :rows] for part, (_, rows) in zip(parts, self.parts, strict=True))

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The weight (or one matrix of the stack) as floats, the padding included."""
        weight = self.weight if expert is None else self.weight[expert]
        if self.scale is None:
            return weight.to(dtype)
        scale = self.scale if expert is None else self.scale[expert]
        return dk.dequantize(weight, scale, dtype=dtype)

    def quantize(self, x: Tensor | Quantized) -> tuple[Tensor, Tensor]:
        if isinstance(x, Quantized):
            return x.q, x.scale
        return dk.quantize_1x128(x, pow2_scale=self.pow2_scale)

    def forward(self, x: Tensor | Quantized, *, fp8: Recipe | None = None, pow2: bool = False) -> Tensor:
        """pow2: in training in FP8, scales of x are powers of two."""
        if self.quantize_activations:
            q, scale = self.quantize(x)
            dtype = x.x.dtype if isinstance(x, Quantized) else x.dtype
            return dk.fp8_gemm(q, scale, self.weight, self.scale, out_dtype=dtype, policy="fixed")
        x = x.x if isinstance(x, Quantized) else x
        if fp8 is not None:
            return fp8.linear(x, self.weight, pow2=pow2)
        return F.linear(x, self.dense(x.dtype))

    def grouped(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """rows[offsets[e]:offsets[e+1]] @ W[e]^T for every expert; every row belongs to an expert."""
        if rows.is_cuda and rows.dtype == torch.bfloat16 and self.scale is None:
            return torch._grouped_mm(rows, self.dense(rows.dtype).mT, offs=offsets[1:])
        counts = offsets.diff().tolist()  # on the CPU nothing waits; on a GPU this path is for float32 comparisons
        stack = self.weight.unbind() if self.scale is None else None  # one gradient for the stack, not one each
        segments = []
        for e, segment in enumerate(rows.split(counts)):
            if counts[e]:
                weight = self.dense(rows.dtype, e) if stack is None else stack[e].to(rows.dtype)
                segments.append(F.linear(segment, weight))
        return torch.cat(segments) if segments else F.linear(rows, self.dense(rows.dtype, 0))


def _activate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), of one matrix each or of a stack of experts."""

    def __init__(self, config: Config, width: int, experts: range = range(0)) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate_up = Linear(hidden, ("gate_proj", width), ("up_proj", width), experts=experts, fp8=True)
        self.down = Linear(width, ("down_proj", hidden), experts=experts, fp8=True, pad_columns=True)

    def forward(self, x: Tensor | Quantized, step: Step) -> Tensor:
        return self.finish(self.gate_up(x, fp8=step.fp8), step)

    def finish(self, gate_up: Tensor, step: Step) -> Tensor:
        if self.down.quantize_activations:
            q, scale = dk.silu_mul_quantize_1x128(gate_up, pow2_scale=self.down.pow2_scale)
            return self.down(Quantized(gate_up, q, scale))
        if step.fp8 is not None:
            return step.fp8.swiglu_linear(gate_up, self.down.weight)
        return self.down(_activate(gate_up))

    def grouped(self, rows: Tensor, row_scale: Tensor | None, offsets: Tensor, step: Step) -> Tensor:
        """Expert e on its rows; FP8 rows come with their scales."""
        up, down = self.gate_up, self.down
        if step.fp8 is not None:
            gate_up = step.fp8.linear(rows, up.weight, offsets, pow2=True, keep_codes=True)
            return step.fp8.swiglu_linear(gate_up, down.weight, offsets, pow2_grad=True)
        if not up.quantize_activations:
            return down.grouped(_activate(up.grouped(rows, offsets)), offsets)
        if down.pow2_scale:
            gate_up = dk.fp8_grouped_gemm(rows, row_scale, up.weight, up.scale, offsets, out_dtype=step.dtype)
            q, scale = dk.silu_mul_quantize_1x128(gate_up, pow2_scale=True)
        else:
            q, scale = dk.fp8_grouped_gemm_swiglu_quantize(rows, row_scale, up.weight, up.scale, offsets)
        return dk.fp8_grouped_gemm(q, scale, down.weight, down.scale, offsets, out_dtype=step.dtype)


class Gate(nn.Module):
    """Router: sigmoid scores in float32; the bias chooses, the scores weigh (section 2.1.2, equations 13 to 16)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Buffer(torch.empty(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Of `.to(...)`, `.bfloat16()` and the like the bias follows the device alone: bfloat16 would choose others."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = nn.Buffer(bias.to(moved.device))
        return self

    def logits(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> float32 [T, E]"""
        return F.linear(x.float(), self.weight.float())

    def forward(self, logits: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> (weights [T, K] float32, experts [T, K] int32)."""
        config = self.config
        if replay is None:
            return dk.moe_gate(
                logits,
                self.e_score_correction_bias,
                num_groups=config.n_group,
                topk_groups=config.topk_group,
                top_k=config.num_experts_per_tok,
                scaling=config.routed_scaling_factor,
                normalize=config.norm_topk_prob,
            )
        weights = logits.sigmoid().gather(1, replay.long())
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.routed_scaling_factor, replay.int().contiguous()


class MoE(nn.Module):
    """Routed experts, weighted, plus the shared ones. `local` experts are here; `parallel` reaches the other ranks'."""

    parallel: ExpertParallel | None = None

    def __init__(self, config: Config, local: range) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.num_experts = config.n_routed_experts
        self.gate = Gate(config)
        self.experts = MLP(config, width, experts=local)
        self.shared_experts = MLP(config, width * config.n_shared_experts) if config.n_shared_experts else None
        self.load: tuple[Tensor, Tensor] | None = None  # of the last training pass: logits, experts
        self.counts: Tensor | None = None  # [E] int64: tokens of each expert since the last update of the bias

    def enter(self, h: Tensor | Quantized, step: Step) -> tuple[Tensor, Tensor | None]:
        """(router logits, what the shared experts' SwiGLU reads)"""
        x = h.x if isinstance(h, Quantized) else h
        shared = self.shared_experts
        return self.gate.logits(x), None if shared is None else shared.gate_up(h, fp8=step.fp8)

    def route(self, logits: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(weights, experts), which it takes from the step or notes where it is asked to"""
        weights, experts = self.gate(logits, step.routing.pop(0) if step.routing is not None else None)
        if step.chosen is not None:
            step.chosen.append(experts)
        if self.training:
            counts = torch.bincount(experts.flatten(), minlength=self.num_experts)
            self.load = logits, experts
            self.counts = counts if self.counts is None else self.counts + counts
        return weights, experts

    def dispatch_send(self, h: Tensor | Quantized, weights: Tensor, experts: Tensor, step: Step) -> Any:
        x, scale = (h.x if isinstance(h, Quantized) else h), None
        if self.experts.gate_up.quantize_activations:
            x, scale = self.experts.gate_up.quantize(h)
        if self.parallel is None:
            return dk.moe_permute(x, experts, self.num_experts, scale=scale)
        return self.parallel.dispatch_send(x, experts, weights, scale=scale, fp8_wire=step.fp8 is not None)

    def compute(self, sent: Any, step: Step) -> tuple[Tensor, Any]:
        """Experts on the rows that were sent: (their rows, handle)"""
        if self.parallel is None:
            rows, row_scale, offsets, handle = sent
        else:
            rows, row_scale, _, offsets, handle = self.parallel.dispatch_recv(sent)
        return self.experts.grouped(rows, row_scale, offsets, step), handle

    def combine_send(self, rows: Tensor, handle: Any) -> Any:
        return (rows, handle) if self.parallel is None else self.parallel.combine_send(rows, handle)

    def combine_recv(self, sent: Any, weights: Tensor) -> Tensor:
        if self.parallel is None:
            return dk.moe_unpermute(*sent, weights)
        return self.parallel.combine_recv(sent)

    def carrier(self, sent: Any) -> Tensor:
        """The tensor through which autograd goes back from an exchange."""
        return sent[0] if self.parallel is None else sent.link.token

    def carried(self, sent: Any, carrier: Tensor) -> Any:
        """The same exchange with autograd going through `carrier`."""
        if self.parallel is None:
            return (carrier, *sent[1:])
        sent.link.token = carrier
        return sent


class Attention(nn.Module):
    """Multi-head latent attention (section 2.1.1): the cache holds the normed latent and one rotary key per token."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, hidden = config.num_attention_heads, config.hidden_size
        width = heads * config.qk_head_dim
        pow2 = config.pow2_scale
        kv_a = ("kv_a_proj_with_mqa", config.latent_dim)
        if config.q_lora_rank is None:
            self.qkv_a = Linear(hidden, ("q_proj", width), kv_a, fp8=True)
        else:
            self.qkv_a = Linear(hidden, ("q_a_proj", config.q_lora_rank), kv_a, fp8=True)
            self.q_a_layernorm = Norm(config.q_lora_rank, LATENT_NORM_EPS, pow2)
            self.q_b_proj = Linear(config.q_lora_rank, ("q_b_proj", width), fp8=True)
        self.kv_a_layernorm = Norm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, ("kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim)), fp8=True
        )
        self.o_proj = Linear(heads * config.v_head_dim, ("o_proj", hidden), fp8=True)
        self.absorbed: Tensor | None = None  # kv_b as floats [heads, nope + v, latent], kept where it is FP8

    def enter(self, h: Tensor | Quantized, step: Step) -> Tensor:
        """Queries, in low rank where the model has it so, latents and rotary keys: the parts of `qkv_a`."""
        return self.qkv_a(h, fp8=step.fp8)

    def attend(self, entered: Tensor, step: Step) -> Tensor:
        """What `enter` made -> [T, heads * v]"""
        if step.absorbed and self.config.q_lora_rank is not None and self.q_b_proj.quantize_activations:
            return self._latent_space(self._prologue(entered, step), step)
        config, fp8 = self.config, step.fp8
        q, kv = self.qkv_a.split(entered)
        if config.q_lora_rank is not None:
            low = self.q_a_layernorm(q, quantize=self.q_b_proj.quantize_activations)
            q = self.q_b_proj(low, fp8=fp8)
        latent = self.kv_a_layernorm(kv[:, : config.kv_lora_rank])
        k_rope = dk.rope(kv[:, config.kv_lora_rank :], step.positions, step.cos_sin)
        if step.cache is not None:
            dk.mla_cache_append(step.cache.pages[self.layer], step.slots, latent, k_rope)
        if step.absorbed:
            return self._latent_space(q, step)
        q_nope, q_rope = self._query_heads(q)
        q_rope = dk.rope(q_rope, step.positions, step.cos_sin)
        out = self._head_space(torch.cat([q_nope, q_rope], dim=-1), latent, k_rope, step)
        return out.reshape(len(q), -1)

    def leave(self, out: Tensor, step: Step) -> Tensor:
        return self.o_proj(out, fp8=step.fp8, pow2=True)

    def _query_heads(self, q: Tensor) -> tuple[Tensor, ...]:
        """Queries [T, heads * qk] -> (nope, rope) [T, heads, ...]"""
        config = self.config
        return q.view(len(q), -1, config.qk_head_dim).split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)

    def _prologue(self, entered: Tensor, step: Step) -> Tensor:
        """Norms, the rotary key, the cache and the codes of q in one op, with the bits of `attend`'s own -> queries."""
        q, kv = parts = self.qkv_a.split(entered)
        padded = q.shape[1] < self.qkv_a.stride(0, self.qkv_a.weight.dtype)
        assert step.cache is not None and step.slots is not None
        codes, scale = dk.mla_prologue(
            torch.cat(parts, dim=-1) if padded else entered[:, : q.shape[1] + kv.shape[1]],
            self.q_a_layernorm.weight,
            self.kv_a_layernorm.weight,
            step.positions,
            step.cos_sin,
            step.cache.pages[self.layer],
            step.slots,
            eps=LATENT_NORM_EPS,
            pow2_scale=self.q_a_layernorm.pow2_scale,
        )
        return self.q_b_proj(Quantized(q, codes, scale))  # of q itself the dtype alone counts

    def _latent_space(self, q: Tensor, step: Step) -> Tensor:
        """W_UK goes into the query and W_UV behind the output: attention reads the cache as it lies."""
        config, batch = self.config, len(step.lengths)
        kv_b = self.absorbed if self.absorbed is not None else self.kv_b_heads(q.dtype)
        w_uk, w_uv = kv_b.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_nope, q_rope = self._query_heads(q)
        absorbed = q.new_empty(*q_nope.shape[:2], config.latent_dim)
        dk.mla_absorb(q_nope, w_uk.mT, out=absorbed[..., : config.kv_lora_rank])
        dk.rope(q_rope, step.positions, step.cos_sin, out=absorbed[..., config.kv_lora_rank :])
        assert step.cache is not None
        out, _ = dk.mla_decode(
            absorbed.unflatten(0, (batch, -1)),
            step.cache.pages[self.layer],
            step.cache.block_table,
            step.seqlens,
            softmax_scale=config.softmax_scale,
            plan=step.plan,
            latent=config.kv_lora_rank,
        )
        return dk.mla_absorb(out.flatten(0, 1), w_uv).flatten(1)

    def _head_space(self, q: Tensor, latent: Tensor, k_rope: Tensor, step: Step) -> Tensor:
        """Multi-head attention over the new tokens; what the cache held before is expanded and merged in chunks."""
        scale, cu = self.config.softmax_scale, step.cu_seqlens
        k_nope, v = self._expand(latent, step)
        out, lse = dk.mla_prefill(q, k_nope, k_rope, v, cu, cu, softmax_scale=scale, causal=True)
        if step.cache is None or not any(step.prefix or ()):
            return out
        cache, prefix = step.cache, step.prefix or []
        size = max(cache.page_size, PREFIX_CHUNK // len(prefix) // cache.page_size * cache.page_size)
        for start in range(0, max(prefix), size):
            counts = [min(max(n - start, 0), size) if new else 0 for n, new in zip(prefix, step.lengths, strict=True)]
            cu_k = cumulative(counts, cu.device)
            table = cache.block_table[:, start // cache.page_size :].contiguous()
            old, old_rope = dk.mla_cache_gather(
                cache.pages[self.layer], table, cu_k, sum(counts), latent=self.config.kv_lora_rank
            )
            k_nope, v = self._expand(old.to(q.dtype), step)
            part = dk.mla_prefill(q, k_nope, old_rope.to(q.dtype), v, cu, cu_k, softmax_scale=scale, causal=False)
            out, lse = dk.merge_attention(out, lse, *part)
        return out

    def _expand(self, latent: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Latents [S, latent] -> (k_nope [S, heads, nope], v [S, heads, v])."""
        config = self.config
        kv = self.kv_b_proj(latent, fp8=step.fp8).view(len(latent), config.num_attention_heads, -1)
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return k_nope, v

    def kv_b_heads(self, dtype: torch.dtype) -> Tensor:
        return self.kv_b_proj.dense(dtype).view(self.config.num_attention_heads, -1, self.config.kv_lora_rank)


class DecoderLayer(nn.Module):
    """Pre-norm block; dense without `experts`. The sum of residual and update is taken inside the next norm."""

    def __init__(self, config: Config, layer: int, experts: range) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, config.pow2_scale)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, config.pow2_scale)
        self.mlp = MoE(config, experts) if experts else MLP(config, config.intermediate_size)

    def forward(self, update: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """(update, residual) of the block before -> those of this one; residual None: update is all there is."""
        phases = self.phases(update, residual, step)
        try:
            while True:
                next(phases)
        except StopIteration as done:
            return done.value

    def phases(
        self, update: Tensor, residual: Tensor | None, step: Step
    ) -> Generator[str, None, tuple[Tensor, Tensor]]:
        """The block in pieces, as `dk.parallel.two_microbatch` takes them: it yields names of exchanges under way.

        In training in FP8, backward computes again what lies between products: norms, queries, keys and values.
        """
        before = (update, residual)
        update, residual = start = step.cut(update, residual)
        attention, mlp = self.self_attn, self.mlp
        entered, residual = step.again(self._enter_attention, *step.summed(update, residual), step)
        out = step.again(attention.attend, entered, step, attention=True)
        update = attention.leave(out, step)
        h, residual, *into_mlp = step.again(self._enter_mlp, *step.summed(update, residual), step)
        attended = (self.input_layernorm, attention, self.post_attention_layernorm)
        if isinstance(mlp, MLP):
            out = mlp.finish(into_mlp[0], step)
            step.note(before, start, (out, residual), *attended, mlp)
            return out, residual
        weights, experts = mlp.route(into_mlp[0], step)
        sent = mlp.dispatch_send(h, weights, experts, step)
        crossing = (mlp.carrier(sent), weights, into_mlp[1])
        there, weights, gate_up = cut = step.cut(*crossing)
        shared = mlp.shared_experts
        step.note(before, start, (residual, *crossing), *attended, mlp.gate, shared and shared.gate_up)
        yield "dispatch"
        rows, handle = mlp.compute(mlp.carried(sent, there), step)
        back = mlp.combine_send(rows, handle)
        returned = mlp.carrier(back)
        step.note(crossing[:1], cut[:1], (returned,), mlp.experts, exchange="dispatch backward")
        yield "combine"
        (here,) = step.cut(returned)
        out = mlp.combine_recv(mlp.carried(back, here), weights)
        if shared is not None:
            out = out + shared.finish(gate_up, step)
        after = (returned, *crossing[1:])
        step.note(after, (here, *cut[1:]), (out,), shared and shared.down, exchange="combine backward")
        return out, residual

    def _enter_attention(self, update: Tensor, residual: Tensor | None, step: Step) -> tuple[Tensor, ...]:
        """(what `Attention.enter` gives, the residual)"""
        h, total = self._normed(self.input_layernorm, update, residual)
        return self.self_attn.enter(h, step), total

    def _enter_mlp(self, update: Tensor, residual: Tensor | None, step: Step) -> tuple[Any, ...]:
        """(normed, the residual, what the MLP enters with)"""
        h, total = self._normed(self.post_attention_layernorm, update, residual)
        entered = self.mlp.enter(h, step) if isinstance(self.mlp, MoE) else (self.mlp.gate_up(h, fp8=step.fp8),)
        return h, total, *entered

    def _normed(self, norm: Norm, update: Tensor, residual: Tensor | None) -> tuple[Any, Tensor]:
        quantize = self.self_attn.o_proj.quantize_activations
        if residual is None:
            return norm(update, quantize=quantize), update
        return norm(update, residual, quantize=quantize)


def cumulative(counts: list[int], device: torch.device) -> Tensor:
    """[0, c0, c0 + c1, ...] as int32."""
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
