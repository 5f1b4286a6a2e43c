"""FastChannelVQ: layouts, losses, estimators, state."""

import pytest
import torch
import torch.nn.functional as F

from revq_kernels import FastChannelVQ, merge_tokens, split_tokens
from revq_kernels.testing.problems import contract_index


def grouped(tokens, groups):
    """[B, T, d] -> [N, G, d] by definition: token t uses codebook t mod G."""
    return torch.stack([tokens[:, g::groups].reshape(-1, tokens.shape[2]) for g in range(groups)], dim=1)


@pytest.mark.parametrize("groups", [1, 2, 6, 12])
@pytest.mark.parametrize("split", ["channel", "space"])
def test_tokens_and_latents_agree(groups, split):
    vq = FastChannelVQ(9, 4, num_groups=groups, split=split).eval()
    latents = torch.randn(3, 8, 2, 3)
    tokens = split_tokens(latents, 4, split)
    by_latents, by_tokens = vq(latents), vq(tokens)
    assert torch.equal(by_latents.indices, by_tokens.indices) and by_latents.indices.shape == (3, 12)
    assert torch.equal(by_latents.quantized, merge_tokens(by_tokens.quantized, (8, 2, 3), split))
    assert torch.equal(vq.encode(latents), by_latents.indices)
    assert torch.equal(vq.decode(by_latents.indices), by_tokens.quantized)
    assert torch.equal(vq.decode(by_latents.indices, (8, 2, 3)), by_latents.quantized)
    expected = contract_index(grouped(tokens, groups), vq.codebook)
    assert torch.equal(grouped(by_tokens.indices[..., None], groups)[..., 0], expected)


def test_channel_split_is_a_view_of_half_rows():
    latents = torch.arange(2 * 32 * 8 * 8.0).reshape(2, 32, 8, 8)
    tokens = split_tokens(latents, 4)
    assert tokens.shape == (2, 512, 4) and tokens.data_ptr() == latents.data_ptr()
    assert torch.equal(tokens[1, 17], latents[1, 1, 0, 4:8])  # token 17: channel 17 // 16, row 0, right half
    assert merge_tokens(tokens, (32, 8, 8)).data_ptr() == latents.data_ptr()


def test_space_split_reads_position_by_position():
    latents = torch.randn(2, 32, 8, 8)
    tokens = split_tokens(latents, 8, "space")
    assert torch.equal(tokens[1, 4 * 9 + 2], latents[1, 16:24, 1, 1])  # position 9 = row 1, column 1; its third piece
    assert torch.equal(merge_tokens(tokens, (32, 8, 8), "space"), latents)


@pytest.mark.parametrize("commitment", [0.0, 0.25])
@pytest.mark.parametrize("estimator", ["straight_through", "none"])
def test_loss_and_gradients_are_the_textbooks(commitment, estimator):
    vq = FastChannelVQ(6, 4, num_groups=2, estimator=estimator, commitment=commitment)
    straight_through = estimator == "straight_through"
    x = torch.randn(3, 8, 4, requires_grad=True)
    weight = torch.randn(3, 8, 4)
    out = vq(x)
    (out.loss + (out.quantized * weight).sum()).backward()

    truth_x = x.detach().double().requires_grad_()
    truth_codebook = vq.codebook.detach().double().requires_grad_()
    quantized = truth_codebook[torch.arange(8) % 2, out.indices]
    loss = F.mse_loss(truth_x.detach(), quantized) + commitment * F.mse_loss(truth_x, quantized.detach())
    passed = truth_x + (quantized - truth_x).detach() if straight_through else quantized
    (loss + (passed * weight.double()).sum()).backward()

    assert torch.equal(out.quantized, vq.decode(out.indices)), "the values are the codebook's own, bit for bit"
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(vq.codebook.grad.double(), truth_codebook.grad, rtol=1e-5, atol=1e-6)
    if straight_through or commitment:
        torch.testing.assert_close(x.grad.double(), truth_x.grad, rtol=1e-5, atol=1e-6)
    else:
        assert x.grad is None


def test_counts_in_training_mode_only():
    vq = FastChannelVQ(5, 2, num_groups=3)
    x = torch.randn(4, 6, 2)
    vq.eval()(x)
    vq.encode(x)
    assert vq.count.sum() == 0
    indices = vq.train()(x).indices
    assert vq.count.sum() == 24
    for g in range(3):
        assert torch.equal(vq.count[g], torch.bincount(indices[:, g::3].reshape(-1), minlength=5))


