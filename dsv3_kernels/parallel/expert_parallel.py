"""Expert parallelism: tokens to the ranks of their experts and back.

A token goes once to every rank that holds one of its experts (DeepSeek-V3 technical report, section 3.2.2), and is
expanded there to a row per expert, experts in order, rows of an expert by source rank, token and choice. On the way
back a rank sums its rows of a token in float32 in order of choice, the token's own rank sums what comes back in order
of rank. No order depends on timing, so results are the same bits whatever carries the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..quant.dequantize import dequantize
from ..quant.quantize_1x128 import quantize_1x128
from .transport import EPTimeoutError, Exchange, Group, Transport, VirtualRanks

T = TypeVar("T")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class EPCapacityError(RuntimeError):
    """More rows came to a rank than ``capacity`` has room for."""


@dataclass
class _Plan:
    """Where one rank's tokens go and where its rows came from. Positions are -1 where there is nothing."""

    slots: Tensor
    """[T, min(K, R)]: the token's wire rows, in order of rank."""
    choice_slot: Tensor
    """[T, K]: the wire row that carries each choice."""
    wire_token: Tensor
    """[wire rows]: the token of each wire row, T for padding."""
    send_counts: list[int]
    recv_counts: list[int] = field(default_factory=list)
    source: Tensor = field(init=False)
    """[rows]: the received wire row that each row is a copy of."""
    choice: Tensor = field(init=False)
    """[rows]: which choice of its token each row is."""
    row: Tensor = field(init=False)
    """[received wire rows, K]: the row of each received choice."""
    valid: Tensor | None = None
    """[rows, 1]: False for rows past the last one (only with a capacity)."""


@dataclass
class Handle:
    """What a dispatch leaves for its combine, and for both backwards.

    ``counts``: per local rank, int32 [experts of the rank], rows of each.
    """

    plans: list[_Plan]
    row_weights: list[Tensor]
    counts: list[Tensor]
    dtype: torch.dtype


@dataclass
class _Dispatching:
    exchange: Exchange
    layout: list[tuple[torch.dtype, int]]
    x: list[Tensor]
    weights: list[Tensor]
    plans: list[_Plan]
    capacity: int | None
    link: _Link


@dataclass
class _Combining:
    exchange: Exchange
    rows: list[Tensor]
    weights: list[Tensor]
    handle: Handle
    link: _Link


