"""Expert placement: replicate the busiest experts and spread the replicas so that every GPU carries the same load.

The policy is that of DeepSeek's EPLB (DeepSeek-V3 technical report, section 3.4; github.com/deepseek-ai/EPLB), and so
are the
results: groups of experts are packed onto nodes, the experts of a node are replicated greedily, the replicas are packed
onto the GPUs of the node. Here the steps run over all layers and nodes at once.

Everything is float32 and takes the first of several equal candidates. Equal loads are ordered by ``torch.sort`` as it
comes, which is what the published program does: it decides only between replicas and experts of exactly the same load.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _pack(load: Tensor, num_packs: int) -> tuple[Tensor, Tensor]:
    """Packs n items into packs of n / num_packs each: heaviest first, each into the lightest pack that has room.

    load [X, n] -> (pack [X, n], place in the pack [X, n]).
    """
    rows, n = load.shape
    capacity = n // num_packs
    if capacity == 1:
        return torch.arange(n).expand(rows, n), torch.zeros(rows, n, dtype=torch.int64)
    order = torch.sort(load, dim=-1, descending=True).indices.numpy()
    heaviest_first = np.take_along_axis(load.numpy(), order, axis=1)

    every = np.arange(rows)
    carried = np.zeros((rows, num_packs), dtype=np.float32)  # inf once a pack is full
    items = np.zeros((rows, num_packs), dtype=np.int64)
    pack = np.empty((rows, n), dtype=np.int64)
    place = np.empty((rows, n), dtype=np.int64)
    for i in range(n):
        lightest = carried.argmin(axis=1)
        taken = items[every, lightest]
        pack[every, order[:, i]] = lightest
        place[every, order[:, i]] = taken
        items[every, lightest] = taken + 1
        carried[every, lightest] += np.where(taken + 1 == capacity, np.float32(np.inf), heaviest_first[:, i])
    return torch.from_numpy(pack), torch.from_numpy(place)


def _replicate(load: Tensor, num_replicas: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each further replica to the expert with the largest load per replica.

    load [X, n] -> (expert of each replica [X, num_replicas], which replica of it [X, num_replicas], replicas [X, n]).
    """
    rows, n = load.shape
    every = np.arange(rows)
    total = load.numpy()
    share = total.copy()
    count = np.ones((rows, n), dtype=np.int64)
    expert = np.empty((rows, num_replicas), dtype=np.int64)
    expert[:, :n] = np.arange(n)
    nth = np.zeros((rows, num_replicas), dtype=np.int64)
    for i in range(n, num_replicas):
        busiest = share.argmax(axis=1)
        expert[:, i] = busiest
        nth[:, i] = count[every, busiest]
        count[every, busiest] += 1
        share[every, busiest] = total[every, busiest] / count[every, busiest].astype(np.float32)
    return torch.from_numpy(expert), torch.from_numpy(nth), torch.from_numpy(count)


def _inverse(permutation: Tensor) -> Tensor:
    rows, n = permutation.shape
    return torch.empty_like(permutation).scatter_(1, permutation, torch.arange(n).expand(rows, n))