def test_utilization_and_perplexity_per_group():
    vq = FastChannelVQ(4, 2, num_groups=3)
    vq.count.copy_(torch.tensor([[1, 1, 1, 1], [8, 0, 0, 0], [0, 0, 0, 0]]))
    assert vq.utilization.tolist() == [1.0, 0.25, 0.0]
    assert vq.perplexity[:2].tolist() == [4.0, 1.0]
    assert vq.perplexity[2].isnan()


def test_initialization_draws_each_vector_once():
    vq = FastChannelVQ(20, 1, num_groups=2)
    x = torch.arange(60.0).reshape(3, 20, 1)
    vq.initialize_(x, generator=torch.Generator().manual_seed(1))
    for g in range(2):
        values = vq.codebook[g, :, 0].tolist()
        assert len(set(values)) == 20
        assert set(values) <= set(x[:, g::2].reshape(-1).tolist())
    first = vq.codebook.clone()
    vq.initialize_(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, vq.codebook)
    with pytest.raises(ValueError, match=r"x: expected at least num_codes=20 vectors per group to draw from, got 10"):
        vq.initialize_(x[:1])


def test_empty_batch():
    vq = FastChannelVQ(5, 4, num_groups=2)
    out = vq(torch.randn(0, 8, 2, 2))
    assert out.quantized.shape == (0, 8, 2, 2) and out.indices.shape == (0, 8) and out.loss.item() == 0
    out.loss.backward()
    assert vq.codebook.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input(dtype):
    vq = FastChannelVQ(50, 4)
    x = torch.randn(2, 30, 4).to(dtype)
    out = vq(x)
    assert out.quantized.dtype == dtype and out.loss.dtype == torch.float32
    assert torch.equal(out.indices, contract_index(x.reshape(-1, 1, 4), vq.codebook).reshape(2, 30))


def test_default_dtype_and_in_place_results():
    torch.set_default_dtype(torch.float64)
    try:
        vq = FastChannelVQ(5, 4)
        assert vq.codebook.dtype == torch.float32
        vq(torch.randn(1, 3, 4, dtype=torch.float32)).quantized.mul_(2)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_leaves_the_indices_alone():
    vq, x = FastChannelVQ(500, 4), torch.randn(2, 300, 4)
    expected = vq.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq(x).indices, expected)


def test_state_round_trip():
    vq, other = FastChannelVQ(5, 2, num_groups=3), FastChannelVQ(5, 2, num_groups=3)
    vq(torch.randn(2, 6, 2))
    other.load_state_dict(vq.state_dict())
    assert set(vq.state_dict()) == {"codebook", "count"}
    assert torch.equal(other.count, vq.count) and torch.equal(other.codebook, vq.codebook)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastChannelVQ(0, 4), r"num_codes: expected an integer >= 1, got 0"),
        (lambda: FastChannelVQ(4, 4.0), r"code_dim: expected an integer >= 1, got 4.0"),
        (lambda: FastChannelVQ(4, 4, split="rows"), r"split: expected 'channel', 'space' or 'flat', got 'rows'"),
        (lambda: FastChannelVQ(4, 4, commitment=-1), r"commitment: expected a weight >= 0, got -1"),
        (
            lambda: FastChannelVQ(4, 4)(torch.zeros(2, 4)),
            r"x: expected \[B, C, H, W\] or \[B, T, d=4\], got shape \(2, 4\)",
        ),
        (lambda: FastChannelVQ(4, 4)(torch.zeros(2, 4, 3)), r"x: expected .* d=4\], got shape \(2, 4, 3\)"),
        (lambda: FastChannelVQ(4, 4)(torch.zeros(2, 3, 1, 1)), r"code_dim: expected a divisor of C\*H\*W=3"),
        (lambda: FastChannelVQ(4, 4, num_groups=3)(torch.zeros(2, 4, 4)), r"x: expected T .* num_groups=3, got T=4"),
        (
            lambda: FastChannelVQ(4, 4).decode(torch.full((1, 2), 4)),
            r"indices: expected values in \[0, K=4\), got 4 to 4",
        ),
        (
            lambda: FastChannelVQ(4, 4, num_groups=2).decode(torch.zeros(1, 3).long()),
            r"indices: expected \[B, T\] with T",
        ),
        (lambda: merge_tokens(torch.zeros(1, 3, 2), (5, 1, 1)), r"tokens: expected \[B, T, d\] with T\*d=5"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
