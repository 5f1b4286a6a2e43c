"""One file that holds a whole training state; it is replaced in one step, so a killed run always finds a whole one."""

from pathlib import Path
from typing import Any

import torch

from revq.data.atomic import atomic_file
from revq.errors import InputError


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists and dicts of them) atomically."""
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU; never runs code from the file.

    Raises:
        InputError: if the file is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: damaged or not a checkpoint: {reason[:120]}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected the dictionary of a checkpoint, got {type(state).__name__}")
    return state
