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
    last = rectifier.fc_out if kind == "mlp" else rectifier.conv_out
    assert last.weight.grad.abs().sum() > 0
    with torch.no_grad():
        last.bias.fill_(0.5)
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


CNN_BLOCK = {"conv1.0.weight": ("r", "w", 3, 3), "conv1.1.weight": ("w", "r", 3, 3), "conv1.1.bias": ("w",)}
CNN_BLOCK |= {"conv2.0.weight": ("r", "w", 3, 3), "conv2.1.weight": ("w", "r", 3, 3)}
CNN_BLOCK |= {"norm.weight": ("w",), "norm.bias": ("w",)}
MLP_BLOCK = {"fc1.weight": ("w", "i"), "fc1.bias": ("w",), "fc2.weight": ("w", "w"), "fc2.bias": ("w",)}
MLP_BLOCK |= {f"norm.{name}": ("w",) for name in ("weight", "bias", "running_mean", "running_var")}
MLP_BLOCK |= {"norm.num_batches_tracked": ()}


def table_4(kind, width, layers):
    """Names and shapes of the paper's other rectifiers, of latents (32, 8, 8)."""
    if kind == "cnn":
        ends = {n: shape for n, shape in official_contract(width, layers).items() if not n.startswith("up_blocks")}
        blocks = {f"up_blocks.0.{layer}": CNN_BLOCK for layer in range(layers)}
    else:
        ends = {"fc_out.weight": (2048, width), "fc_out.bias": (2048,)}
        shortcut = {} if width == 2048 else {"fc3.weight": ("w", "i"), "fc3.bias": ("w",)}
        blocks = {"prelayers.0": MLP_BLOCK | shortcut}
        blocks |= {f"postlayers.{layer}": MLP_BLOCK for layer in range(layers - 1)}
    shapes = dict(ends)
    for block, tensors in blocks.items():
        sizes = {"w": width, "r": width // 16, "i": 2048 if block.startswith("pre") else width}
        shapes |= {f"{block}.{n}": tuple(sizes.get(size, size) for size in shape) for n, shape in tensors.items()}
    return shapes


@pytest.mark.parametrize("form", ["absolute", "residual"])
@pytest.mark.parametrize(
    ("kind", "width", "layers", "parameters"),
    [
        ("cnn", 512, 3, 2_070_560),
        ("cnn", 1024, 4, 10_042_400),
        ("mlp", 2048, 3, 29_386_752),
        ("mlp", 64, 1, 2048 * 64 + 64 + 64 * 65 + 128 + 2048 * 64 + 64 + 64 * 2048 + 2048),
    ],
)
def test_cnn_and_mlp_have_the_layers_of_table_4(kind, width, layers, parameters, form):
    with torch.device("meta"):
        rectifier = build_rectifier(RectifierConfig(kind, width, layers, form), SHAPE)
    assert {name: tuple(tensor.shape) for name, tensor in rectifier.state_dict().items()} == table_4(
        kind, width, layers
    )
    assert sum(parameter.numel() for parameter in rectifier.parameters()) == parameters


def randomize(rectifier):
    for number, tensor in enumerate(rectifier.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)).abs() / 8)


def test_cnn_forward_written_out():
    rectifier = build_rectifier(RectifierConfig("cnn", width=64, layers=2), SHAPE).double()
    randomize(rectifier)
    state, z = rectifier.state_dict(), torch.randn(3, *SHAPE, dtype=torch.float64)

    def conv(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=1)

    def norm(name, x):
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"].view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1)

    h = conv("conv_in", z) + z.repeat_interleave(2, dim=1)
    for block in ("up_blocks.0.0", "up_blocks.0.1"):
        inner = conv(f"{block}.conv1.1", conv(f"{block}.conv1.0", h))
        inner = conv(f"{block}.conv2.1", conv(f"{block}.conv2.0", inner * torch.sigmoid(inner)))
        h = h + norm(f"{block}.norm", inner)
    torch.testing.assert_close(rectifier(z), conv("conv_out", norm("norm_out", h).relu()))


@pytest.mark.parametrize("width", [64, 24])
@pytest.mark.parametrize("training", [True, False])
def test_mlp_forward_written_out(width, training):
    """With and without a layer in the shortcut of the first block, of latents with 64 elements."""
    rectifier = build_rectifier(RectifierConfig("mlp", width, 3), (4, 4, 4)).double().train(training)
    randomize(rectifier)
    state = {name: tensor.clone() for name, tensor in rectifier.state_dict().items()}
    z = torch.randn(5, 4, 4, 4, dtype=torch.float64)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    h = z.flatten(1)
    for block in ("prelayers.0", "postlayers.0", "postlayers.1"):
        inner = linear(f"{block}.fc1", h)
        inner = linear(f"{block}.fc2", inner * torch.sigmoid(inner))
        mean, var = state[f"{block}.norm.running_mean"], state[f"{block}.norm.running_var"]
        if training:  # the batch's own statistics; the running ones follow by a tenth
            state[f"{block}.norm.running_mean"] = 0.9 * mean + 0.1 * inner.mean(0)
            state[f"{block}.norm.running_var"] = 0.9 * var + 0.1 * inner.var(0, correction=1)
            mean, var = inner.mean(0), inner.var(0, correction=0)
        inner = (inner - mean) / (var + 1e-5).sqrt() * state[f"{block}.norm.weight"] + state[f"{block}.norm.bias"]
        h = inner + (linear(f"{block}.fc3", h) if f"{block}.fc3.weight" in state else h)
    torch.testing.assert_close(rectifier(z), linear("fc_out", h).reshape(z.shape))
    for name, tensor in rectifier.state_dict().items():
        expected = state[name] + training if name.endswith("tracked") else state[name]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_mlp_mixes_a_sample_and_in_eval_mode_no_others():
    rectifier = build_rectifier(RectifierConfig("mlp", width=32, layers=2), SHAPE)
    z = torch.randn(4, *SHAPE)
    for batch in (z[:1], z[:0]):
        with pytest.raises(
            InputError, match=r"latents: expected at least two in training mode for the BatchNorm .* got"
        ):
            rectifier(batch)
    rectifier(z)
    rectifier.eval()
    torch.testing.assert_close(rectifier(z)[1:2], rectifier(z[1:2]))
    assert rectifier(z[:0]).shape == (0, *SHAPE)
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
