"""Real latents as queries and codes: the shipped photos through the embedded VAE, encoded once and kept in ``runs/``.

A frame of 192 x 192 pixels is encoded as a whole, and each of the 25 windows of 8 x 8 positions in its latent counts as
the latent of a crop of 128 x 128 pixels.  The encoder is convolutional, so a window equals the latent of that crop except
at its outermost positions, whose receptive field extends beyond the crop.  One encoder pass thus gives 25 crops, more
than 100,000 in all.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from revq.data.latents import LatentStore
from revq_kernels.nn.layout import split_tokens

FOLDER = Path(__file__).parents[2] / "runs" / "benchmark-latents"
SIDE = 8
"""Positions along a side of a crop's latent."""
FRAME_PIXELS = 192
FRAMES = {"train": 19, "held_out": 4}
"""Frames per photo."""
MIN_SCALE = 0.75
"""A frame's side is at least this share of the photo's short side, so a crop's side is at least half of it."""


def store(part: str) -> LatentStore:
    """The frames' latents of the "train" or "held_out" photos; the first call encodes them."""
    from revq import assets
    from revq.data.encode import encode_folder
    from revq.data.vae import load_vae

    return encode_folder(
        assets.train_photos() if part == "train" else assets.held_out_photos(),
        load_vae(),
        image_size=FRAME_PIXELS,
        out=FOLDER / part,
        crops=FRAMES[part],
        min_scale=MIN_SCALE,
        progress=False,
    )


def tokens(frames: LatentStore, d: int, groups: Tensor) -> Tensor:
    """The tokens of every crop in the given groups of the channel split: ``[crops, len(groups), d]``."""
    found = []
    for latents in frames.batches(64):
        windows = latents.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # [frames, C, rows, columns, 8, 8]
        crops = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        found.append(split_tokens(crops, d, "channel")[:, groups])
    return torch.cat(found)


def problem(
    num_queries: int, num_groups: int, num_codes: int, d: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Queries ``[G, N, d]`` from crops of held-out photos, and codes ``[G, K, d]`` from crops of training photos.

    The groups are spread evenly over all tokens of a crop; every element is normalized with the statistics of the
    training crops.

    Raises:
        ValueError: if there are fewer crops than queries or codes.
    """
    train, held_out = store("train"), store("held_out")
    channels = train.plan.latent_shape[0]
    groups = torch.linspace(0, channels * SIDE * SIDE // d - 1, num_groups).long()
    codes, queries = tokens(train, d, groups), tokens(held_out, d, groups)
    mean, deviation, sampled = codes.mean(0), codes.std(0), []
    for values, count in ((queries, num_queries), (codes, num_codes)):
        if len(values) < count:
            raise ValueError(f"real latents: expected at least {count} crops, got {len(values)}")
        rows = values[torch.randperm(len(values), generator=generator)[:count]]
        sampled.append(rows.sub_(mean).div_(deviation).transpose(0, 1).contiguous())
    return sampled[0], sampled[1]


def prepare() -> None:
    """Encode what is missing and print how many crops there are."""
    for part in FRAMES:
        start = time.monotonic()
        frames = store(part)
        crops = len(frames) * (frames.plan.latent_shape[1] - SIDE + 1) ** 2
        print(f"{part}: {len(frames)} frames, {crops} crops, {time.monotonic() - start:.0f} s")
