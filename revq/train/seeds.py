"""Random numbers that depend on nothing but a seed, an epoch and what they are for: so a resumed run draws the same."""

import hashlib

import torch


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed below 2**56 for one purpose in one epoch; unlike seed + epoch, no two of them run into each other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()[:7], "little")


def generator(seed: int, epoch: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device``, seeded by `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, epoch, purpose))
