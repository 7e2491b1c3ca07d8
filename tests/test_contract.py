"""The names and signatures that other frameworks import. Parameters may be added, with defaults; none is renamed."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import dsv3_kernels as dk

CONTRACT = {
    # quant
    "quantize_1x128": "(x, *, pow2_scale=False, scale_layout='mn')",
    "quantize_128x128": "(w, *, pow2_scale=False)",
    "quantize_1x128_both": "(x, *, offsets=None, pow2_scale=False)",
    "dequantize": "(q, scale, *, dtype=torch.bfloat16)",
    "silu_mul_quantize_1x128": "(gate_up, *, weights=None, pow2_scale=False)",
    "rms_norm": "(x, weight, eps, *, residual=None)",
    "rms_norm_quantize_1x128": "(x, weight, eps, *, residual=None)",
    # gemm
    "fp8_gemm": "(a, a_scale, b, b_scale, *, bias=None, out=None, out_dtype=torch.bfloat16, accumulate=False, "
    "policy='auto', num_sms=None)",
    "fp8_grouped_gemm": "(a, a_scale, b, b_scale, offsets, *, out=None, out_dtype=torch.bfloat16, num_sms=None)",
    "fp8_masked_gemm": "(a, a_scale, b, b_scale, counts, *, expected_m=None, out=None, num_sms=None)",
    "fp8_grouped_wgrad": "(a_t, a_scale, b_t, b_scale, offsets, *, out=None, accumulate=False, "
    "out_dtype=torch.float32, num_sms=None)",
    "fp8_grouped_gemm_swiglu_quantize": "(a, a_scale, b, b_scale, offsets, *, weights=None, num_sms=None)",
    "fp8_linear": "(x, weight, *, bias=None, out_dtype=None, pow2_scale=False)",
    "Fp8Linear": "(in_features, out_features, bias=False)",
    "fp8_grouped_linear": "(x, weight, offsets)",
    # mla
    "mla_decode": "(q, kv_cache, block_table, cache_seqlens, *, softmax_scale, causal=True, plan=None, out=None)",
    "mla_decode_plan": "(cache_seqlens, *, num_queries, num_heads, kv_dtype=torch.bfloat16, policy='balanced', "
    "num_sms=None)",
    "mla_prefill": "(q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale, causal=True)",
    "mla_cache_append": "(kv_cache, slots, latent, k_rope)",
    "mla_cache_gather": "(kv_cache, block_table, cu_seqlens, total)",
    "merge_attention": "(out_a, lse_a, out_b, lse_b)",
    "rope": "(x, positions, cos_sin, *, interleaved=True)",
    "yarn_cos_sin": "(head_dim, max_positions, *, base, factor, original_max, beta_fast, beta_slow, mscale, "
    "mscale_all_dim, device)",
    # moe
    "moe_gate": "(logits, bias, *, num_groups, topk_groups, top_k, scaling, normalize=True, score='sigmoid')",
    "moe_permute": "(x, experts, num_experts, *, scale=None, alignment=1)",
    "moe_unpermute": "(rows, handle, weights=None)",
    "moe_update_bias": "(bias, counts, speed)",
    "moe_balance_loss": "(scores, experts, *, seq_ids, alpha)",
    # the switches
    "backend": "(name)",
    "explain": "(op, *args)",
    "is_supported": "(op, device)",
    "preload": "(device)",
    # pipeline and parallel
    "pipeline.schedule": "(name, num_ranks, num_microbatches)",
    "pipeline.Pipeline": "(modules, group, schedule='dualpipe')",
    "parallel.eplb.rebalance_experts": "(weight, num_replicas, num_groups, num_nodes, num_gpus)",
    "parallel.ExpertParallel": "(group=None, num_experts=None, hidden=None, max_tokens=None, *, virtual_ranks=None, "
    "transport='auto', timeout=30.0)",
    "parallel.ExpertParallel.dispatch": "(self, x, experts, weights, *, scale=None, capacity=None)",
    "parallel.ExpertParallel.combine": "(self, rows, handle, *, weighted=True, out=None)",
    # model
    "model.DeepSeekV3.from_pretrained": "(path, *, device, dtype, weights, activations, group)",
    "model.DeepSeekV3.save_pretrained": "(self, path)",
    "model.DeepSeekV3.forward": "(self, tokens, *, seq_lens=None, cache=None, positions=None, routing=None, "
    "return_routing=False)",
    "model.DeepSeekV3.mtp_logits": "(self, tokens)",
    "model.DeepSeekV3.generate": "(self, tokens, max_new_tokens, *, eos_id=None, temperature=0, top_p=1, "
    "generator=None, speculative=False)",
    "model.PagedLatentCache": "",
    "model.mtp": "",
    "model.train.loss": "(model, tokens, *, mtp_weight=0.3, recipe='float32', routing=None)",
    "model.train.gradients": "(model)",
}


def find(path: str):
    found = dk
    for part in path.split("."):
        found = getattr(found, part)
    return found


def parameters(signature: str) -> list[tuple[str, bool, str | None]]:
    """(name, keyword only, default) of each parameter in a written signature."""
    listed, keyword = [], False
    for part in (p.strip() for p in signature.strip("()").split(", ")):
        if part == "*":
            keyword = True
        elif part:
            name, _, default = part.partition("=")
            listed.append((name, keyword, default or None))
    return listed


@pytest.mark.parametrize("path", CONTRACT)
def test_signature(path):
    found = find(path)
    written = parameters(CONTRACT[path])
    if not written:
        return
    actual = inspect.signature(found).parameters
    free_defaults = path.endswith("from_pretrained")
    for name, keyword, default in written:
        bare = name.lstrip("*")
        assert bare in actual, f"{path} has no parameter {bare}"
        parameter = actual[bare]
        if keyword:
            assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD), f"{path}: {bare}"
        if default is None and not free_defaults and not name.startswith("*"):
            assert parameter.default is parameter.empty, f"{path}: {bare} has a default, the contract has none"
        if default is not None:
            wanted = eval(default, {"torch": torch})
            assert parameter.default == wanted, f"{path}: {bare}={parameter.default!r}, the contract says {default}"
    positional = [name for name, keyword, _ in written if not keyword and not name.startswith("*")]
    order = [name for name in actual if actual[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert order[: len(positional)] == positional, f"{path}: positional order {order}"
    extra = set(actual) - {name.lstrip("*") for name, _, _ in written}
    for name in extra - {"self"}:
        parameter = actual[name]
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        assert optional, f"{path}: added parameter {name} has no default"


def test_import_brings_in_neither_torch_nor_triton():
    code = "import sys, dsv3_kernels; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'fp9_gemm'"):
        _ = dk.fp9_gemm
