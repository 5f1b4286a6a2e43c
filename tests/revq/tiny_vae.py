"""A diffusers AutoencoderDC with a few thousand random weights, and photos made of smooth noise."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

LATENT_SHAPE = (4, 8, 8)
"""Of 32-pixel images: downscale 4."""
IMAGE_SIZE = 32


def save_tiny_vae(folder: Path, seed: int = 0) -> Path:
    """Write a random VAE of `LATENT_SHAPE`."""
    from diffusers import AutoencoderDC

    channels = (8, 16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ).save_pretrained(folder)
    return folder


def save_photos(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (64, 48)) -> list[Path]:
    """Write PNGs of smooth noise, one of them in a subfolder."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = folder / ("sub" if number == 0 else "") / f"photo-{number:02d}.png"
        small.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths
