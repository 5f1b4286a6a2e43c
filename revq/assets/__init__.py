"""The demo photos and the embedded VAE that ship inside the package.

Standard library only, so that looking up a path costs nothing. `photos/README.md` and `photos/SOURCES.csv` name every
author and license, `vae/README.md` is the card of the VAE.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def vae_folder() -> Path:
    """Return the folder of the embedded VAE, which `diffusers.AutoencoderDC.from_pretrained` loads."""
    return _HERE / "vae"


def train_photos() -> list[Path]:
    """Return the demo's training photos, sorted by name."""
    return sorted((_HERE / "photos" / "train").glob("*.webp"))


def held_out_photos() -> list[Path]:
    """Return the demo's held-out photos, sorted by name. The embedded VAE has not seen them."""
    return sorted((_HERE / "photos" / "held_out").glob("*.webp"))
