"""The make-believe GPU behaves as one where tests rely on it, and the reference model runs on it, kernels and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rehearsal
import torch
from checks import same_bits
from simulated import needs_simulator, schedule

import dsv3_kernels as dk
from dsv3_kernels import cli
from dsv3_kernels.model import pretrain

PROMPT = b"In the beginning God created the heaven and the earth. And the earth was"


@pytest.fixture
def gpu():
    with rehearsal.device():
        yield torch.device("cuda")


def test_tensors_stay_where_they_are(gpu):
    x = torch.randn(3, 4, device=gpu)
    y = torch.tensor([[1.0], [2.0], [3.0]], device="cuda")
    for t in (
        x,
        x + 1,
        x * y,
        x[1:],
        x.t(),
        x.clone(),
        torch.zeros_like(x),
        x.new_empty(2),
        x.to(torch.float16),
        x.cuda(),
    ):
        assert t.is_cuda and t.device == torch.device("cuda", 0)
    for t in (x.cpu(), x.to("cpu"), torch.ones(3), torch.zeros_like(x, device="cpu")):
        assert not t.is_cuda and t.device.type == "cpu"
    assert x.to(gpu) is x and x.to(torch.float32) is x
    assert torch.equal((x * 2).cpu(), x.cpu() * 2)
    assert torch.ones(3).to(gpu).tolist() == [1, 1, 1] and x.sum().item() == float(x.cpu().sum())
    assert torch.empty(2, device="meta").is_meta


def test_views_share_memory_and_writes_keep_the_tensor(gpu):
    x = torch.zeros(4, 4, device=gpu)
    assert x.add_(1) is x
    x[2:].zero_()
    x[0] = torch.full((4,), 5.0)  # a copy may cross devices
    assert x.sum(1).tolist() == [20, 4, 0, 0]
    assert x[1:].data_ptr() == x.data_ptr() + 16


def test_devices_do_not_mix(gpu):
    x = torch.ones(3, device=gpu)
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.ones(3) @ x,
        lambda: torch.cat([x, torch.ones(3)]),
        lambda: x[:2].index_add_(0, torch.tensor([1]), x[:1]),
    ):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device, found cuda:0 and cpu"):
            mixed()
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # but scalars
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()


def test_gradients(gpu):
    x = torch.randn(5, device=gpu).requires_grad_()
    (x.square() * torch.arange(5, device=gpu)).sum().backward()
    assert x.grad.is_cuda and same_bits(x.grad.cpu(), 2 * x.detach().cpu() * torch.arange(5))


@needs_simulator
def test_backends_are_those_of_a_gpu(gpu):
    x = torch.randn(4, 256)
    with dk.backend("eager"):
        wanted = dk.quantize_1x128(x)
    before = dk.launch_counts()
    assert same_bits([t.cpu() for t in dk.quantize_1x128(x.to(gpu))], list(wanted))
    launched = dk.launch_counts() - before
    assert launched == {"quantize_1x128_f32": 1}  # the free choice
    with dk.backend("triton"):
        dk.quantize_1x128(x.to(gpu))
        with pytest.raises(RuntimeError, match="triton: needs a CUDA device, got cpu"):
            dk.quantize_1x128(x)
    with dk.backend("sim"), pytest.raises(RuntimeError, match="the simulator takes CPU tensors, got cuda"):
        dk.quantize_1x128(x.to(gpu))


def test_nothing_is_left_behind():
    with rehearsal.device():
        pass
    assert torch.cuda.device_count() == 0 or torch.cuda.get_device_name() != rehearsal.FACTS.name
    assert type(torch.ones(1)) is torch.Tensor


@needs_simulator
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_the_model_writes_the_same_text(weights):
    """Prefill, decoding and drafts of the packaged model in CUDA kernels on tensor cores that add as a GPU's do."""
    folder = Path(pretrain.__file__).parent / "demo"
    text = torch.tensor([list(PROMPT)])

    def tokens(device: str) -> list[int]:
        model = dk.model.DeepSeekV3.from_pretrained(folder, weights=weights, device=device)
        return model.generate(text.to(device), max_new_tokens=3, speculative=True)[0].tolist()

    wanted = tokens("cpu")
    before = dk.launch_counts()
    with rehearsal.device(), schedule(rounding="hardware", approximate="1"):
        assert tokens("cuda") == wanted
    launched = set(dk.launch_counts() - before)
    assert not [name for name in launched if name.startswith("triton_")]
    families = {"mla_prefill", "mla_decode_bf16", "mla_absorb", "moe_gate", "moe_permute", "moe_unpermute", "rms_norm"}
    if weights == "fp8":
        families |= {"fp8_gemm", "fp8_grouped_gemm", "fp8_grouped_gemm_swiglu_quantize", "mla_prologue"}
    assert [f for f in families if not any(name.startswith(f) for name in launched)] == []


@needs_simulator
def test_a_step_of_training_is_that_of_the_cpu(tmp_path):
    """The FP8 recipe, forward, backward and optimizer, in kernels."""
    text = tmp_path / "text"
    text.write_bytes(PROMPT * 20)

    def step(device: str) -> dict[str, float]:
        sizes = ["--steps", "1", "--batch", "2", "--sequence", "64"]
        assert cli.main(["train", str(text), "--out", str(tmp_path / device), "--device", device, *sizes]) == 0
        return json.loads((tmp_path / device / "metrics.jsonl").read_text())

    wanted, before = step("cpu"), dk.launch_counts()
    with rehearsal.device(), schedule(rounding="hardware", approximate="1"):
        got = step("cuda")
    launched = set(dk.launch_counts() - before)
    for op in (
        "quantize_1x128_both",
        "fp8_gemm",
        "fp8_grouped_gemm",
        "fp8_grouped_wgrad",
        "triton_mla_prefill_backward",
    ):
        assert any(name.startswith(op) for name in launched), op
    assert got["main"] == pytest.approx(wanted["main"], rel=1e-3)
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.02)
