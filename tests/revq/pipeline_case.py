"""Small latent stores and runs for the tests: correlated random latents, an MLP or identity rectifier, seconds per run."""

from pathlib import Path

import torch

from revq.config import ModelConfig, RectifierConfig, RunConfig, TrainConfig
from revq.data.latent_writer import save_latents
from revq.data.latents import LatentStore

SHAPE = (4, 4, 4)


def random_store(folder: Path, rows: int = 200, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> LatentStore:
    """Latents [rows, *shape] whose elements are correlated, so that a rectifier can reduce the error."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, shape[0] * shape[1] * shape[2], generator=torch.Generator().manual_seed(99))
    latents = torch.randn(rows, 6, generator=generator) @ mixing + 0.2 * torch.randn(
        rows, mixing.shape[1], generator=generator
    )
    return save_latents(
        folder, 3 * latents.reshape(rows, *shape) + 1, vae="tiny", vae_fingerprint="f00d", image_size=64
    )


def tiny_run(*, codes: int = 16, rectifier: RectifierConfig | None = None, **options) -> RunConfig:
    """16 tokens of d=4; batch 32."""
    rectifier = rectifier or RectifierConfig("mlp", width=16, layers=1, form="residual")
    model = ModelConfig(SHAPE, num_tokens=16, num_codes=codes, rectifier=rectifier)
    return RunConfig("tiny", model, TrainConfig(**({"epochs": 3, "batch_size": 32, "learning_rate": 3e-2} | options)))
