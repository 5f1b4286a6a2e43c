"""Codes that are a map of a frozen table."""

import pytest
import torch
from torch import nn

from revq_kernels import EMAUpdate, FastChannelVQ, MappedCodes
from revq_kernels.testing.problems import contract_index


@pytest.mark.parametrize("width", [4, 11])
def test_search_decode_and_gradient_see_the_mapped_codes(width):
    table, linear = torch.randn(20, width), nn.Linear(width, 4)
    vq = FastChannelVQ(20, 4, codes=MappedCodes(table, linear))
    x = torch.randn(2, 9, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(x)
    codes = linear(table).detach()
    assert torch.equal(out.indices, contract_index(x.reshape(-1, 1, 4), codes[None]).reshape(2, 9))
    assert torch.equal(out.quantized, codes[out.indices]) and torch.equal(vq.decode(out.indices), out.quantized)
    out.loss.backward()
    weight = linear.weight.detach().double().requires_grad_()
    mapped = table.double() @ weight.T + linear.bias.detach().double()
    (mapped[out.indices] - x.detach().double()).square().mean().backward()
    torch.testing.assert_close(linear.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)
    assert not vq.codes.table.requires_grad and vq.count.sum() == 18


def test_state_and_parameters():
    vq = FastChannelVQ(8, 4, num_groups=2, codes=MappedCodes(torch.randn(2, 8, 6), nn.Linear(6, 4)))
    assert vq.codebook is None
    assert set(vq.state_dict()) == {"count", "codes.table", "codes.projector.weight", "codes.projector.bias"}
    assert {name for name, _ in vq.named_parameters()} == {"codes.projector.weight", "codes.projector.bias"}
    assert vq.eval()(torch.randn(2, 6, 4)).indices.shape == (2, 6)


def test_wrong_arguments():
    def codes():
        return MappedCodes(torch.randn(8, 4), nn.Linear(4, 4))

    for call, message in (
        (lambda: FastChannelVQ(8, 4, codes=codes(), update=EMAUpdate()), r"codes: expected None beside update"),
        (lambda: FastChannelVQ(8, 4, codes=codes()).reset_(), r"codes: expected None for a codebook to move"),
        (lambda: FastChannelVQ(8, 4, codes=codes()).initialize_(torch.randn(1, 9, 4)), r"codes: expected None for"),
        (
            lambda: FastChannelVQ(9, 4, codes=codes())(torch.randn(1, 9, 4)),
            r"codes: expected .*\(1, 9, 4\), got \(1, 8, 4\)",
        ),
        (lambda: MappedCodes(torch.randn(8), nn.Linear(8, 4)), r"table: expected \[G, K, f\] or \[K, f\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
