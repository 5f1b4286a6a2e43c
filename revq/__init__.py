"""ReVQ: turn a frozen image VAE into a VQ-VAE in latent space, in minutes.

Names load when they are first used, so that ``import revq`` is quick.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "FastChannelVQ": "revq_kernels",
    "FrozenVAE": "revq.data.vae",
    "InputError": "revq.errors",
    "LatentStore": "revq.data.latents",
    "ModelConfig": "revq.config",
    "ReVQ": "revq.model.revq",
    "RectifierConfig": "revq.config",
    "RunConfig": "revq.config",
    "Tokenizer": "revq.tokenizer",
    "TrainConfig": "revq.config",
    "encode_folder": "revq.data.encode",
    "Patched": "revq_kernels.interop.patching",
    "fast_distances": "revq_kernels.interop.lazy_cdist",
    "like": "revq_kernels.interop.patching",
    "load_vae": "revq.data.vae",
    "patch": "revq_kernels.interop.patching",
    "unpatch": "revq_kernels.interop.patching",
}
_MODULES = ("recipes", "train")  # modules, used as revq.recipes.demo() and revq.train.train(...)

__all__ = ["__version__", *sorted([*_HOME, *_MODULES])]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"revq.{name}")
    raise AttributeError(f"module 'revq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
