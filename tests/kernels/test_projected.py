"""Linear maps around a quantizer."""

import pytest
import torch

from revq_kernels import FastChannelVQ, ProjectedVQ
from revq_kernels.interop import formats

SHAPES = {"BCHW": (6, 2, 4), "BLC": (4, 6), "BDT": (6, 4), "BTCHW": (2, 6, 2, 2), "BCDHW": (6, 2, 2, 2), None: (4, 6)}
CHANNEL = {"BCHW": 1, "BLC": 2, "BDT": 1, "BTCHW": 2, "BCDHW": 1, None: 2}


@pytest.mark.parametrize("layout", SHAPES)
def test_each_layout(layout):
    module = ProjectedVQ(6, FastChannelVQ(9, 3, layout=layout, split="space"))
    x, axis = torch.randn(2, *SHAPES[layout]), CHANNEL[layout]
    inner = (x.movedim(axis, -1) @ module.project_in.weight.T + module.project_in.bias).movedim(-1, axis)
    expected, out = module.vq.quantize(inner), module(x)
    codes = module.vq.decode(expected.indices)
    mapped = (codes @ module.project_out.weight.T + module.project_out.bias).reshape(*x.movedim(axis, -1).shape)
    assert torch.equal(out.indices, expected.indices) and torch.equal(module.encode(x), out.indices)
    torch.testing.assert_close(out.quantized, mapped.movedim(-1, axis), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.decode(out.indices, None if layout is None else SHAPES[layout]), out.quantized)
    assert torch.equal(out.loss, expected.loss)


def test_pieces_of_a_position():
    module = ProjectedVQ(6, FastChannelVQ(9, 2, num_groups=2, layout="BCHW", split="space"), inner=4)
    x = torch.randn(2, 6, 3, 3)
    out = module(x)
    assert out.indices.shape == (2, 18) and out.quantized.shape == x.shape
    torch.testing.assert_close(module.decode(out.indices, (6, 3, 3)), out.quantized)


def test_both_maps_learn_from_the_decoder():
    module = ProjectedVQ(6, FastChannelVQ(9, 3))
    x = torch.randn(2, 4, 6, requires_grad=True)
    module(x).quantized.sum().backward()
    for tensor in (module.project_in.weight, module.project_out.weight, x):
        assert tensor.grad.abs().sum() > 0
    expected = torch.ones(6) @ module.project_out.weight @ module.project_in.weight
    torch.testing.assert_close(x.grad, expected.expand(2, 4, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["BLC", "BDT", None])
def test_masked_positions_keep_their_value(layout):
    module = ProjectedVQ(6, FastChannelVQ(9, 3, layout=layout, split="space"))
    x, mask = torch.randn(2, *SHAPES[layout]), torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    out, full = module(x, mask=mask), module.eval()(x)
    axis = CHANNEL[layout]
    ours, own, all_of = (t.movedim(axis, -1) for t in (out.quantized, x, full.quantized))
    assert torch.equal(ours[~mask], own[~mask]) and torch.equal(ours[mask], all_of[mask])
    decoded = module.decode(out.indices, None if layout is None else SHAPES[layout]).movedim(axis, -1)
    assert (decoded[~mask] == 0).all() and decoded[mask].abs().min() > 0


def test_the_output_format_is_the_quantizers():
    module = ProjectedVQ(6, FastChannelVQ(9, 3, layout="BDT", split="space", output_format=formats.dac))
    x = torch.randn(2, 6, 4)
    quantized, commitment, codebook, indices, z_e = module(x)
    assert quantized.shape == x.shape and z_e.shape == (2, 3, 4) and indices.shape == (2, 4)
    torch.testing.assert_close(commitment, codebook)


def test_initialization_uses_the_projected_latents():
    module, x = ProjectedVQ(6, FastChannelVQ(5, 3)), torch.randn(2, 4, 6)
    module.initialize_(x)
    assert module.vq.codebook.shape == (1, 5, 3)
    rows = module.project_in(x).reshape(-1, 3)
    assert all((row == rows).all(1).any() for row in module.vq.codebook[0])


def test_padding_reaches_no_gradient():
    vq = ProjectedVQ(16, FastChannelVQ(32, 4, layout="BLC", split="space"))
    x = torch.randn(2, 8, 16)
    x[1, 4:] = float("nan")
    out = vq(x, lengths=torch.tensor([8, 4]))
    (out.loss + out.quantized[0].sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in vq.parameters())
    assert out.quantized[1, 4:].isnan().all() and (out.indices[1, 4:] == -1).all()


def test_directions_in_bfloat16_there_and_back():
    vq = ProjectedVQ(16, FastChannelVQ(32, 4, metric="cosine", layout="BLC", split="space")).bfloat16().eval()
    out = vq(torch.randn(2, 8, 16).bfloat16())
    assert torch.equal(vq.decode(out.indices, (8, 16)), out.quantized)
