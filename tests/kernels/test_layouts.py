"""Layouts and splits against loops over indices."""

from itertools import product

import numpy as np
import pytest
import torch

from revq_kernels import FastChannelVQ, merge_tokens, split_tokens

SHAPES = {"BCHW": (6, 2, 4), "BLC": (4, 6), "BDT": (6, 4), "BTCHW": (2, 6, 2, 2), "BCDHW": (6, 2, 2, 2)}
CHANNEL = {"BCHW": 0, "BLC": 1, "BDT": 0, "BTCHW": 1, "BCDHW": 0}


def by_hand(sample, layout, split):
    """The elements of a sample in the order of the split, one at a time."""
    axis = CHANNEL[layout]
    channel, others = range(sample.shape[axis]), [range(n) for i, n in enumerate(sample.shape) if i != axis]

    def at(c, place):
        return sample[(*place[:axis], c, *place[axis:])].item()

    if split == "channel":
        return [at(c, place) for c in channel for place in product(*others)]
    if split == "space":
        return [at(c, place) for place in product(*others) for c in channel]
    return [sample[place].item() for place in product(*[range(n) for n in sample.shape])]


@pytest.mark.parametrize("split", ["channel", "space", "flat"])
@pytest.mark.parametrize("layout", SHAPES)
def test_tokens_are_those_by_hand(layout, split):
    latents = torch.randn(2, *SHAPES[layout])
    tokens = split_tokens(latents, 3, split, layout)
    for sample, of_sample in zip(latents, tokens, strict=True):
        assert of_sample.reshape(-1).tolist() == by_hand(sample, layout, split)
    assert torch.equal(merge_tokens(tokens, SHAPES[layout], split, layout), latents)


@pytest.mark.parametrize("split", ["channel", "space", "flat"])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_module_puts_codes_where_tokens_were(layout, split, groups):
    latents = torch.randn(2, *SHAPES[layout])
    vq = FastChannelVQ(9, 3, num_groups=groups, layout=layout, split=split).eval()
    tokens = split_tokens(latents, 3, split, layout)
    out, of_tokens = vq(latents), FastChannelVQ(9, 3, num_groups=groups).eval()
    of_tokens.load_state_dict(vq.state_dict())
    assert torch.equal(out.indices, of_tokens(tokens).indices) and torch.equal(vq.encode(latents), out.indices)
    assert torch.equal(split_tokens(out.quantized, 3, split, layout), of_tokens(tokens).quantized)
    assert torch.equal(vq.decode(out.indices, SHAPES[layout]), out.quantized)


@pytest.mark.parametrize("layout", SHAPES)
def test_the_usual_layer_has_one_token_per_position(layout):
    latents = torch.randn(2, *SHAPES[layout])
    out = FastChannelVQ(9, 6, layout=layout, split="space")(latents)
    assert out.indices.shape == (2, latents[0].numel() // 6)


def test_long_codes():
    vq, x = FastChannelVQ(50, 512), torch.randn(2, 4, 512)
    distance = (x[:, :, None].double() - vq.codebook.detach().double()).square().sum(-1)
    assert torch.equal(vq(x).indices, distance.argmin(-1))


@pytest.mark.parametrize("layout", SHAPES)
def test_a_token_of_the_split_space_stays_within_a_position(layout):
    x = torch.randn(2, *SHAPES[layout])  # C = 6
    for dim in (4, 8, 12, 24):
        vq = FastChannelVQ(9, dim, layout=layout, split="space")
        for call in (vq, vq.encode, vq.initialize_):
            with pytest.raises(ValueError, match=rf"x: expected C to be a multiple of code_dim={dim} .* got C=6 in "):
                call(x)
        with pytest.raises(ValueError, match=rf"latent_shape: expected C to be a multiple of code_dim={dim} "):
            vq.decode(torch.zeros(2, x[0].numel() // dim, dtype=torch.int64), SHAPES[layout])
        assert split_tokens(x, dim, "space", layout).shape == (2, x[0].numel() // dim, dim), "asked for by name"


def test_inputs_that_are_no_latents():
    vq = FastChannelVQ(9, 3, metric="cosine")
    for x, message in (
        ([[1.0]], r"x: expected a torch\.Tensor, got list"),
        (torch.randn(2, 4, 3).numpy(), r"x: expected a torch\.Tensor, got ndarray"),
        (torch.ones(2, 4, 3).long(), r"x: expected a floating-point dtype, got torch\.int64"),
        (torch.ones(2, 4, 3).bool(), r"x: expected a floating-point dtype, got torch\.bool"),
        (torch.ones(2, 4, 3).cfloat(), r"x: expected a floating-point dtype, got torch\.complex64"),
        (torch.ones(2, 4, 3).to_sparse(), r"x: expected a dense torch\.Tensor, got layout torch\.sparse_coo"),
    ):
        for call in (vq, vq.encode, vq.initialize_):
            with pytest.raises(TypeError, match=message):
                call(x)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((3, 2.0, 2), TypeError, r"latent_shape: expected an integer, got 2\.0"),
        ((3, "2", 2), TypeError, r"latent_shape: expected an integer, got '2'"),
        ((12, True, 1), TypeError, r"latent_shape: expected an integer, got True"),
        (12, TypeError, r"latent_shape: expected \(C, H, W\), got 12"),
        ((3, -2, -2), ValueError, r"latent_shape: expected sizes >= 0, got \(3, -2, -2\)"),
        ((3, 2, 3), ValueError, r"tokens: expected \[B, T, d\] with T\*d=18"),
    ],
)
def test_wrong_latent_shapes(shape, error, message):
    vq, indices = FastChannelVQ(9, 3), torch.zeros(2, 4, dtype=torch.int64)
    for call in (lambda: vq.decode(indices, shape), lambda: merge_tokens(vq.decode(indices), shape)):
        with pytest.raises(error, match=message):
            call()
    assert vq.decode(indices, (np.int64(3), 2, 2)).shape == vq.decode(indices, torch.Size((3, 2, 2))).shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastChannelVQ(10**11, 4), r"num_codes: expected at most 2147483647, got 100000000000"),
        (lambda: FastChannelVQ(True, 4), r"num_codes: expected an integer >= 1, got True"),
        (lambda: FastChannelVQ(4, 4, layout=["BCHW"]), r"layout: expected one of .* got \['BCHW'\]"),
        (lambda: FastChannelVQ(4, 4, split="last"), r"split: expected 'channel', 'space' or 'flat', got 'last'"),
        (lambda: FastChannelVQ(4, 4, layout="BHWC"), r"layout: expected one of .*'BCHW'.* got 'BHWC'"),
        (
            lambda: FastChannelVQ(4, 4, layout="BLC")(torch.zeros(2, 4, 2, 2)),
            r"latents: expected \[B, L, C\], got shape \(2, 4, 2, 2\)",
        ),
        (lambda: merge_tokens(torch.zeros(1, 2, 3), (6,)), r"latent_shape: expected \(C, H, W\), got \(6,\)"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
