"""transformers as the oracle: sharp random checkpoints in the released layout, and what transformers makes of them.

Random initialisation by transformers gives logits of standard deviation 0.2 and zero biases, with which most mistakes
stay invisible: here every tensor is drawn for its place, as a function of the seed and its name.
"""

from __future__ import annotations

import json
import math
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

ROUTING_MARGIN, GREEDY_MARGIN = 3e-5, 1e-3
LENGTHS = (1, 7, 33, 70)
NEW = 12

YARN = {
    "type": "yarn",
    "factor": 8,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
BASE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "float32",
}
PLAIN = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_scaling": None, "n_shared_experts": 2}
ODD = {
    "hidden_size": 60,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 21,
    "kv_lora_rank": 19,
    "qk_nope_head_dim": 18,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 12,
    "n_group": 3,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 26,
    "vocab_size": 131,
}
CASES = {
    "base": BASE,
    "plain": BASE | PLAIN | {"first_k_dense_replace": 2},
    "odd": BASE | ODD | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "nonorm": BASE | {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "topk_group": 1, "num_hidden_layers": 3},
}


def tensors(config: dict, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Every released tensor of a configuration, float32. `scale` multiplies the router's spread of biases."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = (config[f"{n}_head_dim"] for n in ("qk_nope", "qk_rope", "v"))
    out: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        std = 1 / math.sqrt(shape[-1]) if std is None else std
        out[name] = torch.randn(shape, generator=generator) * std + mean

    def norm(name: str, size: int) -> None:
        draw(f"{name}.weight", size, std=0.2, mean=1.0)

    def mlp(name: str, width: int) -> None:
        draw(f"{name}.gate_proj.weight", width, hidden, std=1.4 / math.sqrt(hidden))
        draw(f"{name}.up_proj.weight", width, hidden)
        draw(f"{name}.down_proj.weight", hidden, width)

    def layer(index: int, moe: bool) -> None:
        at = f"model.layers.{index}"
        norm(f"{at}.input_layernorm", hidden)
        norm(f"{at}.post_attention_layernorm", hidden)
        at = f"{at}.self_attn"
        rank, latent = config["q_lora_rank"], config["kv_lora_rank"]
        if rank is None:
            draw(f"{at}.q_proj.weight", heads * (nope + rope), hidden, std=1.5 / math.sqrt(hidden))
        else:
            draw(f"{at}.q_a_proj.weight", rank, hidden)
            norm(f"{at}.q_a_layernorm", rank)
            draw(f"{at}.q_b_proj.weight", heads * (nope + rope), rank, std=1.5 / math.sqrt(rank))
        draw(f"{at}.kv_a_proj_with_mqa.weight", latent + rope, hidden, std=1.5 / math.sqrt(hidden))
        norm(f"{at}.kv_a_layernorm", latent)
        draw(f"{at}.kv_b_proj.weight", heads * (nope + value), latent)
        draw(f"{at}.o_proj.weight", hidden, heads * value)
        at = f"model.layers.{index}.mlp"
        if not moe:
            mlp(at, config["intermediate_size"])
            return
        experts = config["n_routed_experts"]
        draw(f"{at}.gate.weight", experts, hidden, std=1.5 / math.sqrt(hidden))
        draw(f"{at}.gate.e_score_correction_bias", experts, std=0.5 * scale, mean=-0.4 * scale)
        for e in range(experts):
            mlp(f"{at}.experts.{e}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            mlp(f"{at}.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])

    draw("model.embed_tokens.weight", config["vocab_size"], hidden, std=1.0)
    draw("lm_head.weight", config["vocab_size"], hidden, std=2 / math.sqrt(hidden))
    norm("model.norm", hidden)
    count = config["num_hidden_layers"]
    for index in range(count):
        layer(index, index >= config["first_k_dense_replace"])
    for index in range(count, count + config["num_nextn_predict_layers"]):
        at = f"model.layers.{index}"
        layer(index, True)
        norm(f"{at}.enorm", hidden)
        norm(f"{at}.hnorm", hidden)
        norm(f"{at}.shared_head.norm", hidden)
        draw(f"{at}.eh_proj.weight", hidden, 2 * hidden)
    return out


