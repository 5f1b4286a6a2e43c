"""How good a model is: its use of the codebooks, its errors on latents, and the pictures that come out."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from revq.data.latents import LatentStore
from revq.model.revq import ReVQ
from revq_kernels import count_codes_

if TYPE_CHECKING:
    from revq.data.vae import FrozenVAE


class CodeUse(NamedTuple):
    """How the codes of all G codebooks are chosen in one pass over a store."""

    utilization: float
    """Share of the G*K codes chosen at least once."""
    lowest_utilization: float
    """The same share in the worst codebook."""
    perplexity: float
    """exp(entropy) of the choices, mean over the codebooks; between 1 and K."""


class LatentErrors(NamedTuple):
    """Mean squared errors per number of a latent, in normalized units (1 = predicting the mean)."""

    quantized: float
    rectified: float

    @property
    def gain(self) -> float:
        """Share of the quantization error that the rectifier takes away; negative if it adds to it."""
        return 1 - self.rectified / self.quantized if self.quantized else 0.0


class Reconstructions(NamedTuple):
    """The same images four times, float32 ``[B, 3, H, W]`` in [-1, 1]."""

    original: Tensor
    vae: Tensor
    """Through the VAE alone."""
    quantized: Tensor
    """Through the tokens, without the rectifier."""
    rectified: Tensor
    """Through the tokens and the rectifier."""


class Quality(NamedTuple):
    """Means over images."""

    psnr: float
    ssim: float


@torch.no_grad()
def code_use(model: ReVQ, store: LatentStore, *, batch_size: int = 256) -> CodeUse:
    """Utilization and perplexity over one pass of ``store`` with the model as it is (not the counts of training)."""
    device = model.quantizer.codebook.device
    count = torch.zeros_like(model.quantizer.count)
    for latents in store.batches(batch_size):
        indices = model.encode_latents(latents.to(device))  # [B, T]; token t uses codebook t mod G
        count_codes_(count, indices.reshape(-1, count.shape[0]))
    return summarize_count(count)


def summarize_count(count: Tensor) -> CodeUse:
    """`CodeUse` of choices that were counted: int64 ``[G, K]``."""
    share = count.double() / count.sum(dim=1, keepdim=True).clamp(min=1)
    perplexity = torch.special.entr(share).sum(dim=1).exp()
    used = (count > 0).double().mean(dim=1)
    return CodeUse(float(used.mean()), float(used.min()), float(perplexity.mean()))


@torch.no_grad()
def latent_errors(model: ReVQ, store: LatentStore, *, batch_size: int = 256) -> LatentErrors:
    """Errors on the latents of ``store`` before and after the rectifier; leaves the model's mode and counts alone."""
    device, training = model.quantizer.codebook.device, model.training
    model.eval()
    quantized = rectified = 0.0
    for latents in store.batches(batch_size):
        out = model(latents.to(device))  # both losses are means over the batch, and in eval mode nothing is counted
        quantized += float(out.quantizer_loss) * len(latents)
        rectified += float(out.rectifier_loss) * len(latents)
    model.train(training)
    return LatentErrors(quantized / len(store), rectified / len(store))


@torch.no_grad()
def reconstruct(model: ReVQ, vae: "FrozenVAE", images: Tensor, *, batch_size: int = 16) -> Reconstructions:
    """Send ``images`` float ``[B, 3, H, W]`` in [-1, 1] through the VAE, and through the tokens with and without rectifier."""
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
    from revq.eval.metrics import psnr, ssim

    def unit(images: Tensor) -> Tensor:
        return images.clamp(-1, 1) / 2 + 0.5

    original = unit(pictures.original)
    return {
        name: Quality(float(psnr(unit(images), original).mean()), float(ssim(unit(images), original).mean()))
        for name, images in zip(pictures._fields[1:], pictures[1:], strict=True)
    }
