"""The two loss terms, their weights, and which side each moves."""

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_weights_of_the_terms_by_their_gradients(legacy, ema, beta):
    vq = FastChannelVQ(6, 4, commitment=beta, legacy_beta=legacy, update=EMAUpdate() if ema else None)
    codes, x = vq.codebook.detach().clone(), torch.randn(3, 8, 4, requires_grad=True)
    out = vq(x)
    difference = (x.detach() - codes[0, out.indices]).double()
    to_codes, to_x = (beta, 1.0) if legacy else (1.0, beta)
    if ema:
        to_codes = 0.0
    torch.testing.assert_close(out.loss.double(), (to_codes + to_x) * difference.square().mean(), rtol=1e-5, atol=0)
    if to_codes or to_x:
        out.loss.backward()
    if to_x:
        torch.testing.assert_close(x.grad.double(), to_x * 2 * difference / x.numel(), rtol=1e-4, atol=1e-7)
    else:
        assert x.grad is None
    if to_codes:
        truth = torch.zeros(6, 4, dtype=torch.float64)
        truth.index_add_(0, out.indices.reshape(-1), -to_codes * 2 * difference.reshape(-1, 4) / x.numel())
        torch.testing.assert_close(vq.codebook.grad[0].double(), truth, rtol=1e-4, atol=1e-7)
    else:
        assert vq.codebook.grad is None


def test_no_loss_in_eval():
    vq, x = FastChannelVQ(6, 4, loss_in_eval=False), torch.randn(3, 8, 4)
    assert vq(x).loss > 0
    loss = vq.eval()(x).loss
    assert loss.item() == 0 and loss.dtype == torch.float32 and loss.shape == ()
    assert FastChannelVQ(6, 4).eval()(x).loss > 0
