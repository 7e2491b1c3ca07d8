"""Checkpoints: the released FP8 layout exactly, round trips, what transformers loads, and files that are not whole."""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from checks import same_bits
from oracle import relative
from safetensors.torch import load_file, save_file
from test_forward import BOUND, MTP_BOUND

import dsv3_kernels as dk
from dsv3_kernels.model import Config, DeepSeekV3, weights
from dsv3_kernels.model.weights import pieces

E4M3 = torch.float8_e4m3fn


def load(folder, **options) -> DeepSeekV3:
    return DeepSeekV3.from_pretrained(folder, device="cpu", **options)


def error(case, model) -> float:
    errors = []
    for prompt in case.prompts:
        with torch.no_grad():
            errors.append(relative(model(torch.tensor([prompt.whole]))[0], prompt.answer.logits))
    return max(errors)


# -- FP8 -------------------------------------------------------------------------------------------------------------
def test_fp8_layout_dequantised_exactly(fp8):
    """Every tensor equals codes * scales in float32; partial blocks, scales in other shards, MTP layer included."""
    _, floats = oracle.quantized(oracle.tensors(oracle.FP8, seed=1))
    index = json.loads((fp8.folder / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [n for n in index if f"{n}_scale_inv" in index and index[n] != index[f"{n}_scale_inv"]]
    assert len(apart) > 50
    names = set()
    for piece in pieces(fp8.model):
        names.add(piece.name)
        assert same_bits(piece.view(getattr(piece.module, piece.attribute)).contiguous(), floats[piece.name]), (
            piece.name
        )
    assert names == set(floats)
    assert error(fp8, fp8.model) <= BOUND


def test_fp8_weights_with_float_activations(fp8):
    """Codes and scales stay as they are and are dequantised at use: prefill, decoding, speculation, MTP."""
    model = load(fp8.folder, weights="fp8", activations="bf16", dtype=torch.float32)
    released = oracle.read(fp8.folder)
    for piece in pieces(model):
        stored = piece.view(getattr(piece.module, piece.attribute)).contiguous()
        if oracle.in_fp8(piece.name):
            assert same_bits(stored, released[piece.name])
            scale = piece.view(piece.module.scale, 128).contiguous()
            assert same_bits(scale, released[f"{piece.name}_scale_inv"])
        else:
            assert same_bits(stored, released[piece.name].float())
    assert error(fp8, model) <= BOUND
    for prompt in fp8.prompts:
        logits = model.mtp_logits(torch.tensor([prompt.whole]))
        assert relative(logits[0], fp8.oracle.mtp(prompt.whole)[0]) <= MTP_BOUND
        for speculative in (False, True):
            assert model.generate([prompt.tokens], 6, speculative=speculative) == [prompt.whole]


def test_padding_in_fp8_storage_is_zero(fp8):
    """Stacked matrices start at whole scale blocks; what lies between them is zero and stays out of every result."""
    model = load(fp8.folder)
    mlp = model.model.layers[1].mlp.experts
    assert mlp.gate_up.weight.shape == (8, 256, 272) and mlp.down.weight.shape == (8, 272, 128)
    codes = mlp.gate_up.weight.view(torch.uint8)
    assert not codes[:, 96:128].any() and not codes[:, 224:].any()
    assert not mlp.down.weight.view(torch.uint8)[:, :, 96:].any()


@pytest.mark.parametrize(
    "mistake",
    ["divided", "tail blocks of equal size", "scales of the neighbour", "no scales", "partial blocks dropped"],
)
def test_fp8_mistakes_are_seen(mistake, fp8, monkeypatch):
    exact = dk.dequantize

    def wrong(q, scale, *, dtype):
        if mistake == "divided":
            scale = 1 / scale
        elif mistake == "scales of the neighbour":
            scale = scale.roll(1, -1)
        elif mistake == "no scales":
            scale = torch.ones_like(scale)
        elif mistake == "partial blocks dropped":
            scale = scale * torch.where(torch.arange(len(scale)) * 128 + 128 > len(q), 0.0, 1.0)[:, None]
        elif mistake == "tail blocks of equal size" and len(q) % 128:  # rows shared out evenly over the scale's rows
            rows = torch.arange(len(q)) * len(scale) // len(q)
            columns = torch.arange(q.shape[1]) // 128
            return (q.float() * scale[rows][:, columns]).to(dtype)
        return exact(q, scale, dtype=dtype)

    monkeypatch.setattr(dk, "dequantize", wrong)
    assert error(fp8, load(fp8.folder, weights="float32")) > 1000 * BOUND


def test_scales_sought_beside_their_weights_alone_are_seen(fp8, monkeypatch):
    """The index says where a scale lies, often in another shard: taken as 1 there, the logits are others."""
    read_index = weights.Checkpoint._read_index

    def own_shard(self):
        read_index(self)
        for name in [n for n in self.entries if n.endswith("_scale_inv")]:
            if self.entries[name].file != self.entries[name.removesuffix("_scale_inv")].file:
                del self.entries[name]

    monkeypatch.setattr(weights.Checkpoint, "_read_index", own_shard)
    with pytest.warns(UserWarning, match="taken as scale 1"):
        model = load(fp8.folder, weights="float32")
    assert error(fp8, model) > 1000 * BOUND


def test_w8a8_linear_layers_exactly(fp8):
    """Each linear layer computes codes times codes with their scales: float64 of the same quantised operands."""
    model = load(fp8.folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    layer = model.model.layers[1]
    linears = [m for m in layer.modules() if isinstance(m, dk.model.layers.Linear) and m.quantizable]
    assert len(linears) == 4 + 2 + 2
    for linear in linears:
        assert linear.quantize_activations
        x = torch.randn(9, linear.weight.shape[-1], generator=generator) * torch.rand(9, 1, generator=generator)
        q, scale = dk.quantize_1x128(x)
        values = dk.dequantize(q, scale, dtype=torch.float32).double()
        if linear.experts:
            continue
        wanted = values @ dk.dequantize(linear.weight, linear.scale, dtype=torch.float32).double().T
        assert relative(linear(x), wanted) <= 1e-5, linear.parts
    experts = layer.mlp.experts
    offsets = torch.tensor([0, 3, 3, 4, 9, 9, 9, 9, 9], dtype=torch.int32)
    x = torch.randn(9, 272, generator=generator)
    q, scale = dk.quantize_1x128(x)
    step = model.step(torch.zeros(1, 9, dtype=torch.int64))
    got = experts.grouped(q, scale, offsets, step)
    for e in (0, 2, 3):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        values = dk.dequantize(q[rows], scale[rows], dtype=torch.float32).double()
        both = (
            values @ dk.dequantize(experts.gate_up.weight[e], experts.gate_up.scale[e], dtype=torch.float32).double().T
        )
        hidden = torch.nn.functional.silu(both[:, :96]) * both[:, 128:224]
        codes, scales = dk.quantize_1x128(hidden.float())
        down = dk.dequantize(experts.down.weight[e], experts.down.scale[e], dtype=torch.float32).double()
        wanted = dk.dequantize(codes, scales, dtype=torch.float32).double() @ down[:, :96].T
        # the intermediate may round to the neighbouring code where float64 and float32 disagree
        assert relative(got[rows], wanted) <= 0.01


def test_absorbed_weights_without_scales_are_seen(fp8):
    """Decoding takes kv_b dequantised; its bare codes would pass every test of prefill alone."""
    model = load(fp8.folder, weights="fp8", activations="bf16", dtype=torch.float32)
    prompt = fp8.prompts[1]

    def decoded() -> float:
        cache = dk.model.PagedLatentCache(model.config, [64], dtype=torch.float32)
        model(torch.tensor([prompt.tokens]), cache=cache)
        step = torch.tensor([prompt.whole[len(prompt.tokens) :][:1]])
        return relative(model(step, cache=cache)[0, 0], prompt.answer.logits[len(prompt.tokens)])

    assert decoded() <= BOUND
    for largest in (1, 448):  # as they are, and brought to the size of weights
        for layer in model.model.layers:
            codes = layer.self_attn.kv_b_proj.weight.float()
            layer.self_attn.absorbed = codes.view_as(layer.self_attn.absorbed) / largest
        assert decoded() > 0.01
    assert error(fp8, model) <= BOUND


def test_zero_tiles(fp8, monkeypatch, tmp_path):
    """A token whose embedding is zero has tiles without a largest value: zeros come out, not 0 / 0."""
    released = oracle.read(fp8.folder)
    released["model.embed_tokens.weight"][5] = 0
    oracle.write(tmp_path, oracle.FP8, released)
    model = load(tmp_path)
    tokens = torch.tensor([[5, 5, 5]])
    assert model(tokens).isfinite().all()
    norm = dk.rms_norm_quantize_1x128

    def no_floor(x, *args, **options):
        q, scale, normed, total = norm(x, *args, **options)
        empty = normed.unflatten(-1, (-1, 16)).abs().amax((-1, -2)) == 0
        return q, torch.where(empty[:, None], torch.nan, scale), normed, total

    monkeypatch.setattr(dk, "rms_norm_quantize_1x128", no_floor)
    assert not model(tokens).isfinite().all()


def test_zero_tiles_of_weights(base, tmp_path, monkeypatch):
    """A matrix of zeros quantised at load: without a floor under the largest value its codes would be 0 / 0."""
    state = oracle.read(base.folder)
    state["model.layers.1.mlp.experts.3.up_proj.weight"].zero_()
    oracle.write(tmp_path, oracle.BASE, state)
    options = {"weights": "fp8", "activations": "bf16", "dtype": torch.float32}
    tokens = torch.tensor([base.prompts[3].whole])
    assert load(tmp_path, **options)(tokens).isfinite().all()
    quantize = dk.quantize_128x128

    def no_floor(w, *, pow2_scale):
        q, scale = quantize(w, pow2_scale=pow2_scale)
        if not w.any():
            scale = torch.zeros_like(scale)  # the largest value / 448
            q = (w / scale[:1, :1]).to(q.dtype)
        return q, scale

    monkeypatch.setattr(dk, "quantize_128x128", no_floor)
    assert not load(tmp_path, **options)(tokens).isfinite().all()


def test_w8a8_whole(fp8):
    """Statistical: FP8 activations move the logits by percents, not more; the choice of experts is replayed."""
    for dtype in (torch.float32, torch.bfloat16):
        model = load(fp8.folder, dtype=dtype)
        for prompt in fp8.prompts:
            routing = [experts.int() for experts in prompt.answer.experts]
            logits = model(torch.tensor([prompt.whole]), routing=routing)[0]
            assert 0.005 < relative(logits, prompt.answer.logits) < 0.15
        tokens = [prompt.tokens for prompt in fp8.prompts]
        assert model.generate(tokens, 5) == model.generate(tokens, 5)


def test_fp8_latent_cache(fp8):
    """656 bytes a token: greedy continuation of the float cache is not promised, logits within percents are."""
    for prompt in fp8.prompts:
        caches = [dk.model.PagedLatentCache(fp8.model.config, [64], dtype=d) for d in (torch.float32, torch.uint8)]
        assert caches[1].bytes_per_token == 3 * 656
        for cache in caches:
            fp8.model(torch.tensor([prompt.tokens]), cache=cache)
        step = torch.tensor([prompt.whole[len(prompt.tokens) :][:2]])
        exact, routing = fp8.model(step, cache=caches[0], return_routing=True)
        rounded = fp8.model(step, cache=caches[1], routing=routing)
        assert 1e-4 < relative(rounded, exact) < 0.1
    out = fp8.model.generate([p.tokens for p in fp8.prompts], 4, cache_dtype=torch.uint8)
    assert [len(row) for row in out] == [len(p.tokens) + 4 for p in fp8.prompts]


def test_scales_missing_or_of_other_types(tmp_path, fp8):
    released = oracle.read(fp8.folder)
    config = oracle.FP8
    name = "model.layers.0.self_attn.o_proj.weight"
    bare = {k: v for k, v in released.items() if k != f"{name}_scale_inv"}
    oracle.write(tmp_path / "bare", config, bare)
    with pytest.warns(UserWarning, match="o_proj.weight is FP8 and has no scales|o_proj.weight_scale_inv"):
        model = load(tmp_path / "bare", weights="float32")
    assert same_bits(model.model.layers[0].self_attn.o_proj.weight.detach(), released[name].float())
    powers = {k: v.log2().ceil().exp2() if k.endswith("scale_inv") else v for k, v in released.items()}
    packed = {k: v.to(torch.float8_e8m0fnu) if k.endswith("scale_inv") else v for k, v in powers.items()}
    oracle.write(tmp_path / "float", config, powers)
    oracle.write(tmp_path / "e8m0", config, packed)
    a, b = load(tmp_path / "float", weights="float32"), load(tmp_path / "e8m0", weights="float32")
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert same_bits(one.detach(), other.detach())


# -- round trips -----------------------------------------------------------------------------------------------------
def test_fp8_round_trip_is_bit_exact(fp8, tmp_path):
    load(fp8.folder).save_pretrained(tmp_path, max_shard_bytes=400_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    before, after = oracle.read(fp8.folder), oracle.read(tmp_path)
    assert set(before) <= set(after)
    assert all(same_bits(before[name], after[name]) for name in before)
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    assert set(after) - set(before) == {f"model.layers.2.{name}" for name in copies}
    for name, original in copies.items():
        assert same_bits(after[f"model.layers.2.{name}"], before[original])
    again = load(tmp_path)  # the copies of the MTP layer are no strangers
    tokens = torch.tensor([fp8.prompts[1].whole])
    assert same_bits(again(tokens), load(fp8.folder)(tokens))


def test_float_round_trip(base, tmp_path):
    base.model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    before, after = oracle.read(base.folder), oracle.read(tmp_path)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    model = load(tmp_path, weights="float32")
    tokens = torch.tensor([base.prompts[2].whole])
    assert same_bits(model(tokens).detach(), base.model(tokens))


def test_bias_stays_float32(base, tmp_path):
    """Whatever the file has, and whatever the other weights become."""
    state = {k: v.bfloat16() if k.endswith("bias") else v for k, v in oracle.read(base.folder).items()}
    oracle.write(tmp_path / "in", oracle.BASE, state)
    model = load(tmp_path / "in", weights="bf16")
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers[1:]]
    assert all(bias.dtype == torch.float32 for bias in biases)
    model.save_pretrained(tmp_path / "out")
    for name, tensor in oracle.read(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if name.endswith("bias") else torch.bfloat16)


def test_transformers_loads_what_is_saved(base, tmp_path):
    base.model.save_pretrained(tmp_path, max_shard_bytes=100_000)
    theirs = oracle.Oracle(tmp_path)
    prompt = base.prompts[2]
    assert same_bits(theirs.answer(prompt.whole).logits, prompt.answer.logits)
    assert relative(theirs.mtp(prompt.whole)[0], base.oracle.mtp(prompt.whole)[0]) == 0


def test_transformers_loads_fp8(tmp_path):
    """With whole blocks alone: partial ones it dequantises wrongly. It rounds to bfloat16 where we keep float32."""
    config = oracle.BASE | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 128,
        "v_head_dim": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    oracle.write(tmp_path / "float", config, oracle.tensors(config, 0))
    load(tmp_path / "float", weights="float32").save_pretrained(tmp_path / "fp8", weights="fp8")
    tokens = list(range(40))
    with torch.no_grad():
        ours, routing = load(tmp_path / "fp8", weights="float32")(torch.tensor([tokens]), return_routing=True)
    theirs = oracle.Oracle(tmp_path / "fp8")
    theirs.model.float()
    assert relative(theirs.answer(tokens, replay=routing).logits, ours[0]) <= 0.01


def test_quantised_at_load(base, tmp_path):
    """A float checkpoint in FP8: the codes of quantize_128x128, saved as such, loaded the same."""
    model = load(base.folder, weights="fp8", activations="bf16", dtype=torch.float32)
    weight = oracle.read(base.folder)["model.layers.0.self_attn.q_a_proj.weight"]
    q, scale = dk.quantize_128x128(weight)
    got = model.model.layers[0].self_attn.qkv_a
    assert same_bits(got.weight.detach()[: len(q)], q) and same_bits(got.scale[: len(scale)], scale)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    again = load(tmp_path, activations="bf16", dtype=torch.float32)
    tokens = torch.tensor([base.prompts[1].whole])
    assert same_bits(again(tokens), model(tokens))


def test_weights_as_the_config_says(base, tmp_path):
    """Without `weights`, a float32 checkpoint loads as float32, by the new spelling of the key and the old one."""
    state = oracle.read(base.folder)
    plain = {name: value for name, value in oracle.BASE.items() if name != "torch_dtype"}
    for number, (extra, wanted) in enumerate(
        [
            ({"torch_dtype": "float32"}, torch.float32),
            ({"dtype": "float32"}, torch.float32),
            ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.bfloat16),
            ({"torch_dtype": "float16"}, torch.bfloat16),
            ({}, torch.bfloat16),
        ]
    ):
        folder = oracle.write(tmp_path / str(number), plain | extra, state)
        model = load(folder)
        assert model.dtype == wanted and {p.dtype for p in model.parameters()} == {wanted}, extra
        assert model.weights == ("float32" if wanted == torch.float32 else "bf16")
    model = load(tmp_path / "0", weights="bf16")
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16


def test_router_bias_stays_float32(base):
    """Whatever dtype the model is brought to; it follows to other devices, and gets no values of its own there."""
    model = base.load(weights="float32")
    gates = [module for module in model.modules() if isinstance(module, dk.model.layers.Gate)]
    biases = [gate.e_score_correction_bias.clone() for gate in gates]
    assert len(gates) == 4
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()):
        change(model)
        for gate, bias in zip(gates, biases, strict=True):
            assert gate.weight.dtype != torch.float32
            assert same_bits(gate.e_score_correction_bias, bias)
            assert "e_score_correction_bias" in dict(gate.named_buffers())
    model.to("meta", torch.bfloat16)
    assert all(gate.e_score_correction_bias.is_meta for gate in gates)
    assert all(gate.e_score_correction_bias.dtype == torch.float32 for gate in gates)


# -- the MTP layer, there or not -------------------------------------------------------------------------------------
def test_without_mtp(base, tmp_path):
    state = oracle.read(base.folder)
    main = {name: tensor for name, tensor in state.items() if ".layers.4." not in name}
    oracle.write(tmp_path / "absent", oracle.BASE, main)
    oracle.write(tmp_path / "off", oracle.BASE | {"num_nextn_predict_layers": 0}, state)
    for name in ("absent", "off"):
        model = load(tmp_path / name, weights="float32")
        assert model.config.num_nextn_predict_layers == 0 and len(model.model.layers) == 4
        assert error(base, model) <= BOUND
        with pytest.raises(ValueError, match="no MTP layer"):
            model.mtp_logits(torch.zeros(1, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match="no MTP layer"):
            model.generate([[1, 2]], 4, speculative=True)


def test_copies_of_the_mtp_layer_are_not_read(base, tmp_path):
    """Embedding and head are the main model's, whatever lies beside the MTP layer."""
    state = oracle.read(base.folder)
    for name in ("embed_tokens", "shared_head.head"):
        state[f"model.layers.4.{name}.weight"] = torch.full_like(state["lm_head.weight"], torch.nan)
    oracle.write(tmp_path, oracle.BASE, state)
    tokens = torch.tensor([base.prompts[1].whole])
    with torch.no_grad():
        assert same_bits(load(tmp_path, weights="float32").mtp_logits(tokens), base.model.mtp_logits(tokens))


# -- files that are not whole ----------------------------------------------------------------------------------------
def broken(name: str, folder: Path) -> None:
    """Break a copy of the three-shard checkpoint in the named way."""
    shard = folder / "model-00002-of-00003.safetensors"
    index = folder / "model.safetensors.index.json"
    content = shard.read_bytes()
    if name == "missing shard":
        shard.unlink()
    elif name == "truncated shard":
        shard.write_bytes(content[:-10])
    elif name == "truncated header":
        shard.write_bytes(content[:100])
    elif name == "empty shard":
        shard.write_bytes(b"")
    elif name == "header is not JSON":
        shard.write_bytes(struct.pack("<Q", 20) + b"x" * 40)
    elif name == "index is not JSON":
        index.write_text("{")
    elif name == "index without a map":
        index.write_text("{}")
    elif name == "index names a tensor that is not there":
        places = json.loads(index.read_text())
        places["weight_map"]["model.norm.weight"] = (
            shard.name if "model.norm.weight" not in load_file(shard) else ("model-00001-of-00003.safetensors")
        )
        index.write_text(json.dumps(places))
    elif name == "no weights":
        for file in [index, *folder.glob("*.safetensors")]:
            file.unlink()
    elif name == "no config":
        (folder / "config.json").unlink()
    else:
        state = oracle.read(folder)
        weight = "model.layers.1.mlp.experts.3.up_proj.weight"
        if name == "missing tensor":
            del state[weight]
        elif name == "wrong shape":
            state[weight] = state[weight].T.contiguous()
        elif name == "wrong dtype":
            state[weight] = state[weight].int()
        elif name == "unknown tensor":
            state["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(4)
        elif name == "wrong scale shape":
            state[weight] = state[weight].to(E4M3)
            state[f"{weight}_scale_inv"] = torch.ones(2, 2)
        elif name == "FP8 norm":
            state["model.norm.weight"] = state["model.norm.weight"].to(E4M3)
        index.unlink()
        for file in folder.glob("model-*.safetensors"):
            file.unlink()
        save_file(state, folder / "model.safetensors")


BROKEN = {
    "missing shard": (FileNotFoundError, "1 of 3 shards missing: model-00002-of-00003"),
    "truncated shard": (ValueError, r"model-00002-of-00003\.safetensors is truncated: \d+ bytes, its header describes"),
    "truncated header": (ValueError, "truncated.*inside its header"),
    "empty shard": (ValueError, "truncated"),
    "header is not JSON": (ValueError, "no safetensors header"),
    "index is not JSON": (ValueError, "not an index"),
    "index without a map": (ValueError, "not an index"),
    "index names a tensor that is not there": (ValueError, r"lacks model\.norm\.weight"),
    "no weights": (FileNotFoundError, "neither"),
    "no config": (FileNotFoundError, r"config\.json"),
    "missing tensor": (ValueError, r"1 of \d+ tensors missing: .*experts\.3\.up_proj"),
    "wrong shape": (ValueError, r"experts\.3\.up_proj.*got shape \[64, 32\], wanted \[32, 64\]"),
    "wrong dtype": (ValueError, r"experts\.3\.up_proj.*got dtype I32"),
    "unknown tensor": (ValueError, r"does not have: .*q_proj\.bias"),
    "wrong scale shape": (ValueError, r"up_proj\.weight_scale_inv.*\[2, 2\].*wanted F32 of shape \[1, 1\]"),
    "FP8 norm": (ValueError, r"norm\.weight.*F8_E4M3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(name, base, tmp_path, monkeypatch):
    """A clear error, and before any memory is taken."""
    folder = tmp_path / "copy"
    shutil.copytree(base.folder, folder)
    broken(name, folder)
    monkeypatch.setattr(weights, "materialise", lambda *_: pytest.fail("memory was taken"))
    kind, words = BROKEN[name]
    with pytest.raises(kind, match=words):
        load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int8"}, "weights: got 'int8'"),
        ({"activations": "int8"}, "activations: got 'int8'"),
        ({"weights": "bf16", "activations": "fp8"}, "activations: got 'fp8' with weights='bf16'"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_options(base, options, words):
    with pytest.raises(ValueError, match=f"from_pretrained: {words}"):
        load(base.folder, **options)


def test_a_failed_save_changes_nothing(base, tmp_path, monkeypatch):
    base.model.save_pretrained(tmp_path, max_shard_bytes=300_000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    calls = []

    def fails(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(tensors, file, metadata=metadata)

    monkeypatch.setattr(weights, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        base.model.save_pretrained(tmp_path, weights="bf16", max_shard_bytes=300_000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    base.model.save_pretrained(tmp_path, weights="bf16")  # fewer files: the old shards go
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# -- memory ----------------------------------------------------------------------------------------------------------
MEASURE = """
import sys
import torch
import dsv3_kernels as dk
from dsv3_kernels.model import Config, DeepSeekV3, weights

small, large = sys.argv[1:]

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def measure(kind):
    DeepSeekV3.from_pretrained(small, device="cpu", weights=kind)  # libraries, code, pools
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    start = status("VmRSS")
    model = DeepSeekV3.from_pretrained(large, device="cpu", weights=kind)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    print(status("VmHWM") - start, held)

measure("fp8")
measure("bf16")
read = weights.Checkpoint.read

def hoard(self, name):  # the mistake: all tensors in memory before the first is placed
    if not hasattr(self, "kept"):
        self.kept = {name: read(self, name) for name in self.entries}
    return self.kept[name]

weights.Checkpoint.read = hoard
measure("fp8")
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200 MB of bfloat16 in five shards."""
    config = oracle.FP8 | {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "n_routed_experts": 56,
        "n_group": 8,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "vocab_size": 4096,
        "num_nextn_predict_layers": 0,
    }
    del config["quantization_config"]
    folder = tmp_path_factory.mktemp("large")
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes = {piece.name: piece.shape for piece in pieces(DeepSeekV3.skeleton(Config.from_dict(config)))}
    state = {name: block[: math.prod(shape)].view(shape).clone() for name, shape in shapes.items()}
    return oracle.write(folder, config, state, shards=5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of /proc")
def test_loading_streams(large, base):
    """Peak host memory: 1.2 times the model and the largest shard; and a loader that hoards is seen."""
    sizes = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert 195e6 < sum(sizes) < 215e6
    command = [sys.executable, "-c", MEASURE, str(base.folder), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind, line in zip(("fp8", "bf16", "hoard"), done.stdout.splitlines(), strict=True):
        peak, held = map(int, line.split())
        bound = 1.2 * held + max(sizes)
        print(f"{kind}: peak {peak / 1e6:.0f} MB, model {held / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
        assert (peak <= bound) == (kind != "hoard"), kind
