"""Configuration of a DeepSeek-V3 model, read from and written to the released `config.json`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

# Fields that change the mathematics, with the values this model computes. A field that is absent means the first one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False,),
    "attention_dropout": (0.0, None),
    "hidden_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "mlp_layer_types": (None,),
    "index_topk": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1.0, None),
    "residual_multiplier": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "swiglu_limit": (None,),
    "use_qk_norm": (False, None),
    "mtp_hidden_states_first": (False, None),
    "chain_hidden_post_norm": (None,),
}
_ROPE_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "truncate": (True, None),
    "partial_rotary_factor": (1.0, None),
}
_ROPE_READ = {"rope_theta", "factor", "original_max_position_embeddings"}
_YARN_READ = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_ARCHITECTURE = "DeepseekV3ForCausalLM"


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv:2309.00071) in DeepSeek's parameters."""

    factor: float
    original_max: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def rotary_mscales(self) -> tuple[float, float]:
        """(mscale, mscale_all_dim) whose ratio scales cos and sin; a pair not given whole means (1, 0)."""
        if self.mscale and self.mscale_all_dim:
            return self.mscale, self.mscale_all_dim
        return 1.0, 0.0


@dataclass
class Config:
    """The released fields under their released names; `other` keeps unknown ones for `save`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    quantization: dict[str, Any] | None = None  # the released FP8 block, or None for plain weights
    other: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = [
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"),
            *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
        ]
        for name in positive + (["q_lora_rank"] if self.q_lora_rank is not None else []):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config: {name}: got {value!r}, wanted a positive integer")
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"config: {name}: got {value!r}, wanted an integer >= 0")
        _want(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "an even number")
        size, rest = divmod(self.n_routed_experts, self.n_group)
        _want(rest == 0 and size >= 2, "n_group", self.n_group, "groups of equal size, two experts or more in each")
        _want(self.topk_group <= self.n_group, "topk_group", self.topk_group, f"at most n_group = {self.n_group}")
        _want(
            self.num_experts_per_tok <= size * self.topk_group,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"at most the {size * self.topk_group} experts of the groups taken",
        )

    # -- derived -----------------------------------------------------------------------------------------------------
    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values of one cached token: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(192), times the square of YaRN's length correction (0.1352338 for the released model)."""
        scale = self.qk_head_dim**-0.5
        if self.yarn and self.yarn.mscale_all_dim and self.yarn.factor > 1:
            scale *= (0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0) ** 2
        return scale

    @property
    def pow2_scale(self) -> bool:
        """Activation scales are powers of two (V3.1: `scale_fmt` "ue8m0")."""
        return (self.quantization or {}).get("scale_fmt") == "ue8m0"

    # -- config.json -------------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read `config.json` (or a folder with one). ValueError for what this model does not compute."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"config: no config.json at {file}")
        try:
            raw = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"config: {file} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"config: {file}: got a JSON {type(raw).__name__}, wanted an object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """From the released fields, old (`rope_scaling`, `rope_theta`) or new (`rope_parameters`)."""
        raw = dict(raw)
        architectures = raw.pop("architectures", None) or [_ARCHITECTURE]
        kind = raw.pop("model_type", "deepseek_v3")
        if architectures != [_ARCHITECTURE] or kind != "deepseek_v3":
            raise ValueError(f"config: architecture {architectures} ({kind}), wanted {_ARCHITECTURE} (deepseek_v3)")
        for name, allowed in _FIXED.items():
            if name in raw and raw[name] not in allowed:
                raise ValueError(f"config: {name} = {raw[name]!r} changes the result; only {allowed[0]!r} is computed")
        if "num_mtp_layers" in raw:
            raw.setdefault("num_nextn_predict_layers", raw["num_mtp_layers"])
            del raw["num_mtp_layers"]
        heads = raw.get("num_attention_heads")
        for name, implied in (("num_key_value_heads", heads), ("head_dim", raw.get("qk_rope_head_dim"))):
            if raw.pop(name, None) not in (None, implied):
                raise ValueError(f"config: {name} differs from the {implied!r} that MLA implies")
        raw.pop("qk_head_dim", None)
        raw["rope_theta"], raw["yarn"] = _read_rope(raw)
        raw["quantization"] = _read_quantization(raw.pop("quantization_config", None))
        if raw.get("q_lora_rank") == 0:  # the inference configs write 0 for none
            raw["q_lora_rank"] = None
        known = {f.name for f in fields(cls)} - {"other"}
        missing = [f.name for f in fields(cls)[:8] if raw.get(f.name) is None]
        if missing:
            raise ValueError(f"config: missing {', '.join(missing)}")
        given = {name: raw[name] for name in known if name in raw}
        for name in ("n_group", "topk_group"):
            if given.get(name, 1) is None:
                given[name] = 1
        return cls(**given, other={name: value for name, value in raw.items() if name not in known})

    def to_dict(self) -> dict[str, Any]:
        """The released form; both spellings of RoPE, so that old and new readers agree."""
        raw: dict[str, Any] = {"architectures": [_ARCHITECTURE], "model_type": "deepseek_v3", **self.other}
        skip = {"other", "yarn", "quantization"}
        raw |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        raw["num_key_value_heads"] = self.num_attention_heads
        raw |= {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
        raw |= {"attention_bias": False, "tie_word_embeddings": False, "rope_scaling": None}
        if self.yarn:
            names = {"original_max": "original_max_position_embeddings"}
            values = {names.get(f.name, f.name): getattr(self.yarn, f.name) for f in fields(self.yarn)}
            raw["rope_scaling"] = {"type": "yarn"} | {k: v for k, v in values.items() if v is not None}
        if self.quantization:
            raw["quantization_config"] = self.quantization
        return raw

    def saved_as(self, fp8: bool, dtype: str) -> Config:
        """This configuration for a checkpoint of FP8 weights or of floats; `dtype` is that of the float tensors."""
        other = {name: value for name, value in self.other.items() if name != "dtype"} | {"torch_dtype": dtype}
        quantization = (self.quantization or FP8_BLOCK) if fp8 else None
        return dataclasses.replace(self, quantization=quantization, other=other)

    def save(self, folder: str | Path) -> None:
        Path(folder, "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")


FP8_BLOCK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def _want(ok: bool, name: str, got: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"config: {name}: got {got!r}, wanted {wanted}")


def _read_rope(raw: dict[str, Any]) -> tuple[float, Yarn | None]:
    """(theta, YaRN) from the new key, else the old ones; every key that is not understood is refused."""
    rope = dict(raw.pop("rope_parameters", None) or {})
    old = dict(raw.pop("rope_scaling", None) or {})
    theta = raw.pop("rope_theta", None)
    rope = rope or old
    theta = rope.get("rope_theta") or theta or 10000.0
    kinds = {rope.pop(name) for name in ("type", "rope_type") if name in rope} - {None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "yarn"):
        raise ValueError(
            f"config: rope type {sorted({kind, *kinds})} changes the result; only default and yarn are computed"
        )
    for name, allowed in _ROPE_FIXED.items():
        if rope.pop(name, allowed[0]) not in allowed:
            raise ValueError(f"config: rope {name} changes the result; only {allowed[0]!r} is computed")
    unknown = set(rope) - _ROPE_READ - (_YARN_READ if kind == "yarn" else set())
    if kind == "default":
        return float(theta), None
    if unknown:
        raise ValueError(f"config: rope: unknown {', '.join(sorted(unknown))}")
    original: Any = rope.get("original_max_position_embeddings")
    limit = raw.get("max_position_embeddings", 4096)
    _want(
        isinstance(original, int) and original > 0, "original_max_position_embeddings", original, "a positive integer"
    )
    yarn = Yarn(
        factor=float(rope["factor"] if rope.get("factor") is not None else limit / original),
        original_max=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
    )
    _want(yarn.factor >= 1, "rope factor", yarn.factor, "at least 1")
    return float(theta), yarn


def _read_quantization(block: dict[str, Any] | None) -> dict[str, Any] | None:
    if not block:
        return None
    for name, allowed in {
        "quant_method": ("fp8",),
        "fmt": ("e4m3", None),
        "activation_scheme": ("dynamic", None),
        "weight_block_size": ([128, 128],),
        "scale_fmt": ("ue8m0", "float", None),
    }.items():
        if block.get(name) not in allowed and (name in block or None not in allowed):
            raise ValueError(f"config: quantization_config: {name} = {block.get(name)!r}, wanted {allowed[0]!r}")
    return dict(block)
