"""DeepSeek-V3 whole: forward pass, latent cache, loading and saving."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsv3_kernels as dk

from .. import _checks
from . import weights as storage
from .config import Config, Yarn
from .generate import generate, load_tokenizer
from .layers import Attention, DecoderLayer, Linear, MoE, Norm, Step, cumulative
from .mtp import FEEDS, MTPLayer, chain, need

ABSORB_QUERIES = 4  # up to so many new tokens per sequence attend in latent space (3.4x the arithmetic, no expansion)


class PagedLatentCache:
    """Latents of B sequences in pages: one tensor [layers, pages, page, 576] and a table of pages per sequence.

    `seqlens` [B] int32 on the device counts cached tokens; `lengths` is the same on the host, so that no step has
    to wait for the device. dtype uint8 takes the FP8 format of 656 bytes a token (latent 512, rotary key 64).
    """

    def __init__(
        self,
        config: Config,
        capacities: Sequence[int],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        page_size: int = 64,
    ) -> None:
        if not capacities or any(n < 1 for n in capacities):
            raise ValueError(
                f"PagedLatentCache: capacities: got {list(capacities)}, wanted one positive number or more"
            )
        _checks.integer("PagedLatentCache", "page_size", page_size, 1)
        counts = [-(-n // page_size) for n in capacities]
        if dtype == torch.uint8 and (config.kv_lora_rank, config.qk_rope_head_dim) != (512, 64):
            raise ValueError("PagedLatentCache: dtype: uint8 takes latents of 512 and rotary keys of 64 only")
        width = 656 if dtype == torch.uint8 else config.latent_dim
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.page_size, self.latent_dim = page_size, config.latent_dim
        self.pages = torch.zeros(layers, sum(counts), page_size, width, dtype=dtype, device=device)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        first = 0
        for row, count in enumerate(counts):
            table[row, :count] = torch.arange(first, first + count)
            first += count
        self.block_table = table.to(device)
        self.capacities = [count * page_size for count in counts]
        self.lengths = [0] * len(counts)
        self.seqlens = torch.zeros(len(counts), dtype=torch.int32, device=device)

    @property
    def bytes_per_token(self) -> int:
        """Over all layers, the MTP layer's included."""
        return self.pages.shape[0] * self.pages.shape[3] * self.pages.element_size()

    def slots(self, positions: Tensor) -> Tensor:
        """[B, S] places in each sequence -> slots int64 in the flattened pages."""
        page = self.block_table.gather(1, (positions // self.page_size).clamp(max=self.block_table.shape[1] - 1))
        return page.long() * self.page_size + positions % self.page_size

    def set_lengths(self, lengths: Sequence[int], seqlens: Tensor | None = None) -> None:
        """Forget or accept tokens: sequence b holds lengths[b] from now on (`seqlens`: the same, on the device)."""
        for b, (n, limit) in enumerate(zip(lengths, self.capacities, strict=True)):
            if not 0 <= n <= limit:
                raise ValueError(f"PagedLatentCache: sequence {b}: got length {n}, wanted 0 to {limit}")
        self.lengths = list(lengths)
        if seqlens is None:
            seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        self.seqlens.copy_(seqlens)


class Backbone(nn.Module):
    """All but the output head; the MTP layers come after the main ones."""

    def __init__(self, config: Config, local: range) -> None:
        super().__init__()
        count, dense = config.num_hidden_layers, config.first_k_dense_replace
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [DecoderLayer(config, i, local if i >= dense else range(0)) for i in range(count)]
        extra = [MTPLayer(config, count + k, local) for k in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList([*blocks, *extra])
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)


class DeepSeekV3(nn.Module):
    """The released model. `DeepSeekV3(config)` is randomly initialised and trainable; see `from_pretrained`.

    `mtp_feed` is what the MTP layer sees of the main model: its "post_norm" hidden state (as inference engines do
    with the released weights) or the "pre_norm" one.
    """

    cos_sin: Tensor
    tokenizer: Any = None
    group: Any = None
    mtp_feed = "post_norm"

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self._build(config)
        self._allocate("bf16" if dtype == torch.bfloat16 else "float32", dtype, torch.device(device))
        with torch.no_grad():
            for module in self.modules():
                for parameter in module.parameters(recurse=False):
                    if isinstance(module, Norm):
                        parameter.fill_(1.0)
                    else:
                        parameter.normal_(0.0, config.other.get("initializer_range", 0.02), generator=generator)
                for buffer in module.buffers(recurse=False):
                    buffer.zero_()
        self._finish("bf16")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weights: str | None = None,
        activations: str | None = None,
        group: Any = None,
    ) -> DeepSeekV3:
        """Load a Hugging Face DeepSeek-V3 folder: config.json, safetensors, tokenizer.json where there is one.

        `weights`: how the large matrices are kept, "fp8" (codes and 128x128 scales), "bf16" or "float32"; by default
        as the checkpoint's config says they are (`quantization_config`, else `dtype` or `torch_dtype`), "bf16" where
        it says float16 or nothing. FP8 weights multiply FP8 activations (1x128 scales) unless `activations` is
        "bf16", which dequantises the weights and leaves activations alone. `dtype` is that of the activations and,
        with FP8 weights, of all other tensors: by default float32 for weights="float32", else bfloat16.

        `group`: a torch.distributed group whose ranks share the routed experts out, each holding the rest whole and
        bringing its own sequences. All ranks then make the same calls, `generate` with the same options; a rank whose
        sequences have ended keeps step until all have.

        ValueError or FileNotFoundError in words for a checkpoint that is not whole, before any memory is taken.
        """
        op = "from_pretrained"
        _checks.one_of(op, "weights", weights, None, *storage.STORAGE)
        _checks.one_of(op, "activations", activations, None, "bf16", "fp8")
        config = Config.load(path)
        checkpoint = storage.Checkpoint(path)
        first = f"model.layers.{config.num_hidden_layers}."
        if not any(name.startswith(first) for name in checkpoint.entries):
            config.num_nextn_predict_layers = 0
        if weights is None:
            floats = config.other.get("dtype", config.other.get("torch_dtype"))
            weights = "fp8" if config.quantization else "float32" if floats == "float32" else "bf16"
        activations = activations or ("fp8" if weights == "fp8" else "bf16")
        if activations == "fp8" and weights != "fp8":
            raise ValueError(f"{op}: activations: got 'fp8' with weights={weights!r}, wanted weights='fp8'")
        dtype = dtype or (torch.float32 if weights == "float32" else torch.bfloat16)
        _checks.one_of(op, "dtype", dtype, torch.float32, torch.bfloat16)
        checkpoint.check(list(storage.pieces(cls.skeleton(config))), config.num_hidden_layers)
        model = cls.sharded(config, group)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model._allocate(weights, dtype, device)
        storage.fill(model, checkpoint)
        model.tokenizer = load_tokenizer(path, config.vocab_size)
        model._finish(activations)
        return model.eval()

    def save_pretrained(
        self, path: str | Path, *, weights: str | None = None, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        """Write a folder that `from_pretrained` and transformers load; `weights` as kept unless given."""
        _checks.one_of("save_pretrained", "weights", weights, None, *storage.STORAGE)
        _checks.value("save_pretrained", "model", self.group is None, "a part of the experts", "all experts")
        storage.save(self, path, weights or self.weights, max_shard_bytes)
        if hasattr(self.tokenizer, "save"):
            self.tokenizer.save(path)

    # -- construction ------------------------------------------------------------------------------------------------
    @classmethod
    def skeleton(cls, config: Config, local: range | None = None) -> DeepSeekV3:
        """All modules (of the experts, the `local` ones), on the meta device: shapes and names without memory."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build(config, local)
        return model

    @classmethod
    def sharded(cls, config: Config, group: Any, max_tokens: int | None = None) -> DeepSeekV3:
        """The same for a rank of `group` (None: one process): its experts, and the way to the others'.

        max_tokens: the most that a rank brings to one pass; max_position_embeddings when None.
        """
        if group is None:
            return cls.skeleton(config)
        ranks, experts = group.size(), config.n_routed_experts
        _checks.value(
            "model", "group", ranks <= experts, f"{ranks} ranks", f"at most one for each of {experts} experts"
        )
        limit = max_tokens or config.max_position_embeddings
        parallel = dk.parallel.ExpertParallel(group, experts, config.hidden_size, limit)
        model = cls.skeleton(config, parallel.local_experts(group.rank()))
        model.group = group
        for module in model.modules():
            if isinstance(module, MoE):
                module.parallel = parallel
        return model

    def allocate(self, device: torch.device | str) -> DeepSeekV3:
        """Give a skeleton float32 memory, its values unset."""
        self._allocate("float32", torch.float32, torch.device(device))
        self._finish("bf16")
        return self

    def _build(self, config: Config, local: range | None = None) -> None:
        with torch.device("meta"):
            self.model = Backbone(config, range(config.n_routed_experts) if local is None else local)
            self.lm_head = Linear(config.hidden_size, ("lm_head", config.vocab_size))
        self.config = config

    def _allocate(self, weights: str, dtype: torch.dtype, device: torch.device) -> None:
        storage.materialise(self, weights, dtype, device)
        self._tabulate(weights, dtype, device)

    def _tabulate(self, weights: str, dtype: torch.dtype, device: torch.device) -> None:
        self.weights, self.dtype, self.device = weights, dtype, device
        config, yarn = self.config, self.config.yarn or Yarn(1.0, self.config.max_position_embeddings)
        mscale, mscale_all_dim = yarn.rotary_mscales
        self.cos_sin = dk.yarn_cos_sin(
            config.qk_rope_head_dim,
            config.max_position_embeddings,
            base=config.rope_theta,
            factor=yarn.factor,
            original_max=yarn.original_max,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            mscale=mscale,
            mscale_all_dim=mscale_all_dim,
            device=device,
        )

    def _finish(self, activations: str) -> None:
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize_activations = activations == "fp8" and module.quantizable
                module.pow2_scale = self.config.pow2_scale
            if isinstance(module, Attention) and module.kv_b_proj.scale is not None:
                module.absorbed = module.kv_b_heads(self.dtype)

    # -- forward -----------------------------------------------------------------------------------------------------
    def step(
        self,
        tokens: Tensor,
        *,
        seq_lens: Sequence[int] | Tensor | None = None,
        cache: PagedLatentCache | None = None,
        positions: Tensor | None = None,
    ) -> Step:
        """Everything a pass over tokens [B, S] needs, checked; with lengths on the host it waits for no device."""
        batch, width = self._check_tokens(tokens)
        lengths = self._check_lengths(seq_lens, batch, width)
        prefix = [0] * batch
        if cache is not None:
            self._check_cache(cache, lengths)
            prefix = list(cache.lengths)
        longest, limit = max(p + n for p, n in zip(prefix, lengths, strict=True)), len(self.cos_sin)
        _checks.value("model", "tokens", longest <= limit, f"{longest} of them", f"max_position_embeddings = {limit}")
        rows = None
        if any(n != width for n in lengths):
            rows = torch.cat([torch.arange(b * width, b * width + n) for b, n in enumerate(lengths)]).to(self.device)
        places = torch.arange(width, device=self.device).expand(batch, width)
        if cache is not None:
            places = places + cache.seqlens[:, None]
        if positions is not None:
            self._check_positions(positions, tokens)

        def packed(table: Tensor) -> Tensor:
            flat = table.reshape(-1).long()
            return flat if rows is None else flat[rows]

        out = Step(
            tokens=packed(tokens),
            positions=packed(places if positions is None else positions),
            cos_sin=self.cos_sin,
            lengths=lengths,
            cu_seqlens=cumulative(lengths, self.device)
            if rows is not None
            else torch.arange(0, batch * width + 1, width, dtype=torch.int32, device=self.device),
            dtype=self.dtype,
            rows=rows,
        )
        if cache is None:
            return out
        out.cache, out.prefix, out.slots = cache, prefix, packed(cache.slots(places))
        out.seqlens = cache.seqlens + (width if rows is None else out.cu_seqlens.diff())
        out.absorbed = rows is None and width <= ABSORB_QUERIES and min(prefix) > 0
        if out.absorbed:
            heads, kind = self.config.num_attention_heads, cache.pages.dtype
            out.plan = dk.mla_decode_plan(
                out.seqlens, num_queries=width, num_heads=heads, kv_dtype=kind, policy="fixed"
            )
        return out

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens, self.model.embed_tokens.weight).to(dtype)

    def hidden(self, step: Step) -> tuple[Tensor, Tensor]:
        """The main layers: (final hidden states after the last norm, before it), [T, H] each. Fills the cache."""
        update, residual = self.embed(step.tokens, step.dtype), None
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            update, residual = layer(update, residual, step)
        return self.model.norm(update, residual)

    def head(self, hidden: Tensor) -> Tensor:
        """Normed hidden states -> float32 logits."""
        return self.lm_head(hidden).float()

    def feed(self, normed: Tensor, residual: Tensor) -> Tensor:
        """The hidden state that the MTP layer sees."""
        _checks.one_of("model", "mtp_feed", self.mtp_feed, *FEEDS)
        return normed if self.mtp_feed == "post_norm" else residual

    def forward(
        self,
        tokens: Tensor,
        *,
        seq_lens: Sequence[int] | Tensor | None = None,
        cache: PagedLatentCache | None = None,
        positions: Tensor | None = None,
        routing: list[Tensor] | None = None,
        return_routing: bool = False,
    ) -> Any:
        """tokens int [B, S] -> logits float32 [B, S, V], or (logits, routing) with `return_routing`.

        seq_lens: valid tokens of each row (right padding; its logits are 0, its routing -1). cache: the tokens follow
        what it holds, and are added to it. positions [B, S]: of the rotary embedding, when not consecutive. routing:
        experts to use, int [B * S, K] per MoE layer; their weights are recomputed from this pass's scores.

        TypeError, ValueError, RuntimeError (device) in words; the cache is unchanged then.
        """
        step = self.step(tokens, seq_lens=seq_lens, cache=cache, positions=positions)
        step.routing, _ = split_routing(self, routing, tokens, step.rows)
        if return_routing:
            step.chosen = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            logits = self._unpack(self.head(self.hidden(step)[0]), step, tokens.shape, 0.0)
        if cache is not None:
            self._fill(cache, step)
        if not return_routing:
            return logits
        return logits, [self._unpack(e, step, tokens.shape, -1).flatten(0, 1) for e in step.chosen or []]

    def program(
        self, tokens: Tensor, *, seq_lens: Sequence[int] | Tensor | None = None, cache: PagedLatentCache | None = None
    ) -> Generator[str, None, Tensor]:
        """`forward`, pausing while rows are under way to experts on other ranks, with the bits of `forward`.

        `dk.parallel.two_microbatch(model.program, tokens_a, tokens_b)` gives both logits, one microbatch computing
        while the other's rows travel; with caches: `two_microbatch(lambda m: model.program(m[0], cache=m[1]), a, b)`.
        """
        run: Any = (
            self._program if cache is None else torch.no_grad()(self._program)
        )  # decorates every part of a generator
        return run(tokens, seq_lens, cache)

    def _program(self, tokens: Tensor, seq_lens: Any, cache: PagedLatentCache | None) -> Generator[str, None, Tensor]:
        step = self.step(tokens, seq_lens=seq_lens, cache=cache)
        update, residual = self.embed(step.tokens, step.dtype), None
        for layer in cast(Sequence[DecoderLayer], self.model.layers[: self.config.num_hidden_layers]):
            update, residual = yield from layer.phases(update, residual, step)
        logits: Tensor = self._unpack(self.head(self.model.norm(update, residual)[0]), step, tokens.shape, 0.0)
        if cache is not None:
            self._fill(cache, step)
        return logits

    @staticmethod
    def _fill(cache: PagedLatentCache, step: Step) -> None:
        """The step's tokens are in the cache."""
        cache.set_lengths([p + n for p, n in zip(cache.lengths, step.lengths, strict=True)], step.seqlens)

    def mtp_logits(self, tokens: Tensor, *, routing: list[Tensor] | None = None, return_routing: bool = False) -> Any:
        """MTP module of depth 1: float32 [B, S-1, V]; row i sees the hidden state of i and token i+1, predicts i+2.

        `routing` is as in `forward`, with one more entry [B * (S-1), K] for the MTP layer; so is what is returned.
        """
        need(self, "mtp_logits")
        step = self.step(tokens)
        _checks.value("mtp_logits", "tokens", tokens.shape[1] > 1, list(tokens.shape), "two tokens or more each")
        step.routing, own = split_routing(self, routing, tokens)
        step.chosen = [] if return_routing else None
        fed = self.feed(*self.hidden(step)).view(*tokens.shape, -1)
        logits = self.head(chain(self, tokens, step, fed, own)[0])
        return (logits, step.chosen) if return_routing else logits

    def generate(
        self,
        tokens: Any,
        max_new_tokens: int,
        *,
        eos_id: int | None = None,
        temperature: float = 0,
        top_p: float = 1,
        generator: torch.Generator | None = None,
        speculative: bool = False,
        **options: Any,
    ) -> Any:
        """Prompts [B, S] or a list of lists -> prompts and what follows them; see `dk.model.generate.generate`."""
        return generate(
            self,
            tokens,
            max_new_tokens,
            eos_id=eos_id,
            temperature=temperature,
            top_p=top_p,
            generator=generator,
            speculative=speculative,
            **options,
        )

    @staticmethod
    def _unpack(packed: Tensor, step: Step, shape: torch.Size, fill: float) -> Tensor:
        if step.rows is None:
            return packed.view(*shape, -1)
        out = packed.new_full((shape.numel(), packed.shape[-1]), fill)
        return out.index_copy(0, step.rows, packed).view(*shape, -1)

    # -- checks ------------------------------------------------------------------------------------------------------
    def _check_tokens(self, tokens: Any) -> tuple[int, int]:
        _checks.dtype("model", "tokens", tokens, torch.int64, torch.int32)
        _checks.shape("model", "tokens", tokens, ("batch", "tokens"))
        _checks.value("model", "tokens", tokens.numel() > 0, list(tokens.shape), "at least one sequence of one token")
        _checks.rows("model", "tokens", tokens)
        _checks.device("model", tokens=tokens, weights=self.cos_sin)
        _inside("tokens", tokens, self.config.vocab_size)
        return tokens.shape[0], tokens.shape[1]

    def _check_lengths(self, seq_lens: Any, batch: int, width: int) -> list[int]:
        if seq_lens is None:
            return [width] * batch
        if isinstance(seq_lens, Tensor):
            _checks.shape("model", "seq_lens", seq_lens, (batch,))
        elif not isinstance(seq_lens, Sequence):
            raise TypeError(f"model: seq_lens: got {type(seq_lens).__name__}, wanted a list or a Tensor of ints")
        lengths = seq_lens.tolist() if isinstance(seq_lens, Tensor) else list(seq_lens)
        ok = len(lengths) == batch and all(isinstance(n, int) and 0 <= n <= width for n in lengths) and any(lengths)
        _checks.value("model", "seq_lens", ok, lengths, f"{batch} lengths of 0 to {width}, not all 0")
        return lengths

    def _check_cache(self, cache: Any, lengths: list[int]) -> None:
        if not isinstance(cache, PagedLatentCache):
            raise TypeError(f"model: cache: got {type(cache).__name__}, wanted a PagedLatentCache")
        _checks.dtype("model", "cache", cache.pages, self.dtype, torch.uint8)
        _checks.device("model", cache=cache.pages, weights=self.lm_head.weight)
        batch, held = len(lengths), len(cache.lengths)
        _checks.value("model", "cache", batch == held, held, f"{batch} sequences, as in tokens")
        fits = len(cache.pages) >= self.config.num_hidden_layers and cache.latent_dim == self.config.latent_dim
        _checks.value("model", "cache", fits, list(cache.pages.shape), "pages made for this configuration")
        paged = cache.block_table.shape[1] * cache.page_size
        for b, (old, new, limit) in enumerate(zip(cache.lengths, lengths, cache.capacities, strict=True)):
            if old + new > min(limit, paged):
                what = "is made for" if limit <= paged else "has a block_table for"
                raise ValueError(
                    f"model: cache: sequence {b} grows to {old + new} tokens, the cache {what} {min(limit, paged)}"
                )

    def _check_positions(self, positions: Any, tokens: Tensor) -> None:
        _checks.dtype("model", "positions", positions, torch.int64, torch.int32)
        _checks.shape("model", "positions", positions, tokens.shape)
        _checks.device("model", positions=positions, tokens=tokens)
        _inside("positions", positions, len(self.cos_sin))


def split_routing(
    model: DeepSeekV3, routing: list[Tensor] | None, tokens: Tensor, rows: Tensor | None = None
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Experts to replay -> (those of the main layers, packed; those of the MTP depths, if given), checked."""
    if routing is None:
        return None, None
    if isinstance(routing, Tensor) and routing.dim() == 3:  # the layers' choices stacked
        routing = list(routing)
    if not isinstance(routing, (list, tuple)):
        raise TypeError(f"model: routing: got {type(routing).__name__}, wanted a list of Tensors")
    config, (batch, width) = model.config, tokens.shape
    main = max(config.num_hidden_layers - config.first_k_dense_replace, 0)
    whole = main + config.num_nextn_predict_layers
    if len(routing) not in (main, whole):
        raise ValueError(f"model: routing: got {len(routing)} tensors, wanted {main} (or {whole}, the MTP layers too)")
    for i, experts in enumerate(routing):
        _checks.dtype("model", "routing", experts, torch.int32, torch.int64)
        _checks.shape("model", "routing", experts, (batch * (width - max(i - main + 1, 0)), config.num_experts_per_tok))
        _checks.device("model", routing=experts, tokens=tokens)
    packed = [experts if rows is None else experts[rows] for experts in routing[:main]]
    for experts in [*packed, *routing[main:]]:
        _inside("routing", experts, config.n_routed_experts)
    return packed, routing[main:] or None


def _inside(argument: str, tensor: Tensor, size: int) -> None:
    """ValueError unless all values are in 0 to size - 1."""
    good = ((tensor >= 0) & (tensor < size)).all()
    if tensor.is_cuda:  # reported with the next synchronisation: a decode loop does not wait for it
        torch._assert_async(good, f"model: {argument}: a value outside 0 to {size - 1}")
    elif not good:
        got = [int(tensor.min()), int(tensor.max())]
        raise ValueError(f"model: {argument}: got values from {got[0]} to {got[1]}, wanted 0 to {size - 1}")
