"""Layouts and splits against loops over indices."""

from itertools import product

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


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
