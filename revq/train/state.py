"""The state of a training run: where it stands, its checkpoint file, and the random numbers that a resumed run repeats."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revq.data.atomic import atomic_file
from revq.errors import InputError
from revq.eval.evaluate import CodeUse, LatentErrors

_KEYS = ("about", "epoch", "cursor", "step", "sums", "last", "errors", "model", "optimizer")


@dataclass
class RunState:
    """How far a run has come.  The model's and the optimizer's own states are saved beside it."""

    epoch: int = 0
    """Epochs that are complete."""
    cursor: int = 0
    """Optimizer steps done in the current epoch."""
    step: int = 0
    """Optimizer steps of the whole run."""
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """float64 ``[2]``: sums of the quantizer and of the rectifier loss over the current epoch."""
    last: CodeUse | None = None
    """Code use in the last complete epoch."""
    errors: LatentErrors | None = None
    """Validation errors after the last complete epoch; None without a validation store."""

    def save(self, path: str | Path, about: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint of a run that ``about`` identifies, atomically."""
        values = (
            about,
            self.epoch,
            self.cursor,
            self.step,
            self.sums,
            self.last and [*self.last],
            self.errors and [*self.errors],
            model.state_dict(),
            optimizer.state_dict(),
        )
        save_checkpoint(path, dict(zip(_KEYS, values, strict=True)))

    @classmethod
    def load(cls, path: str | Path, about: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "RunState":
        """Read a checkpoint that `save` wrote; the model and the optimizer take their states from it.

        Raises:
            InputError: if the file is missing, damaged, or of a run that ``about`` does not identify.
        """
        state = load_checkpoint(path)
        missing = set(_KEYS) - state.keys()
        if missing:
            raise InputError(f"{path}: not a training checkpoint, it lacks {', '.join(sorted(missing))}")
        if state["about"] != about:
            raise InputError(
                f"{path}: is of a run with another configuration or other latents; give another output folder"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        last = CodeUse(*state["last"]) if state["last"] else None
        errors = LatentErrors(*state["errors"]) if state["errors"] else None
        return cls(state["epoch"], state["cursor"], state["step"], state["sums"], last, errors)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists and dicts of them) in one step: a killed run leaves a whole file."""
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
    except Exception as error:  # torch raises many unrelated types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: damaged or not a checkpoint: {reason[:120]}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected the dictionary of a checkpoint, got {type(state).__name__}")
    return state


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed below 2**56 for one purpose in one epoch, independent of all others: a resumed run draws the same numbers.

    A hash, because seed + epoch would give (seed 1, epoch 2) and (seed 2, epoch 1) the same numbers.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()[:7], "little")


def generator(seed: int, epoch: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on ``device``, seeded by `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, epoch, purpose))
