"""The rectifiers: names and shapes of the official checkpoints, the residual form, gradients."""

import pytest
import torch
import torch.nn.functional as F

from revq.config import RectifierConfig
from revq.errors import InputError
from revq.model.rectifier import build_rectifier

SHAPE = (32, 8, 8)
KINDS = ("efficientvit", "cnn", "mlp")


def official_contract(width, layers):
    """Names and shapes of the official decoder checkpoint (32 latent channels)."""
    w = width
    contract = {"conv_in.weight": (w, 32, 3, 3), "conv_in.bias": (w,), "norm_out.weight": (w,), "norm_out.bias": (w,)}
    contract |= {"conv_out.weight": (32, w, 3, 3), "conv_out.bias": (32,)}
    for layer in range(layers):
        block = {
            "attn.to_q.weight": (w, w),
            "attn.to_k.weight": (w, w),
            "attn.to_v.weight": (w, w),
            "attn.to_qkv_multiscale.0.proj_in.weight": (3 * w, 1, 5, 5),
            "attn.to_qkv_multiscale.0.proj_out.weight": (3 * w, 32, 1, 1),
            "attn.to_out.weight": (w, 2 * w),
            "attn.norm_out.weight": (w,),
            "attn.norm_out.bias": (w,),
            "conv_out.conv_inverted.weight": (8 * w, w, 1, 1),
            "conv_out.conv_inverted.bias": (8 * w,),
            "conv_out.conv_depth.weight": (8 * w, 1, 3, 3),
            "conv_out.conv_depth.bias": (8 * w,),
            "conv_out.conv_point.weight": (w, 4 * w, 1, 1),
            "conv_out.norm.weight": (w,),
            "conv_out.norm.bias": (w,),
        }
        contract |= {f"up_blocks.0.{layer}.{name}": shape for name, shape in block.items()}
    return contract


@pytest.mark.parametrize("form", ["absolute", "residual"])
@pytest.mark.parametrize(
    ("width", "layers", "millions", "keys"),
    [(512, 3, 14.07, 51), (1024, 4, 72.97, 66), (512, 4, 18.66, 66)],
    ids=["512T", "256T-B", "256T-L"],
)
def test_efficientvit_has_the_official_names_shapes_and_sizes(width, layers, millions, keys, form):
    with torch.device("meta"):
        rectifier = build_rectifier(RectifierConfig(width=width, layers=layers, form=form), SHAPE)
    shapes = {name: tuple(tensor.shape) for name, tensor in rectifier.state_dict().items()}
    assert shapes == official_contract(width, layers)
    assert len(shapes) == keys
    assert round(sum(p.numel() for p in rectifier.parameters()) / 1e6, 2) == millions


def test_absolute_form_is_the_official_forward():
    rectifier = build_rectifier(RectifierConfig(width=64, layers=2), SHAPE)
    z = torch.randn(3, *SHAPE)
    # the forward pass written out: conv_in plus each channel repeated, the blocks, RMSNorm over channels, ReLU, conv_out
    h = rectifier.conv_in(z) + z.repeat_interleave(2, dim=1)
    for block in rectifier.up_blocks[0]:
        h = block(h)
    h = h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt()
    h = h * rectifier.norm_out.weight.view(1, -1, 1, 1) + rectifier.norm_out.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(rectifier(z), rectifier.conv_out(F.relu(h)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_form_starts_as_the_identity_and_can_leave_it(kind):
    rectifier = build_rectifier(RectifierConfig(kind, width=32, layers=1, form="residual"), SHAPE)
    z = torch.randn(2, *SHAPE)
    assert torch.equal(rectifier(z), z)
    rectifier(z).square().sum().backward()
    assert rectifier.conv_out.weight.grad.abs().sum() > 0
    with torch.no_grad():
        rectifier.conv_out.bias.fill_(0.5)
    torch.testing.assert_close(rectifier(z), z + 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_absolute_form_is_not_residual(kind):
    torch.manual_seed(1)
    absolute = build_rectifier(RectifierConfig(kind, width=32, layers=1), SHAPE)
    residual = build_rectifier(RectifierConfig(kind, width=32, layers=1, form="residual"), SHAPE)
    residual.load_state_dict(absolute.state_dict())  # both forms have the same parameter names
    z = torch.randn(2, *SHAPE)
    torch.testing.assert_close(residual(z), absolute(z) + z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(32, 8, 8), (4, 4, 4), (16, 2, 6)], ids=str)
def test_output_has_the_latents_shape_and_every_parameter_a_gradient(kind, shape):
    rectifier = build_rectifier(RectifierConfig(kind, width=64, layers=2), shape)
    out = rectifier(torch.randn(2, *shape))
    assert out.shape == (2, *shape)
    out.square().sum().backward()
    assert [name for name, p in rectifier.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_cnn_blocks_are_convolutions_between_the_official_ends():
    rectifier = build_rectifier(RectifierConfig("cnn", width=64, layers=2), SHAPE)
    shapes = {name: tuple(tensor.shape) for name, tensor in rectifier.state_dict().items()}
    assert shapes["conv_in.weight"] == (64, 32, 3, 3)
    assert shapes["conv_out.weight"] == (32, 64, 3, 3)
    assert shapes["up_blocks.0.1.conv1.weight"] == shapes["up_blocks.0.1.conv2.weight"] == (64, 64, 3, 3)
    assert not any("attn" in name for name in shapes)


def test_mlp_mixes_a_sample_and_no_others():
    rectifier = build_rectifier(RectifierConfig("mlp", width=32, layers=2), SHAPE)
    z = torch.randn(4, *SHAPE)
    torch.testing.assert_close(rectifier(z)[1:2], rectifier(z[1:2]))
    moved = z.clone()
    moved[0, 0, 0, 0] += 1
    assert (rectifier(moved)[0] != rectifier(z)[0]).flatten().float().mean() > 0.9


@pytest.mark.parametrize("form", ["absolute", "residual"])
def test_identity_returns_its_input(form):
    rectifier = build_rectifier(RectifierConfig("identity", form=form), SHAPE)
    z = torch.randn(2, *SHAPE)
    assert torch.equal(rectifier(z), z)
    assert not list(rectifier.parameters())


def test_unusable_configurations_are_refused():
    with pytest.raises(InputError, match="multiple of the 12 latent channels, got 32"):
        build_rectifier(RectifierConfig("cnn", width=32), (12, 4, 4))
    with pytest.raises(InputError, match="form: expected 'absolute' or 'residual', got 'other'"):
        build_rectifier(RectifierConfig("identity", form="other"), SHAPE)
    with pytest.raises(InputError, match=r"kind: expected .* got 'vit'"):
        build_rectifier(RectifierConfig("vit", width=32), SHAPE)
