"""`EMAUpdate` against its formula in float64."""

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ


def test_steps_are_the_formula():
    torch.manual_seed(1)
    decay, eps, groups, codes = 0.8, 1e-3, 2, 5
    vq = FastChannelVQ(codes, 3, num_groups=groups, update=EMAUpdate(decay, eps))
    size = torch.ones(groups, codes, dtype=torch.float64)
    total = vq.codebook.detach().double()
    for _ in range(4):
        x, before = torch.randn(7, 6, 3), vq.codebook.detach().clone()
        out = vq(x)
        assert torch.equal(out.quantized, before[torch.arange(6) % 2, out.indices]), "the codes as they were"
        for g in range(groups):
            one_hot = torch.nn.functional.one_hot(out.indices[:, g::2].reshape(-1), codes).double()
            size[g] = decay * size[g] + (1 - decay) * one_hot.sum(0)
            total[g] = decay * total[g] + (1 - decay) * one_hot.T @ x[:, g::2].reshape(-1, 3).double()
        n = size.sum(1, keepdim=True)
        smoothed = (size + eps) / (n + codes * eps) * n
        torch.testing.assert_close(vq.codebook.detach().double(), total / smoothed[..., None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(vq.update.cluster_size.double(), size, rtol=1e-5, atol=1e-6)
    assert vq.count.sum() == 4 * 42


def test_no_gradient_for_the_codes_and_none_moves_in_eval():
    vq = FastChannelVQ(5, 3, update=EMAUpdate())
    x = torch.randn(2, 4, 3, requires_grad=True)
    (vq(x).loss + vq(x).quantized.sum()).backward()
    assert not vq.codebook.requires_grad and vq.codebook.grad is None and x.grad is not None
    before = vq.codebook.clone()
    vq.eval()(x)
    vq.train().encode(x)
    assert torch.equal(vq.codebook, before)


def test_codes_reach_the_means_of_their_clusters():
    centers = torch.tensor([[5.0, 0], [-5, 0], [0, 5]])
    vq = FastChannelVQ(3, 2, update=EMAUpdate(decay=0.5))
    with torch.no_grad():
        vq.codebook[0] = centers + 1
    vq.update.restart_(vq.codebook, torch.ones(1, 3).bool())
    for _ in range(30):
        vq(centers.repeat(10, 1)[None])
    torch.testing.assert_close(vq.codebook[0], centers, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("move", ["reset", "initialize"])
def test_moved_codes_stay_moved(move):
    """An old average would move them back in the same step."""
    vq = FastChannelVQ(6, 2, update=EMAUpdate(decay=0.9))
    x = torch.randn(1, 60, 2) + 3
    with torch.no_grad():
        vq.codebook[0, :3] = x[0, :3]
        vq.codebook[0, 3:] -= 100.0
    vq.update.restart_(vq.codebook, torch.ones(1, 6).bool())
    vq(x)
    if move == "reset":
        assert vq.reset_(noise=0.0)[0, 3:].all()
    else:
        vq.initialize_(x)
    torch.testing.assert_close(vq.update.embed_sum[0, 3:], vq.codebook[0, 3:])
    assert (vq.update.cluster_size[0, 3:] == 1).all()
    vq(x)
    assert vq.codebook.min() > -10


def test_state_round_trip():
    vq, other = (FastChannelVQ(5, 2, update=EMAUpdate()) for _ in range(2))
    vq(torch.randn(2, 6, 2))
    other.load_state_dict(vq.state_dict())
    assert set(vq.state_dict()) == {"codebook", "count", "update.cluster_size", "update.embed_sum"}
    x = torch.randn(2, 6, 2)
    vq(x), other(x)
    assert torch.equal(vq.codebook, other.codebook)


def test_wrong_arguments():
    update = EMAUpdate()
    FastChannelVQ(4, 4, update=update)
    for make, message in (
        (lambda: FastChannelVQ(4, 4, update=update), r"update: expected an EMAUpdate of its own"),
        (lambda: EMAUpdate(decay=1.0), r"decay: expected a share in \[0, 1\), got 1.0"),
        (lambda: EMAUpdate(eps=0.0), r"eps: expected a number > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_averages_are_float32_in_a_model_of_any_dtype(dtype):
    vq = FastChannelVQ(2, 4, update=EMAUpdate(0.9))
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([-1.0, 1.0])[None, :, None].expand(1, 2, 4))
    vq.update.restart_(vq.codebook, torch.ones_like(vq.count, dtype=torch.bool))
    vq.to(dtype)
    assert vq.update.embed_sum.dtype == vq.update.cluster_size.dtype == torch.float32
    x = torch.tensor([-3.0, 3.0], dtype=dtype).repeat(500)[None, :, None].expand(1, 1000, 4)
    for _ in range(200):
        vq(x)
    torch.testing.assert_close(vq.codebook[0, :, 0].float(), torch.tensor([-3.0, 3.0]), rtol=0, atol=0.02)


def test_codes_loaded_without_averages_stay():
    plain, vq = FastChannelVQ(32, 8), FastChannelVQ(32, 8, update=EMAUpdate())
    vq.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(vq.update.embed_sum, plain.codebook)
    trained = FastChannelVQ(32, 8, update=EMAUpdate())
    trained(torch.randn(2, 16, 8))
    vq.load_state_dict(trained.state_dict())
    assert torch.equal(vq.update.embed_sum, trained.update.embed_sum), "averages that come along are taken"


def test_codes_without_any_selection_do_not_move():
    vq = FastChannelVQ(8, 4, update=EMAUpdate(0.0))
    before = vq.codebook.detach().clone()
    vq(torch.randn(2, 8, 4), lengths=torch.tensor([0, 0]))
    assert torch.equal(vq.codebook, before)


def test_a_refused_quantizer_leaves_its_companion_free():
    update = EMAUpdate()
    with pytest.raises(ValueError, match="commitment"):
        FastChannelVQ(8, 4, update=update, commitment=-1)
    FastChannelVQ(8, 4, update=update)
