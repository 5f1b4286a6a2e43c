"""The state of a training run: where it stands, its checkpoint file, and the random numbers that a resumed run repeats."""

import hashlib
import json
import os
import signal
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revq.config import RunConfig, to_dict
from revq.data.atomic import atomic_file
from revq.data.foreign import Failure, attempt
from revq.data.json_text import parse_json
from revq.errors import InputError
from revq.eval.evaluate import CodeUse, LatentErrors
from revq.interrupt import Interrupted
from revq.model.rectifier import refuse_earlier_rectifier

_KEYS = ("about", "epoch", "cursor", "step", "sums", "last", "errors", "model", "optimizer")
_BLOCK = 1 << 20  # bytes that are checked at a time


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
    """float64 ``[2]`` (float32 on a device without it): sums of the quantizer and of the rectifier loss over the epoch."""
    last: CodeUse | None = None
    """Code use in the last complete epoch."""
    errors: LatentErrors | None = None
    """Validation errors after the last complete epoch; None without a validation store."""
    saved: int | None = None
    """Step of the checkpoint on disk; None before the first."""
    planned: int | None = None
    """Epochs of the configuration in the loaded checkpoint, which may be fewer than this call's; None for a new run."""

    def save(self, path: str | Path, about: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint of a run that ``about`` (see `about_run`) identifies, atomically.

        Raises:
            InputError: if a weight, a statistic, a moment of the optimizer or a sum of losses is not finite.  Then
                nothing is written, and the checkpoint on disk stays.
        """
        broken = first_not_finite(
            [
                *model.state_dict().items(),
                *(
                    (f"{moment} of {name}", value)
                    for name, parameter in model.named_parameters()
                    for moment, value in optimizer.state.get(parameter, {}).items()
                ),
                ("the sum of the losses", self.sums),
            ]
        )
        if broken:
            raise InputError(self.diverged(broken, path))
        values = (
            about,
            self.epoch,
            self.cursor,
            self.step,
            self.sums.cpu().double(),
            self.last and [*self.last],
            self.errors and [*self.errors],
            model.state_dict(),
            optimizer.state_dict(),
        )
        before = _version(path)
        try:
            save_checkpoint(path, dict(zip(_KEYS, values, strict=True)))
        finally:
            if _version(path) != before:  # also if a signal came after the file was in its place
                self.saved = self.step

    def diverged(self, what: str, path: str | Path) -> str:
        """The message for a value that is not finite, which ``what`` names; it says what is left on disk."""
        left = f"{path} of step {self.saved} is kept" if self.saved is not None else "nothing was saved"
        return (
            f"learning_rate: training diverged in epoch {max(0, self.epoch - (not self.cursor))}, step {self.step}: {what}; "
            f"expected a smaller learning_rate, rectifier_weight_decay or reset_noise; {left}"
        )

    def resume(
        self,
        path: str | Path,
        about: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        overwrite: bool = False,
    ) -> bool:
        """Read a checkpoint that `save` wrote, if there is one; the model and the optimizer take their states from it.

        The configuration in it may differ from that of ``about`` in one thing: ``train.epochs`` may have become larger.

        Args:
            overwrite: ignore a damaged checkpoint and that of another run.

        Returns:
            Whether the run goes on from there; False starts a new one.

        Raises:
            InputError: if the file is damaged, or of another run; the message names what differs.
        """
        if not Path(path).exists():
            return False
        try:
            state = load_checkpoint(path)
            planned = _check_state(path, state, json.loads(about), model, optimizer)
        except InputError:
            if overwrite:
                return False
            raise
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.cursor, self.step, self.sums = (state[name] for name in ("epoch", "cursor", "step", "sums"))
        self.last = CodeUse(*state["last"]) if state["last"] else None
        self.errors = LatentErrors(*state["errors"]) if state["errors"] else None
        self.saved, self.planned = self.step, planned
        return True

    @contextmanager
    def says_what_is_saved(self, path: Path) -> Iterator[None]:
        """Within the block an interruption becomes an `Interrupted` that says what of the run is on disk."""
        try:
            yield
        except KeyboardInterrupt as error:
            saved = f"step {self.saved} is saved in {path}" if self.saved is not None else ""
            raise Interrupted(getattr(error, "number", signal.SIGINT), saved) from None


def _version(path: str | Path) -> tuple[int, int] | None:
    """Changes when a file is replaced; None if there is none."""
    return (Path(path).stat().st_ino, Path(path).stat().st_mtime_ns) if Path(path).exists() else None


def about_run(config: RunConfig, latents: str, validation: str | None) -> str:
    """What identifies a run, as a JSON text: its configuration and the fingerprints of its stores of latents."""
    return json.dumps([to_dict(config), latents, validation])


def read_about(state: dict[str, Any], path: str | Path) -> list[Any]:
    """The configuration (a dictionary) and the two fingerprints in a checkpoint.

    Raises:
        InputError: if the checkpoint holds something else there.
    """
    text = state.get("about")
    if not isinstance(text, str):
        raise InputError(f"{path}: not a training checkpoint, it does not say of which run it is")
    about = parse_json(f'{{"about": {text}}}'.encode(), path)["about"]
    if not isinstance(about, list) or len(about) != 3 or not isinstance(about[0], dict):
        raise InputError(f"{path}: not a training checkpoint, it does not say of which run it is")
    return about


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, with the value and its place; None if all are finite.

    Costs one pass over the values, without temporary tensors of their size, and one wait for the device per tensor.
    """
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    ends = [torch.stack(torch.aminmax(tensor.detach())).cpu() for _, tensor in named]
    for (name, tensor), pair in zip(named, ends, strict=True):
        if not bool(pair.isfinite().all()):
            place = (~tensor.detach().isfinite()).nonzero()[0].tolist()
            value = float(tensor.detach()[tuple(place)])
            return f"{name} is not finite ({value} at {place})"
    return None


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists and dicts of them) in one step: a killed run leaves a whole file.

    Raises:
        OSError: if the file cannot be written, such as on a full disk.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # `load_checkpoint` verifies them
    try:
        with atomic_file(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError as error:  # torch's writer hides the system's own error
        raise OSError(f"{path}: cannot write the checkpoint; is the disk full? ({str(error)[:120]})") from error
    finally:
        torch.serialization.set_crc32_options(checksums)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU; never runs code from the file.

    Every byte of the content is compared with the checksums in the file first, which `torch.load` does not do.

    Raises:
        InputError: if the file is missing, damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")

    def load() -> Any:
        _verify_checksums(path)
        return torch.load(path, map_location="cpu", weights_only=True)

    state = attempt(load)
    if isinstance(state, Failure):
        reason = str(state.error).strip().splitlines()[0] if str(state.error).strip() else type(state.error).__name__
        raise InputError(f"{path}: damaged or not a checkpoint: {reason[:120]}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected the dictionary of a checkpoint, got {type(state).__name__}")
    return state


def _verify_checksums(path: Path) -> None:
    """Compare every record of a torch file, a zip archive without compression, with its CRC-32.

    Raises:
        ValueError, or one of the errors of `zipfile`.
    """
    end = b"PK\x05\x06"  # starts the last 22 bytes of an archive
    with path.open("rb") as file:
        file.seek(-min(22, path.stat().st_size), os.SEEK_END)
        tail = file.read()
        if tail[:4] != end or tail[-2:] != bytes(2):
            raise ValueError("expected the end of a zip archive in the last 22 bytes")
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                    raise ValueError(f"expected records without compression, got another in {record.filename!r}")
                with archive.open(record) as content:
                    while content.read(_BLOCK):  # raises at a record's end if its checksum differs
                        pass


def _check_state(
    path: str | Path, state: dict[str, Any], about: list[Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Check that a checkpoint fits the run, the model and the optimizer; returns the epochs that it was planned for."""
    missing = set(_KEYS) - state.keys()
    if missing:
        raise InputError(f"{path}: not a training checkpoint, it lacks {', '.join(sorted(missing))}")
    old = read_about(state, path)
    planned = _check_same_run(path, old, about)
    _check_values(path, state, planned)
    train = old[0]["train"]
    earlier = train.get("reset_pairing") == "release" and "reset_first_epoch" not in train
    if earlier and train.get("reset") and state["epoch"] < about[0]["train"]["epochs"]:
        raise InputError(
            f"{path}: is of a run whose reset_pairing='release' paired other codes; commit 4d4a8f7 is the last that resumes it"
        )
    if isinstance(state["model"], dict):
        refuse_earlier_rectifier(state["model"], path)
    _check_tensors(f"{path}: model", state["model"], model.state_dict())
    _check_tensors(f"{path}: optimizer", *_moments(path, state["optimizer"], optimizer))
    return planned


def _check_same_run(path: str | Path, old: list[Any], new: list[Any]) -> int:
    """Check that a checkpoint's run is this call's, up to more epochs; returns the epochs that it was planned for."""
    # A field that the checkpoint lacks is newer than the checkpoint; its default is what the code did before.
    differing = dict(_differences(old[0], new[0], to_dict(RunConfig(""))))
    planned = new[0]["train"]["epochs"]
    if "train.epochs" in differing:
        earlier, now = differing["train.epochs"]
        if type(earlier) is int and 0 < earlier < now:
            planned = earlier
            del differing["train.epochs"]
    texts = [f"{name} {before!r} -> {now!r}" for name, (before, now) in differing.items()]
    texts += [
        f"other {what}"
        for what, a, b in zip(("latents", "validation latents"), old[1:], new[1:], strict=True)
        if a != b
    ]
    if texts:
        raise InputError(f"{path}: is of another run ({', '.join(texts)}); give another output folder, or overwrite it")
    return planned


def _differences(old: Any, new: Any, default: Any, name: str = "") -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Pairs (dotted name, (old, new)) of the values that differ in two nested dictionaries."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield name, (old, new)
        return
    for key in dict.fromkeys([*new, *old]):
        fallback = default.get(key, "unknown") if isinstance(default, dict) else "unknown"
        below = f"{name}.{key}" if name else key
        yield from _differences(old.get(key, fallback), new.get(key, "unknown"), fallback, below)


def _check_values(path: str | Path, state: dict[str, Any], planned: int) -> None:
    """Check the types and ranges of what is neither a model's nor an optimizer's state."""
    counts = [state[name] for name in ("epoch", "cursor", "step")]
    sums = state["sums"]
    whole = all(type(count) is int and count >= 0 for count in counts) and counts[0] <= planned
    whole = whole and isinstance(sums, Tensor) and sums.shape == (2,) and sums.dtype == torch.float64
    for name, length in (("last", len(CodeUse._fields)), ("errors", len(LatentErrors._fields))):
        values = state[name]
        fits = isinstance(values, list) and len(values) == length and all(type(value) is float for value in values)
        whole = whole and (fits or (values is None and (name == "errors" or counts[0] == 0)))
    if not whole:
        raise InputError(
            f"{path}: not a training checkpoint, its epoch, step, losses or measures are not numbers that fit"
        )


def _moments(path: str | Path, state: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors in an optimizer's state dictionary, and the parameters that they must fit, by the same names."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = optimizer.state_dict()["param_groups"]
    try:
        groups = [group["params"] for group in state["param_groups"]]
        moments = state["state"]
        found = {
            f"{moment} {number}": moments[number][moment] for number in moments for moment in ("exp_avg", "exp_avg_sq")
        }
        steps = all(moments[number]["step"].numel() == 1 for number in moments)
        keys = all(group.keys() <= mine.keys() for group, mine in zip(state["param_groups"], own, strict=True))
    except (KeyError, TypeError, AttributeError, ValueError):
        groups, found, steps, keys = [], {}, False, False
    if not (steps and keys) or groups != [group["params"] for group in own]:
        raise InputError(f"{path}: not a training checkpoint, its optimizer's state has another form")
    expected = {
        f"{moment} {number}": parameter
        for number, parameter in enumerate(parameters)
        for moment in ("exp_avg", "exp_avg_sq")
        if number in moments  # a parameter without a gradient has none
    }
    return found, expected


def _check_tensors(label: str, found: Any, expected: dict[str, Tensor]) -> None:
    """Check that ``found`` holds tensors of the names, shapes and dtypes of ``expected``."""
    if not isinstance(found, dict) or found.keys() != expected.keys():
        raise InputError(f"{label}: expected the state of this configuration's {label.rpartition(' ')[2]}, got another")
    for name, tensor in expected.items():
        got = found[name]
        if not isinstance(got, Tensor) or (got.shape, got.dtype) != (tensor.shape, tensor.dtype):
            raise InputError(f"{label}: expected {name} of shape {list(tensor.shape)}, got something else")


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed below 2**56 for one purpose in one epoch, independent of all others: a resumed run draws the same numbers.

    A hash, because seed + epoch would give (seed 1, epoch 2) and (seed 2, epoch 1) the same numbers.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()[:7], "little")


def generator(seed: int, epoch: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on ``device``, seeded by `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, epoch, purpose))
