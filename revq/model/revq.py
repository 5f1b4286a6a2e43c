"""The ReVQ model (paper, section 3.3, Algorithm 1): normalize, quantize, rectify, denormalize; and its folder on disk.

A model folder holds ``config.json`` and ``model.safetensors``.  ``tokenizer.json`` is added where the VAE is known whose
latents the model reads: `revq.Tokenizer` needs it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq import __version__
from revq.config import MOST_BYTES, ModelConfig, model_config_from_dict, to_dict
from revq.data.atomic import atomic_folder
from revq.data.hub import fetch, find_folder, one_line
from revq.data.json_text import manifest_text, read_json, read_manifest
from revq.data.tensor_file import load_tensors, write_tensors
from revq.errors import InputError
from revq.model.normalizer import Normalizer
from revq.model.rectifier import build_rectifier, refuse_earlier_rectifier
from revq_kernels import FastChannelVQ, native
from revq_kernels.index import tree_pays

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_ORIGIN_FORMAT = "revq-tokenizer-2"
MODEL_FILES = frozenset({CONFIG, WEIGHTS, TOKENIZER})
"""The files of a model folder; `save_model` replaces them and keeps all others, such as a README.md."""


class ReVQOutput(NamedTuple):
    """What `ReVQ` returns for a batch of latents."""

    latents: Tensor
    """float32 ``[B, C, h, w]``: quantized and rectified, in the VAE's units."""
    indices: Tensor
    """int64 ``[B, T]``."""
    quantizer_loss: Tensor
    """Scalar: mean squared error of the quantized latents, normalized units."""
    rectifier_loss: Tensor
    """Scalar: mean squared error of the rectified latents, normalized units (Eq. 4)."""


class _Quantizer(FastChannelVQ):
    """Searches a float64 codebook, of a model after ``double()``, by its float32 values."""

    def current_codes(self) -> Tensor:
        codes = super().current_codes()
        return codes.float() if codes.dtype == torch.float64 else codes


