"""FlashInfer as a rival of mla_decode: a wrapper that computes from just what it is given has the right results."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv3_kernels as dk
from bench import bench_mla


class Wrapper:
    """The part of flashinfer.mla.BatchMLAPagedAttentionWrapper's interface that is used, in float64."""

    def __init__(self, workspace: Tensor, backend: str) -> None:
        assert workspace.numel() >= 1 << 27 and backend == "fa3"

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, num_heads: int,
        head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float, q_data_type: Any,
        kv_data_type: Any,
    ) -> None:  # fmt: skip
        assert (head_dim_ckv, head_dim_kpe, page_size, causal) == (512, 64, 64, True)
        assert q_data_type == kv_data_type == torch.bfloat16
        for tensor in (qo_indptr, kv_indptr, kv_indices, kv_len_arr):
            assert tensor.dtype == torch.int32
        self.bounds, self.pages, self.heads = (qo_indptr, kv_indptr, kv_len_arr), kv_indices, num_heads
        self.scale = sm_scale

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv: Tensor, kpe: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
        assert return_lse and q_nope.shape[1] == self.heads
        outs, lses = [], []
        queries, pages, lengths = (x.tolist() for x in self.bounds)
        for b, length in enumerate(lengths):
            mine = self.pages[pages[b] : pages[b + 1]].long()
            keys = torch.cat([ckv[mine], kpe[mine]], -1).flatten(0, 1)[:length].double()
            rows = slice(queries[b], queries[b + 1])
            q = torch.cat([q_nope[rows], q_pe[rows]], -1).double()
            s = q @ keys.T * self.scale
            for i in range(len(q)):
                s[i, :, length - (len(q) - 1 - i) :] = -torch.inf
            outs.append(s.softmax(-1) @ keys[:, :512])
            lses.append(s.logsumexp(-1))
        return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("queries", [1, 2])
def test_flashinfer_is_asked_for_the_same_attention(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    case = bench_mla.mla_decode(3, 200, 4, queries)
    inputs = case.make(torch.device("cpu"))
    out, lse = case.peers["flashinfer"](*inputs)()
    wanted, wanted_lse = dk.mla_decode(*inputs[:4], softmax_scale=bench_mla.SCALE)
    assert (out.view_as(wanted) - wanted).abs().max() < 0.02
    assert (lse.view_as(wanted_lse) - wanted_lse).abs().max() < 1e-3


def test_without_the_package_it_does_not_appear() -> None:
    case = bench_mla.mla_decode(1, 64, 2)
    with pytest.raises(ImportError):
        case.peers["flashinfer"](*case.make(torch.device("cpu")))
