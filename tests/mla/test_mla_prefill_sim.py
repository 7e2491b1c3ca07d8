"""The prefill kernels through the simulator: element by element against float64, and against PyTorch's rounding.

Shapes are the smallest that reach a case: both rings wrap, masks on the diagonal and at the end, several tiles on one
CTA, tensor copies that hang over into another sequence's rows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from checks import same_bits
from simulated import SCHEDULES, counters, coverage, launches, needs_simulator, schedule
from torch import Tensor

from dsv3_kernels.mla import _cuda

pytestmark = needs_simulator

SCALE = 0.1352338
FORWARD = "mla_prefill_128x128"
BACKWARD = [f"mla_prefill_backward_{part}" for part in ("delta", "keys", "queries", "rope")]
GRADIENTS = ("grad q", "grad k_nope", "grad k_rope", "grad v")


@dataclass
class Case:
    """Packed sequences; every row that no sequence owns, and everything between rows, is NaN."""

    q: Tensor
    k_nope: Tensor
    k_rope: Tensor
    v: Tensor
    grad_out: Tensor
    cu_q: Tensor
    cu_k: Tensor
    causal: bool

    @property
    def inputs(self) -> tuple:
        return self.q, self.k_nope, self.k_rope, self.v, self.cu_q, self.cu_k, SCALE, self.causal

    def sequences(self):
        """(rows of q, rows of k, queries x keys that are hidden) of those that have both."""
        for (q0, q1), (k0, k1) in zip(pairwise(self.cu_q.tolist()), pairwise(self.cu_k.tolist()), strict=True):
            if q1 > q0 and k1 > k0:
                hidden = torch.zeros(q1 - q0, k1 - k0, dtype=torch.bool)
                if self.causal:
                    hidden = torch.arange(k1 - k0) > torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
                yield slice(q0, q1), slice(k0, k1), hidden

    def keys(self, rows: slice) -> Tensor:
        heads = self.q.shape[1]
        return torch.cat([self.k_nope[rows], self.k_rope[rows, None].expand(-1, heads, -1)], -1).transpose(0, 1)


def bounds(lengths, before: int = 0) -> Tensor:
    return torch.tensor([before, *lengths]).cumsum(0).int()


def make(
    queries, keys, heads: int = 1, *, causal: bool = True, spread: float = 0.5, spare: int = 0, apart: int = 0
) -> Case:
    """`spare`: rows of no sequence before and after all; `apart`: elements between rows and between heads."""
    cu_q, cu_k = bounds(queries, spare), bounds(keys, spare)

    def packed(rows: Tensor, *shape: int, size: float) -> Tensor:
        whole = torch.full((int(rows[-1]) + spare, *shape[:-1], shape[-1] + apart), torch.nan).bfloat16()
        view = whole[..., : shape[-1]]
        owned = slice(spare, int(rows[-1]))
        view[owned] = (torch.randn(view[owned].shape) * size).bfloat16()
        return view

    q, grad_out = packed(cu_q, heads, 192, size=spread), packed(cu_q, heads, 128, size=1)
    kv = packed(cu_k, heads, 256, size=1)
    kv[..., :128] *= spread  # two views of one tensor, as the up-projection's output
    return Case(
        q, kv[..., :128], packed(cu_k, 64, size=spread), kv[..., 128:], grad_out.contiguous(), cu_q, cu_k, causal
    )


def forward(case: Case, sms: int = 0) -> tuple[Tensor, Tensor]:
    """The kernel's results, inside larger tensors of NaN that it must leave alone."""
    rows, heads, _ = case.q.shape
    out, lse = torch.full((rows + 2, heads, 128), torch.nan).bfloat16(), torch.full((rows + 2, heads), torch.nan)
    with launches(FORWARD):
        _cuda.mla_prefill(*case.inputs, out[1:-1], lse[1:-1], sms)
    for memory in (out, lse):
        assert memory[[0, -1]].isnan().all()
    return out[1:-1], lse[1:-1]


