"""The FP8 training recipe: gradients against the recipe in plain float32 and against no quantisation at all."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from oracle import cosines
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_kernels.model import Config, DeepSeekV3, fp8, train
from dsv3_kernels.pipeline import WeightGrad


def gradients(model, tokens, **options) -> dict[str, Tensor]:
    model.zero_grad()
    train.loss(model, tokens, **options)[0].backward()
    return train.gradients(model)


@pytest.fixture(scope="module")
def replay(trained):
    """(model, tokens, routing, float32 gradients) after a warm-up, experts chosen once for all"""
    model, text, _ = trained
    tokens = text(8)
    with torch.no_grad():
        _, routing = model.mtp_logits(tokens, return_routing=True)
    return model, tokens, routing, gradients(model, tokens, recipe="float32", routing=routing)


# -- the recipe again, from its description, in float32 ----------------------------------------------------------------
def tiled(x: Tensor, rows: int, columns: int, pow2: bool) -> Tensor:
    """x rounded to E4M3 in blocks of rows x columns, each with its scale."""
    padded = F.pad(x.float(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-4) / 448
    if pow2:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(2, 3).flatten(0, 1)[: x.shape[0], : x.shape[1]]


def by_row(x: Tensor, pow2: bool) -> Tensor:
    return tiled(x, 1, 128, pow2)


class Product(torch.autograd.Function):
    """x @ w.T; x2 is what is left of x for the weight's gradient."""

    @staticmethod
    def forward(ctx, x, w, x2, pow2_x, pow2_grad, tokens_pow2):
        wq = tiled(w, 128, 128, False)
        ctx.save_for_backward(wq, x2)
        ctx.dtype, ctx.pow2_grad, ctx.tokens_pow2 = x.dtype, pow2_grad, tokens_pow2
        return (by_row(x, pow2_x) @ wq.mT).to(torch.bfloat16)

    @staticmethod
    def backward(ctx, grad):
        wq, x2 = ctx.saved_tensors
        dx = (by_row(grad, ctx.pow2_grad) @ wq).to(ctx.dtype)
        dw = tiled(grad, 128, 1, ctx.pow2_grad).mT @ tiled(x2, 128, 1, ctx.tokens_pow2)
        return dx, dw, None, None, None, None


class Swiglu(torch.autograd.Function):
    """silu(gate) * up of the exact values; its gradient is that at the cached codes."""

    @staticmethod
    def forward(ctx, gate_up, cached):
        ctx.save_for_backward(cached)
        return swiglu(gate_up.float())

    @staticmethod
    def backward(ctx, grad):
        (cached,) = ctx.saved_tensors
        with torch.enable_grad():
            cached = cached.detach().requires_grad_()
            return torch.autograd.grad(swiglu(cached), cached, grad)[0].to(torch.bfloat16), None


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


class Emulated(fp8.Recipe):
    """Every product in float32 on rounded operands, group by group; nothing is computed twice."""

    def linear(self, x, weight, offsets=None, *, pow2=False, keep_codes=False):
        def one(rows, w):
            return Product.apply(rows, w, by_row(rows, pow2) if keep_codes else rows, pow2, False, pow2)

        return grouped(one, x, weight, offsets)

    def swiglu_linear(self, gate_up, weight, offsets=None, *, pow2_grad=False):
        def one(rows, w):
            cached = by_row(rows, False)
            return Product.apply(Swiglu.apply(rows, cached), w, swiglu(cached), False, pow2_grad, False)

        return grouped(one, gate_up, weight, offsets)

    def again(self, function, *inputs, attention=False):
        return function(*inputs)


def grouped(one, x, weight, offsets):
    if offsets is None:
        return one(x, weight)
    bounds = offsets.tolist()
    return torch.cat([one(x[a:b], w) for a, b, w in zip(bounds[:-1], bounds[1:], weight, strict=True)])


def test_against_the_recipe_in_float32(replay, monkeypatch):
    model, tokens, routing, _ = replay
    got = gradients(model, tokens, recipe="fp8", routing=routing)
    monkeypatch.setattr(train, "Recipe", Emulated)
    wanted = gradients(model, tokens, recipe="fp8", routing=routing)
    everything, worst = cosines(got, wanted)
    print(f"emulated: {everything:.6f}, worst {worst:.6f}")
    assert everything >= 0.999 and worst >= 0.999


