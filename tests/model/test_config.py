"""config.json: both spellings, what is kept, what is refused and in which words."""

from __future__ import annotations

import json
import math

import pytest
from oracle import BASE, CASES, YARN

from dsv3_kernels.model import Config

# The released configuration, by its published values.
RELEASED = BASE | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_scaling": YARN | {"factor": 40, "original_max_position_embeddings": 4096},
}
NEW_ROPE = {key: value for key, value in YARN.items() if key != "type"} | {"rope_type": "yarn", "rope_theta": 10000.0}


def test_released_values():
    config = Config.from_dict(RELEASED)
    assert config.softmax_scale == pytest.approx(0.1352338, abs=1e-7)
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    assert (config.qk_head_dim, config.latent_dim) == (192, 576)
    assert config.yarn.rotary_mscales == (1.0, 1.0)
    assert not config.pow2_scale
    v31 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    assert Config.from_dict(RELEASED | {"quantization_config": v31}).pow2_scale


def test_old_and_new_rope_keys():
    old = Config.from_dict(BASE)
    new = {key: value for key, value in BASE.items() if key not in ("rope_scaling", "rope_theta")}
    assert Config.from_dict(new | {"rope_parameters": NEW_ROPE}) == old
    assert Config.from_dict(BASE | {"rope_scaling": YARN | {"rope_type": "yarn"}}) == old
    plain = Config.from_dict(BASE | {"rope_scaling": None, "rope_theta": 5000.0})
    assert plain.yarn is None and plain.rope_theta == 5000.0
    assert Config.from_dict(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}) == plain


def test_half_given_mscales():
    """mscale alone, or neither, scales the angles by m(1); mscale_all_dim alone changes the softmax too."""
    bare = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
    for extra in ({}, {"mscale": 0.7}, {"mscale_all_dim": 0.7}):
        config = Config.from_dict(BASE | {"rope_scaling": bare | extra})
        assert config.yarn.rotary_mscales == (1.0, 0.0)
        factor = (0.1 * 0.7 * math.log(8) + 1) ** 2 if "mscale_all_dim" in extra else 1.0
        assert config.softmax_scale == pytest.approx(config.qk_head_dim**-0.5 * factor, rel=1e-12)


@pytest.mark.parametrize("name", sorted(CASES))
def test_round_trip(name, tmp_path):
    raw = CASES[name] | {"bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "my_note": {"kept": [1, 2]}}
    config = Config.from_dict(raw)
    config.save(tmp_path)
    assert Config.load(tmp_path) == Config.load(tmp_path / "config.json") == config
    written = json.loads((tmp_path / "config.json").read_text())
    for key, value in raw.items():
        assert written[key] == value or key == "rope_scaling", key
    if raw["rope_scaling"]:
        assert written["rope_scaling"] == raw["rope_scaling"]


def test_transformers_reads_and_writes_the_same(tmp_path):
    from transformers import DeepseekV3Config

    for name, raw in CASES.items():
        Config.from_dict(raw).save(tmp_path)
        theirs = DeepseekV3Config.from_pretrained(tmp_path)
        theirs.save_pretrained(tmp_path)
        again = Config.load(tmp_path)
        again.other = Config.from_dict(raw).other
        assert again == Config.from_dict(raw), name


CHANGES_THE_RESULT = {
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "moe_layer_freq": 2,
    "rope_interleave": False,
    "attention_dropout": 0.1,
    "sliding_window": 128,
    "index_topk": 2048,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.mark.parametrize("field", sorted(CHANGES_THE_RESULT))
def test_refuses_what_it_does_not_compute(field):
    with pytest.raises(ValueError, match=field):
        Config.from_dict(BASE | {field: CHANGES_THE_RESULT[field]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture.*LlamaForCausalLM"),
        ({"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}, "architecture"),
        ({"model_type": "deepseek_v2"}, "deepseek_v2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type.*linear"),
        ({"rope_scaling": YARN | {"rope_type": "dynamic"}}, "rope type.*dynamic"),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        ({"rope_scaling": YARN | {"long_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}}, "fmt"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"q_lora_rank": -1}, "q_lora_rank"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 16}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_refuses_in_words(change, words):
    with pytest.raises(ValueError, match=f"config: .*{words}"):
        Config.from_dict(BASE | change)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Config.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Config.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="wanted an object"):
        Config.load(tmp_path)
