"""Whether a replacement does what it replaces: both, and the original in float64, run on copies with one random batch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revq_kernels.interop.doubles import Doubles, doubled, in_double, plain_copy
from revq_kernels.interop.family import Call, Vectors

_FACTOR, _ROUNDINGS = 2.0, 64
"""A float may be this many times as far from the float64 run as the original's, or this many roundings of the largest."""


class Run(NamedTuple):
    """What a call gave: its result, the gradients of its arguments and parameters, parameters and buffers after it."""

    result: dict[str, Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def difference(module: nn.Module, fast: nn.Module, calls: Callable[[nn.Module, Vectors], list[Call]]) -> str | None:
    """Where ``fast`` departs from ``module`` in evaluation or training mode: None, or what and by how much.

    Integers (indices) must be those of the original, or of the original run in float64 where that corrects it.  Floats
    (outputs, losses, gradients, state after the call) may be twice as far from the float64 run as the original's own,
    or 64 roundings.  Neither module is changed, nor the state of torch's random numbers.
    """
    kind = _device(module).type
    # float64 has the answer to what is asked in float32; and what is made in inference mode takes no gradient
    with torch.autocast(kind, enabled=False), torch.inference_mode(False):
        return _difference(module, fast, calls)


def _difference(module: nn.Module, fast: nn.Module, calls: Callable[[nn.Module, Vectors], list[Call]]) -> str | None:
    for training in (False, True):
        for call in calls(module, Vectors()):
            original = run(plain_copy(module).train(training), call)
            with Doubles():
                truth = run(in_double(module).train(training), doubled_call(call))
            found = run(plain_copy(fast).train(training), call)
            for part in Run._fields:
                reason = compare(getattr(found, part), getattr(original, part), getattr(truth, part))
                if reason is not None:
                    return f"{call.method} in {'training' if training else 'evaluation'} mode, {part}: {reason}"
    return None


def run(module: nn.Module, call: Call) -> Run:
    """Call ``module`` itself, with gradients of a fixed projection of everything it returns, under a fixed random state."""
    args, kwargs = _leaves(call.args), _leaves(call.kwargs)
    with _seeded(_device(module)), torch.inference_mode(False), torch.enable_grad():
        result = dict(named_tensors(getattr(module, call.method)(*args, **kwargs)))
        total = sum(
            (_projection(value) for value in result.values() if value.requires_grad), torch.zeros((), device="cpu")
        )
        if total.requires_grad:
            total.backward()
    leaves = [*named_tensors((args, kwargs), "arguments"), *module.named_parameters()]
    gradients = {name: leaf.grad for name, leaf in leaves if leaf.grad is not None}
    state = {name: value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}
    return Run({name: value.detach() for name, value in result.items()}, gradients, state)


def compare(found: dict[str, Tensor], original: dict[str, Tensor], truth: dict[str, Tensor]) -> str | None:
    """Why ``found`` is no stand-in for ``original``, given the same in float64; None if it is."""
    if found.keys() != original.keys():
        return f"it gives {sorted(found)}, the original {sorted(original)}"
    for name, value in sorted(
        found.items(), key=lambda item: item[1].is_floating_point()
    ):  # indices say more than floats
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
    """The largest error of ``value`` against ``exact``, and the largest that the original's own error allows."""
    if not value.numel():
        return torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    same = (value == exact) | (value.isnan() & exact.isnan())  # equal infinities differ by NaN
    error = torch.where(same, 0, (value.double() - exact).abs()).max()
    own = torch.where(original == exact, 0, (original.double() - exact).abs()).nan_to_num(0.0).max()
    rounding = torch.finfo(value.dtype).eps * exact.abs().nan_to_num(0.0, 0.0, 0.0).max()
    return error, torch.maximum(_FACTOR * own, _ROUNDINGS * rounding)


def doubled_call(call: Call) -> Call:
    """The call with float64 arguments."""
    return dataclasses.replace(call, args=doubled(call.args), kwargs=doubled(call.kwargs))


def named_tensors(value: Any, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists, dicts and dataclasses, with where they stand."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value) or isinstance(value, dict):
        items = value.items() if isinstance(value, dict) else vars(value).items()
        for key, item in items:
            yield from named_tensors(item, f"{name}.{key}")
    elif isinstance(value, tuple | list):
        for position, item in enumerate(value):
            yield from named_tensors(item, f"{name}[{position}]")


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """A fixed random state on the CPU and ``device``, the old one afterwards; ``torch.manual_seed`` would seed every card."""
    cards = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(0)
        for card in cards:
            torch.cuda.default_generators[card].manual_seed(0)
        yield


def _leaves(values: Any) -> Any:
    """``values`` with floating tensors as new leaves that take gradients."""

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        return tensor.requires_grad_(tensor.is_floating_point())

    return torch.utils._pytree.tree_map_only(Tensor, leaf, values)


def _projection(value: Tensor) -> Tensor:
    """A sum with weights that tell places apart."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64, device=value.device).view(value.shape)
    return (value.double() * weights).sum().cpu()
