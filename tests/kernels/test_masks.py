"""Masked positions: the same results as without these positions."""

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ, ProjectedVQ, ResidualVQ
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
        ({"mask": MASK[..., None]}, ValueError, r"mask: expected .* got shape \(3, 5, 1\)"),
        ({"mask": torch.tensor(True)}, ValueError, r"mask: expected .* got shape \(\)"),
        ({"mask": MASK.numpy()}, TypeError, r"mask: expected a torch\.Tensor, got ndarray"),
        ({"mask": MASK.to_sparse()}, TypeError, r"mask: expected a dense torch\.Tensor, got layout torch\.sparse_coo"),
        ({"mask": MASK.to("meta")}, ValueError, r"mask: expected x's device cpu, got meta"),
        ({"lengths": torch.ones(3).bool()}, TypeError, r"lengths: expected an integer dtype, got torch\.bool"),
        ({"lengths": torch.ones(3).cfloat()}, TypeError, r"lengths: expected an integer dtype, got torch\.complex64"),
        ({"lengths": torch.tensor(3)}, ValueError, r"lengths: expected \[B=3\], got shape \(\)"),
        ({"lengths": torch.ones(3, 1).long()}, ValueError, r"lengths: expected \[B=3\], got shape \(3, 1\)"),
        ({"lengths": torch.ones(3).long().to("meta")}, ValueError, r"lengths: expected x's device cpu, got meta"),
        ({"lengths": torch.tensor([0, 6, 5])}, ValueError, r"lengths: expected values from 0 to L=5, got 0 to 6"),
        ({"lengths": torch.tensor([-1, 2, 5])}, ValueError, r"lengths: expected values from 0 to L=5, got -1 to 5"),
        ({"lengths": torch.tensor([2**63] * 3, dtype=torch.uint64)}, ValueError, r"lengths: expected values .* got -9"),
        ({"lengths": 5}, TypeError, r"lengths: expected a torch\.Tensor, got int"),
        ({"mask": MASK, "lengths": torch.ones(3).long()}, ValueError, r"mask: expected None beside lengths, got both"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        FastChannelVQ(6, 4)(torch.zeros(3, 5, 4), **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
def test_lengths_of_any_integer_type(dtype):
    vq, x = FastChannelVQ(6, 4).eval(), torch.randn(3, 5, 4)
    found = vq(x, lengths=torch.tensor([5, 0, 2], dtype=dtype)).indices
    assert torch.equal(found >= 0, torch.arange(5) < torch.tensor([5, 0, 2])[:, None])


def test_wrong_lengths_of_every_module():
    plain = FastChannelVQ(6, 4, layout="BDT", split="space")
    modules = [plain, ResidualVQ([plain]), ProjectedVQ(8, FastChannelVQ(6, 4, layout="BDT", split="space"))]
    for module, channels in zip(modules, (4, 4, 8), strict=True):
        x = torch.randn(2, channels, 3)
        with pytest.raises(ValueError, match=r"lengths: expected values from 0 to L=3, got 3 to 4"):
            module(x, lengths=torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to L=3"):
        plain.initialize_(torch.randn(9, 4, 3), lengths=torch.full((9,), 4))


def test_a_compiled_graph_asserts_lengths():
    compiled = torch.compile(
        lambda n: token_mask(None, n, batch=2, positions=3, num_tokens=6), backend="eager", fullgraph=True
    )
    assert compiled(torch.tensor([3, 0])).sum() == 6
    with pytest.raises(RuntimeError, match="lengths: expected values from 0 to the number of positions"):
        compiled(torch.tensor([3, 4]))


def test_splits_without_positions():
    channel = FastChannelVQ(6, 2, layout="BDT")
    with pytest.raises(ValueError, match=r"mask: expected \[B, 1\], as tokens of this split span positions"):
        channel(torch.zeros(3, 2, 4), mask=torch.ones(3, 4).bool())
    with pytest.raises(ValueError, match=r"lengths: expected None, as tokens of this split span positions"):
        channel(torch.zeros(3, 2, 4), lengths=torch.ones(3).long())
    with pytest.raises(ValueError, match=r"mask: expected whole tokens per position, got T=2 tokens of L=4"):
        token_mask(torch.ones(1, 4).bool(), None, batch=1, positions=4, num_tokens=2)


def test_no_positions_and_no_tensor():
    vq = FastChannelVQ(8, 4)
    assert vq(torch.randn(2, 0, 4), lengths=torch.tensor([0, 0])).indices.shape == (2, 0)
    with pytest.raises(TypeError, match=r"lengths: expected a torch\.Tensor, got list"):
        vq(torch.randn(2, 8, 4), lengths=[3, 4])
