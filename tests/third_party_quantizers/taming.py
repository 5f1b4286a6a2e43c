"""CompVis/taming-transformers, taming/modules/vqvae/quantize.py: VectorQuantizer and VectorQuantizer2."""

import torch
from torch import Tensor, nn

from tests.third_party_quantizers.distances import squared_distances


class VectorQuantizer(nn.Module):
    """The older class: codes by a product with the one-hot matrix, which is returned.  ``get_codebook_entry`` is left out."""

    def __init__(self, n_e: int, e_dim: int, beta: float) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta = n_e, e_dim, beta
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """z ``[B, C, H, W]`` -> quantized of that shape, loss, (perplexity, one-hot ``[N, K]``, indices)."""
        z = z.permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, self.e_dim)
        indices = squared_distances(flat, self.embedding.weight).argmin(dim=1, keepdim=True)
        one_hot = torch.zeros(len(flat), self.n_e).to(z).scatter_(1, indices, 1)
        rows = torch.matmul(one_hot, self.embedding.weight).view(z.shape)
        loss = torch.mean((rows.detach() - z) ** 2) + self.beta * torch.mean((rows - z.detach()) ** 2)
        quantized = (z + (rows - z).detach()).permute(0, 3, 1, 2).contiguous()
        usage = one_hot.mean(dim=0)
        perplexity = torch.exp(-torch.sum(usage * torch.log(usage + 1e-10)))
        return quantized, loss, (perplexity, one_hot, indices)


class Remapping(nn.Module):
    """Base of VectorQuantizer2 and its subclasses: the table, and indices remapped to those in use.

    ``remap`` is the tensor of indices in use, not the path of a file that holds it.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: Tensor | None,
        unknown_index: str | int,
        sane_index_shape: bool,
        legacy: bool,
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)
        self.sane_index_shape = sane_index_shape
        self.remap, self.re_embed = remap, n_e
        if remap is not None:
            self.register_buffer("used", remap)
            self.re_embed = len(remap)
            self.unknown_index = unknown_index
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Indices among all codes -> positions in ``used``, by comparison with every entry."""
        shape = inds.shape
        assert len(shape) > 1
        inds = inds.reshape(shape[0], -1)
        same = (inds.unsqueeze(-1) == self.used.to(inds)).long()
        new, unknown = same.argmax(-1), same.sum(-1) == 0
        if self.unknown_index == "random":
            new[unknown] = torch.randint(0, self.re_embed, size=new[unknown].shape).to(device=new.device)
        else:
            new[unknown] = self.unknown_index
        return new.reshape(shape)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Positions in ``used`` -> indices among all codes."""
        inds = inds.clone()
        if self.re_embed > len(self.used):
            inds[inds >= len(self.used)] = 0
        return self.used.to(inds)[inds]

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes by (remapped) index, ``shape`` being (B, H, W, C)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).reshape(-1)
        rows = self.embedding(indices)
        return rows if shape is None else rows.view(shape).permute(0, 3, 1, 2).contiguous()

    def loss(self, z: Tensor, rows: Tensor) -> Tensor:
        """Both loss terms, one of them times beta."""
        to_codes, to_z = torch.mean((rows.detach() - z) ** 2), torch.mean((rows - z.detach()) ** 2)
        return to_codes + self.beta * to_z if self.legacy else self.beta * to_codes + to_z

    def arranged(self, indices: Tensor, quantized: Tensor) -> Tensor:
        """Flat indices in the shape and numbering of the options."""
        if self.remap is not None:
            indices = self.remap_to_used(indices.reshape(quantized.shape[0], -1)).reshape(-1, 1)
        if self.sane_index_shape:
            indices = indices.reshape(quantized.shape[0], quantized.shape[2], quantized.shape[3])
        return indices


class VectorQuantizer2(Remapping):
    """The class of VQGAN checkpoints; ``legacy`` multiplies the codebook's term by beta."""

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: Tensor | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple]:
        """z ``[B, C, H, W]`` -> quantized of that shape, loss, (None, None, indices)."""
        assert temp in (None, 1.0) and not rescale_logits and not return_logits, "for quantizers of another kind"
        z = z.permute(0, 2, 3, 1).contiguous()
        indices = self.distances(z.view(-1, self.e_dim)).argmin(dim=1)
        rows = self.embedding(indices).view(z.shape)
        quantized = (z + (rows - z).detach()).permute(0, 3, 1, 2).contiguous()
        return quantized, self.loss(z, rows), (None, None, self.arranged(indices, quantized))

    def distances(self, flat: Tensor) -> Tensor:
        """Distances ``[N, K]``."""
        return squared_distances(flat, self.embedding.weight)
