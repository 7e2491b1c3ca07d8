"""The table of ops, and the one way an op is made.

The table is plain data and needs no torch; `define` registers an op with torch.library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMESPACE = "dsv3_kernels"
FAMILIES = ("quant", "gemm", "mla", "moe", "ep")


@dataclass(frozen=True)
class Op:
    """One registered op: where it lives and which implementations ship. Every op has an eager one."""

    family: str
    module: str = ""  # file in the family's folders; the op's own name when empty
    cuda: bool = False  # a hand-written sm_90a kernel ships
    triton: bool = False  # a Triton kernel ships
    fp8: bool = False  # reads or writes E4M3 whatever its arguments: in Triton for compute capability 8.9 and newer
    out: bool = False  # a caller may give the output: a second schema, <op>_out
    grad: str = ""  # the op that computes its gradient, when it is differentiable
    internal: bool = False  # no public function of this name: a backward, or half of a public op


OPS: dict[str, Op] = {
    # quant
    "quantize_1x128": Op("quant", cuda=True, triton=True, fp8=True, out=True),
    "quantize_128x128": Op("quant", cuda=True, triton=True, fp8=True, out=True),
    "quantize_1x128_both": Op("quant", cuda=True, triton=True, fp8=True, out=True),
    "dequantize": Op("quant", cuda=True, triton=True, fp8=True),
    "silu_mul_quantize_1x128": Op("quant", cuda=True, triton=True, fp8=True, out=True),
    "rms_norm": Op("quant", cuda=True, triton=True, grad="rms_norm_backward"),
    "rms_norm_backward": Op("quant", module="rms_norm", cuda=True, triton=True, internal=True),
    "rms_norm_quantize_1x128": Op("quant", cuda=True, triton=True, fp8=True, out=True),
    # gemm
    "fp8_gemm": Op("gemm", cuda=True, triton=True, fp8=True, out=True),
    "fp8_gemm_accumulate": Op("gemm", module="fp8_gemm", cuda=True, triton=True, fp8=True, internal=True),
    "fp8_grouped_gemm": Op("gemm", cuda=True, triton=True, fp8=True),
    "fp8_masked_gemm": Op("gemm", cuda=True, triton=True, fp8=True),
    "fp8_grouped_wgrad": Op("gemm", cuda=True, triton=True, fp8=True, out=True),
    "fp8_grouped_wgrad_accumulate": Op(
        "gemm", module="fp8_grouped_wgrad", cuda=True, triton=True, fp8=True, internal=True
    ),
    "fp8_grouped_gemm_swiglu_quantize": Op("gemm", cuda=True, triton=True, fp8=True),
    # mla
    "rope": Op("mla", cuda=True, triton=True, out=True, grad="rope"),
    "mla_prefill": Op("mla", cuda=True, triton=True, grad="mla_prefill_backward"),
    "mla_prefill_backward": Op("mla", module="mla_prefill", cuda=True, triton=True, internal=True),
    "mla_decode": Op("mla", cuda=True, triton=True, out=True),
    "mla_decode_plan": Op("mla", cuda=True, triton=True),
    "mla_prologue": Op("mla", cuda=True, triton=True, fp8=True),
    "mla_absorb": Op("mla", cuda=True, triton=True, out=True),
    "mla_cache_append": Op("mla", cuda=True, triton=True),
    "mla_cache_gather": Op("mla", cuda=True, triton=True),
    "merge_attention": Op("mla", cuda=True, triton=True),
    # moe
    "moe_gate": Op("moe", cuda=True, triton=True, grad="moe_gate_backward"),
    "moe_gate_backward": Op("moe", module="moe_gate", cuda=True, triton=True, internal=True),
    "moe_permute": Op("moe", cuda=True, triton=True, grad="moe_unpermute"),
    "moe_unpermute": Op("moe", cuda=True, triton=True, grad="moe_unpermute_backward"),
    "moe_unpermute_backward": Op("moe", module="moe_unpermute", cuda=True, triton=True, internal=True),
    "moe_update_bias": Op("moe", triton=True),
    "moe_balance_loss": Op("moe", triton=True, grad="moe_balance_loss_backward"),
    "moe_balance_loss_backward": Op("moe", module="moe_balance_loss", triton=True, internal=True),
}

# Public functions made of ops, with no op of their own: file in the family's folders, and the family.
COMPOSITIONS: dict[str, str] = {
    "fp8_linear": "gemm",
    "fp8_grouped_linear": "gemm",
}


def module_of(op: str) -> str:
    """Dotted name of the module that defines `op`."""
    row = OPS[op]
    return f"{NAMESPACE}.{row.family}.{row.module or op}"


class Definition:
    """A registered op: call it for fresh outputs; `.out(*args, *outputs)` writes into given ones."""

    __slots__ = ("_functional", "name", "out")

    def __init__(self, name: str, functional: Callable[..., Any], out: Callable[..., Any] | None) -> None:
        self.name = name
        self._functional = functional
        self.out: Any = out  # None when the op has no out variant

    def __call__(self, *args: Any) -> Any:
        return self._functional(*args)


_library: Any = None


def define(schema: str, *, allocate: Callable[..., Any] | None, out: str | None = None) -> Definition:
    """Register an op, and its out variant, for CPU, CUDA, Meta and fake tensors.

    `allocate` takes the op's arguments and returns its empty outputs: it is the fake implementation, and the
    outputs that a kernel backend fills. `None` for an op that only mutates its arguments (a schema `-> ()`).

    Implementations are found by convention, at the first call, in the family's folder: `_eager.<op>(*args)` returns
    the outputs; `_cuda.<op>(*args, *outputs)` and `_triton_<module>.<op>(*args, *outputs)` fill them. All of them run
    without autograd: a gradient is a `torch.autograd.Function` outside the op, so that eager cannot hide a
    missing backward.
    """
    import torch

    global _library
    if _library is None:
        _library = torch.library.Library(NAMESPACE, "FRAGMENT")
    name = schema.partition("(")[0]
    if name not in OPS:
        raise ValueError(f"define: op {name!r} has no row in _library.OPS")
    functional = _register(torch, name, schema, _functional_call(torch, name, allocate), allocate or _nothing)
    if (out is not None) != OPS[name].out:
        raise ValueError(f"define: op {name!r} and its row in _library.OPS disagree about an out variant")
    if out is None:
        return Definition(name, functional, None)
    arity = len(functional._schema.arguments)
    return Definition(name, functional, _register(torch, f"{name}_out", out, _out_call(torch, name, arity), _nothing))


def _register(torch: Any, name: str, schema: str, call: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, call, key)
    # Autograd must not see the op: neither record through it nor mark its outputs.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _nothing(*_: Any) -> None:
    return None


def records(*inputs: Any) -> bool:
    """Whether autograd must see a call with these inputs: the public function then takes its autograd.Function."""
    import torch

    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


def _functional_call(torch: Any, name: str, allocate: Callable[..., Any] | None) -> Callable[..., Any]:
    from . import backends

    def call(*args: Any) -> Any:
        chosen, implementation = backends.implementation(name, args)
        if chosen == "eager":
            with torch.no_grad():
                return implementation(*args)
        if allocate is None:
            return backends.launch(chosen, implementation, args)
        outputs = allocate(*args)
        backends.launch(chosen, implementation, (*args, *outputs) if isinstance(outputs, tuple) else (*args, outputs))
        return outputs

    return call


def _out_call(torch: Any, name: str, arity: int) -> Callable[..., Any]:
    from . import backends

    def call(*args: Any) -> None:
        inputs = args[:arity]
        chosen, implementation = backends.implementation(name, inputs)
        if chosen != "eager":
            return backends.launch(chosen, implementation, args)
        with torch.no_grad():
            results = implementation(*inputs)
            for target, result in zip(args[arity:], results if isinstance(results, tuple) else (results,), strict=True):
                target.copy_(result)

    return call
