"""Images to tokens and back: a ReVQ model together with the VAE whose latents it was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revq.data.images import center_crop, to_tensor
from revq.data.vae import FrozenVAE, load_vae
from revq.errors import InputError
from revq.model.files import TOKENIZER, model_file, model_folder, write_model
from revq.model.revq import ReVQ

if TYPE_CHECKING:
    from PIL.Image import Image


class Tokenizer:
    """Encodes square images to tokens and decodes tokens to images.

    Args:
        model: put in eval mode.
        vae: the VAE of the latents that ``model`` was trained on.
        image_size: side of the images, in pixels.

    Raises:
        InputError: if the VAE's latents of such images are not what the model reads.
    """

    def __init__(self, model: ReVQ, vae: FrozenVAE, image_size: int) -> None:
        shape = vae.latent_shape(image_size)
        if shape != model.config.latent_shape:
            raise InputError(
                f"image_size: the model reads latents {model.config.latent_shape}, "
                f"but {vae.name} gives {shape} at {image_size} pixels"
            )
        self.model, self.vae, self.image_size = model.eval(), vae, image_size

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        vae: FrozenVAE | str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "Tokenizer":
        """Load what `save_pretrained` wrote.

        Args:
            vae: the VAE, or its folder or hub id, if it is not to be found under the name that was saved.
            revision: branch, tag or commit of a hub repository.

        Raises:
            InputError: if files are missing or damaged, or the VAE has other weights than the one that was saved.
        """
        path = model_file(folder_or_hub_id, TOKENIZER, revision)
        name, fingerprint, image_size = read_description(path)
        if vae is None:
            vae = name
        if not isinstance(vae, FrozenVAE):
            vae = load_vae(vae, device=device)
        if vae.fingerprint != fingerprint:
            raise InputError(
                f"{path}: made with a VAE of fingerprint {fingerprint[:12]}..., "
                f"but {vae.name} has {vae.fingerprint[:12]}...: its weights are others"
            )
        return cls(ReVQ.from_pretrained(folder_or_hub_id, revision=revision, device=device), vae, image_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's files and tokenizer.json (the VAE's name and fingerprint, not its weights), atomically.

        Raises:
            InputError: if the folder holds files that are no part of a model folder.
        """
        description = {"vae": self.vae.name, "vae_fingerprint": self.vae.fingerprint, "image_size": self.image_size}
        with model_folder(folder) as new:
            write_model(self.model, new)
            (new / TOKENIZER).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def encode(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """Tokens int64 ``[B, T]`` of images.

        Args:
            images: float ``[B, 3, image_size, image_size]`` in [-1, 1], or PIL images of any size, which are center-cropped.

        Raises:
            InputError: for a tensor of another shape or dtype, or no image.
        """
        return self.model.encode_latents(self.latents(images).to(self._model_device))

    def latents(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """The VAE's latents float32 ``[B, C, h, w]`` of images as for `encode`."""
        return self.vae.encode(self._batch(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Images float32 ``[B, 3, image_size, image_size]`` in [-1, 1] of tokens ``[B, T]``.

        Equal tokens in an equal batch give equal bits on one machine with one number of threads.

        Raises:
            InputError: for tokens of another shape or dtype, or out of range.
        """
        return self.vae.decode(self.model.decode_tokens(indices))

    def reconstruct(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """``decode(encode(images))``."""
        return self.decode(self.encode(images))

    @property
    def _model_device(self) -> torch.device:
        return self.model.quantizer.codebook.device

    def _batch(self, images: "Tensor | Sequence[Image]") -> Tensor:
        if not isinstance(images, Tensor):
            return to_tensor([center_crop(image, self.image_size) for image in images])
        expected = (3, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(f"images: expected shape [B, {', '.join(map(str, expected))}], got {list(images.shape)}")
        return images


def read_description(path: Path) -> tuple[str, str, int]:
    """The VAE's name and fingerprint, and the image size, of a tokenizer.json.

    Raises:
        InputError: if the file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return str(values["vae"]), str(values["vae_fingerprint"]), int(values["image_size"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected JSON with vae, vae_fingerprint and image_size ({error!r})") from error
