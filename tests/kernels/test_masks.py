"""Masked positions: the same results as without these positions."""

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ
from revq_kernels.nn.layout import token_mask

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize("metric", ["l2", "cosine", "inner_product"])
@pytest.mark.parametrize("garbage", [0.0, 1e9, float("nan")])
def test_masked_tokens_have_no_effect(metric, garbage):
    vq, other = (FastChannelVQ(6, 4, metric=metric, update=EMAUpdate(decay=0.5)) for _ in range(2))
    other.load_state_dict(vq.state_dict())
    data, weight = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    x = data.masked_fill(~MASK[..., None], garbage).requires_grad_()
    kept = data[MASK][None].requires_grad_()
    out, without = vq(x, mask=MASK), other(kept)
    (out.loss + (out.quantized * weight).sum()).backward()
    (without.loss + (without.quantized * weight[MASK]).sum()).backward()

    assert torch.equal(out.indices[MASK], without.indices[0]) and (out.indices[~MASK] == -1).all()
    assert torch.equal(out.quantized[MASK], without.quantized[0])
    torch.testing.assert_close(out.quantized[~MASK], x[~MASK], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(out.loss, without.loss)
    torch.testing.assert_close(x.grad[MASK], kept.grad[0])
    assert torch.equal(x.grad[~MASK], weight[~MASK]), "their own value, so the gradient of the identity"
    assert torch.equal(vq.count, other.count) and vq.count.sum() == MASK.sum()
    torch.testing.assert_close(vq.codebook, other.codebook)
    torch.testing.assert_close(vq.update.embed_sum, other.update.embed_sum)
    assert (vq.decode(out.indices)[~MASK] == 0).all()


def test_lengths_are_a_mask():
    vq, x = FastChannelVQ(6, 4, layout="BDT", split="space"), torch.randn(3, 4, 5)
    by_lengths = vq(x, lengths=torch.tensor([5, 2, 0]))
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    by_mask = vq(x, mask=mask)
    assert torch.equal(by_lengths.indices, by_mask.indices) and torch.equal(by_lengths.loss, by_mask.loss)
    assert torch.equal(by_lengths.indices >= 0, mask)
    assert torch.equal(by_lengths.quantized[1, :, 2:], x[1, :, 2:])


def test_a_position_of_several_tokens():
    vq, x = FastChannelVQ(6, 2, num_groups=3, layout="BLC", split="space"), torch.randn(3, 5, 6)
    out = vq(x, mask=MASK)
    assert torch.equal((out.indices >= 0).reshape(3, 5, 3), MASK[..., None].expand(3, 5, 3))
    for group in range(3):
        chosen = out.indices.reshape(3, 5, 3)[..., group][MASK]
        assert torch.equal(vq.count[group], torch.bincount(chosen, minlength=6))


def test_whole_samples_for_any_split():
    vq, x = FastChannelVQ(6, 4), torch.randn(3, 4, 2, 2)
    out = vq(x, mask=torch.tensor([[True], [False], [True]]))
    assert (out.indices[1] == -1).all() and (out.indices[[0, 2]] >= 0).all() and torch.equal(out.quantized[1], x[1])


def test_nothing_left():
    vq, x = FastChannelVQ(6, 4), torch.randn(2, 3, 4, requires_grad=True)
    out = vq(x, lengths=torch.zeros(2, dtype=torch.int64))
    out.loss.backward()
    assert out.loss == 0 and torch.equal(out.quantized, x) and (x.grad == 0).all()


def test_initialization_draws_what_counts():
    vq, x = FastChannelVQ(6, 4), torch.randn(3, 5, 4)
    vq.initialize_(x, mask=MASK)
    assert {tuple(row.tolist()) for row in vq.codebook[0]} == {tuple(row.tolist()) for row in x[MASK]}
    with pytest.raises(ValueError, match=r"x: expected at least num_codes=6 vectors .* got 5"):
        vq.initialize_(x, lengths=torch.tensor([5, 0, 0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": MASK.long()}, TypeError, r"mask: expected dtype torch.bool, got torch.int64"),
        ({"mask": MASK[:2]}, ValueError, r"mask: expected \[B=3, L=5\] or \[B, 1\], got shape \(2, 5\)"),
        ({"mask": MASK[:, :4]}, ValueError, r"mask: expected \[B=3, L=5\] .* got shape \(3, 4\)"),
        ({"lengths": torch.ones(3)}, TypeError, r"lengths: expected an integer dtype, got torch.float32"),
        ({"lengths": torch.ones(2).long()}, ValueError, r"lengths: expected \[B=3\], got shape \(2,\)"),
        ({"mask": MASK, "lengths": torch.ones(3).long()}, ValueError, r"mask: expected None beside lengths, got both"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        FastChannelVQ(6, 4)(torch.zeros(3, 5, 4), **options)


def test_splits_without_positions():
    channel = FastChannelVQ(6, 2, layout="BDT")
    for options in ({"mask": torch.ones(3, 4).bool()}, {"lengths": torch.ones(3).long()}):
        with pytest.raises(ValueError, match=r"mask: expected \[B, 1\], as tokens of this split span positions"):
            channel(torch.zeros(3, 2, 4), **options)
    with pytest.raises(ValueError, match=r"mask: expected whole tokens per position, got T=2 tokens of L=4"):
        token_mask(torch.ones(1, 4).bool(), None, batch=1, positions=4, num_tokens=2)


def test_no_positions_and_no_tensor():
    vq = FastChannelVQ(8, 4)
    assert vq(torch.randn(2, 0, 4), lengths=torch.tensor([0, 0])).indices.shape == (2, 0)
    with pytest.raises(TypeError, match=r"lengths: expected a torch\.Tensor, got list"):
        vq(torch.randn(2, 8, 4), lengths=[3, 4])