def write(folder: Path, config: dict, state: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint folder; with several shards, neighbouring names go to different files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(sorted(state))}
    for file in files:
        save_file({n: t for n, t in state.items() if places[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@dataclass
class Answer:
    """What transformers computes on one sequence."""

    logits: Tensor  # [S, V]
    experts: list[Tensor]  # [S, K] per MoE layer
    margin: float  # of the closest routing decision


class Oracle:
    """transformers' model of a folder, all of it in its eager implementations."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        import transformers
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        transformers.logging.set_verbosity_error()
        self.folder = folder
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        # The released depth is written into the class: without this an MTP layer elsewhere is not found.
        modeling.DeepseekV3PreTrainedModel._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}.*"]
        self.model = modeling.DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self.router = modeling.DeepseekV3TopkRouter
        self._mtp = None

    @contextmanager
    def _routers(self, seen: list, replay: list[Tensor] | None = None):
        """Record every router's output, or make them choose the given experts."""
        original = self.router.forward
        queue = list(replay or [])

        def forward(router, hidden):
            logits, weights, experts = original(router, hidden)
            if replay is not None:
                experts = queue.pop(0).long()
                weights = logits.sigmoid().gather(1, experts)
                if router.norm_topk_prob:
                    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
                weights = weights * router.routed_scaling_factor
            seen.append((router, logits, experts))
            return logits, weights, experts

        self.router.forward = forward
        try:
            yield
        finally:
            self.router.forward = original

    @torch.no_grad()
    def answer(self, tokens: list[int], replay: list[Tensor] | None = None) -> Answer:
        seen: list = []
        with self._routers(seen, replay):
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()
        return Answer(logits, [e for _, _, e in seen], min((_margin(r, z) for r, z, _ in seen), default=math.inf))

    @torch.no_grad()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        prompt = torch.tensor([tokens])
        options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()

    @torch.no_grad()
    def latents(self, tokens: list[int]) -> list[Tensor]:
        """Per layer [S, latent + rope]: the normed latent and the rotated key, pairs interleaved as in the weights."""
        cache = self.model(torch.tensor([tokens]), use_cache=True).past_key_values
        out = []
        for layer in cache.layers:
            key = layer.values[0, 0]  # transformers keeps first elements of all pairs, then second ones
            first, second = key.chunk(2, -1)
            out.append(torch.cat([layer.keys[0, 0], torch.stack([first, second], -1).flatten(-2)], -1))
        return out

    def gradients(
        self, tokens: Tensor, mtp_weight: float, replay: list[Tensor] | None = None
    ) -> tuple[float, float, dict[str, Tensor]]:
        """(main loss, MTP loss, {released name: gradient}) of tokens [B, S], by torch autograd."""
        layer = self._mtp_model()
        parameters = [*self.model.named_parameters(), *((f"mtp.{n}", p) for n, p in layer.layers.named_parameters())]
        for _, parameter in parameters:
            parameter.requires_grad_(True).grad = None
        positions = torch.arange(1, tokens.shape[1]).expand(len(tokens), -1)
        with self._routers([], replay):
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state
            main = _cross_entropy(self.model.lm_head(hidden)[:, :-1], tokens[:, 1:])
            out = layer.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
        extra = _cross_entropy(layer._project_to_logits(out)[:, :-1], tokens[:, 2:])
        (main + mtp_weight * extra).backward()
        grads = {}
        for name, parameter in parameters:
            depth = self.model.config.num_hidden_layers
            name = name.replace("mtp.0.mtp_block.", "mtp.0.").replace("post_norm", "shared_head.norm")
            name = name.replace("mtp.0.", f"model.layers.{depth}.")
            at, _, kind = name.rpartition(".")
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            if kind == "gate_up_proj":
                for e, (gate, up) in enumerate(g.chunk(2) for g in grad):
                    grads |= {f"{at}.{e}.gate_proj.weight": gate, f"{at}.{e}.up_proj.weight": up}
            elif kind == "down_proj":
                grads |= {f"{at}.{e}.down_proj.weight": g for e, g in enumerate(grad)}
            else:
                grads[name] = grad
        return main.item(), extra.item(), grads

    def _mtp_model(self):
        from transformers.modeling_layers import MtpModel

        if self._mtp is None:
            self._mtp = MtpModel.from_pretrained(self.model).eval()
            for layer in self._mtp.layers:
                layer.mtp_block.self_attn.config._attn_implementation = "eager"
                layer.mtp_block.mlp.experts.config._experts_implementation = "eager"
        return self._mtp

    @torch.no_grad()
    def mtp(self, tokens: list[int], pre_norm: bool = False) -> tuple[Tensor, float]:
        """(logits [S-1, V] of the MTP module, routing margin)."""
        layer = self._mtp_model()
        ids = torch.tensor([tokens])
        base = self.model.model
        seen: list = []
        states: list[Tensor] = []
        hook = base.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        with self._routers(seen):
            hidden = base(ids, use_cache=False).last_hidden_state
            hook.remove()
            hidden = states[0] if pre_norm else hidden
            positions = torch.arange(1, ids.shape[1])[None]
            out = layer.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
        logits = layer._project_to_logits(out)[0].float()
        return logits, min(_margin(r, z) for r, z, _ in seen)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _margin(router, logits: Tensor) -> float:
    """Distance of the closest decision between taking an expert (or a group) and not."""
    biased = logits.sigmoid() + router.e_score_correction_bias
    groups = biased.view(len(biased), router.num_group, -1)
    scores = groups.topk(2, -1).values.sum(-1).sort(-1, descending=True)
    margin = math.inf
    if router.topk_group < router.num_group:
        margin = float((scores.values[:, router.topk_group - 1] - scores.values[:, router.topk_group]).min())
    kept = torch.zeros_like(scores.values).scatter(1, scores.indices[:, : router.topk_group], 1.0).bool()
    ordered = groups.masked_fill(~kept[..., None], -math.inf).flatten(1).sort(-1, descending=True).values
    gap = ordered[:, router.top_k - 1] - ordered[:, router.top_k]
    return min(margin, float(gap[gap.isfinite()].min()) if gap.isfinite().any() else math.inf)


@dataclass
class Prompt:
    tokens: list[int]
    whole: list[int]  # with the greedy continuation
    answer: Answer  # over `whole`


def prompts(oracle: Oracle, lengths: tuple[int, ...] = LENGTHS, new: int = NEW, seed: int = 0) -> list[Prompt]:
    """Prompts on which no decision is a near-tie: drawn again until routing and greedy choices have their margins."""
    generator = torch.Generator().manual_seed(seed)
    size = oracle.model.config.vocab_size
    out = []
    for length in lengths:
        for _ in range(200):
            tokens = torch.randint(size, (length,), generator=generator).tolist()
            whole = oracle.greedy(tokens, new)
            answer = oracle.answer(whole)
            best = answer.logits[length - 1 : -1].topk(2, -1).values
            if answer.margin > ROUTING_MARGIN and float((best[:, 0] - best[:, 1]).min()) > GREEDY_MARGIN:
                if oracle.model.config.num_mtp_layers and oracle.mtp(whole)[1] <= ROUTING_MARGIN:
                    continue
                out.append(Prompt(tokens, whole, answer))
                break
        else:
            raise AssertionError(f"no prompt of {length} tokens without near-ties in 200 draws")
    return out


# -- the released FP8 layout, written out block by block --------------------------------------------------------------
FP8 = BASE | {
    "hidden_size": 272,
    "intermediate_size": 224,
    "moe_intermediate_size": 96,
    "q_lora_rank": 160,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "n_group": 4,
    "num_experts_per_tok": 2,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def in_fp8(name: str) -> bool:
    """The released checkpoints keep the projections of attention and of the MLPs in FP8, nothing else."""
    return "_proj" in name and name.endswith(".weight") and "eh_proj" not in name


def quantized(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors as released, the same dequantised to float32). Blocks differ in magnitude: every scale counts."""
    released, floats = {}, {}
    for name, weight in state.items():
        if not in_fp8(name):
            keep = weight if name.endswith("bias") else weight.bfloat16()
            released[name], floats[name] = keep, keep.float()
            continue
        rows, columns = (-(-n // 128) for n in weight.shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(rows, columns)
        floats[name] = torch.empty(weight.shape)
        for i in range(rows):
            for j in range(columns):
                at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                block = weight[at] * (0.7 + 0.6 * torch.rand(1, generator=generator))
                scales[i, j] = block.abs().max() / 448
                codes[at] = (block / scales[i, j]).to(torch.float8_e4m3fn)
                floats[name][at] = codes[at].float() * scales[i, j]
        released[name], released[f"{name}_scale_inv"] = codes, scales
    return released, floats


def cosines(got: dict, wanted: dict) -> tuple[float, float]:
    """(of all gradients as one vector, the worst of the matrices that carry a thousandth of it or more)."""
    flat = [torch.cat([grads[name].flatten().double() for name in wanted]) for grads in (got, wanted)]
    total = float(flat[1].norm())
    each = [
        float(F.cosine_similarity(got[n].flatten().double(), w.flatten().double(), dim=0))
        for n, w in wanted.items()
        if w.dim() == 2 and float(w.norm()) > 1e-3 * total
    ]
    return float(F.cosine_similarity(*flat, dim=0)), min(each)


def relative(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())