def _check(weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> None:
    op = "rebalance_experts"
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight: got {type(weight).__name__}, wanted a Tensor")
    if weight.is_complex() or weight.dtype == torch.bool:
        raise TypeError(f"{op}: weight: got {weight.dtype}, wanted a real number type")
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"{op}: weight: got shape {tuple(weight.shape)}, wanted [layers, experts]")
    sizes = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: {name}: got {type(value).__name__}, wanted an int")
        if value < 1:
            raise ValueError(f"{op}: {name}: got {value}, wanted at least 1")
    experts = weight.shape[1]
    if num_replicas < experts:
        raise ValueError(f"{op}: num_replicas: got {num_replicas}, wanted at least one for each of {experts} experts")
    if num_replicas % num_gpus:
        raise ValueError(f"{op}: num_replicas: got {num_replicas}, wanted a multiple of num_gpus = {num_gpus}")
    if num_groups % num_nodes == 0:
        if num_gpus % num_nodes:
            raise ValueError(f"{op}: num_gpus: got {num_gpus}, wanted a multiple of num_nodes = {num_nodes}")
        if experts % num_groups:
            raise ValueError(f"{op}: num_groups: got {num_groups}, wanted a divisor of the {experts} experts")
    if not (torch.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError(f"{op}: weight: got negative or not finite loads, wanted loads of 0 or more")


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plans replicas of experts and their places.

    Args:
        weight: [layers, experts], how busy each expert was (any unit, any real dtype, any device).
        num_replicas: physical experts per layer, a multiple of ``num_gpus``, at least the number of experts.
        num_groups: groups of the group-limited gate. Where ``num_nodes`` divides it, a group stays within one node (the
            hierarchical policy); elsewhere groups and nodes are ignored (the global policy).
        num_nodes: nodes; fast links within one.
        num_gpus: GPUs of all nodes.

    Returns:
        ``phy2log`` [layers, num_replicas]: the expert that each replica is a copy of; GPU g holds the replicas
        ``g * num_replicas // num_gpus`` and following. ``log2phy`` [layers, experts, most replicas of one]: the
        replicas of each expert, -1 where there is no more. ``logcnt`` [layers, experts]: how many. All int64 on the
        CPU.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    load = weight.detach().float().cpu().contiguous()
    layers, experts = load.shape
    group_size = experts // num_groups
    node_experts = experts // num_nodes
    gpu_replicas = num_replicas // num_gpus

    # Groups to nodes. "Node order" numbers the experts node by node.
    node, place = _pack(load.unflatten(-1, (num_groups, group_size)).sum(-1), num_nodes)
    first = (node * (num_groups // num_nodes) + place) * group_size
    to_node_order = (first.unsqueeze(-1) + torch.arange(group_size)).flatten(-2)
    from_node_order = _inverse(to_node_order)

    # Replicas within each node; rows are now (layer, node).
    node_load = load.gather(-1, from_node_order).view(-1, node_experts)
    expert, nth, count = _replicate(node_load, num_replicas // num_nodes)

    # Replicas to the GPUs of the node.
    gpu, slot = _pack((node_load / count).gather(-1, expert), num_gpus // num_nodes)
    by_place = _inverse(gpu * gpu_replicas + slot)
    placed = expert.gather(-1, by_place).view(layers, num_nodes, num_replicas // num_nodes)
    placed = placed + torch.arange(0, experts, node_experts).view(1, -1, 1)

    phy2log = from_node_order.gather(-1, placed.flatten(-2))
    logcnt = count.view(layers, experts).gather(-1, to_node_order)
    most = int(logcnt.max()) if layers else 1
    log2phy = torch.full((layers, experts * most), -1, dtype=torch.int64)
    replica = nth.gather(-1, by_place).view(layers, num_replicas)
    log2phy.scatter_(-1, phy2log * most + replica, torch.arange(num_replicas).expand(layers, -1))
    return phy2log, log2phy.view(layers, experts, most), logcnt


def gpu_loads(weight: Tensor, phy2log: Tensor, logcnt: Tensor, num_gpus: int) -> Tensor:
    """The load of each GPU if an expert's load is shared equally by its replicas: [layers, num_gpus], float64."""
    share = weight.detach().double().cpu() / logcnt
    return share.gather(-1, phy2log).unflatten(-1, (num_gpus, -1)).sum(-1)


def imbalance(weight: Tensor, phy2log: Tensor, logcnt: Tensor, num_gpus: int) -> Tensor:
    """Load of the busiest GPU over the mean of all: [layers], 1 at best (and where a layer has no load)."""
    loads = gpu_loads(weight, phy2log, logcnt, num_gpus)
    mean = loads.mean(-1)
    return torch.where(mean > 0, loads.amax(-1) / mean, torch.ones_like(mean))


def choose_replicas(experts: Tensor, log2phy: Tensor, logcnt: Tensor, *, start: int = 0) -> Tensor:
    """The physical experts for routed tokens of one layer: token t takes replica (start + t) modulo the expert's count.

    Args:
        experts: int [T, K], -1 for a dropped choice (stays -1).
        log2phy, logcnt: [experts, X] and [experts] of this layer, on the device of ``experts``.
        start: the first token's number; give each rank another one.

    Returns:
        [T, K] of the dtype of ``experts``. No host synchronisation.
    """
    if experts.dim() != 2:
        raise ValueError(f"choose_replicas: experts: got shape {tuple(experts.shape)}, wanted [tokens, choices]")
    if log2phy.dim() != 2 or logcnt.shape != log2phy.shape[:1]:
        raise ValueError(
            f"choose_replicas: log2phy, logcnt: got shapes {tuple(log2phy.shape)} and {tuple(logcnt.shape)}, "
            "wanted [experts, replicas] and [experts] (one layer)"
        )
    chosen = experts.long().clamp(min=0)
    token = torch.arange(start, start + experts.shape[0], device=experts.device).unsqueeze(-1)
    physical = log2phy[chosen, token % logcnt[chosen]]
    return torch.where(experts < 0, -1, physical).to(experts.dtype)
