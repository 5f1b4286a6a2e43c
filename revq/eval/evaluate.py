"""Measures of a model: the use of its codebooks, its errors on latents, and its reconstructions of images."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from revq.data.latents import LatentStore
from revq.eval.metrics import psnr, ssim
from revq.model.revq import ReVQ
from revq_kernels import count_codes_, perplexity, utilization

if TYPE_CHECKING:
    from revq.data.vae import FrozenVAE


class CodeUse(NamedTuple):
    """How often the codes of the G codebooks are chosen in one pass over a store."""

    utilization: float
    """Fraction of the G*K codes that are chosen at least once."""
    lowest_utilization: float
    """The lowest utilization of a single codebook."""
    perplexity: float
    """exp(entropy) of the chosen codes, mean over the codebooks; between 1 and K."""


class LatentErrors(NamedTuple):
    """Mean squared errors per element of a latent, in normalized units (1 = the error of predicting the mean)."""

    quantized: float
    """Before the rectifier."""
    rectified: float
    """After the rectifier."""

    @property
    def gain(self) -> float:
        """Fraction by which the rectifier reduces the error; negative if it increases the error."""
        return 1 - self.rectified / self.quantized if self.quantized else 0.0


class Reconstructions(NamedTuple):
    """Images and three reconstructions of them, float32 ``[B, 3, H, W]`` in [-1, 1]."""

    original: Tensor
    """The images."""
    vae: Tensor
    """Encoded and decoded by the VAE alone."""
    quantized: Tensor
    """Encoded to tokens and decoded without the rectifier."""
    rectified: Tensor
    """Encoded to tokens and decoded with the rectifier."""


class Quality(NamedTuple):
    """Image quality, means over images."""

    psnr: float
    """Peak signal-to-noise ratio in dB."""
    ssim: float
    """Structural similarity, at most 1."""


LABELS = ("original", "VAE", "quantized", "rectified")
"""Titles of the four pictures of `Reconstructions`."""


@torch.no_grad()
def code_use(model: ReVQ, store: LatentStore, *, batch_size: int = 256) -> CodeUse:
    """Utilization and perplexity in one pass over ``store``; the counts of training are neither used nor changed."""
    count = torch.zeros_like(model.quantizer.count)
    model.build_index(len(store))
    for latents in store.batches(batch_size):
        indices = model.encode_latents(latents.to(model.device))  # [B, T]; token t uses codebook t mod G
        count_codes_(count, indices.reshape(-1, count.shape[0]))
    return summarize_count(count)


def summarize_count(count: Tensor) -> CodeUse:
    """`CodeUse` of int64 ``[G, K]``: how often each code was selected; the perplexity is NaN without any selection."""
    used = utilization(count).cpu().double()  # [G]
    return CodeUse(float(used.mean()), float(used.min()), float(perplexity(count).cpu().double().mean()))


@torch.no_grad()
def latent_errors(
    model: ReVQ, store: LatentStore, *, batch_size: int = 256, count: Tensor | None = None
) -> LatentErrors:
    """Errors on the latents of ``store`` before and after the rectifier; keeps the model's mode and statistics.

    Args:
        count: int64 ``[G, K]``, to which the selections are added.
    """
    training = model.training
    model.eval()  # eval mode does not count
    quantized = rectified = 0.0
    for latents in store.batches(batch_size):
        out = model(latents.to(model.device))  # both losses are means over the batch
        quantized += float(out.quantizer_loss) * len(latents)
        rectified += float(out.rectifier_loss) * len(latents)
        if count is not None:
            count_codes_(count, out.indices.reshape(-1, count.shape[0]))  # token t uses codebook t mod G
    model.train(training)
    return LatentErrors(quantized / len(store), rectified / len(store))


@torch.no_grad()
def reconstruct(model: ReVQ, vae: "FrozenVAE", images: Tensor, *, batch_size: int = 16) -> Reconstructions:
    """Reconstruct ``images`` float ``[B, 3, H, W]`` in [-1, 1] by the VAE alone, and from tokens without and with rectifier."""
    model.eval()
    parts = []
    for batch in images.split(batch_size):
        latents = vae.encode(batch)
        indices = model.encode_latents(latents)
        candidates = (latents, model.decode_tokens(indices, rectify=False), model.decode_tokens(indices))
        parts.append((batch, *(vae.decode(candidate).float().cpu() for candidate in candidates)))
    return Reconstructions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def image_quality(pictures: Reconstructions) -> dict[str, Quality]:
    """PSNR and SSIM against the originals (data range 1), means over images, by the names of `Reconstructions`."""

    def unit(images: Tensor) -> Tensor:
        return images.clamp(-1, 1) / 2 + 0.5

    original = unit(pictures.original)
    return {
        name: Quality(float(psnr(unit(images), original).mean()), float(ssim(unit(images), original).mean()))
        for name, images in zip(pictures._fields[1:], pictures[1:], strict=True)
    }


def mean_quality(parts: Iterable[tuple[int, dict[str, Quality]]]) -> dict[str, Quality]:
    """The means over all images, from the means over parts of them: pairs (images, `image_quality` of them)."""
    count, sums = 0, dict[str, tuple[float, float]]()
    for images, quality in parts:
        count += images
        for name, (psnr_mean, ssim_mean) in quality.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + images * psnr_mean, before[1] + images * ssim_mean)
    return {name: Quality(psnr_sum / count, ssim_sum / count) for name, (psnr_sum, ssim_sum) in sums.items()}
