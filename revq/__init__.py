"""ReVQ: turn a frozen image VAE into a VQ-VAE in latent space, in minutes.

Public names load on first use, so that ``import revq`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of `_HOME`, for type checkers and editors
    from revq import recipes, train
    from revq.config import ModelConfig, RectifierConfig, RunConfig, TrainConfig
    from revq.data.encode import encode_folder
    from revq.data.latents import LatentStore
    from revq.data.vae import FrozenVAE, load_vae
    from revq.errors import InputError
    from revq.model.revq import ReVQ
    from revq.tokenizer import Tokenizer
    from revq_kernels import FastChannelVQ
    from revq_kernels.interop.lazy_cdist import fast_distances
    from revq_kernels.interop.patching import Patched, like, patch, unpatch

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here

_HOME = {
    "FastChannelVQ": "revq_kernels",
    "FrozenVAE": "revq.data.vae",
    "InputError": "revq.errors",
    "LatentStore": "revq.data.latents",
    "ModelConfig": "revq.config",
    "Patched": "revq_kernels.interop.patching",
    "ReVQ": "revq.model.revq",
    "RectifierConfig": "revq.config",
    "RunConfig": "revq.config",
    "Tokenizer": "revq.tokenizer",
    "TrainConfig": "revq.config",
    "encode_folder": "revq.data.encode",
    "fast_distances": "revq_kernels.interop.lazy_cdist",
    "like": "revq_kernels.interop.patching",
    "load_vae": "revq.data.vae",
    "patch": "revq_kernels.interop.patching",
    "unpatch": "revq_kernels.interop.patching",
}
_MODULES = ("recipes", "train")  # used as revq.recipes.demo() and revq.train.train(...)

__all__ = [
    "FastChannelVQ",
    "FrozenVAE",
    "InputError",
    "LatentStore",
    "ModelConfig",
    "Patched",
    "ReVQ",
    "RectifierConfig",
    "RunConfig",
    "Tokenizer",
    "TrainConfig",
    "__version__",
    "encode_folder",
    "fast_distances",
    "like",
    "load_vae",
    "patch",
    "recipes",
    "train",
    "unpatch",
]


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
