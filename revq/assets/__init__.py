"""Separate because it marks the package data: paths of the demo photos and of the embedded VAE; standard library only.

``photos/README.md`` and ``photos/SOURCES.csv`` name every author and license; ``vae/README.md`` describes the VAE.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def vae_folder() -> Path:
    """The folder of the embedded VAE, which `diffusers.AutoencoderDC.from_pretrained` loads."""
    return _HERE / "vae"


def train_photos() -> list[Path]:
    """The demo's training photos, sorted by name."""
    return sorted((_HERE / "photos" / "train").glob("*.webp"))


def held_out_photos() -> list[Path]:
    """The demo's held-out photos, sorted by name.  The embedded VAE was not trained on them."""
    return sorted((_HERE / "photos" / "held_out").glob("*.webp"))
