"""Which implementation of an op runs: chosen per call from the device, the tensors and what the caller forced.

`eager` is plain PyTorch and runs anywhere; `triton` needs a GPU of compute capability 8.0 (8.9 for FP8); `cuda` needs
9.0 (H100, H200, H800); `sim` executes the very kernels of `cuda` and `triton` from their PTX on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from . import _triton, env
from ._library import NAMESPACE, OPS

NAMES = ("eager", "triton", "cuda", "sim", "sim:cuda", "sim:triton")


class _Asked(threading.local):
    """What this thread's `with` blocks ask for; None where none does, and the environment decides."""

    name: str | None = None
    check_values: bool | None = None


_local = _Asked()


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force a backend for the calls of this thread inside the `with` block; `None` gives the choice back.

    Raises:
        ValueError: `name` is not one of `eager`, `triton`, `cuda`, `sim`, `sim:cuda`, `sim:triton`.
        RuntimeError: from the op, when the forced backend cannot serve the call; it says what is missing.
    """
    _check_name("backend", name)
    before = _local.name
    _local.name = name
    try:
        yield
    finally:
        _local.name = before


def forced() -> str | None:
    """The backend that this thread or the process asks for, `None` when the choice is free."""
    return _local.name or _process_wide()


@functools.cache
def _process_wide() -> str | None:
    name = env.get("DSV3_KERNELS_BACKEND")  # once: a look at the environment costs as much as a launch
    _check_name("DSV3_KERNELS_BACKEND", name)
    return name


def _check_name(argument: str, name: str | None) -> None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}, wanted one of {', '.join(NAMES)}")


def save_for_backward(ctx: Any) -> None:
    """Remember the forced backend: the backward pass may run in a thread of autograd's, where nothing is forced."""
    import torch

    if not torch.compiler.is_compiling():  # compiled graphs read the thread's choice when they run
        ctx.backend = forced()


def restored(ctx: Any) -> contextlib.AbstractContextManager[None]:
    """The `with` block of a backward pass: the backend that its forward pass saved."""
    name = getattr(ctx, "backend", None)
    return backend(name) if name is not None else contextlib.nullcontext()


@contextlib.contextmanager
def check_values(enabled: bool = True) -> Iterator[None]:
    """Let this thread's ops inside the block read their index tensors first: for looking for a mistake.

    Lengths, block tables, offsets, counts, slots, positions and experts are held against the sizes of the other
    arguments, and `ValueError` says which is wrong. Each check waits for the device; a CUDA graph cannot be captured
    inside. Elsewhere kernels take such values as they come: they stay inside the tensors and compute nonsense.
    `DSV3_KERNELS_CHECK_VALUES=1` does it for the process. (CPU tensors in the eager backend are always checked.)
    """
    before = _local.check_values
    _local.check_values = enabled
    try:
        yield
    finally:
        _local.check_values = before


@functools.cache
def _values_are_checked() -> bool:
    """In the process, where a thread says nothing else."""
    return env.get("DSV3_KERNELS_CHECK_VALUES") not in (None, "0")


@contextlib.contextmanager
def early_launches() -> Iterator[None]:
    """Let this thread's CUDA kernels inside the block start before their predecessors in the stream end.

    A kernel then sets itself up while the last CTAs of the one before still run, and waits for its end (and for all it
    wrote) before it touches memory: programmatic dependent launch, worth one to three microseconds where kernels are
    short, also when captured into a CUDA graph. Results are the same. It is off elsewhere, in other threads (autograd's
    among them), and for kernels that do not wait by themselves (`_host.kernels()[name]["waits"]`: the FP8 GEMMs do).
    """
    host = _host()
    if isinstance(host, str):
        yield
    else:
        with host.early_launches():
            yield