def backward(case: Case, out: Tensor, lse: Tensor, sms: int = 0) -> list[Tensor]:
    """The kernels' gradients, inside larger tensors of NaN that they must leave alone."""
    memory = [torch.full((len(x) + 2, *x.shape[1:]), torch.nan).bfloat16() for x in case.inputs[:4]]
    grads = [x[1:-1] for x in memory]
    with contextlib.ExitStack() as stack:
        for kernel in BACKWARD:
            stack.enter_context(launches(kernel))
        _cuda.mla_prefill_backward(case.grad_out, *case.inputs[:4], out, lse, *case.inputs[4:], *grads, sms)
    assert all(x[[0, -1]].isnan().all() for x in memory)
    return grads


def rounded(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.bfloat16().float()


def attention(case: Case, real: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition in float64; or in float32 with unnormalised weights rounded to bfloat16, as kernels compute."""
    out = torch.zeros(*case.q.shape[:2], 128, dtype=real)
    lse = torch.full(case.q.shape[:2], -torch.inf, dtype=real)
    for rows, owned, hidden in case.sequences():
        q, k, v = (t.to(real) for t in (case.q[rows].transpose(0, 1), case.keys(owned), case.v[owned].transpose(0, 1)))
        s = (SCALE * (q @ k.mT)).masked_fill(hidden, -torch.inf)
        top = s.amax(-1, keepdim=True)
        top = top.masked_fill(top.isneginf(), 0)
        p = (s - top).exp()
        total = p.sum(-1, keepdim=True)
        out[rows] = (rounded(p) @ v / total.masked_fill(total == 0, 1)).transpose(0, 1)
        lse[rows] = (top + total.log())[..., 0].transpose(0, 1)
    return out if real == torch.float64 else out.bfloat16(), lse


def gradients(case: Case, real: torch.dtype) -> list[Tensor]:
    """The definition in float64; or in float32 with P and dS rounded to bfloat16, as kernels compute. In that of the
    keys P has been rounded already."""
    out, lse = attention(case, real)
    grads = [torch.zeros(x.shape, dtype=real) for x in (case.q, case.k_nope, case.k_rope, case.v)]
    for rows, owned, hidden in case.sequences():
        q, do, o = (t[rows].transpose(0, 1).to(real) for t in (case.q, case.grad_out, out))
        k, v = case.keys(owned).to(real), case.v[owned].transpose(0, 1).to(real)
        shift = lse[rows].t()[..., None]
        p = (SCALE * (q @ k.mT) - shift.masked_fill(shift.isneginf(), 0)).masked_fill(hidden, -torch.inf).exp()
        slope = do @ v.mT - (do * o).sum(-1, keepdim=True)
        ds = p * slope
        grads[0][rows] = (SCALE * rounded(ds) @ k).transpose(0, 1)
        p = rounded(p)
        dk = SCALE * rounded(p * slope).mT @ q
        grads[1][owned] = dk[..., :128].transpose(0, 1)
        grads[2][owned] = dk[..., 128:].sum(0)
        grads[3][owned] = (p.mT @ do).transpose(0, 1)
    return grads if real == torch.float64 else [g.bfloat16() for g in grads]


def no_worse(got: Tensor, reference: Tensor, exact: Tensor, what: str) -> None:
    """The largest and the mean error are at most twice those of PyTorch's arithmetic in the same precision."""
    assert got.isfinite().all(), f"{what}: not finite"
    ours, theirs = (got.double() - exact).abs(), (reference.double() - exact).abs()
    for name, a, b in (("largest", ours.amax(), theirs.amax()), ("mean", ours.mean(), theirs.mean())):
        assert a <= 2 * b + 1e-6, f"{what}: {name} error {a:.3g}, PyTorch's {b:.3g}"


def check_forward(case: Case) -> tuple[Tensor, Tensor]:
    out, lse = forward(case)
    (exact, exact_lse), (reference, _) = attention(case, torch.float64), attention(case, torch.float32)
    empty = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty) and (out[empty] == 0).all()
    assert ((lse.double() - exact_lse).abs() <= 1e-5 * exact_lse.abs().clamp(min=1))[~empty].all()
    if not empty.all():
        no_worse(out[~empty], reference[~empty], exact[~empty], "out")
    return out, lse


def check_backward(case: Case) -> list[Tensor]:
    grads = backward(case, *forward(case))
    exact, reference = gradients(case, torch.float64), gradients(case, torch.float32)
    # What has no partner, or belongs to no sequence, has a gradient of exactly zero.
    used = [torch.zeros(len(x), dtype=torch.bool) for x in case.inputs[:4]]
    for rows, owned, hidden in case.sequences():
        used[0][rows] = ~hidden.all(1)
        for part in used[1:]:
            part[owned] = ~hidden.all(0)
    for name, got, rough, want, mine in zip(GRADIENTS, grads, reference, exact, used, strict=True):
        assert (got[~mine] == 0).all(), f"{name}: rows of no sequence, or seen by none"
        if want.numel():
            no_worse(got, rough, want, name)
    return grads


LENGTHS = {
    "one block": ([128], [128]),
    "smallest": ([1], [1]),
    "longer keys": ([64, 1, 200], [257, 65, 513]),
    "longer queries": ([257, 65], [200, 1]),
    "mixed": ([1, 0, 63, 64, 65, 200, 5, 130], [257, 5, 0, 200, 63, 1, 5, 130]),
    "many": ([3, 1] * 17, [2, 3, 4, 0, 5, 1, 1, 1, 0, 0] * 3 + [1] * 4),  # more sequences than a warp has lanes
    "nothing": ([5, 0], [0, 3]),
    "none": ([], []),
}


CASES = [
    ("one block", 1, True),
    ("one block", 1, False),
    ("smallest", 16, True),
    ("longer keys", 2, True),
    ("longer keys", 1, False),
    ("longer queries", 1, True),
    ("longer queries", 1, False),
    ("mixed", 3, True),
    ("mixed", 1, False),
    ("many", 1, True),
    ("nothing", 2, True),
    ("none", 1, True),
]
cases = pytest.mark.parametrize(("lengths", "heads", "causal"), CASES, ids=str)


@cases
def test_forward(lengths: str, heads: int, causal: bool) -> None:
    check_forward(make(*LENGTHS[lengths], heads, causal=causal, spare=2, apart=8))


HOSTILE = {
    "large": lambda c: c.q.mul_(50),
    "equal": lambda c: c.q.zero_(),
    "dominating": lambda c: c.k_nope[40].mul_(100),
    "negative": lambda c: (c.k_nope.copy_(-c.q[: len(c.k_nope), :, :128].abs() * 20), c.q.abs_()),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_forward_of_hostile_scores(kind: str) -> None:
    case = make([150], [150], 2)
    HOSTILE[kind](case)
    check_forward(case)


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_forward_under_any_schedule(options: dict[str, str]) -> None:
    case = make([200, 20], [300, 90], 2, spare=1)
    wanted = forward(case)
    assert same_bits(forward(case), wanted)
    with schedule(**options):  # all tiles on one CTA: the rings run on across tiles
        assert same_bits(forward(case, sms=1), wanted)


def test_forward_reaches_every_block() -> None:
    with coverage(FORWARD) as seen:
        forward(make([300, 3], [300, 0], 2, spare=1), sms=2)
    assert seen.unreached() == []


def test_forward_keeps_to_its_budget() -> None:
    """Bytes and tensor cycles as docs/mla.md has them, every output byte once, no bank met twice."""
    case = make([256], [384], 2, causal=False)
    with schedule(banks="1"):
        forward(case)
    spent, tiles, blocks = counters(), 4, 12
    assert spent["wgmma_cycles"] == blocks * 2560
    assert spent["tma_read"] == tiles * 49152 + blocks * (49152 + 32768)
    assert spent["global_write"] == 256 * 2 * (256 + 4)
    assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0


def test_rows_of_other_tokens_do_not_matter() -> None:
    """A sequence alone and among others, a head alone and among others: the same bits."""
    case = make([40, 150], [70, 150], 2)
    out, lse = forward(case)
    alone = Case(
        *(t[40:] if t is case.q or t is case.grad_out else t[70:] for t in (case.q, case.k_nope, case.k_rope, case.v)),
        case.grad_out[40:],
        bounds([150]),
        bounds([150]),
        True,
    )
    assert same_bits(forward(alone), (out[40:], lse[40:].contiguous()))
    one = Case(case.q[:, 1:], case.k_nope[:, 1:], case.k_rope, case.v[:, 1:], case.grad_out, case.cu_q, case.cu_k, True)
    assert same_bits(forward(one), (out[:, 1:].contiguous(), lse[:, 1:].contiguous()))


@cases
def test_backward(lengths: str, heads: int, causal: bool) -> None:
    check_backward(make(*LENGTHS[lengths], heads, causal=causal, spare=2, apart=8))


@pytest.mark.parametrize("kind", HOSTILE)
def test_backward_of_hostile_scores(kind: str) -> None:
    case = make([150], [150], 2)
    HOSTILE[kind](case)
    check_backward(case)


def test_backward_sums_the_rotary_key_over_groups_of_heads() -> None:
    """More heads than partial sums: 9 groups of two, the last of one."""
    check_backward(make([9], [9], 17))


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_backward_under_any_schedule(options: dict[str, str]) -> None:
    case = make([140, 20], [200, 70], 1, spare=1)
    results = forward(case)
    wanted = backward(case, *results)
    assert same_bits(backward(case, *results), wanted)
    with schedule(**options):  # all tiles on one CTA: the ring runs on across tiles
        assert same_bits(backward(case, *results, sms=1), wanted)


def test_backward_reaches_every_block() -> None:
    with contextlib.ExitStack() as stack:
        seen = [stack.enter_context(coverage(kernel)) for kernel in BACKWARD]
        case = make([140, 3], [150, 0], 2, spare=1)
        backward(case, *forward(case), sms=2)
    assert [part.unreached() for part in seen] == [[], [], [], []]


def test_backward_keeps_to_its_budget() -> None:
    """Bytes and tensor cycles as docs/mla.md has them, every output byte once, no bank met twice."""
    case = make([128], [256], 2, causal=False)
    results = forward(case)
    with schedule(banks="1"):
        backward(case, *results)
    spent = counters()  # of the last launch, dQ
    tiles, blocks = 2, 8
    assert spent["wgmma_cycles"] == blocks * 2048
    assert spent["tma_read"] == tiles * 81920 + blocks * 40960
    assert spent["global_write"] == 128 * 2 * 384
    assert spent["shared_wavefronts"] == spent["shared_ideal"] > 0


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [([-5, 9, 40], [3, 70, 200]), ([50, 60, 70], [90, 95, 99]), ([4, 4, 20], [-9, -2, 11])],
)
def test_bounds_that_no_caller_may_pass_stay_inside(cu_q, cu_k) -> None:
    """Eager refuses them; kernels, which learn of them on the device, neither hang nor leave their tensors."""
    case = make([33], [80], 1)
    case.cu_q, case.cu_k = torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32)
    out, lse = forward(case)
    backward(case, out, lse)


def test_what_the_kernels_leave_to_eager() -> None:
    case = make([3], [3], 2)
    q, k_nope, k_rope, v, *rest = case.inputs
    odd = torch.zeros(3, 2, 196).bfloat16()[..., 1:193]
    for words, args in {
        "the kernel computes bfloat16": (q.float(), k_nope.float(), k_rope.float(), v.float(), *rest),
        "the kernel has 128 and 64 for keys": (q, k_nope, k_rope, v[..., :64], *rest),
        "the kernel takes a positive one": (q, k_nope, k_rope, v, *rest[:2], -1.0, True),
        "q: a row does not start at a multiple of 16 bytes": (odd, k_nope, k_rope, v, *rest),
    }.items():
        assert words in str(_cuda.mla_prefill_cannot(*args))
        assert words in str(_cuda.mla_prefill_backward_cannot(case.grad_out, *args[:4], v, k_rope, *args[4:]))
    assert _cuda.mla_prefill_cannot(*case.inputs) is None
    assert "no heads" in str(_cuda.mla_prefill_backward_cannot(case.grad_out, q[:, :0], *case.inputs[1:4], v, v, *rest))
