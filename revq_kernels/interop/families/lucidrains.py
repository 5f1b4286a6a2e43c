"""vector-quantize-pytorch 1.32: the Codebook inside VectorQuantize, ResidualVQ and all that is built of them."""

import torch
import torch.nn.functional as F
from torch import nn

from revq_kernels.interop.families.lucidrains_codebook import CodebookMethods, options, outside_graphs
from revq_kernels.interop.family import Call, Family, Vectors


def _unfit(module: nn.Module) -> str | None:
    from vector_quantize_pytorch.vector_quantize_pytorch import gumbel_sample

    outside_graphs()
    expected = (module.num_codebooks, module.codebook_size)
    if module.embed.dim() != 3 or module.embed.shape[:2] != expected:
        return f"embed is {tuple(module.embed.shape)}, expected [{expected[0]}, {expected[1]}, d]"
    choose = getattr(module.gumbel_sample, "func", module.gumbel_sample)
    if choose is not gumbel_sample or not {*options(module)} <= {"stochastic", "straight_through"}:
        return "gumbel_sample, which chooses the code, is not the package's"
    return None


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    heads, num_codes, dim = module.embed.shape
    rows = 8 if module.initted else min((num_codes + 1) // 2, 512)  # k-means warns of fewer vectors than codes
    x = vectors(module.embed, heads, 2, rows, dim) if heads > 1 else vectors(module.embed, 2, rows, dim)
    if module.use_cosine_sim:
        x = F.normalize(x, dim=-1)
    if not module.initted:
        return [Call("forward", (x,))]
    mask = torch.arange(rows, device=x.device).expand(2, -1) < torch.tensor([[rows], [rows // 2]], device=x.device)
    calls = [Call("forward", (x,)), Call("forward", (x,), {"mask": mask})]
    if not module.affine_param:
        indices = torch.arange(x[..., 0].numel(), device=x.device).view(x.shape[:-1]) % num_codes
        calls.append(Call("update_indices", (x, indices), {"mask": mask}))
    return calls


FAMILIES = (
    Family(
        "vector-quantize-pytorch Codebook",
        ("vector_quantize_pytorch.vector_quantize_pytorch.Codebook",),
        CodebookMethods,
        _unfit,
        _calls,
    ),
)
