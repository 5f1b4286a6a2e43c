"""Mean and variance of each element of a latent, and the normalizer that uses them (paper, section 4.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from revq.errors import InputError


class LatentStatistics:
    """Mean and population variance of every element of a latent, over a stream of batches, in float64.

    Batches are combined by the parallel formula of Chan, Golub and LeVeque, which stays accurate when the mean is large
    compared with the standard deviation.  `merge` combines the statistics of parts of a data set.

    Attributes:
        count: number of samples so far.
        mean: float64 ``[*shape]`` on the CPU (None before the first sample).
        variance: float64 ``[*shape]`` on the CPU, the mean squared deviation (None before the first sample).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None  # sum of squared deviations from the mean

    @property
    def variance(self) -> Tensor | None:
        """Population variance, float64 ``[*shape]`` (None before the first sample)."""
        return None if self._squares is None else self._squares / self.count

    @torch.no_grad()
    def update(self, latents: Tensor) -> None:
        """Add a batch ``[B, *shape]`` of any floating dtype, on any device that supports float64.

        Raises:
            InputError: if the shape differs from that of earlier batches.
        """
        if len(latents) == 0:
            return
        batch = latents.detach().cpu().double()  # not every device has float64
        mean = batch.mean(dim=0)
        squares = (batch - mean).square_().sum(dim=0)
        self._join(len(latents), mean, squares)

    def merge(self, other: "LatentStatistics") -> None:
        """Add the samples of ``other``.

        Raises:
            InputError: if ``other`` has latents of another shape.
        """
        if other.mean is not None and other._squares is not None:
            self._join(other.count, other.mean, other._squares)

    def state_dict(self) -> dict[str, Any]:
        """The statistics so far: ``count`` (int), ``mean`` and ``squares`` (float64 tensors, None if count is 0)."""
        return {"count": self.count, "mean": _copy(self.mean), "squares": _copy(self._squares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.count = int(state["count"])
        self.mean, self._squares = _copy(state["mean"]), _copy(state["squares"])

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self.mean is None or self._squares is None:
            self.count, self.mean, self._squares = count, mean.clone(), squares.clone()
            return
        if mean.shape != self.mean.shape:
            raise InputError(f"latents: expected shape {_text(self.mean)} per sample as before, got {_text(mean)}")
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self._squares = self._squares + squares + delta.square() * (self.count * count / total)
        self.count = total


class Normalizer(nn.Module):
    """Normalizes every element of a latent to zero mean and unit variance; the identity until it is fitted.

    The statistics are per element, not per channel, as in the paper's released model.

    Args:
        latent_shape: (C, h, w).

    Attributes:
        mean, std: float32 buffers ``[C, h, w]``; they stay float32 in ``half()``, ``double()`` and the like, as rounded
            statistics would move every latent.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_shape, dtype=torch.float32))
        self.register_buffer("std", torch.ones(latent_shape, dtype=torch.float32))

    @torch.no_grad()
    def fit_(self, statistics: LatentStatistics) -> "Normalizer":
        """Take mean and standard deviation from ``statistics``; an element that never varies gets std 1.

        Raises:
            InputError: if the statistics are empty, not finite, or of another shape.
        """
        if statistics.mean is None or statistics.variance is None:
            raise InputError("statistics: expected at least one latent, got none")
        if statistics.mean.shape != self.mean.shape:
            raise InputError(f"statistics: expected shape {_text(self.mean)}, got {_text(statistics.mean)}")
        mean, std = statistics.mean.float(), statistics.variance.sqrt().float()
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise InputError("statistics: expected finite numbers; some latents contain NaN or infinity")
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std == 0, 1.0, std))
        return self

    def normalize(self, latents: Tensor) -> Tensor:
        """``[B, C, h, w]`` of any floating dtype in the VAE's units -> float32 in units of standard deviations."""
        # Subtraction and division are each correctly rounded, so every device gives the same normalized latent.
        return (latents.float() - self.mean.float()) / self.std.float()

    def denormalize(self, normalized: Tensor) -> Tensor:
        """The inverse of `normalize`: ``[B, C, h, w]`` -> float32 in the VAE's units."""
        return normalized.float() * self.std.float() + self.mean.float()

    def _apply(self, fn: Any, recurse: bool = True) -> "Normalizer":
        """Convert as any module does (``to``, ``half``, ...), but to float32 alone."""

        def convert(buffer: Tensor) -> Tensor:
            converted: Tensor = fn(buffer)
            return converted if converted.dtype == torch.float32 else buffer.to(converted.device)

        return super()._apply(convert, recurse)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
