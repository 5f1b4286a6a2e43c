"""Checks that every patched quantizer must pass: one patched module against the unmodified original."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import revq
from revq_kernels.interop.choices import Choices
from revq_kernels.interop.families.family import Call
from revq_kernels.interop.verify import (
    Doubles,
    compare,
    doubled_call,
    in_double,
    named_tensors,
    plain_copy,
    run,
    with_defined_buffers,
)

Inputs = Callable[[int], tuple[Any, ...]]


def check_quantizer(build: Callable[[], nn.Module], inputs: Inputs, *, method: str = "forward", steps: int = 20) -> int:
    """All checks below for one module; ``inputs(seed)`` gives the arguments of ``method``.

    Returns how many indices of the original, over all runs, float64 calls wrong (and ours does not share).
    """
    module = build()
    corrected = sum(
        check_call(module, Call(method, inputs(seed)), training=training, autocast=autocast)
        for seed, (training, autocast) in enumerate([(False, False), (True, False), (False, True), (True, True)])
    )
    if steps:
        check_training(module, method, inputs, steps)
    check_state(build, Call(method, inputs(5)))
    return corrected


def check_call(module: nn.Module, call: Call, *, training: bool, autocast: bool = False) -> int:
    """Compare outputs, losses, indices, gradients and buffers of one call with the original's and its float64 run."""
    module = with_defined_buffers(module)
    original, fast, exact = (plain_copy(module).train(training) for _ in range(3))
    choices = Choices()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(original, call)
        with patched(fast):
            found = run(fast, call, choices)
    with Doubles():
        truth = run(in_double(exact), doubled_call(call), Choices(choices.taken))
    corrected = 0
    for part in ("result", "gradients", "state"):
        ours, theirs, right = getattr(found, part), getattr(expected, part), getattr(truth, part)
        reason = compare(ours, theirs, right)
        assert reason is None, f"training={training}, autocast={autocast}, {part}: {reason}"
        whole = [name for name, value in ours.items() if not value.is_floating_point()]
        corrected += sum(int(((theirs[name] != right[name]) & (ours[name] == right[name])).sum()) for name in whole)
    return corrected


def check_training(module: nn.Module, method: str, inputs: Inputs, steps: int, lr: float = 0.1) -> None:
    """Compare parameters and buffers after some steps of SGD."""
    runs = []
    calls = [
        Call(method, inputs(100 + step)) for step in range(steps)
    ]  # outside `Doubles`, where randn draws other values
    for wrap, patch in ((plain_copy, False), (plain_copy, True), (in_double, False)):
        copied = wrap(module).train()
        parameters = list(copied.parameters())
        optimizer = torch.optim.SGD(parameters, lr=lr) if parameters else None
        with patched(copied) if patch else Doubles() if wrap is in_double else torch.enable_grad():
            for call in calls:
                run(copied, doubled_call(call) if wrap is in_double else call)  # the parameters keep the gradients
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
        runs.append(dict(copied.state_dict()))
    original, fast, truth = runs
    assert compare(fast, original, truth) is None, compare(fast, original, truth)
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, original[name])]
    assert moved or not list(module.buffers()) + list(module.parameters()), "twenty steps changed nothing"


def check_state(build: Callable[[], nn.Module], call: Call) -> None:
    """The state keeps its names and values, `like` shares its tensors, and `unpatch` restores the original bit for bit."""
    module = build().eval()
    before, state, kind, held = run(module, call), copy.deepcopy(module.state_dict()), type(module), set(vars(module))
    copied = revq.like(module)
    assert type(module) is kind and list(copied.state_dict()) == list(state)
    for (name, mine), (_, theirs) in zip(named_state(copied), named_state(module), strict=True):
        assert mine is theirs, f"{name} is not shared"

    report = revq.patch(module, verbose=False)
    assert report.entries and all(entry.patched for entry in report.entries), report
    assert isinstance(module, kind) and list(module.state_dict()) == list(state)
    fresh = build().eval()
    fresh.load_state_dict(module.state_dict())
    module.load_state_dict(fresh.state_dict())
    revq.unpatch(module)
    assert type(module) is kind and set(vars(module)) == held
    assert all(type(part).__dict__.get("revq_original") is None for part in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    after = run(module, call)
    for old, new in zip(before[:3], after[:3], strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def check_memory(module: nn.Module, call: Call, pairs: int) -> None:
    """The patched module creates no tensor of ``pairs`` = N x K elements or more, forward or backward."""
    for training in (False, True):
        original, fast = (plain_copy(module).train(training) for _ in range(2))
        assert largest_tensor(original, call) >= pairs, "the original makes no matrix: this test proves nothing"
        with patched(fast):
            assert largest_tensor(fast, call) < pairs


def largest_tensor(module: nn.Module, call: Call) -> int:
    """Elements of the largest tensor that an operator creates in a call and its backward pass."""
    with _Largest() as largest:
        run(module, call)
    return largest.numbers


def graph_breaks(module: nn.Module, call: Call) -> int:
    """The number of graph breaks of torch.compile in a call."""
    torch._dynamo.reset()
    return torch._dynamo.explain(getattr(module, call.method))(*call.args, **call.kwargs).graph_break_count


def patched(module: nn.Module, verify: bool = False) -> Any:
    """A block in which every quantizer in ``module`` is patched; `check_state` and some tests have the check run, too."""
    report = revq.patch(module, verify=verify, verbose=False)
    assert report.entries and all(entry.patched for entry in report.entries), report
    return report


def named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers (not copies) by name."""
    return [*module.named_parameters(), *module.named_buffers()]


class _Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        ]
        self.numbers = max([self.numbers, *made])
        return result


__all__ = ["Call", "check_call", "check_memory", "check_quantizer", "graph_breaks", "named_tensors", "patched"]
