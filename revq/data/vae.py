"""The frozen image VAE of a ReVQ model: one of three diffusers autoencoder classes, with latents in raw units."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revq.assets import vae_folder
from revq.data.hub import fetch, find_folder, one_line
from revq.errors import InputError

CLASSES = ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny")


class FrozenVAE:
    """An autoencoder in eval mode and float32, without gradients.

    Latents are in the VAE's raw units: the output of its encoder and the input of its decoder.  ``scaling_factor`` and
    ``shift_factor``, which diffusion pipelines apply between the two, are not applied; `Normalizer` replaces them.

    Args:
        vae: a diffusers autoencoder.
        name: its name.

    Attributes:
        vae: the autoencoder.
        name: "embedded", the absolute path of a folder, or a hub id; `load_vae` accepts it.
        class_name: diffusers' class, one of `CLASSES`.
        downscale: image pixels per latent position, along a side.
        latent_channels: C.
        device: where the weights are.
    """

    def __init__(self, vae: Any, name: str) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.name = name
        self.class_name = type(vae).__name__
        config = self.vae.config
        if self.class_name not in CLASSES:
            raise InputError(f"{name}: expected a VAE of class {', '.join(CLASSES)}, got {self.class_name}")
        if config.in_channels != 3:
            raise InputError(f"{name}: expected a VAE of RGB images (3 channels), got {config.in_channels} channels")
        self.latent_channels: int = config.latent_channels
        blocks = config.block_out_channels if self.class_name == "AutoencoderKL" else config.encoder_block_out_channels
        self.downscale = 2 ** (len(blocks) - 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where `encode` and `decode` compute."""
        return next(self.vae.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the float32 weights with their names and shapes, 64 hex digits; independent of the file format."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a square image.

        Raises:
            InputError: if ``image_size`` is not a positive multiple of ``downscale``.
        """
        if image_size < 1 or image_size % self.downscale:
            raise InputError(f"image_size: expected a multiple of the VAE's {self.downscale}, got {image_size}")
        side = image_size // self.downscale
        return (self.latent_channels, side, side)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to latents; for `AutoencoderKL`, the mode of the posterior.

        Results depend on batch composition in the last bits.  To compare tokens exactly, start from stored latents.

        Args:
            images: float ``[B, 3, H, W]`` in [-1, 1], H and W multiples of ``downscale``.

        Returns:
            float32 ``[B, C, H/downscale, W/downscale]``.

        Raises:
            InputError: for another shape or dtype.
        """
        self._check_images(images)
        out = self.vae.encode(images.to(self.device, torch.float32))
        if self.class_name == "AutoencoderKL":
            return out.latent_dist.mode()
        return out.latent if self.class_name == "AutoencoderDC" else out.latents

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"images: expected float [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if images.shape[2] % self.downscale or images.shape[3] % self.downscale:
            raise InputError(
                f"images: expected height and width to be multiples of {self.downscale}, got {tuple(images.shape[2:])}"
            )

    @torch.no_grad()
    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The means and the log-variances of the posterior, both as `encode` returns latents.

        Raises:
            InputError: if the VAE has no posterior; for another shape or dtype.
        """
        if self.class_name != "AutoencoderKL":
            raise InputError(f"log_variances: expected a VAE with a posterior (AutoencoderKL), got {self.class_name}")
        self._check_images(images)
        posterior = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents float ``[B, C, h, w]`` to images float32 ``[B, 3, h*downscale, w*downscale]``, clamped to [-1, 1].

        Raises:
            InputError: for another shape or dtype.
        """
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels or not latents.is_floating_point():
            raise InputError(
                f"latents: expected float [B, {self.latent_channels}, h, w], got {latents.dtype} {tuple(latents.shape)}"
            )
        return self.vae.decode(latents.to(self.device, torch.float32)).sample.clamp(-1, 1)


def load_vae(name: str | Path = "embedded", *, device: str | torch.device = "cpu") -> FrozenVAE:
    """Load a VAE of the class that its config.json names; weights of any dtype are converted to float32.

    Args:
        name: "embedded" for the VAE that ships with revq, a folder, or a hub id.
        device: where to put the weights.

    Raises:
        InputError: if there is no such folder or hub id, its files are missing or damaged, or its class is not one of
            `CLASSES`.
    """
    folder = _embedded_folder() if name == "embedded" else find_folder(name, "a VAE folder")
    if folder is None:
        config_file, source, label = fetch(str(name), "config.json"), str(name), str(name)
    else:
        config_file, source = folder / "config.json", str(folder)
        label = "embedded" if name == "embedded" else str(folder)
    vae_class = _vae_class(config_file, label)
    if folder is not None and not any(folder.glob("diffusion_pytorch_model*")):
        raise InputError(f"{label}: expected the VAE's weights, diffusion_pytorch_model.safetensors, which are missing")
    return FrozenVAE(_load(vae_class, source, label).to(device), label)


def _embedded_folder() -> Path:
    return Path(vae_folder())


def _vae_class(config_file: Path, label: str) -> Any:
    if not config_file.is_file():
        inner = config_file.parent / "vae"
        hint = f"; try {inner}" if (inner / "config.json").is_file() else ""
        raise InputError(f"{label}: expected a VAE folder with a config.json, which is missing{hint}")
    try:
        class_name = json.loads(config_file.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{config_file}: expected a diffusers configuration with a _class_name ({error!r})") from error
    if class_name not in CLASSES:
        raise InputError(f"{config_file}: expected _class_name to be one of {', '.join(CLASSES)}, got {class_name!r}")
    import diffusers

    return getattr(diffusers, class_name)


def _load(vae_class: Any, source: str, label: str) -> torch.nn.Module:
    try:
        vae, report = vae_class.from_pretrained(
            source,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    # Damaged files raise many types: safetensors', torch's and pickle's errors, OSError, KeyError, ...
    except Exception as error:
        raise InputError(f"{label}: cannot load this {vae_class.__name__} ({one_line(error)})") from error
    if report["missing_keys"]:  # diffusers leaves them at random values
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{label}: the weights lack {len(missing)} tensors of this {vae_class.__name__}: {missing[0]}, ..."
        )
    return vae
