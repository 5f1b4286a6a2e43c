"""`Processes`: what several processes of one training exchange, so that their codes stay equal bit for bit."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NOT_DRAWN = 2.0
"""A ticket behind every drawn one, which are in [0, 1): there is no row."""


class Processes:
    """The processes whose statistics are summed, as `torch.nn.SyncBatchNorm` names them.

    Every method is a collective call: each process of the group must make it, and all get equal bits.  With one process,
    without torch.distributed, and for None, a method returns what it was given.  A copy shares the group.

    Args:
        group: "auto", the default group, if torch.distributed is initialized when a method is called; None, no exchange;
            or a group of `torch.distributed.new_group` that this process is in.

    Raises:
        ValueError: for anything else.
    """

    def __init__(self, group: Any = "auto") -> None:
        is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
        if not (group is None or is_group or (isinstance(group, str) and group == "auto")):
            raise ValueError(f"process_group: expected 'auto', None or a group that this process is in, got {group!r}")
        self.group = group
        self.name = group.group_name if is_group else group
        """The group for an operator, which takes no objects: None, "auto" or the name that torch gave it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return self

    def __reduce__(self) -> Any:
        if self.group not in (None, "auto"):
            raise TypeError("process_group: expected 'auto' or None in a quantizer that is pickled, got a group")
        return Processes, (self.group,)

    def several(self) -> bool:
        """Whether there is another process; a compiled graph asks when it runs, so for a trace there may always be."""
        return self.name is not None and (torch.compiler.is_compiling() or _active(self.group) is not None)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of float32 tensors of one shape."""
        if self.name is None:
            return tensor
        if torch.compiler.is_compiling():  # opaque: it must decide at run time whether this is a recomputation
            return torch.ops.revq.sum_over_processes(tensor, self.name)
        group = _active(self.group)
        if group is not None:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=group)
        return tensor

    def lowest(self, tickets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of all processes' tickets ``[G, K]``, in rising order, and rows float32 ``[G, K, d]``, the K lowest per group."""
        if self.name is None:
            return tickets, rows
        if torch.compiler.is_compiling():
            return torch.ops.revq.lowest_of_processes(tickets, rows, self.name)
        return _lowest(tickets, rows, _active(self.group))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows ``[N, ...]`` of all processes, in the order of their ranks; N may differ."""
        group = _active(self.group)
        if group is None:
            return rows
        lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=rows.device)
        lengths[dist.get_rank(group)] = rows.shape[0]
        dist.all_reduce(lengths, group=group)
        first = int(lengths[: dist.get_rank(group)].sum())
        total = rows.new_zeros(int(lengths.sum()), *rows.shape[1:])
        total[first : first + rows.shape[0]] = rows
        dist.all_reduce(total.view(torch.int32), group=group)  # as integers, whose sum with 0 keeps every bit
        return total

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the group's first process."""
        group = _active(self.group)
        if group is not None:
            dist.broadcast(tensor, group=group, group_src=0)


def _active(group: Any) -> Any:
    """The group to exchange with; None if there is no other process."""
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if isinstance(group, str) else group
    return group if dist.get_world_size(group) > 1 else None


def sum_over_processes(tensor: Tensor, group: str) -> Tensor:
    """`Processes.sum` for a group's name, without aliasing."""
    tensor = tensor.clone()
    found = _active(_resolved(group))
    if found is not None:
        dist.all_reduce(tensor, group=found)
    return tensor


def lowest_of_processes(tickets: Tensor, rows: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """`Processes.lowest` for a group's name."""
    return _lowest(tickets, rows, _active(_resolved(group)))


def _resolved(name: str) -> Any:
    """The group of a name in an operator's arguments."""
    return name if name == "auto" else dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _lowest(tickets: Tensor, rows: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Sums of what is zero in all processes but one, which any backend can do."""
    if group is None:
        return tickets, rows
    num_codes, processes, rank = tickets.shape[1], dist.get_world_size(group), dist.get_rank(group)
    every = tickets.new_zeros(tickets.shape[0], processes, num_codes)
    every[:, rank] = tickets
    dist.all_reduce(every, group=group)
    # Stable, so that equal tickets of processes with equal seeds are in one order everywhere.
    lowest, place = every.flatten(1).sort(dim=1, stable=True)
    place = place[:, :num_codes]
    own = (place // num_codes == rank)[..., None]
    chosen = torch.where(own, rows.gather(1, (place % num_codes)[..., None].expand_as(rows)), 0.0)
    dist.all_reduce(chosen, group=group)
    return lowest[:, :num_codes].contiguous(), chosen


def check_whole(codebook: Any) -> None:
    """Refuse a DTensor, by an attribute that others do not have: importing that class takes long.

    Raises:
        ValueError: for a codebook that is sharded.
    """
    if hasattr(codebook, "device_mesh"):
        raise ValueError(
            "codebook: expected a whole tensor, which an update or a reset can move, got a DTensor; with fully_shard, pass "
            "ignored_params={quantizer.codebook}"
        )
