"""LlamaGen's quantizer, by what it holds: four losses in training, an entropy over all codes among them."""

from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revq_kernels.interop.entropy import code_entropies
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import nearest

_TEMPERATURE, _EPS = 0.01, 1e-5


class _LlamaGen:
    def forward(self, z: Tensor) -> tuple:
        z = torch.einsum("b c h w -> b h w c", z).contiguous()
        rows, codes = z.view(-1, self.e_dim), self.embedding.weight
        if self.l2_norm:
            z = F.normalize(z, p=2, dim=-1)
            rows = F.normalize(rows, p=2, dim=-1)
            codes = F.normalize(codes, p=2, dim=-1)
        indices = nearest(rows, codes)
        quantized = codes[indices].view(z.shape)
        vq_loss = commit_loss = entropy_loss = None
        usage = 0
        if self.training:
            if self.show_usage:
                count = indices.shape[0]
                used = self.codebook_used.detach()  # it is a parameter, which as a leaf takes no assignment
                used[:-count] = used[count:].clone()
                used[-count:] = indices
                usage = len(torch.unique(used)) / self.n_e
            vq_loss = torch.mean((quantized - z.detach()) ** 2)
            commit_loss = self.beta * torch.mean((quantized.detach() - z) ** 2)
            entropy_loss = self.entropy_loss_ratio * _entropy_loss(rows, codes, self.entropy_loss_ratio)
        quantized = z + (quantized - z).detach()
        quantized = torch.einsum("b h w c -> b c h w", quantized)
        return quantized, (vq_loss, commit_loss, entropy_loss, usage), (None, None, indices)


def _entropy_loss(rows: Tensor, codes: Tensor, ratio: float) -> Tensor:
    if ratio == 0:  # value and gradients become 0; only NaN and infinities come through
        return rows.sum() + codes.sum()
    of_rows, of_mean = code_entropies(rows, codes, _TEMPERATURE, _EPS)
    autocast = torch.is_autocast_enabled(rows.device.type)
    dtype = torch.float32 if autocast else torch.promote_types(rows.dtype, codes.dtype)
    return (of_rows - of_mean).to(dtype)


def _unfit(module: nn.Module) -> str | None:
    attrgetter("beta", "l2_norm", "show_usage", "entropy_loss_ratio", "codebook_used" if module.show_usage else "n_e")(
        module
    )
    if hasattr(module, "groups"):
        return "MGVQ's returns the one-hot matrix and draws from a softmax over all vectors of the batch"
    expected, found = (module.n_e, module.e_dim), tuple(module.embedding.weight.shape)
    return None if expected == found else f"embedding.weight is {found}, expected {expected}"


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    return [Call("forward", (vectors(module.embedding.weight, 2, module.e_dim, 4, 8),))]


FAMILIES = (Family("LlamaGen", ("*.VectorQuantizer",), _LlamaGen, _unfit, _calls),)
