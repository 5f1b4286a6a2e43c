"""Checks a replacement against the original: both run on one random batch, and a float64 run of the original decides."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from revq_kernels.interop.choices import Choices
from revq_kernels.interop.facts import attributes, described, kept_surroundings, leaves
from revq_kernels.interop.families.family import Call, Family, Vectors

_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_FACTOR, _ROUNDINGS = 2.0, 64
"""A float may be off from the float64 run by this multiple of the original's error, or this many roundings of the largest."""


_EVALUATION, _TRAINING = (2, 1, 0), (2, 1, 0, 3)
"""Sizes of the batch in consecutive calls; 0 is a large one.  The calls of a mode change one module, as a training run does.
The last call of an evaluation runs without gradients, as inference does."""

_LARGE, _PAIRS = 64, 1 << 24
"""The large batch, and the limit on its elements times codes, which the original may hold at a time in float64."""


class Run(NamedTuple):
    """The outcome of a call: its result, the gradients of its arguments and parameters, the module's tensors after it.

    ``facts`` are everything else: the structure of the result, the module's attributes, changes outside of the module.
    """

    result: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    facts: dict[str, Any]


def difference(module: nn.Module, fast: nn.Module, family: Family) -> str | None:
    """Where ``fast`` differs from ``module`` in evaluation or training mode: None, or what and by how much.

    Both modes run several calls of several sizes on one module.  Integers (indices) must be those of the original, or those
    of its float64 run where that corrects the original.  Floats (outputs, losses, gradients, state after the call) may be off
    from the float64 run by twice the original's error, or by 64 roundings.  Where two codes are equally near up to rounding,
    the float64 run takes the replacement's (see `revq_kernels.interop.choices`).  Structure, types, attributes and changes
    outside of the module must be equal.  A codebook that k-means has not initialized is checked as if it had, and k-means
    itself by one call with one iteration.  Neither the modules nor the state of random numbers change.
    """
    kind = _device(module).type
    # Under autocast the runs would not be float32 and float64; tensors made in inference mode take no gradient
    with torch.autocast(kind, enabled=False), torch.inference_mode(False):
        module, fast = with_defined_buffers(module), with_defined_buffers(fast)
        started = family.started
        if not started or bool(getattr(module, started)):
            return _difference(module, fast, family, ((False, _EVALUATION), (True, _TRAINING)))
        reason = _difference(_of_one_iteration(module), _of_one_iteration(fast), family, ((True, (2,)),))
        ready, fast_ready = (_initialized(each, started) for each in (module, fast))
        return reason or _difference(ready, fast_ready, family, ((False, _EVALUATION), (True, _TRAINING)))


def _difference(module: nn.Module, fast: nn.Module, family: Family, modes: tuple) -> str | None:
    for training, sizes in modes:
        original, quick = (plain_copy(each).train(training) for each in (module, fast))
        exact = in_double(module).train(training)
        for step, size in enumerate(sizes):
            for call in family.calls(module, Vectors(step, size or _large_batch(module))):
                for each in (original, quick, exact):
                    each.zero_grad(set_to_none=True)
                choices, own, grad = Choices(), Choices(), training or step + 1 < len(sizes)
                found, expected = run(quick, call, choices, grad=grad), run(original, call, own, grad=grad)
                with Doubles():
                    truth = run(exact, doubled_call(call), Choices(choices.taken, own.taken), grad=grad)
                reason = disagreement(found, expected, truth)
                if reason is not None:
                    when = "" if step == 0 else f", call {step + 1}"
                    return f"{call.method} in {'training' if training else 'evaluation'} mode{when}, {reason}"
    return None


def with_defined_buffers(module: nn.Module) -> nn.Module:
    """``module``, or a copy with values in the buffers that its first training step will initialize.

    Until then such a buffer holds whatever was in its memory, which may be infinite or NaN.  What says that a buffer awaits
    that step is another one, called ``<name>_needs_init`` (vector-quantize-pytorch's affine parameters).
    """
    suffix = "_needs_init"
    waiting = [
        name.removesuffix(suffix) for name, flag in module.named_buffers() if name.endswith(suffix) and bool(flag)
    ]
    if not waiting:
        return module
    copied = plain_copy(module)
    buffers = dict(copied.named_buffers())
    for name in waiting:
        if name in buffers:
            buffers[name].data.fill_(1)
    return copied


