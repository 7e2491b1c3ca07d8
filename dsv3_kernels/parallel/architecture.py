"""The sizes of a model that costs depend on: operations per token, and where its tokens go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Architecture:
    """The sizes that costs depend on, by their Hugging Face names; the defaults are DeepSeek-V3."""

    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    vocab_size: int = 129280

    @classmethod
    def of(cls, config: Architecture | Mapping[str, Any] | Any | None) -> Architecture:
        """From a config.json as a mapping, or any object with these attributes; None is DeepSeek-V3."""
        if config is None or isinstance(config, Architecture):
            return config or cls()
        get = config.get if isinstance(config, Mapping) else lambda name, default: getattr(config, name, default)
        return cls(**{f.name: get(f.name, f.default) for f in fields(cls)})

    @property
    def attention_weights(self) -> int:
        """Matrix elements of one attention layer, each used once per token."""
        query = self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        down = 0 if self.q_lora_rank is None else self.q_lora_rank
        q = self.hidden_size * query if not down else down * (self.hidden_size + query)
        kv = self.hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv += self.kv_lora_rank * self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv + self.num_attention_heads * self.v_head_dim * self.hidden_size

    @property
    def moe_weights(self) -> int:
        """Matrix elements that one token meets in an MoE layer: router, shared and chosen experts."""
        experts = self.n_shared_experts + self.num_experts_per_tok
        return self.hidden_size * (self.n_routed_experts + 3 * self.moe_intermediate_size * experts)

    @property
    def active_weights(self) -> int:
        """Matrix elements that one token meets, without the input embedding."""
        dense = self.first_k_dense_replace
        total = self.num_hidden_layers * self.attention_weights + dense * 3 * self.hidden_size * self.intermediate_size
        return total + (self.num_hidden_layers - dense) * self.moe_weights + self.hidden_size * self.vocab_size

    def attention_flops(self, sequence: int) -> float:
        """Scores and values of one layer, per token, causal, averaged over a sequence."""
        width = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        return 2 * self.num_attention_heads * width * sequence / 2

    def forward_flops(self, sequence: int) -> float:
        """Floating-point operations of the forward per token."""
        return 2 * self.active_weights + self.num_hidden_layers * self.attention_flops(sequence)

    def training_flops(self, sequence: int) -> float:
        """Forward and backward per token: three times the forward; recomputation is not counted."""
        return 3 * self.forward_flops(sequence)


@dataclass(frozen=True)
class Routing:
    """Expected number of distinct ranks and nodes that a token's experts live on."""

    ranks_per_token: float
    nodes_per_token: float


@lru_cache(maxsize=256)
def _distinct(places: int, experts: int, top_k: int, groups: int, topk_groups: int) -> float:
    """Expected number of distinct places among a token's experts, experts in equal contiguous shares."""
    if groups == topk_groups:
        share = experts // places
        return places * (1 - math.comb(experts - share, top_k) / math.comb(experts, top_k))
    # No closed form: the gate prefers groups with two good experts. 20 000 tokens with a fixed seed, good to half a
    # percent.
    scores = np.random.default_rng(0).random((20_000, groups, experts // groups))
    group_score = np.sort(scores, axis=-1)[..., -2:].sum(-1)
    dropped = np.argsort(group_score, axis=-1)[:, : groups - topk_groups]
    np.put_along_axis(scores, dropped[..., None], -1.0, axis=1)
    chosen = np.argpartition(scores.reshape(len(scores), -1), -top_k, axis=-1)[:, -top_k:]
    where = np.sort(chosen * places // experts, axis=-1)
    return float((np.diff(where, axis=-1) > 0).sum(-1).mean() + 1)


def routing(ranks: int, config: Any = None, *, group_limited: bool = True) -> Routing:
    """Where a token goes under DeepSeek-V3's gate with equally likely experts, ``ranks`` ranks, 8 to a node."""
    a = Architecture.of(config)
    if ranks < 1 or a.n_routed_experts % ranks:
        raise ValueError(f"routing: ranks: got {ranks}, wanted a divisor of the {a.n_routed_experts} experts")
    groups = (a.n_group, a.topk_group) if group_limited else (1, 1)
    nodes = max(1, ranks // RANKS_PER_NODE)
    by_rank, by_node = (_distinct(n, a.n_routed_experts, a.num_experts_per_tok, *groups) for n in (ranks, nodes))
    return Routing(by_rank, by_node)