@dataclass
class _Link:
    """Joins the two halves for autograd. Backward runs in halves too: that of `recv` starts the exchange of gradients,
    that of `send` waits for it, and what lies between them in the graph, or is run between them, hides it."""

    token: Tensor | None = None
    """Leads autograd from the second half to the first; None where no gradients are recorded."""
    exchange: Exchange | None = None


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """[n, width] tensors as one [n, bytes]."""
    flat = [t.contiguous().view(-1).view(torch.uint8).view(len(t), t.shape[1] * t.element_size()) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _unpack(packed: Tensor, layout: Sequence[tuple[torch.dtype, int]]) -> list[Tensor]:
    parts = packed.split([dtype.itemsize * width for dtype, width in layout], dim=1)
    # Copies: a slice of bytes is not aligned for wider elements, and a single row keeps its odd stride when contiguous.
    fresh = [part.clone(memory_format=torch.contiguous_format).view(-1) for part in parts]
    return [part.view(dtype).view(len(packed), width) for part, (dtype, width) in zip(fresh, layout, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index], whatever the dtype: a float8 tensor cannot be indexed everywhere."""
    return x.view(torch.uint8)[index].view(x.dtype) if x.dtype in _FLOAT8 else x[index]


def _sum_rows(rows: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """out[i] = sum over j of weight[index[i, j]] * rows[index[i, j]], in order of j; index -1 adds nothing."""
    total = rows.new_zeros(len(index), rows.shape[1], dtype=_wide(rows.dtype))
    if not len(rows):
        return total
    for where in index.unbind(1):
        at = where.clamp(min=0)
        term = rows[at].to(total.dtype)
        if weight is not None:
            term = term * weight[at].to(total.dtype).unsqueeze(-1)
        total += torch.where((where >= 0).unsqueeze(-1), term, 0)
    return total


class ExpertParallel:
    """Dispatch and combine over the ranks of a group, or over virtual ranks in one process.

    Args:
        group: a torch.distributed group (gloo, nccl), whose ranks hold the experts; or give ``virtual_ranks``.
        num_experts: experts of all ranks. They lie in contiguous order; the first ``num_experts % ranks`` ranks hold
            one more. With replicas (:mod:`dsv3_kernels.parallel.eplb`) count and name physical experts.
        hidden: elements of a row. max_tokens: the most tokens that any rank brings to one dispatch.
        virtual_ranks: ranks in this process; every input and output of the methods is then a list, one entry per rank.
        transport: "collective" moves rows by torch.distributed; "auto" takes what there is.
        timeout: seconds to wait for a peer.

    A rank that is gone or late raises :class:`EPTimeoutError` with ``peer`` and ``phase``. All ranks must make the same
    calls in the same order, with or without gradients alike; the number of tokens may differ, and may be 0.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        num_experts: int | None = None,
        hidden: int | None = None,
        max_tokens: int | None = None,
        *,
        virtual_ranks: int | None = None,
        transport: str = "auto",
        timeout: float = 30.0,
    ) -> None:
        op = "ExpertParallel"
        sizes = {"num_experts": num_experts, "hidden": hidden, "max_tokens": max_tokens}
        if virtual_ranks is not None:
            sizes["virtual_ranks"] = virtual_ranks
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{op}: {name}: got {type(value).__name__}, wanted an int")
            if value < 1:
                raise ValueError(f"{op}: {name}: got {value}, wanted at least 1")
        if group is not None and virtual_ranks is not None:
            raise ValueError(f"{op}: group, virtual_ranks: got both, wanted one of them")
        if transport not in ("auto", "collective", "p2p"):
            raise ValueError(f"{op}: transport: got {transport!r}, wanted auto, collective or p2p")
        if transport == "p2p":
            raise RuntimeError(f"{op}: transport: p2p needs the one-sided kernels, which this build does not have")
        if not timeout > 0:
            raise ValueError(f"{op}: timeout: got {timeout}, wanted more than 0 seconds")
        num_experts, hidden, max_tokens = cast(int, num_experts), cast(int, hidden), cast(int, max_tokens)
        self._virtual = virtual_ranks is not None
        self._transport: Transport
        if virtual_ranks is not None:
            self._transport = VirtualRanks(virtual_ranks)
        else:
            if not dist.is_initialized():
                raise RuntimeError(
                    f"{op}: group: torch.distributed is not initialised; give virtual_ranks to go without"
                )
            self._transport = Group(cast(dist.ProcessGroup, group or dist.group.WORLD), timeout)
        self.num_experts, self.hidden, self.max_tokens = num_experts, hidden, max_tokens
        self.num_ranks = self._transport.num_ranks
        base, more = divmod(num_experts, self.num_ranks)
        self._first = list(accumulate((base + (r < more) for r in range(self.num_ranks)), initial=0))
        self._needed: list[Tensor] = []
        self._capacity = 0

    def local_experts(self, rank: int) -> range:
        """The experts that ``rank`` holds."""
        return range(self._first[rank], self._first[rank + 1])

    # Dispatch ------------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        x: Any,
        experts: Any,
        weights: Any,
        *,
        scale: Any = None,
        capacity: int | None = None,
        fp8_wire: bool = False,
    ) -> tuple[Any, Any, Any, Any, Handle]:
        """Sends tokens to their experts.

        Args:
            x: [T, hidden], any float dtype, float8 included; T up to ``max_tokens``, another one on every rank.
            experts: int32 or int64 [T, K], -1 for a choice that is dropped; no expert twice in a row of it.
            weights: float32 (or float64) [T, K].
            scale: float32 [T, C], sent with the rows of a float8 ``x``.
            capacity: rows of every output, for static shapes and no host synchronisation; more rows than that raise
                :class:`EPCapacityError` at :meth:`check` or at the next call. None: exactly the rows that came.
            fp8_wire: a float ``x`` travels as E4M3 codes with a power-of-two scale per 128 elements, and arrives as the
                numbers that these stand for (quantising them so again changes nothing). Gradients travel as they are
                (technical report, section 3.3.3).

        Returns:
            ``rows`` [S, hidden], ``row_scale`` [S, C] or None, ``row_weights`` [S], ``offsets`` int32 [experts here +
            1] (rows of the rank's i-th expert are offsets[i]:offsets[i + 1]; rows past the last are zero), and a handle
            for :meth:`combine`. Differentiable in ``x`` (not float8) and ``weights``.
        """
        return self.dispatch_recv(
            self.dispatch_send(x, experts, weights, scale=scale, capacity=capacity, fp8_wire=fp8_wire)
        )

    def dispatch_send(
        self,
        x: Any,
        experts: Any,
        weights: Any,
        *,
        scale: Any = None,
        capacity: int | None = None,
        fp8_wire: bool = False,
    ) -> _Dispatching:
        """The first half of :meth:`dispatch`: plans and sends. Its result goes to :meth:`dispatch_recv`."""
        self._raise_overflow(wait=False)
        xs, chosen, gates = self._listed(x, "x"), self._listed(experts, "experts"), self._listed(weights, "weights")
        scales = [None] * len(xs) if scale is None else self._listed(scale, "scale")
        for i in range(len(xs)):
            self._check_inputs(xs[i], chosen[i], gates[i], scales[i])
        if capacity is not None and (not isinstance(capacity, int) or isinstance(capacity, bool)):
            raise TypeError(f"dispatch: capacity: got {type(capacity).__name__}, wanted an int or None")
        if capacity is not None and capacity < 1:
            raise ValueError(f"dispatch: capacity: got {capacity}, wanted at least 1")
        if fp8_wire and xs[0].dtype in _FLOAT8:
            raise TypeError(f"dispatch: fp8_wire: got {xs[0].dtype} rows, wanted float16, bfloat16 or float32")

        with torch.no_grad():
            plans = [self._plan(e, capacity) for e in chosen]
            if capacity is None:
                counts = [torch.tensor(p.send_counts).view(-1, 1).to(xs[0].device) for p in plans]
                ones = [[1] * self.num_ranks] * len(plans)
                for plan, got in zip(plans, self._start(counts, ones, ones, "dispatch/counts").wait(), strict=True):
                    plan.recv_counts = got.flatten().tolist()
            else:
                for plan in plans:
                    plan.recv_counts = plan.send_counts
            payload = []
            for plan, xi, si, ei, wi in zip(plans, xs, scales, chosen, gates, strict=True):
                if fp8_wire:
                    xi, si = quantize_1x128(xi, pow2_scale=True, scale_layout="k")
                parts = [xi, ei.int(), wi] if si is None else [xi, ei.int(), wi, si]
                packed = _pack(parts)
                packed = torch.cat([packed, packed.new_full((1, packed.shape[1]), 255)])  # the padding's experts are -1
                payload.append(packed[plan.wire_token])
            layout = [(t.dtype, t.shape[1]) for t in parts]
            layout[1] = (torch.int32, chosen[0].shape[1])
            exchange = self._forward(payload, plans, "dispatch/payload")
        link = _Link()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*xs, *gates)):
            link.token = _DispatchSend.apply(self, plans, link, *xs, *gates)
        return _Dispatching(exchange, layout, xs, gates, plans, capacity, link)

    def dispatch_recv(self, pending: _Dispatching) -> tuple[Any, Any, Any, Any, Handle]:
        """The second half of :meth:`dispatch`."""
        plans = pending.plans
        x, weights, scales, offsets, counts = [], [], [], [], []
        with torch.no_grad():
            for rank, plan, packed in zip(self._transport.local_ranks, plans, pending.exchange.wait(), strict=True):
                got = _unpack(packed, pending.layout)
                offset, count = self._expand(plan, got[1], rank, pending.capacity)
                if got[0].dtype != pending.x[0].dtype:  # codes on the wire alone
                    got = [dequantize(got[0], got[3], dtype=pending.x[0].dtype), *got[1:3]]
                x.append(self._rows(got[0], plan))
                weight = got[2][plan.source, plan.choice]
                weights.append(weight if plan.valid is None else torch.where(plan.valid.squeeze(-1), weight, 0))
                scales.append(self._rows(got[3], plan) if len(got) > 3 else None)
                offsets.append(offset)
                counts.append(count)
        n = len(plans)
        if pending.link.token is not None:
            dtypes = pending.x[0].dtype, pending.weights[0].dtype
            both = _DispatchRecv.apply(self, plans, pending.link, dtypes, pending.link.token, *x, *weights)
            x, weights = list(both[:n]), list(both[n:])
        handle = Handle(plans, weights, counts, pending.x[0].dtype)
        row_scale = None if scales[0] is None else self._given(scales)
        return self._given(x), row_scale, self._given(weights), self._given(offsets), handle

    def _plan(self, experts: Tensor, capacity: int | None) -> _Plan:
        """Where tokens go: a pure function of the experts."""
        tokens, ranks, device = len(experts), self.num_ranks, experts.device
        chosen = experts.long()
        bounds = torch.tensor(self._first[1:], device=device)
        dropped = (chosen < 0) | (chosen >= self.num_experts)
        rank = torch.where(dropped, ranks, torch.bucketize(chosen, bounds, right=True))
        member = torch.zeros(tokens, ranks + 1, dtype=torch.bool, device=device).scatter_(1, rank, True)[:, :ranks]
        nth = member.long().cumsum(0)
        exact = capacity is None
        counts: list[int] = nth[-1].tolist() if exact and tokens else [0 if exact else self.max_tokens] * ranks
        start = torch.tensor(list(accumulate(counts, initial=0)), device=device)
        size = sum(counts)
        slot = torch.where(member, start[:ranks] + nth - 1, size)
        wire_token = torch.full((size + 1,), tokens, device=device)
        wire_token.scatter_(0, slot.flatten(), torch.arange(tokens, device=device).repeat_interleave(ranks))
        slots = slot.sort(dim=1).values[:, : min(experts.shape[1], ranks)]
        mine = torch.cat([slot, slot.new_full((tokens, 1), size)], dim=1).gather(1, rank)
        return _Plan(
            slots=torch.where(slots < size, slots, -1),
            choice_slot=torch.where(mine < size, mine, -1),
            wire_token=wire_token[:size],
            send_counts=counts,
        )

    def _expand(self, plan: _Plan, experts: Tensor, rank: int, capacity: int | None) -> tuple[Tensor, Tensor]:
        """Sorts the received choices of this rank's experts by expert, stably: offsets and counts."""
        here = self.local_experts(rank)
        local = experts.long() - here.start
        local = torch.where((local >= 0) & (local < len(here)), local, len(here)).flatten()
        order = local.argsort(stable=True)
        counts = torch.zeros(len(here) + 1, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add_(0, local, torch.ones_like(local))[: len(here)]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        rows = torch.arange(len(order), device=experts.device)
        if capacity is None:
            order = order[: int(offsets[-1])]
            number = rows[: len(order)]
        else:
            self._note_overflow(offsets[-1], capacity)
            offsets = offsets.clamp(max=capacity)
            order = torch.cat([order, order.new_zeros(max(0, capacity - len(order)))])[:capacity]
            rows = torch.arange(capacity, device=experts.device)
            plan.valid = (rows < offsets[-1]).unsqueeze(-1)
            number = torch.where(plan.valid.squeeze(-1), rows, -1)
        width = experts.shape[1]
        plan.source, plan.choice = order // width, order % width
        position = torch.full((experts.numel() + 1,), -1, device=experts.device)
        target = order if plan.valid is None else torch.where(plan.valid.squeeze(-1), order, experts.numel())
        position.scatter_(0, target, number)
        plan.row = position[:-1].view(-1, width)
        return offsets.int(), counts.int()

    @staticmethod
    def _rows(received: Tensor, plan: _Plan) -> Tensor:
        if not len(received):  # only with no rows at all: a capacity always receives its padding
            return received.new_zeros(len(plan.source), received.shape[1])
        rows = _take(received, plan.source)
        if plan.valid is None:
            return rows
        if rows.dtype in _FLOAT8:
            return torch.where(plan.valid, rows.view(torch.uint8), 0).view(rows.dtype)
        return torch.where(plan.valid, rows, 0)

    # Combine -------------------------------------------------------------------------------------------------------

    def combine(self, rows: Any, handle: Handle, *, weighted: bool = True, out: Any = None) -> Any:
        """Brings rows back to their tokens and sums them.

        Args:
            rows: [S, hidden], float, in the order of the dispatch's rows; rows past the last are not read.
            weighted: multiply each row by its weight of the dispatch (False where the rows already are).
            out: [T, hidden] to write to (then without gradients).

        Returns:
            [T, hidden] of the dtype of ``rows``: summed in float32 (float64 for float64 rows), by choice on the
            experts' rank, rounded, then by rank. Differentiable in ``rows``, and in the weights given to
            :meth:`dispatch`.
        """
        return self.combine_recv(self.combine_send(rows, handle, weighted=weighted), out=out)

    def combine_send(self, rows: Any, handle: Handle, *, weighted: bool = True) -> _Combining:
        """The first half of :meth:`combine`. Its result goes to :meth:`combine_recv`."""
        listed = self._listed(rows, "rows", op="combine")
        for tensor, plan in zip(listed, handle.plans, strict=True):
            if not tensor.is_floating_point() or tensor.dtype in _FLOAT8:
                raise TypeError(f"combine: rows: got {tensor.dtype}, wanted float16, bfloat16, float32 or float64")
            if tensor.shape != (len(plan.source), self.hidden):
                raise ValueError(
                    f"combine: rows: got shape {tuple(tensor.shape)}, wanted {(len(plan.source), self.hidden)}"
                )
        weights = handle.row_weights if weighted else []
        with torch.no_grad():
            exchange = self._send_back(listed, weights or [None] * len(listed), handle.plans, "combine/payload")
        link = _Link()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*listed, *weights)):
            link.token = _CombineSend.apply(self, handle.plans, link, bool(weights), *listed, *weights)
        return _Combining(exchange, listed, weights, handle, link)

    def combine_recv(self, pending: _Combining, *, out: Any = None) -> Any:
        """The second half of :meth:`combine`."""
        with torch.no_grad():
            results = self._sum_back(pending.exchange, pending.handle.plans, pending.rows[0].dtype)
        if pending.link.token is not None:
            if out is not None:
                raise ValueError("combine: out: got a tensor, wanted None where gradients are recorded")
            results = list(_CombineRecv.apply(self, pending.handle.plans, pending.link, pending.link.token, *results))
        if out is None:
            return self._given(results)
        for target, result in zip(self._listed(out, "out", op="combine"), results, strict=True):
            if target.shape != result.shape or target.dtype != result.dtype:
                raise ValueError(
                    f"combine: out: got {target.dtype} {tuple(target.shape)}, "
                    f"wanted {result.dtype} {tuple(result.shape)}"
                )
            target.copy_(result)
        return out

    # Movement, in both directions and for both backwards -----------------------------------------------------------

    def _start(
        self, send: list[Tensor], send_counts: list[list[int]], recv_counts: list[list[int]], phase: str
    ) -> Exchange:
        return self._transport.start(send, send_counts, recv_counts, phase)

    def _forward(self, payload: list[Tensor], plans: list[_Plan], phase: str) -> Exchange:
        """Wire rows to the experts' ranks."""
        return self._start(payload, [p.send_counts for p in plans], [p.recv_counts for p in plans], phase)

    def _back(self, payload: list[Tensor], plans: list[_Plan], phase: str) -> Exchange:
        """Wire rows back to the tokens' ranks."""
        return self._start(payload, [p.recv_counts for p in plans], [p.send_counts for p in plans], phase)

    def _send_again(self, x: list[Tensor], plans: list[_Plan], phase: str) -> Exchange:
        """Starts to dispatch [T, hidden] tensors a second time."""
        payload = [torch.cat([t, t.new_zeros(1, t.shape[1])])[p.wire_token] for t, p in zip(x, plans, strict=True)]
        return self._forward([_pack([t]) for t in payload], plans, phase)

    def _recv_again(self, exchange: Exchange, dtype: torch.dtype, plans: list[_Plan]) -> list[Tensor]:
        layout = [(dtype, self.hidden)]
        return [self._rows(_unpack(g, layout)[0], p) for g, p in zip(exchange.wait(), plans, strict=True)]

    def _send_back(
        self, rows: list[Tensor], weights: Sequence[Tensor | None], plans: list[_Plan], phase: str
    ) -> Exchange:
        sums = [_sum_rows(r, p.row, w).to(r.dtype) for r, p, w in zip(rows, plans, weights, strict=True)]
        return self._back([_pack([s]) for s in sums], plans, phase)

    def _sum_back(self, exchange: Exchange, plans: list[_Plan], dtype: torch.dtype) -> list[Tensor]:
        got = [_unpack(packed, [(dtype, self.hidden)])[0] for packed in exchange.wait()]
        return [_sum_rows(rows, p.slots).to(dtype) for rows, p in zip(got, plans, strict=True)]

    # Arguments -----------------------------------------------------------------------------------------------------

    def _listed(self, value: Any, name: str, op: str = "dispatch") -> list[Tensor]:
        values = list(value) if self._virtual and isinstance(value, list | tuple) else [value]
        if len(values) != len(self._transport.local_ranks) or not all(isinstance(v, Tensor) for v in values):
            wanted = f"a list of {self.num_ranks} tensors" if self._virtual else "a tensor"
            raise TypeError(f"{op}: {name}: got {type(value).__name__}, wanted {wanted}")
        return values

    def _given(self, values: list[T]) -> list[T] | T:
        return values if self._virtual else values[0]

    def _check_inputs(self, x: Tensor, experts: Tensor, weights: Tensor, scale: Tensor | None) -> None:
        op = "dispatch"
        if not x.is_floating_point():
            raise TypeError(f"{op}: x: got {x.dtype}, wanted a float dtype")
        if experts.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: experts: got {experts.dtype}, wanted int32 or int64")
        if weights.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: weights: got {weights.dtype}, wanted float32 or float64")
        if x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"{op}: x: got shape {tuple(x.shape)}, wanted [tokens, {self.hidden}]")
        if len(x) > self.max_tokens:
            raise ValueError(f"{op}: x: got {len(x)} tokens, wanted at most max_tokens = {self.max_tokens}")
        if experts.dim() != 2 or len(experts) != len(x) or not experts.shape[1]:
            raise ValueError(f"{op}: experts: got shape {tuple(experts.shape)}, wanted [{len(x)}, choices]")
        if weights.shape != experts.shape:
            raise ValueError(f"{op}: weights: got shape {tuple(weights.shape)}, wanted {tuple(experts.shape)}")
        if scale is not None and scale.dtype != torch.float32:
            raise TypeError(f"{op}: scale: got {scale.dtype}, wanted float32")
        if scale is not None and (scale.dim() != 2 or len(scale) != len(x)):
            raise ValueError(f"{op}: scale: got shape {tuple(scale.shape)}, wanted [{len(x)}, columns]")
        if experts.device.type == "cpu" and experts.numel():
            low, high = int(experts.min()), int(experts.max())
            if low < -1 or high >= self.num_experts:
                raise ValueError(f"{op}: experts: got {low if low < -1 else high}, wanted -1 to {self.num_experts - 1}")

    def _note_overflow(self, needed: Tensor, capacity: int) -> None:
        """Keeps the number of rows needed where the host can read it without waiting."""
        self._capacity = capacity
        host = torch.zeros((), dtype=torch.int64, pin_memory=needed.is_cuda)
        self._needed.append(host.copy_(needed, non_blocking=True))
        del self._needed[: -2 * len(self._transport.local_ranks)]

    def _raise_overflow(self, *, wait: bool) -> None:
        if wait and any(n.is_pinned() for n in self._needed):
            torch.cuda.synchronize()
        worst = max((int(n) for n in self._needed), default=0)
        if worst > self._capacity:
            self._needed.clear()
            raise EPCapacityError(f"dispatch: capacity: got {self._capacity}, but {worst} rows came to one rank")

    def check(self) -> None:
        """Raises :class:`EPCapacityError` if a dispatch overflowed its capacity. Waits for the device."""
        self._raise_overflow(wait=True)


