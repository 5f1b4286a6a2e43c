"""A ReVQ model on disk: config.json and model.safetensors in one folder."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revq.config import ModelConfig, model_config_from_dict, to_dict
from revq.data.atomic_folder import atomic_folder
from revq.data.hub import fetch, find_folder, one_line
from revq.errors import InputError

if TYPE_CHECKING:
    from revq.model.revq import ReVQ

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
MODEL_FILES = frozenset({CONFIG, WEIGHTS, TOKENIZER})
"""What a model folder, of a `ReVQ` or of a `Tokenizer`, may hold."""


def model_folder(folder: str | Path) -> AbstractContextManager[Path]:
    """An `atomic_folder` that may replace an older model folder, of a `ReVQ` or of a `Tokenizer`, and nothing else."""
    return atomic_folder(folder, MODEL_FILES)


def write_model(model: "ReVQ", folder: Path) -> None:
    """Write the two files into ``folder``; not atomic by itself."""
    from safetensors.torch import save_file

    from revq import __version__

    config = {"_class_name": type(model).__name__, "_revq_version": __version__, **to_dict(model.config)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors writes files for the owner alone


def model_file(folder_or_hub_id: str | Path, filename: str, revision: str | None = None) -> Path:
    """The path of one file of a model, downloaded if the name is a hub id.

    Raises:
        InputError: if there is no such folder, file or hub id.
    """
    folder = find_folder(folder_or_hub_id, "a model folder")
    if folder is None:
        return fetch(str(folder_or_hub_id), filename, revision)
    if not (folder / filename).is_file():
        raise InputError(f"{folder}: expected a model folder with {filename}, which is missing")
    return folder / filename


def read_model(model_class: type["ReVQ"], folder_or_hub_id: str | Path, revision: str | None) -> "ReVQ":
    """Build the model that config.json describes and give it the tensors of model.safetensors, on the CPU.

    Raises:
        InputError: if a file is missing or damaged, a tensor is missing or too many, or has another shape.
    """
    config_file = model_file(folder_or_hub_id, CONFIG, revision)
    weights_file = model_file(folder_or_hub_id, WEIGHTS, revision)
    config = _read_config(config_file)
    try:
        with torch.device("meta"):  # no memory and no random numbers for tensors that the file brings
            model = model_class(config)
    except InputError as error:
        raise InputError(f"{config_file}: {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{config_file}: does not describe a model ({one_line(error)})") from error
    model.load_state_dict(_read_weights(weights_file, model.state_dict()), assign=True)
    return model


def _read_config(path: Path) -> ModelConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text or of the JSON
        raise InputError(f"{path}: expected JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    try:
        return model_config_from_dict({name: value for name, value in values.items() if not name.startswith("_")})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``path``, of exactly the names and shapes of ``expected``, in its dtypes."""
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:  # safetensors' own error, or OSError
        raise InputError(f"{path}: expected a safetensors file ({one_line(error)})") from error
    for name, tensor in expected.items():
        if name not in state:
            raise InputError(f"{path}: expected a tensor {name}, which is missing")
        if state[name].shape != tensor.shape:
            raise InputError(f"{path}: expected {name} of shape {list(tensor.shape)}, got {list(state[name].shape)}")
    surplus = sorted(state.keys() - expected.keys())
    if surplus:
        raise InputError(f"{path}: expected no tensor {surplus[0]} in this model")
    # Copies, because the loaded tensors are the mapped file itself: whoever overwrites the file would change the model.
    return {name: tensor.to(expected[name].dtype, copy=True) for name, tensor in state.items()}
