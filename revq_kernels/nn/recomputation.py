"""Activation checkpointing: what runs again in a backward pass changes no state and sees the codes of its first run.

Under `torch.compile` both are operators, which decide when the graph runs: a compiled module may be called inside a
checkpoint, and nothing in its trace could tell.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from revq_kernels.nn.processes import lowest_of_processes, sum_over_processes

CALLS = 16
"""Calls between a forward pass and its backward pass whose codes are kept."""

RUNS_IN_PYTHON = (torch.Tag.cudagraph_unsafe,)
"""A replayed CUDA graph would ask no questions."""

_numbers = count()
_memories: "WeakValueDictionary[int, CodeMemory]" = WeakValueDictionary()


def recomputing() -> bool:
    """Whether this code runs inside a backward pass, where checkpoints run a forward pass again; False in a trace."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def updates_apply(like: Tensor) -> Tensor | None:
    """bool scalar on ``like``'s device for a compiled graph: not `recomputing`; None where the caller asks in Python."""
    return torch.ops.revq.updates_apply(like) if torch.compiler.is_compiling() else None


def apart() -> AbstractContextManager[Any]:
    """A block that selective checkpoints do not see: they expect equal operators in the first and the second run."""
    if torch.compiler.is_compiling():
        return nullcontext()
    modes = (_CachedTorchDispatchMode, _CachingTorchDispatchMode)
    selective = any(isinstance(mode, modes) for mode in _get_current_dispatch_mode_stack())
    return _disable_current_modes() if selective else nullcontext()


class _Call(NamedTuple):
    shape: torch.Size
    fingerprint: Tensor
    codes: Tensor
    recalled: list[bool]


class CodeMemory:
    """The codes that training calls searched, for their recomputation: by then, averages and replacements moved them.

    A recomputation has the queries of its call, up to rounding, so it gets the codes of the call whose queries are
    nearest.  A call's codes are dropped by the next call after its recomputation, at the latest after `CALLS` others.
    A copy has no memory.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        self.handle = torch.tensor(number, dtype=torch.int64, device="cpu")
        """The memory for an operator, which takes no objects.  An int would make a compiler compile each quantizer again."""
        self.calls: deque[_Call] = deque(maxlen=CALLS)
        self.traced = False
        _memories[number] = self

    def __reduce__(self) -> Any:
        return CodeMemory, ()

    def needed(self) -> bool:
        """Whether this call may be run again, or is: it saves no tensors, or a checkpoint packs the saved ones."""
        if recomputing() or not torch.is_grad_enabled():
            return True
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def codes_of_call(self, queries: Tensor, codes: Tensor) -> Tensor:
        """Codes ``[G, K, d]`` to search for queries ``[N, G, d]``: a copy of those given, or, if run again, of the first run's.

        Raises:
            RuntimeError: if a recomputation comes too late.
        """
        if torch.compiler.is_compiling():
            # A compiler that traces a whole checkpoint would save the codes, which the next call moves.  It does not trace
            # one with a side effect such as this, but compiles what is inside and runs the checkpoint as it is.
            self.traced = True
            return torch.ops.revq.codes_of_call(queries, codes, self.handle)
        with apart():
            return self.recall(queries) if recomputing() else self.remember(queries, codes)

    def remember(self, queries: Tensor, codes: Tensor) -> Tensor:
        """A copy of the codes of a first run."""
        kept = [call for call in self.calls if not call.recalled]
        self.calls.clear()
        self.calls.extend(kept)
        self.calls.append(_Call(queries.shape, _fingerprint(queries), codes.clone(), []))
        return codes.clone()

    def recall(self, queries: Tensor) -> Tensor:
        """A copy of the codes of the call with these queries.  Of equal ones, the last comes first, as in a backward pass."""
        calls = [call for call in reversed(self.calls) if call.shape == queries.shape]
        if not calls:
            raise RuntimeError(
                f"recomputation: expected one of the last {CALLS} training calls, whose codes are kept, got an earlier one"
            )
        calls.sort(key=lambda call: len(call.recalled))  # stable
        if len(calls) > 1:
            own = _fingerprint(queries)
            distances = torch.stack([(call.fingerprint - own).abs().sum() for call in calls])
            call = calls[int(distances.nan_to_num(nan=0.0).argmin())]
        else:
            call = calls[0]
        call.recalled.append(True)
        return call.codes.clone()


def _fingerprint(queries: Tensor) -> Tensor:
    """float32 ``[G, d]`` that differs for other queries and for another order of them."""
    ramp = torch.linspace(0.5, 1.5, queries.shape[0], dtype=torch.float32, device=queries.device)
    return (ramp[:, None, None] * queries.detach().float().nan_to_num(0.0, 1.0, -1.0)).sum(dim=0)


@torch.library.custom_op("revq::updates_apply", mutates_args=(), tags=RUNS_IN_PYTHON)
def _updates_apply(like: Tensor) -> Tensor:
    return torch.full((), not recomputing(), dtype=torch.bool, device=like.device)


@_updates_apply.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


@torch.library.custom_op("revq::codes_of_call", mutates_args=(), tags=RUNS_IN_PYTHON)
def _codes_of_call(queries: Tensor, codes: Tensor, handle: Tensor) -> Tensor:
    return _memories[int(handle)].codes_of_call(queries, codes)


@_codes_of_call.register_fake
def _(queries: Tensor, codes: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(codes, memory_format=torch.contiguous_format)


@torch.library.custom_op("revq::sum_over_processes", mutates_args=(), tags=RUNS_IN_PYTHON)
def _sum_over_processes(tensor: Tensor, group: str) -> Tensor:
    return tensor.clone() if recomputing() else sum_over_processes(tensor, group)


@_sum_over_processes.register_fake
def _(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("revq::lowest_of_processes", mutates_args=(), tags=RUNS_IN_PYTHON)
def _lowest_of_processes(tickets: Tensor, rows: Tensor, group: str) -> tuple[Tensor, Tensor]:
    found = (tickets, rows) if recomputing() else lowest_of_processes(tickets, rows, group)
    return found[0].clone(), found[1].clone()


@_lowest_of_processes.register_fake
def _(tickets: Tensor, rows: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tickets), torch.empty_like(rows)
