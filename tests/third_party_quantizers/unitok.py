"""UniTok's quantizers (FoundationVision/UniTok, models/quant.py), restated.

Kept: constructors, names of attributes and state, the losses on normalized vectors, the record of usage that evaluation
updates too, the sum over processes in training.  Left out: ``extra_repr`` and the residual convolution that the file also
defines.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.third_party_quantizers import process_group as dist


class NormalizedEmbedding(nn.Embedding):
    """A table whose rows are normalized when they are read."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)

    def forward(self, idx: Tensor) -> Tensor:
        """Unit vectors of ``idx``."""
        return F.embedding(idx, self.get_norm_weight())

    def get_norm_weight(self) -> Tensor:
        """All unit vectors."""
        return F.normalize(self.weight, dim=1)


class VectorQuantizer(nn.Module):
    """``[B, L, vocab_width]`` -> (quantized, loss, entropy loss, percentage of codes in use)."""

    def __init__(
        self,
        vocab_size: int,
        vocab_width: int,
        beta: float = 0.25,
        use_entropy_loss: bool = False,
        entropy_temp: float = 0.01,
    ) -> None:
        super().__init__()
        self.vocab_size, self.vocab_width, self.beta = vocab_size, vocab_width, beta
        self.vocab_usage_record_times = 0
        self.register_buffer("vocab_usage", torch.zeros(vocab_size))
        self.codebook = NormalizedEmbedding(vocab_size, vocab_width)
        self.use_entropy_loss, self.inv_entropy_tau = use_entropy_loss, 1 / entropy_temp

    def init_vocab(self, eini: float) -> None:
        """A normal table of standard deviation ``eini``, or a small uniform one for a negative number."""
        if eini > 0:
            nn.init.trunc_normal_(self.codebook.weight.data, std=eini)
        elif eini < 0:
            bound = -eini * self.vocab_width**-0.5 / 36
            self.codebook.weight.data.uniform_(-bound, bound)

    def forward(self, features: Tensor) -> tuple:
        """The code of the largest inner product, both sides normalized."""
        shape = features.shape
        features = F.normalize(features.reshape(-1, shape[-1]), dim=-1).float()
        codes = self.codebook.get_norm_weight()
        indices = (features.detach() @ codes.t()).argmax(1)
        entropy_loss = _entropy_loss(features, codes, self.inv_entropy_tau) if self.use_entropy_loss else 0
        found = self.codebook(indices)
        loss = self.beta * F.mse_loss(features, found.detach()) + F.mse_loss(found, features.detach())
        through = (found.detach() - features.detach()) + features

        share = indices.bincount(minlength=self.vocab_size).float()
        if self.training and dist.initialized():
            torch.distributed.all_reduce(share)
        share = share / share.sum()
        usage = (share > 0.01 / self.vocab_size).float().mean() * 100
        if self.vocab_usage_record_times == 0:
            self.vocab_usage.copy_(share)
        else:
            kept, new = (0.9, 0.1) if self.vocab_usage_record_times < 100 else (0.99, 0.01)
            self.vocab_usage.mul_(kept).add_(share, alpha=new)
        self.vocab_usage_record_times += 1
        return through.view(shape), loss, entropy_loss, usage

    def f_to_idx(self, features: Tensor) -> Tensor:
        """Indices ``[B, L]``."""
        rows = F.normalize(features.reshape(-1, features.shape[-1]), dim=-1).float()
        return (rows.detach() @ self.codebook.get_norm_weight().float().t()).argmax(1).view(features.shape[:2])


class VectorQuantizerM(nn.Module):
    """Several quantizers in parallel, one for each chunk of the last dimension."""

    def __init__(
        self,
        vocab_size: int,
        vocab_width: int,
        beta: float = 0.25,
        use_entropy_loss: bool = False,
        entropy_temp: float = 0.01,
        num_codebooks: int = 16,
    ) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        size, width = vocab_size // num_codebooks, vocab_width // num_codebooks
        self.codebooks = nn.ModuleList(
            VectorQuantizer(size, width, beta, use_entropy_loss, entropy_temp) for _ in range(num_codebooks)
        )

    def init_vocab(self, eini: float) -> None:
        """Initialize every quantizer's table."""
        for codebook in self.codebooks:
            codebook.init_vocab(eini)

    def f_to_idx(self, features: Tensor) -> Tensor:
        """Indices ``[B, num_codebooks, L]``."""
        return torch.stack([part.f_to_idx(piece) for part, piece in self._pieces(features)], dim=1)

    def idx_to_f(self, indices: Tensor) -> Tensor:
        """Unit vectors of indices ``[B, num_codebooks, ...]``, concatenated."""
        assert indices.shape[1] == self.num_codebooks
        parts = [part.codebook(indices[:, i].flatten(1)) for i, part in enumerate(self.codebooks)]
        return torch.cat(parts, dim=-1)

    def forward(self, features: Tensor) -> tuple:
        """Quantized chunks, concatenated, and the means of the other results."""
        results = [part(piece) for part, piece in self._pieces(features)]
        quantized, *rest = zip(*results, strict=True)
        means = (sum(values) / self.num_codebooks for values in rest)
        return torch.cat(quantized, dim=-1), *means

    def _pieces(self, features: Tensor) -> zip:
        return zip(self.codebooks, features.split(features.shape[-1] // self.num_codebooks, dim=-1), strict=True)


def _entropy_loss(rows: Tensor, codes: Tensor, sharpness: float) -> Tensor:
    distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * (rows @ codes.t())
    logits = -distances.float() * sharpness
    probability = logits.softmax(-1)
    of_samples = -(probability * logits.log_softmax(-1)).sum(-1).mean()
    mean = probability.mean(0)
    return of_samples + (mean * (mean + 1e-7).log()).sum()