def _large_batch(module: nn.Module) -> int:
    codes = max(
        (tensor.numel() // tensor.shape[-1] for tensor in module.state_dict().values() if tensor.dim() > 1), default=1
    )
    return max(4, min(_LARGE, _PAIRS // (64 * codes)))


def _of_one_iteration(module: nn.Module) -> nn.Module:
    copied: Any = plain_copy(module)
    copied.kmeans_iters = min(1, copied.kmeans_iters)
    return copied


def _initialized(module: nn.Module, started: str) -> nn.Module:
    """A copy with the codebook of a k-means that has run: random codes, each of which one vector selected."""
    copied: Any = plain_copy(module)
    with torch.no_grad():
        codes = Vectors()(torch.zeros_like(copied.embed), *copied.embed.shape)
        if getattr(copied, "use_cosine_sim", False):
            codes = torch.nn.functional.normalize(codes, dim=-1)
        copied.embed.copy_(codes)
        copied.embed_avg.copy_(codes)
        copied.cluster_size.fill_(1)
        getattr(copied, started).fill_(True)
    return copied


def disagreement(found: Run, original: Run, truth: Run) -> str | None:
    """What differs between two runs, and the part of the outcome in which it does; None if nothing differs."""
    # Facts last: a wrong number of the result explains more than an attribute that follows from it
    for part in ("result", "gradients", "state"):
        reason = compare(getattr(found, part), getattr(original, part), getattr(truth, part))
        if reason is not None:
            return f"{part}: {reason}"
    return compare_facts(found.facts, original.facts, truth.facts)


def compare_facts(found: dict[str, Any], original: dict[str, Any], truth: dict[str, Any]) -> str | None:
    """The first fact that differs; a number that depends on rounding may be that of the float64 run."""
    for name in [*original, *(name for name in found if name not in original)]:
        ours, theirs, right = (each.get(name, "missing") for each in (found, original, truth))
        if ours in (theirs, right):
            continue
        if all(isinstance(value, float) for value in (ours, theirs, right)):
            values = [torch.tensor(value, device="cpu", dtype=torch.float64) for value in (ours, theirs, right)]
            error, allowed = errors(values[0].float(), values[1].float(), values[2])
            if (theirs != right and error <= allowed) or (values[0].isnan() and values[1].isnan()):
                continue
        return f"{name} is {ours}, the original's {theirs}"
    return None


def run(module: nn.Module, call: Call, choices: Choices | None = None, *, grad: bool = True) -> Run:
    """Call ``module`` (not a copy) with a fixed random state, and take the gradients of a weighted sum of all results.

    ``choices`` records the searches of the call.  What the call changes outside of the module is restored.  Without ``grad``
    the call runs as under `torch.no_grad`, and there are no gradients.
    """
    args, kwargs = _leaves(call.args, grad), _leaves(call.kwargs, grad)
    with (
        _seeded(_device(module)),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        kept_surroundings(module) as changes,
    ):
        with choices if choices is not None else contextlib.nullcontext():
            value = getattr(module, call.method)(*args, **kwargs)
        facts = changes()
        result = dict(named_tensors(value))
        facts |= {name: described(leaf) for name, leaf in leaves(value, "result")}
        total = sum(
            (_weighted_sum(value) for value in result.values() if value.requires_grad), torch.zeros((), device="cpu")
        )
        if total.requires_grad:
            total.backward()
    inputs = [*named_tensors((args, kwargs), "arguments"), *module.named_parameters()]
    gradients = {name: leaf.grad for name, leaf in inputs if leaf.grad is not None}
    held = [*module.named_parameters(), *module.named_buffers(), *attributes(module)]
    facts |= {name: described(leaf) for name, leaf in held}
    state = {name: value.detach() for name, value in held if isinstance(value, Tensor)}
    return Run({name: value.detach() for name, value in result.items()}, gradients, state, facts)


def compare(found: dict[str, Tensor], original: dict[str, Tensor], truth: dict[str, Tensor]) -> str | None:
    """Why ``found`` cannot replace ``original``, given the float64 results ``truth``; None if it can."""
    if found.keys() != original.keys():
        return f"it gives {sorted(found)}, the original {sorted(original)}"
    # Integers first: a wrong index explains more than the wrong floats that follow from it
    for name, value in sorted(found.items(), key=lambda item: item[1].is_floating_point()):
        expected, exact = original[name], truth[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            got, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (value, expected))
            return f"{name} is {got}, the original's {wanted}"
        if not value.is_floating_point():
            wrong = int(((value != expected) & (value != exact)).sum())
            if wrong:
                return f"{name}: {wrong} of {value.numel()} differ"
            continue
        error, allowed = (float(e) for e in errors(value, expected, exact))
        if not error <= allowed:
            return f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
    return None


def errors(value: Tensor, original: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The largest error of ``value`` against ``exact``, and the largest error that is allowed, given the original's."""
    if not value.numel():
        return torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    same = (value == exact) | (value.isnan() & exact.isnan())  # the difference of equal infinities is NaN
    same |= ~value.isfinite() & ~original.isfinite()  # where float64 still has a number, the original has none
    error = torch.where(same, 0, (value.double() - exact).abs()).max()
    own = torch.where(original == exact, 0, (original.double() - exact).abs()).nan_to_num(0.0).max()
    rounding = torch.finfo(value.dtype).eps * exact.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return error, torch.maximum(_FACTOR * own, _ROUNDINGS * rounding)


def named_tensors(value: Any, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers and objects, each with its path."""
    for path, leaf in leaves(value, name):
        if isinstance(leaf, Tensor):
            yield path, leaf


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in which neither buffers nor computed attributes (the weight of ``weight_norm``) take gradients.

    torch does not copy a computed tensor, and a buffer that takes a gradient cannot be changed in place.
    """
    attributes = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    graded = [tensor for tensor in module.buffers() if tensor.requires_grad]
    graded += [tensor for tensor in attributes if not tensor.is_leaf]
    return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in graded})


def in_double(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with float64 parameters and buffers, to be called inside `Doubles`."""
    wide = plain_copy(module).double()
    for part in wide.modules():  # tensors that are neither parameters nor buffers, such as a cached codebook
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.dtype in _NARROW:
                setattr(part, name, value.double())
    return wide


def doubled_call(call: Call) -> Call:
    """The call with float64 arguments in place of narrower floats."""
    return dataclasses.replace(call, args=_doubled(call.args), kwargs=_doubled(call.kwargs))


class Doubles(TorchFunctionMode):
    """Within the block, code that converts to float32 or a narrower dtype converts to float64, which is also the default.

    So a module with float64 parameters (`in_double`) computes in float64 throughout.
    """

    def __enter__(self) -> "Doubles":
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args = tuple(_wide(value) for value in args)
        return func(*args, **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _doubled(values: Any) -> Any:
    def double(tensor: Tensor) -> Tensor:
        if tensor.dtype not in _NARROW:
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, double, values)


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """A fixed random state on the CPU and ``device``, restored afterwards; ``torch.manual_seed`` would seed every GPU."""
    cards = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(0)
        for card in cards:
            torch.cuda.default_generators[card].manual_seed(0)
        yield


def _leaves(values: Any, grad: bool) -> Any:
    """``values`` with floating-point tensors as new leaves, which take gradients if ``grad``."""

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        return tensor.requires_grad_(grad and tensor.is_floating_point())

    return tree_map_only(Tensor, leaf, values)


def _weighted_sum(value: Tensor) -> Tensor:
    """A sum whose weights depend on the position, so that exchanged elements change it."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64, device=value.device).view(value.shape)
    return (value.double() * weights).sum().cpu()
