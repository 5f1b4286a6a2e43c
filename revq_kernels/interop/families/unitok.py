"""The quantizers that stand side by side in UniTok's, by what they hold: unit vectors and a record of their usage."""

from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revq_kernels.interop.entropy import code_entropies
from revq_kernels.interop.families.process_group import sums_over_processes
from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import count_choices, has_zero_code, most_aligned


class _UniTok:
    def forward(self, features: Tensor) -> tuple:
        B, L, C = features.shape
        features = features.reshape(-1, C)
        features = F.normalize(features, dim=-1).float()
        codes = self.codebook.get_norm_weight()
        indices = most_aligned(features, codes)
        entropy_loss = 0
        if self.use_entropy_loss:
            of_rows, of_mean = code_entropies(features, codes, 1 / self.inv_entropy_tau, 1e-7)
            entropy_loss = of_rows - of_mean
        found = self.codebook(indices)
        vq_loss = F.mse_loss(found.detach(), features).mul_(self.beta) + F.mse_loss(found, features.detach())
        found = (found.detach() - features.detach()).add_(features)

        share = count_choices(indices, self.vocab_size).float()
        if self.training and sums_over_processes(type(self)):
            torch.distributed.all_reduce(share)
        share /= share.sum()
        usage = (share > 0.01 / self.vocab_size).float().mean().mul_(100)
        if self.vocab_usage_record_times == 0:
            self.vocab_usage.copy_(share)
        elif self.vocab_usage_record_times < 100:
            self.vocab_usage.mul_(0.9).add_(share, alpha=0.1)
        else:
            self.vocab_usage.mul_(0.99).add_(share, alpha=0.01)
        self.vocab_usage_record_times += 1
        return found.view(B, L, C), vq_loss, entropy_loss, usage

    def f_to_idx(self, features: Tensor) -> Tensor:
        B, L, C = features.shape
        features = F.normalize(features.reshape(-1, C), dim=-1).float()
        return most_aligned(features, self.codebook.get_norm_weight().float()).view(B, L)


def _unfit(module: nn.Module) -> str | None:
    attrgetter("beta", "vocab_usage", "vocab_usage_record_times", "use_entropy_loss", "inv_entropy_tau")(module)
    table = module.codebook.weight
    expected, found = (module.vocab_size, module.vocab_width), tuple(table.shape)
    if expected != found:
        return f"codebook.weight is {found}, expected {expected}"
    if not callable(module.codebook.get_norm_weight):
        return "codebook.get_norm_weight is no method"
    return "a code is 0, and has no direction" if has_zero_code(table) else None


def _calls(module: nn.Module, vectors: Vectors) -> list[Call]:
    features = vectors(module.codebook.weight, 2, 32, module.vocab_width)
    return [Call("forward", (features,)), Call("f_to_idx", (features,))]


FAMILIES = (Family("UniTok", ("*.VectorQuantizer",), _UniTok, _unfit, _calls),)
