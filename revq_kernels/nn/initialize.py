"""Where a codebook starts: vectors of the data, or k-means on them."""

import torch
from torch import Tensor

from revq_kernels import ops
from revq_kernels.functional import count_codes_, nearest_code
from revq_kernels.nn.dead_codes import distinct_rows


@torch.no_grad()
def initial_codebook(
    vectors: Tensor, mask: Tensor | None, num_codes: int, iterations: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """K vectors per group, drawn without replacement, then moved by Lloyd's iterations (k-means).

    Drawing with replacement would start with 2 to 27 % exact twins at the paper's sizes, of which only the lower index is
    ever chosen.

    Args:
        vectors: ``[N, G, d]``.
        mask: bool ``[N, G]``, which of them count, or None.
        num_codes: K.
        iterations: of Lloyd; 0 leaves the drawn vectors.
        generator: source of the draws, on any device.

    Returns:
        float32 ``[G, K, d]``.

    Raises:
        ValueError: if a group has fewer than K vectors that count, or for negative iterations.
    """
    if iterations < 0:
        raise ValueError(f"iterations: expected an integer >= 0, got {iterations}")
    codebook = []
    for group in range(vectors.shape[1]):
        rows = vectors[:, group] if mask is None else vectors[mask[:, group], group]
        if rows.shape[0] < num_codes:
            raise ValueError(
                f"x: expected at least num_codes={num_codes} vectors per group to draw from, got {rows.shape[0]}"
            )
        device = "cpu" if generator is None else generator.device
        chosen = torch.randperm(rows.shape[0], generator=generator, device=device)[:num_codes]
        codes = rows[chosen.to(rows.device)].float()
        for _ in range(iterations):
            codes = _lloyd(rows, codes, generator)
        codebook.append(codes)
    return torch.stack(codebook)


def _lloyd(rows: Tensor, codes: Tensor, generator: torch.Generator | None) -> Tensor:
    """rows ``[n, d]``, codes ``[K, d]`` -> the mean of each code's rows; a code without any becomes one of the rows."""
    queries, num_codes = rows[:, None], codes.shape[0]
    indices = nearest_code(queries, codes[None])
    count = count_codes_(torch.zeros(1, num_codes, dtype=torch.int64, device=rows.device), indices)
    total = ops.overload("segment_sum", "default")(queries, indices, num_codes)[0]
    empty = count == 0
    device = "cpu" if generator is None else generator.device
    drawn, _ = distinct_rows(empty.to(device), rows.shape[0], generator=generator)
    mean = total / count[0, :, None].clamp(min=1)
    return torch.where(empty[0, :, None], rows[drawn[0].to(rows.device)].float(), mean)
