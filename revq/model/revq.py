"""The ReVQ model: normalize, quantize, rectify, denormalize (paper, section 3.3, Algorithm 1)."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revq.config import ModelConfig
from revq.errors import InputError
from revq.model.normalizer import Normalizer
from revq.model.rectifier import build_rectifier
from revq_kernels import FastChannelVQ


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


class ReVQ(nn.Module):
    """Latents of a frozen VAE to tokens and back.

    Args:
        config: shapes, codebooks and rectifier.

    Attributes:
        normalizer: `Normalizer`; the identity until it is fitted.
        quantizer: `FastChannelVQ` with G codebooks; it gives the codebook its gradient and the latents none.
        rectifier: the network g of Eq. 3, on normalized latents.

    Raises:
        InputError: if the rectifier's configuration does not fit the latent.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.normalizer = Normalizer(config.latent_shape)
        self.quantizer = FastChannelVQ(
            config.num_codes,
            config.code_dim,
            num_groups=config.groups,
            split=config.split,
            estimator="none",
            commitment=0.0,
        )
        self.rectifier = build_rectifier(config.rectifier, config.latent_shape)

    def forward(self, latents: Tensor, *, joint: bool = False) -> ReVQOutput:
        """Quantize and rectify; in training mode the quantizer counts its choices.

        Args:
            latents: float ``[B, C, h, w]`` in the VAE's units; they receive no gradient.
            joint: False, as released: the rectifier's loss trains the rectifier alone.  True, the paper's Eq. 4: it
                trains the codebook too.

        Raises:
            InputError: for latents of another shape or dtype.
        """
        target = self._normalized(latents)
        quantized, indices, quantizer_loss = self.quantizer(target)
        rectified = self.rectifier(quantized if joint else quantized.detach())
        rectifier_loss = F.mse_loss(rectified, target)
        return ReVQOutput(self.normalizer.denormalize(rectified), indices, quantizer_loss, rectifier_loss)

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """Tokens int64 ``[B, T]`` of latents float ``[B, C, h, w]`` (Eq. 1); counts nothing.

        Equal latents give equal tokens on every device and in every batch.

        Raises:
            InputError: for latents of another shape or dtype.
        """
        return self.quantizer.encode(self._normalized(latents))

    @torch.no_grad()
    def decode_tokens(self, indices: Tensor, *, rectify: bool = True) -> Tensor:
        """Latents float32 ``[B, C, h, w]``, in the VAE's units, of tokens ``[B, T]`` of any integer dtype.

        Args:
            rectify: False leaves the rectifier out, for comparison.

        Raises:
            InputError: for another shape or dtype, or an index that is not in [0, num_codes).
        """
        tokens = self._checked_tokens(indices)
        quantized = self.quantizer.decode(tokens, self.config.latent_shape)
        return self.normalizer.denormalize(self.rectifier(quantized) if rectify else quantized)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; an older model folder is replaced in one step, whole or not at all.

        Raises:
            InputError: if the folder holds files that are no part of a model folder.
        """
        from revq.model.files import model_folder, write_model

        with model_folder(folder) as new:
            write_model(self, new)

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
        from revq.model.files import read_model

        return read_model(cls, folder_or_hub_id, revision).to(device).eval()

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
        tokens = indices.to(self.quantizer.codebook.device, torch.int64)
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < num_codes):
            raise InputError(
                f"indices: expected values in [0, num_codes={num_codes}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        return tokens
