"""Separate because it names the public part of this room: code use, errors on latents and image quality."""

from revq.eval.evaluate import code_use, image_quality, latent_errors, reconstruct, summarize_count
from revq.eval.metrics import psnr, ssim

__all__ = ["code_use", "image_quality", "latent_errors", "psnr", "reconstruct", "ssim", "summarize_count"]