class ReVQ(nn.Module):
    """Latents of a frozen VAE to tokens and back.

    The parameters are float32, whatever torch's default dtype is.  ``half()``, ``bfloat16()`` and ``double()`` convert the
    codebook and the rectifier: the search is that of the converted codes, in float32, and the rectifier computes in its own
    dtype.  The normalizer's statistics stay float32, and so do latents and losses.  A model made or loaded in
    ``torch.inference_mode()`` can be trained outside it.

    Args:
        config: shapes, codebooks and rectifier.

    Attributes:
        normalizer: `Normalizer`; the identity until it is fitted.
        quantizer: `FastChannelVQ` with G codebooks; the codebook receives a gradient, the latents receive none.
        rectifier: the network g of Eq. 3, on normalized latents.

    Raises:
        InputError: if the configuration is invalid, the rectifier does not fit the latent, or the model would not fit
            the memory of the machine (unless it is made on another device, such as "meta").
    """

    normalizer: Normalizer
    quantizer: FastChannelVQ
    rectifier: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        if torch.get_default_device().type == "cpu":
            config.check_size(memory_bytes(), "the memory of this machine")
        self.config = config
        with torch.inference_mode(False), _float32_by_default():
            self._build(config)

    def _build(self, config: ModelConfig) -> None:
        self.normalizer = Normalizer(config.latent_shape)
        self.quantizer = _Quantizer(
            config.num_codes,
            config.code_dim,
            num_groups=config.groups,
            split=config.split,
            estimator="none",
            commitment=0.0,
        )
        # A latent of few tokens, which `config.num_tokens` asks for, has tokens of several positions.
        self.quantizer.token_layout = replace(self.quantizer.token_layout, spans_positions=True)
        self.rectifier = build_rectifier(config.rectifier, config.latent_shape)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters and buffers are."""
        return self.normalizer.mean.device

    def forward(self, latents: Tensor, *, joint: bool = False) -> ReVQOutput:
        """Quantize and rectify; in training mode the quantizer counts how often each code is chosen.

        Args:
            latents: float ``[B, C, h, w]`` in the VAE's units; they receive no gradient.
            joint: False, as released: the rectifier's loss trains the rectifier alone.  True, the paper's Eq. 4: it
                trains the codebook too.

        Raises:
            InputError: for latents of another shape or dtype.
        """
        target = self._normalized(latents)
        quantized, indices, quantizer_loss = self.quantizer(target)
        rectified = self._rectify(quantized if joint else quantized.detach())
        rectifier_loss = F.mse_loss(rectified, target)
        return ReVQOutput(self.normalizer.denormalize(rectified), indices, quantizer_loss, rectifier_loss)

    def build_index(self, num_latents: int) -> bool:
        """Build a search tree over the codes (`FastChannelVQ.build_index`) if that saves time for this many latents.

        Tokens are the same with and without it.  It is a snapshot of the codebook, for eval mode on the CPU; training
        mode, `load_state_dict` and `to` drop it.

        Args:
            num_latents: how many latents are going to be encoded.

        Returns:
            Whether the tree was built.
        """
        config = self.config
        queries = num_latents * config.num_tokens // config.groups  # of each codebook
        if self.training or self.device.type != "cpu" or native.load() is not None:
            return False
        if not tree_pays(config.num_codes, config.code_dim, queries):
            return False
        self.quantizer.build_index()
        return True

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """Tokens int64 ``[B, T]`` of latents float ``[B, C, h, w]`` (Eq. 1); does not change the quantizer's counts.

        Equal latents give equal tokens on every device and in every batch.

        Raises:
            InputError: for latents of another shape or dtype.
        """
        return self.quantizer.encode(self._normalized(latents))

    @torch.no_grad()
    def decode_tokens(self, indices: Tensor, *, rectify: bool = True) -> Tensor:
        """Latents float32 ``[B, C, h, w]``, in the VAE's units, of tokens ``[B, T]`` of any integer dtype.

        The rectifier works as in eval mode: equal tokens give equal latents in any mode and batch.

        Args:
            rectify: False omits the rectifier, for comparison.

        Raises:
            InputError: for another shape or dtype, or an index that is not in [0, num_codes).
        """
        tokens = self._checked_tokens(indices)
        latents = self.quantizer.decode(tokens, self.config.latent_shape)
        if rectify:
            training = self.rectifier.training
            self.rectifier.eval()  # BatchNorm, of the mlp, would mix the latents and change its running statistics
            try:
                latents = self._rectify(latents)
            finally:
                self.rectifier.train(training)
        return self.normalizer.denormalize(latents)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, whole or not at all; other files in the folder stay.

        Raises:
            InputError: if a weight is not finite, or ``folder`` is a file.
        """
        save_model(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> "ReVQ":
        """Load what `save_pretrained` wrote, from a folder or from the Hugging Face hub, in eval mode.

        Args:
            revision: branch, tag or commit of a hub repository.

        Raises:
            InputError: if files are missing or damaged, or do not fit each other.
        """
        with torch.inference_mode(False):  # else the model could not be trained
            return cls._load(folder_or_hub_id, revision).to(device).eval()

    @classmethod
    def _load(cls, folder_or_hub_id: str | Path, revision: str | None) -> "ReVQ":
        config_file = model_file(folder_or_hub_id, CONFIG, revision)
        weights_file = model_file(folder_or_hub_id, WEIGHTS, revision)
        config = _read_config(config_file)
        try:
            with torch.device("meta"):  # the file brings the values, so no memory and no random numbers are needed
                model = cls(config)
        except InputError as error:
            raise InputError(f"{config_file}: {error}") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{config_file}: does not describe a model ({one_line(error)})") from error
        model.load_state_dict(_read_weights(weights_file, model.state_dict()), assign=True)
        return model

    def _rectify(self, quantized: Tensor) -> Tensor:
        """The rectifier on latents ``[B, C, h, w]``, in the dtype of its weights; float32."""
        weight = next(self.rectifier.parameters(), None)  # the identity has none
        return self.rectifier(quantized if weight is None else quantized.to(weight.dtype)).float()

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> "ReVQ":
        """Convert as any module does (``to``, ``half``, ...); also in inference mode to weights that can be trained."""
        super()._apply(fn, recurse)
        return self

    def _normalized(self, latents: Tensor) -> Tensor:
        expected = self.config.latent_shape
        if latents.dim() != 4 or tuple(latents.shape[1:]) != expected:
            shape = ", ".join(str(size) for size in expected)
            raise InputError(f"latents: expected shape [B, {shape}], got {list(latents.shape)}")
        if not latents.is_floating_point():
            raise InputError(f"latents: expected a floating point dtype, got {latents.dtype}")
        return self.normalizer.normalize(latents.detach())

    def _checked_tokens(self, indices: Tensor) -> Tensor:
        num_tokens, num_codes = self.config.num_tokens, self.config.num_codes
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise InputError(f"indices: expected an integer dtype, got {indices.dtype}")
        if indices.dim() != 2 or indices.shape[1] != num_tokens:
            raise InputError(f"indices: expected shape [B, num_tokens={num_tokens}], got {list(indices.shape)}")
        tokens = indices.to(self.device, torch.int64)
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < num_codes):
            raise InputError(
                f"indices: expected values in [0, num_codes={num_codes}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        return tokens


def memory_bytes() -> int:
    """Memory of this machine; more than any model has where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return MOST_BYTES
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Within the block, modules are made in float32, whatever the caller's default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class LatentOrigin(NamedTuple):
    """The VAE and the image size that a model's latents come from: the content of ``tokenizer.json``."""

    vae: str
    """Name of the VAE, which `revq.load_vae` takes."""
    vae_fingerprint: str
    """`FrozenVAE.fingerprint` of its weights."""
    image_size: int
    """Side of the square images, in pixels."""


def save_model(model: ReVQ, folder: str | Path, origin: LatentOrigin | None = None) -> None:
    """Write a model folder, with a tokenizer.json if ``origin`` is given; an older one is replaced in one step.

    Files of other names stay.  The weights are written with checksums, see `revq.data.tensor_file`.

    Raises:
        InputError: if a weight is not finite, or ``folder`` is a file.
    """
    config = {"_class_name": type(model).__name__, "_revq_version": __version__, **to_dict(model.config)}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
            raise InputError(f"{name}: expected finite weights to save, got NaN or infinity; nothing was written")
    with atomic_folder(folder, MODEL_FILES, keep_others=True) as new:
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tensors(new / WEIGHTS, state, {"format": "pt"})
        if origin is not None:
            values = {"format": _ORIGIN_FORMAT, **origin._asdict()}
            (new / TOKENIZER).write_text(manifest_text(values), encoding="utf-8")


def model_folder(run: str | Path) -> Path:
    """Where a training run in the folder ``run`` writes its model.

    That is ``run/model``, or ``run`` itself if it is called "model", unless an earlier version wrote ``model/model``.
    """
    run = Path(run)
    inner = run / "model"
    return run if run.absolute().name == "model" and not inner.is_dir() else inner


def read_origin(path: Path) -> LatentOrigin:
    """Read a tokenizer.json.

    Raises:
        InputError: if the file is damaged.
    """
    expected = "expected JSON with vae, vae_fingerprint and image_size"
    try:
        values = read_manifest(path, unchecked=frozenset({None}))  # the first version has neither format nor checksum
    except InputError as error:
        raise InputError(f"{path}: {expected} ({str(error).removeprefix(f'{path}: ')})") from None
    if values.get("format") not in (None, _ORIGIN_FORMAT):
        raise InputError(f"{path}: expected {_ORIGIN_FORMAT} or older, got {values['format']!r}: a newer revq wrote it")
    for name, kind in LatentOrigin.__annotations__.items():
        value: Any = values.get(name)
        if type(value) is not kind or (kind is int and not 0 <= value < 2**31):
            raise InputError(f"{path}: {expected}, two texts and pixels, got {name} {str(value)[:60]!r}")
    return LatentOrigin(*(values[name] for name in LatentOrigin._fields))


def model_file(folder_or_hub_id: str | Path, filename: str, revision: str | None = None) -> Path:
    """The path of one file of a model folder, or of the model in a run's folder; downloads the file of a hub id.

    Raises:
        InputError: if there is no such folder, file or hub id.
    """
    folder = find_folder(folder_or_hub_id, "a model folder")
    if folder is None:
        return fetch(str(folder_or_hub_id), filename, revision)
    if not (folder / CONFIG).is_file() and (model_folder(folder) / CONFIG).is_file():
        folder = model_folder(folder)  # of a run
    if not (folder / filename).is_file():
        unfinished = " (a run whose training is not finished)" if (folder / "checkpoint.pt").is_file() else ""
        raise InputError(f"{folder}: expected a model folder with {filename}, which is missing{unfinished}")
    return folder / filename


def _read_config(path: Path) -> ModelConfig:
    values = read_json(path)
    try:
        return model_config_from_dict({name: value for name, value in values.items() if not name.startswith("_")})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``path``, which must have the names and shapes of ``expected``, converted to its dtypes."""
    state, _ = load_tensors(path, checksums=False)  # files of earlier versions and of others have none
    refuse_earlier_rectifier(state, path)
    for name, tensor in expected.items():
        if name not in state:
            raise InputError(f"{path}: expected a tensor {name}, which is missing")
        if state[name].shape != tensor.shape:
            raise InputError(f"{path}: expected {name} of shape {list(tensor.shape)}, got {list(state[name].shape)}")
    surplus = sorted(state.keys() - expected.keys())
    if surplus:
        raise InputError(f"{path}: expected no tensor {surplus[0]} in this model")
    return {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
