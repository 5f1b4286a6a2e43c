"""k-means: Lloyd's iterations on the exact search."""

from itertools import pairwise

import pytest
import torch

from revq_kernels import FastChannelVQ
from revq_kernels.nn.codebook_updates import initial_codebook
from revq_kernels.testing.problems import contract_index


def seeded(number=1):
    return torch.Generator().manual_seed(number)


def test_one_iteration_is_the_mean_of_each_codes_vectors():
    x = torch.randn(60, 2, 3)
    drawn = initial_codebook(x, None, 5, 0, seeded())
    codes = initial_codebook(x, None, 5, 1, seeded())
    for g in range(2):
        alone = initial_codebook(x[:, g : g + 1], None, 5, 0, seeded())
        assert g or torch.equal(alone[0], drawn[0])
    indices = contract_index(x[:, :1], drawn[:1])[:, 0]
    for k in range(5):
        torch.testing.assert_close(codes[0, k].double(), x[indices == k, 0].double().mean(0), rtol=1e-5, atol=1e-6)


def test_the_error_falls_and_separate_clusters_are_found():
    centers = 20 * torch.randn(6, 4)
    x = (centers.repeat(30, 1) + 0.1 * torch.randn(180, 4))[:, None]
    errors = []
    for iterations in range(5):
        codes = initial_codebook(x, None, 6, iterations, seeded(4))
        errors.append(torch.cdist(x[:, 0].double(), codes[0].double()).min(1).values.square().mean().item())
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0]


def test_empty_clusters_are_drawn_again():
    """If all vectors are equal, all codes but one have no vectors."""
    x = torch.cat([torch.full((40, 1, 2), 5.0), torch.randn(3, 1, 2) + 9])
    empty = 0
    for seed in range(5):
        drawn = initial_codebook(x, None, 8, 0, seeded(seed))
        indices = contract_index(x, drawn)[:, 0]
        codes = initial_codebook(x, None, 8, 1, seeded(seed))
        unused = [k for k in range(8) if not (indices == k).any()]
        empty += len(unused)
        assert codes.isfinite().all()
        assert all(tuple(codes[0, k].tolist()) in {tuple(row.tolist()) for row in x[:, 0]} for k in unused)
    assert empty > 20


def test_deterministic_by_its_generator():
    vq, x = FastChannelVQ(6, 3, num_groups=2), torch.randn(4, 20, 3)
    vq.initialize_(x, iterations=4, generator=seeded(1))
    first = vq.codebook.detach().clone()
    vq.initialize_(x, iterations=4, generator=seeded(1))
    assert torch.equal(vq.codebook, first)
    vq.initialize_(x, iterations=4, generator=seeded(2))
    assert not torch.equal(vq.codebook, first)


def test_the_module_gives_what_the_metric_sees():
    vq, x = FastChannelVQ(6, 3, metric="cosine"), 50 * torch.randn(4, 20, 3)
    vq.initialize_(x)
    torch.testing.assert_close(vq.codebook.norm(dim=-1), torch.ones(1, 6))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"iterations: expected an integer >= 0, got -1"):
        FastChannelVQ(6, 3).initialize_(torch.randn(1, 20, 3), iterations=-1)
