"""Separate because it names the public part of this room: images, VAEs, latent stores and token files."""

from revq.data.encode import encode_folder
from revq.data.images import (
    center_crop,
    decode_image,
    image_files,
    list_images,
    load_image,
    random_crop,
    to_pil,
    to_tensor,
)
from revq.data.latent_writer import LatentWriter, Source, save_latents
from revq.data.latents import LatentStore, StorePlan, is_latent_store
from revq.data.tokens import TokenFile, TokenWriter, load_tokens, save_tokens
from revq.data.vae import FrozenVAE, load_vae

__all__ = [
    "FrozenVAE",
    "LatentStore",
    "LatentWriter",
    "Source",
    "StorePlan",
    "TokenFile",
    "TokenWriter",
    "center_crop",
    "decode_image",
    "encode_folder",
    "image_files",
    "is_latent_store",
    "list_images",
    "load_image",
    "load_tokens",
    "load_vae",
    "random_crop",
    "save_latents",
    "save_tokens",
    "to_pil",
    "to_tensor",
]
