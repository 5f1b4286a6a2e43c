"""IBQ's VectorQuantizer2, restated: separate because taming's class has the same name.

TencentARC/SEED-Voken, src/IBQ/modules/vqvae/quantize.py; IndexPropagationQuantize is left out.
"""

import torch.nn.functional as F
from torch import Tensor

from tests.third_party_quantizers import taming
from tests.third_party_quantizers.distances import squared_distances


class VectorQuantizer2(taming.VectorQuantizer2):
    """taming's with ``l2_normalize``: directions are compared, the row that is returned keeps its length."""

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        l2_normalize: bool = False,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.l2_normalize = l2_normalize

    def distances(self, flat: Tensor) -> Tensor:
        """As taming's, or those of the directions."""
        if not self.l2_normalize:
            return super().distances(flat)
        return squared_distances(F.normalize(flat), F.normalize(self.embedding.weight))