class _DispatchSend(torch.autograd.Function):
    """Takes the gradients of [n x, n weights] from the exchange that the other half's backward has started."""

    @staticmethod
    def forward(ctx: Any, ep: ExpertParallel, plans: list[_Plan], link: _Link, *tensors: Tensor) -> Tensor:
        ctx.ep, ctx.plans, ctx.link = ep, plans, link
        ctx.dtypes = tensors[0].dtype, tensors[-1].dtype
        return tensors[-1].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        ep, plans = ctx.ep, ctx.plans
        wire, hidden, layout = _gradient_layout(ep, plans, *ctx.dtypes)
        exchange, ctx.link.exchange = ctx.link.exchange, None
        x_grads: list[Tensor | None] = []
        w_grads: list[Tensor | None] = []
        for plan, packed in zip(plans, exchange.wait(), strict=True):
            total, by_choice = _unpack(packed, layout)
            x_grads.append(_sum_rows(total, plan.slots).to(wire) if hidden else None)
            padded = torch.cat([by_choice, by_choice.new_zeros(1, by_choice.shape[1])])
            at = plan.choice_slot
            w_grads.append(padded[at, torch.arange(at.shape[1], device=at.device)])
        return None, None, None, *x_grads, *w_grads


class _DispatchRecv(torch.autograd.Function):
    """Gives what was received (n rows, n weights) a gradient: it starts on its way back to the tokens, unweighted, and
    to their weights."""

    @staticmethod
    def forward(
        ctx: Any,
        ep: ExpertParallel,
        plans: list[_Plan],
        link: _Link,
        dtypes: tuple[torch.dtype, torch.dtype],
        token: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.ep, ctx.plans, ctx.link, ctx.dtypes = ep, plans, link, dtypes
        received = tuple(t.view_as(t) for t in tensors)
        ctx.mark_non_differentiable(*(t for t in received[: len(plans)] if t.dtype in _FLOAT8))
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ep, plans, n = ctx.ep, ctx.plans, len(ctx.plans)
        wire, hidden, _ = _gradient_layout(ep, plans, *ctx.dtypes)
        payload = []
        for plan, rows, weight in zip(plans, grads[:n], grads[n:], strict=True):
            total = _sum_rows(rows, plan.row).to(wire) if hidden else weight.new_zeros(len(plan.row), 0)
            by_choice = torch.cat([weight, weight.new_zeros(1)])[plan.row]  # -1 finds the zero
            payload.append(_pack([total, by_choice.to(ctx.dtypes[1])]))
        ctx.link.exchange = ep._back(payload, plans, "dispatch backward")
        return None, None, None, None, grads[n].new_zeros(()), *([None] * (2 * n))


def _gradient_layout(
    ep: ExpertParallel, plans: list[_Plan], x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[torch.dtype, int, list[tuple[torch.dtype, int]]]:
    """What dispatch's backward sends per token: a gradient of x (none of float8 codes) and one of each weight."""
    wire, hidden = (torch.float32, 0) if x_dtype in _FLOAT8 else (x_dtype, ep.hidden)
    return wire, hidden, [(wire, hidden), (weight_dtype, plans[0].row.shape[1])]


class _CombineSend(torch.autograd.Function):
    """Takes the gradients of [n rows, n weights or none] from the exchange that the other half's backward has started:
    the tokens' gradients dispatched again, times the weights."""

    @staticmethod
    def forward(
        ctx: Any, ep: ExpertParallel, plans: list[_Plan], link: _Link, weighted: bool, *tensors: Tensor
    ) -> Tensor:
        ctx.ep, ctx.plans, ctx.link, ctx.weighted = ep, plans, link, weighted
        ctx.dtype = tensors[0].dtype
        ctx.save_for_backward(*(tensors if weighted else ()))
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        n, saved = len(ctx.plans), ctx.saved_tensors
        exchange, ctx.link.exchange = ctx.link.exchange, None
        again = ctx.ep._recv_again(exchange, ctx.dtype, ctx.plans)
        if not ctx.weighted:
            return None, None, None, None, *again
        row_grads, weight_grads = [], []
        for plan, rows, weight, grad in zip(ctx.plans, saved[:n], saved[n:], again, strict=True):
            wide = grad.to(_wide(grad.dtype))
            row_grads.append((wide * weight.to(wide.dtype).unsqueeze(-1)).to(rows.dtype))
            if plan.valid is not None:
                rows = torch.where(plan.valid, rows, 0)
            weight_grads.append((wide * rows).sum(-1).to(weight.dtype))
        return None, None, None, None, *row_grads, *weight_grads


class _CombineRecv(torch.autograd.Function):
    """Gives the n results a gradient: it starts on its way to the experts' ranks."""

    @staticmethod
    def forward(
        ctx: Any, ep: ExpertParallel, plans: list[_Plan], link: _Link, token: Tensor, *results: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ep, ctx.plans, ctx.link = ep, plans, link
        return tuple(t.view_as(t) for t in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.link.exchange = ctx.ep._send_again(list(grads), ctx.plans, "combine backward")
        return None, None, None, grads[0].new_zeros(()), *([None] * len(grads))


__all__ = ["EPCapacityError", "EPTimeoutError", "ExpertParallel", "Handle"]