@dataclass(frozen=True)
class Explanation:
    """What a call would take, and why the other backends would not."""

    op: str
    backend: str
    reason: str
    kernels: tuple[str, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(
        default_factory=dict
    )  # of a CUDA kernel chosen by a cost model, whether it is taken or not

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        lines += [f"  kernel {name}" for name in self.kernels]
        if self.plan:
            lines.append(f"  {_words_of(self.plan, self.backend)}")
        lines += [f"  not {name}: {why}" for name, why in self.passed_over.items()]
        return "\n".join(lines)


def _words_of(plan: dict[str, Any], backend: str) -> str:
    """One line: what is launched, and what the cost model expects of it."""
    where = "" if backend.endswith("cuda") else "on Hopper: "
    if "words" in plan:
        return f"{where}{plan['kernel']}: {plan['words']}"
    rows, columns = plan["tile"]
    split = f", K shared by {plan['split']}" if plan["split"] > 1 else ""
    pair = " to a pair of CTAs" if plan["pair"] else ""
    shape = f"{plan['tiles']} tiles of {rows} x {columns}{pair}{split}, {plan['stages']} stages, waves: {plan['waves']}"
    model = "measured choice" if plan["measured"] else "unmeasured model"
    return f"{where}{plan['kernel']}: {shape}; {plan['us']:.1f} us, bound by {plan['bound']} ({model})"


def explain(op: str, *args: Any) -> Explanation:
    """Say which backend and kernel `op(*args)` would take on these tensors, and why. Nothing is run.

    `args` are those of the torch op (`torch.ops.dsv3_kernels.<op>`), the last ones optional; with none, a CPU tensor is
    assumed. For ops whose CUDA kernel a cost model chooses, the model's plan comes with it: kernel, tile, stages, how
    many CTAs share K, waves, predicted time and what bounds it.
    """
    _known("explain", op)
    name, reason, passed_over = _choose(op, args, _device_of(args))
    kind = name.removeprefix("sim:")
    kernels = _kernels_of(op) if kind == "cuda" else _triton_kernels_of(op) if kind == "triton" else ()
    plan = _plan_of(op, args)
    if plan and kind == "cuda":
        kernels = plan.get("kernels", (plan["kernel"],))
    return Explanation(op, name, reason, kernels, passed_over, plan)


def _plan_of(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """A module of CUDA kernels may define `<op>_plan(*args)`, or `<op>_choice` where there is an op of that name: what
    its cost model chooses."""
    if not args or not OPS[op].cuda or _host_missing() is not None:
        return {}
    hook = f"{op}_plan" if f"{op}_plan" not in OPS else f"{op}_choice"
    plan = getattr(_module(op, "cuda"), hook, None)
    return plan(*args) if plan is not None else {}


def is_supported(op: str, device: Any, backend: str | None = None) -> bool:
    """Whether `op` runs on `device` (a torch.device or its name), on any backend or on the one named."""
    import torch

    _known("is_supported", op)
    _check_name("backend", backend)
    device = torch.device(device)
    if device.type != "cpu" and _gpu_missing(device) is not None:
        return False
    return backend in (None, "eager") or any(missing(op, name, device) is None for name in _expand(op, backend or ""))


def preload(device: Any) -> list[str]:
    """Load every CUDA image on `device` now, so that a CUDA graph capture need not. Returns the kernels' names.

    Raises:
        RuntimeError: the native module, the driver or a Hopper GPU is missing; the message says which.
    """
    import torch

    device = torch.device(device)
    why = _cuda_missing(device)
    if why is not None:
        raise RuntimeError(f"preload: {why}")
    host = importlib.import_module(f"{NAMESPACE}._host")
    index = device.index if device.index is not None else torch.cuda.current_device()
    host.preload(index)
    return sorted(_host_kernels())


def launch_counts() -> Counter[str]:
    """Launches so far in this process, by kernel name; the names of Triton kernels begin with `triton_`."""
    host = _host()
    counts = Counter(host.launch_counts() if isinstance(host, ModuleType) else ())
    counts.update(_triton.launches)
    return counts


# The choice. Everything below is read inside the opaque op, so that torch.compile neither breaks on it nor bakes it in.


def implementation(op: str, args: tuple[Any, ...]) -> tuple[str, Callable[..., Any]]:
    """The backend that serves this call, and its function."""
    try:
        device = args[0].device  # nearly always a tensor
    except (AttributeError, IndexError):
        device = _device_of(args)
    name = _local.name or _process_wide()
    eager = name == "eager" or (name is None and device.type == "cpu")
    checked = _local.check_values
    if (_values_are_checked() if checked is None else checked) or (eager and device.type == "cpu"):
        from . import _values

        _values.check(op, args, device)
    if eager:
        return "eager", _function(op, "eager")
    served, cannot = _settled.get((op, name, device), _OPEN)
    if served is not None and (cannot is None or cannot(*args) is None):
        return served
    chosen, _, passed_over = _choose(op, args, device)
    kind = chosen.removeprefix("sim:")
    function = _function(op, kind)
    if kind == chosen and not passed_over:  # what a GPU's first choice lacks does not change; the simulator may appear
        _settled[op, name, device] = (chosen, function), _check_of(op, kind)
    return chosen, function


_Served = tuple[str, Callable[..., Any]]
_OPEN: tuple[_Served | None, Callable[..., Any] | None] = None, None
_settled: dict[tuple[str, str | None, Any], tuple[_Served | None, Callable[..., Any] | None]] = {}


def launch(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run a kernel backend's function with its device current (a launcher in C++ takes the device itself)."""
    if name == "cuda":
        return function(*args)
    if name == "triton":
        import torch

        device = _device_of(args)
        if device.index == torch._C._cuda_getDevice():  # a `with` costs microseconds
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)
    from . import _simulator

    with _simulator.active(name.removeprefix("sim:")):
        return function(*args)


def _choose(op: str, args: tuple[Any, ...], device: Any) -> tuple[str, str, dict[str, str]]:
    name = forced()
    candidates = _expand(op, name) if name else ("cuda", "triton", "eager")
    passed_over: dict[str, str] = {}
    for candidate in candidates:
        why = missing(op, candidate, device) or _cannot(op, candidate, args)
        if why is None:
            return candidate, "forced" if name else _default_reason(candidate, device), passed_over
        passed_over[candidate] = why
    reasons = "; ".join(f"{candidate}: {why}" for candidate, why in passed_over.items())
    raise RuntimeError(f"{op}: backend {name!r} cannot serve this call ({reasons})")


def _expand(op: str, name: str) -> tuple[str, ...]:
    """`sim` means the CUDA kernel where there is one, else Triton's."""
    return ("sim:cuda" if OPS[op].cuda else "sim:triton",) if name == "sim" else (name,) if name else ("cuda", "triton")


def _default_reason(name: str, device: Any) -> str:
    if name == "eager":
        return "CPU tensors" if device.type == "cpu" else "no kernel serves this call"
    return f"fastest on {device}"


def missing(op: str, name: str, device: Any) -> str | None:
    """What `name` lacks to serve `op` on `device`; `None` when nothing."""
    if name == "eager":
        return None
    simulated, kind = name.startswith("sim"), name.removeprefix("sim:")
    if kind == "cuda" and not OPS[op].cuda:
        return "no CUDA kernel for this op yet"
    if kind == "triton" and not OPS[op].triton:
        return "no Triton kernel for this op yet"
    if simulated:
        from . import _simulator

        if device.type != "cpu":
            return f"the simulator takes CPU tensors, got {device.type}"
        return _simulator.missing() or (_host_missing() if kind == "cuda" else _triton_missing())
    return _cuda_missing(device) if kind == "cuda" else _triton_missing() or _triton_device(op, device)


def _gpu_missing(device: Any) -> str | None:
    import torch

    if device.type != "cuda":
        return f"needs a CUDA device, got {device.type}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if (device.index or 0) < count else f"needs a CUDA device, got {device} where torch sees {count}"


def _cuda_missing(device: Any) -> str | None:
    why = _gpu_missing(device) or _host_missing()
    if why is not None:
        return why
    capability = _capability(device)
    got = f"{capability[0]}.{capability[1]}"
    return None if capability == (9, 0) else f"needs compute capability 9.0 (Hopper), got {got}"


def _triton_device(op: str, device: Any) -> str | None:
    why = _gpu_missing(device)
    if why is not None:
        return why
    fp8 = OPS[op].fp8
    wanted = (8, 9) if fp8 else (8, 0)
    capability = _capability(device)
    if capability >= wanted:
        return None
    what = f"{wanted[0]}.{wanted[1]}{' (FP8)' if fp8 else ''}"
    return f"needs compute capability {what}, got {capability[0]}.{capability[1]}"


def _cannot(op: str, name: str, args: tuple[Any, ...]) -> str | None:
    """A kernel module may define `<op>_cannot(*args)`: why it does not serve these shapes, or `None`."""
    if name == "eager" or not args:
        return None
    check = _check_of(op, name.removeprefix("sim:"))
    return check(*args) if check is not None else None


@functools.cache
def _check_of(op: str, kind: str) -> Callable[..., Any] | None:
    return getattr(_module(op, kind), f"{op}_cannot", None)


@functools.cache
def _module(op: str, kind: str) -> ModuleType:
    row = OPS[op]
    file = {"eager": "_eager", "cuda": "_cuda", "triton": f"_triton_{row.module or op}"}[kind]
    return importlib.import_module(f"{NAMESPACE}.{row.family}.{file}")


@functools.cache
def _function(op: str, kind: str) -> Callable[..., Any]:
    return getattr(_module(op, kind), op)


@functools.cache
def _host() -> ModuleType | str:
    """The native module, or why it is not here."""
    try:
        return importlib.import_module(f"{NAMESPACE}._host")
    except ImportError as error:
        return f"the native module is not built ({error}); see `dsv3 info`"


def _host_missing() -> str | None:
    host = _host()
    return host if isinstance(host, str) else None


def _host_kernels() -> tuple[str, ...]:
    host = _host()
    return () if isinstance(host, str) else tuple(host.kernels())


def _kernels_of(op: str) -> tuple[str, ...]:
    return _owned(op, _host_kernels())


def _triton_kernels_of(op: str) -> tuple[str, ...]:
    prefix = "triton_"
    names = [name.removeprefix(prefix) for name in vars(_module(op, "triton")) if name.startswith(prefix)]
    return tuple(prefix + name for name in _owned(op, names))


def _owned(op: str, kernels: Iterable[str]) -> tuple[str, ...]:
    """A kernel is of the longest op name that begins its own; an op without any launches those of its module's op."""
    owners: dict[str, list[str]] = {}
    for kernel in kernels:
        if owner := max((name for name in OPS if f"{kernel}_".startswith(f"{name}_")), key=len, default=""):
            owners.setdefault(owner, []).append(kernel)
    return tuple(owners.get(op) or owners.get(OPS[op].module) or ())


@functools.cache
def _triton_missing() -> str | None:
    with contextlib.suppress(ImportError):  # an import hook may refuse the name
        if importlib.util.find_spec("triton") is not None:
            return None
    return "triton is not installed"


@functools.cache
def _capability(device: Any) -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability(device)


def _device_of(args: tuple[Any, ...]) -> Any:
    import torch

    for value in args:
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    return torch.device("cpu")


def _known(function: str, op: str) -> None:
    if op not in OPS:
        raise ValueError(f"{function}: op: got {op!r}, wanted one of {', '.join(OPS)}")