@pytest.mark.parametrize(("pow2", "bounds"), [(False, (0.99, 0.97)), (True, (0.98, 0.94))])
def test_against_float32(replay, pow2, bounds, monkeypatch):
    """And a weight gradient whose scales are those of the next block of tokens."""
    model, tokens, routing, wanted = replay
    monkeypatch.setattr(train, "Recipe", lambda _: fp8.Recipe(pow2))
    got = gradients(model, tokens, recipe="fp8", routing=routing)
    everything, worst = cosines(got, wanted)
    print(f"power-of-two {pow2}: {everything:.5f}, worst {worst:.5f}")
    assert bounds[0] <= everything < 0.99999 and worst >= bounds[1]
    quantize = fp8.quantize_1x128_both

    def rolled(x, **options):
        q, scale, q_t, scale_t, offsets = quantize(x, **options)
        return q, scale, q_t, scale_t.roll(1, 1), offsets

    monkeypatch.setattr(fp8, "quantize_1x128_both", rolled)
    wrong, wrong_worst = cosines(gradients(model, tokens, recipe="fp8", routing=routing), wanted)
    print(f"scales rolled by one: {wrong:.5f}, worst {wrong_worst:.5f}")
    assert wrong < bounds[0] and wrong_worst < bounds[1]


def test_what_is_computed_again_has_the_same_bits(replay, monkeypatch):
    model, tokens, routing, _ = replay
    got = gradients(model, tokens, recipe="fp8", routing=routing)
    monkeypatch.setattr(fp8.Recipe, "again", lambda _, function, *inputs, attention=False: function(*inputs))
    kept = gradients(model, tokens, recipe="fp8", routing=routing)
    assert all(torch.equal(got[name], kept[name]) for name in kept)


def test_weight_gradients_can_wait(replay):
    """As zb1p and DualPipe have them wait: none of the products' until the hook runs; then the same bits."""
    model, tokens, routing, _ = replay
    wanted = gradients(model, tokens, recipe="fp8", routing=routing)
    model.zero_grad()
    hook = WeightGrad()
    with hook.active():
        total, _ = train.loss(model, tokens, recipe="fp8", routing=routing)
    with hook.active(), hook.deferring():
        total.backward()
    waiting = {name for name in wanted if name not in train.gradients(model)}
    assert {name.split(".")[-2] for name in waiting} >= {"q_a_proj", "kv_b_proj", "o_proj", "up_proj", "down_proj"}
    assert not any("norm" in name or "eh_proj" in name for name in waiting)
    hook.run()
    assert all(torch.equal(grad, wanted[name]) for name, grad in train.gradients(model).items())


class Counted(TorchDispatchMode):
    """Calls of products, by op; of those outside the library the weight's shape too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].removesuffix("_out")
        if name in ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_grouped_mm"):
            self.seen[name, *args[1].shape] += 1
        elif name.startswith("fp8_"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_every_large_product_is_in_fp8(replay):
    model, tokens, *_ = replay
    config = model.config
    model.zero_grad()
    with Counted() as forward:
        total, _ = train.loss(model, tokens, recipe="fp8")
    with Counted() as backward:
        total.backward()
    blocks, moe, dense = 3, 2, 1  # with the MTP layer's
    linears = 4 * blocks + 2 * dense + 2 * moe  # q_a and kv_a, q_b, kv_b, o; gate and up, down; of the shared expert
    again = 2 * blocks  # q_b and kv_b
    assert forward.seen.pop("fp8_gemm") == linears
    assert forward.seen.pop("fp8_grouped_gemm") == 2 * moe
    assert backward.seen.pop("fp8_gemm") == 2 * linears + again
    assert backward.seen.pop("fp8_grouped_gemm") == 2 * moe
    assert backward.seen.pop("fp8_grouped_wgrad") == 2 * moe
    hidden, vocab, experts = config.hidden_size, config.vocab_size, config.n_routed_experts
    others = {("mm", hidden, experts): moe, ("mm", 2 * hidden, hidden): 1, ("mm", hidden, vocab): 2}
    assert forward.seen == others  # router, MTP projection, head
    assert sum(backward.seen.values()) == 2 * sum(others.values()) + moe  # the router's is computed again


def kept_bytes(model, tokens, recipe: str) -> int:
    """What a forward pass leaves behind for its backward."""
    train.loss(model, tokens, recipe=recipe)  # what a first call allocates for good
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        total, _ = train.loss(model, tokens, recipe=recipe)
    assert total.requires_grad
    return sum(event.self_cpu_memory_usage for event in run.events())


def test_backward_keeps_little():
    """Wide tokens, small weights: little more than half of what bfloat16 keeps, weights included."""
    config = Config(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
    )
    model = DeepSeekV3(config).train()
    tokens = torch.randint(32, (4, 256))
    fp8_bytes, bf16_bytes = (kept_bytes(model, tokens, recipe) for recipe in ("fp8", "bf16"))
    print(f"kept for backward: fp8 {fp8_bytes / 1e6:.2f} MB, bf16 {bf16_bytes / 1e6:.2f} MB")
    assert fp8_bytes < 0.55 * bf16_bytes


def test_sizes_that_fp8_cannot_multiply(base):
    with pytest.raises(ValueError, match=r"fp8 recipe: weight: got .* wanted multiples of 16"):
        train.loss(base.load(weights="float32"), torch.tensor([[1, 2, 3]]), recipe="fp8")
