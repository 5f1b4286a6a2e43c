"""Vectors that are not finite enter no statistics, and a warning counts them."""

import warnings

import pytest
import torch

from revq_kernels import EMAUpdate, FastChannelVQ, ProjectedVQ, ReplaceDeadCodes, ResidualVQ
from revq_kernels.nn.codebook_updates import initial_codebook

BAD = {
    "nan": (float("nan"),),
    "inf": (float("inf"),),
    "inf - inf": (float("inf"), float("-inf")),
    "huge": (3e38,),
    "huge sum": (1e19, -1e19, 1e19, 1e19),
}


def with_bad_rows(bad, dtype=torch.float32):
    """Tokens ``[4, 64, 4]`` with three bad ones, and a mask of the others."""
    x, good = torch.randn(4, 64, 4).to(dtype), torch.ones(4, 64, dtype=torch.bool)
    for place in ((0, 0), (2, 17), (3, 63)):
        good[place] = False
        for element, value in enumerate(BAD[bad]):
            x[place][element] = value
    return x, good


def state(vq):
    return {name: tensor.clone() for name, tensor in vq.state_dict().items()}


MAKES = {
    "l2": lambda: FastChannelVQ(24, 4),
    "averages": lambda: FastChannelVQ(24, 4, num_groups=2, update=EMAUpdate(0.5)),
    "cosine": lambda: FastChannelVQ(24, 4, metric="cosine", update=EMAUpdate(0.5)),
    "cosine_lookup": lambda: FastChannelVQ(24, 4, metric="cosine_lookup", update=EMAUpdate(0.5)),
    "inner_product": lambda: FastChannelVQ(24, 4, metric="inner_product"),
    "residual": lambda: ResidualVQ([FastChannelVQ(24, 4, update=EMAUpdate(0.5)) for _ in range(2)]),
}


@pytest.mark.filterwarnings("ignore:x. expected finite")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", MAKES)
def test_statistics_are_those_of_the_other_vectors(make, bad, dtype):
    """Which is what a mask of the others gives."""
    vq, other = MAKES[make](), MAKES[make]()
    other.load_state_dict(vq.state_dict())
    for _ in range(3):
        x, good = with_bad_rows(bad, dtype)
        vq(x)
        other(x, mask=good)
    for name, tensor in state(other).items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, vq.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:x. expected finite")
@pytest.mark.parametrize("bad", BAD)
def test_bad_vectors_replace_no_code_and_select_none(bad):
    vq = FastChannelVQ(24, 4, dead_codes=ReplaceDeadCodes(every=1))
    x, good = with_bad_rows(bad)
    x[:, 20:], good[:, 20:] = x[0, 0], False  # few good ones, so that each of them replaces a code
    with torch.no_grad():
        vq.codebook += 100
    for _ in range(3):
        vq(x)
    assert vq.codebook.isfinite().all() and vq.codebook.abs().max() < 1000
    assert vq.count.sum() == 3 * good.sum() and vq.utilization <= 1 and vq.perplexity.isfinite()


@pytest.mark.filterwarnings("ignore:x. expected finite")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("iterations", [0, 5])
def test_initial_codes_are_of_finite_vectors(bad, iterations):
    x, good = with_bad_rows(bad)
    rows, good = x.reshape(-1, 1, 4), good.reshape(-1)
    codes = initial_codebook(rows, None, 64, iterations, torch.Generator().manual_seed(1))
    expected = initial_codebook(rows[good], None, 64, iterations, torch.Generator().manual_seed(1))
    assert torch.equal(codes, expected) and codes.isfinite().all()
    vq = FastChannelVQ(64, 4)
    vq.initialize_(x, iterations=iterations)
    assert vq.codebook.isfinite().all() and vq.codebook.abs().max() < 100
    with pytest.raises(ValueError, match=r"x: expected at least num_codes=254 vectors per group.*got 253 finite ones"):
        FastChannelVQ(254, 4).initialize_(x)


def test_a_bad_weight_leaves_its_vector_out():
    vq, weight = FastChannelVQ(24, 4, metric="diagonal"), torch.ones(2, 9, 4)
    weight[1, 3, 0] = float("nan")
    with pytest.warns(UserWarning, match="got 1 so far"):
        vq(torch.randn(2, 9, 4), weight=weight)
    assert vq.count.sum() == 17


def test_training_goes_on_after_one_bad_vector():
    vq = FastChannelVQ(24, 4, update=EMAUpdate(0.9))
    x = torch.randn(1, 256, 4)
    x[0, 3] = float("nan")
    with pytest.warns(UserWarning):
        vq(x)
    for _ in range(30):
        vq(torch.randn(1, 256, 4))
    assert len(vq.eval()(torch.randn(1, 256, 4)).indices.unique()) > 12


def test_the_warning_counts_and_does_not_flood():
    vq, (x, _) = FastChannelVQ(8, 4), with_bad_rows("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(9):
            vq(x)
    assert [str(w.message).split("got ")[1].split()[0] for w in caught] == ["3", "6", "12", "24"]
    masked = FastChannelVQ(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked(x, mask=~x.isnan().any(dim=-1))  # padding may be anything
        masked.eval()(x)


def test_a_compiled_quantizer_counts_them_and_warns_when_it_is_asked():
    torch._dynamo.reset()
    vq = FastChannelVQ(24, 4, update=EMAUpdate(0.5))
    x, good = with_bad_rows("inf")
    torch.compile(vq, fullgraph=True, backend="aot_eager")(x)
    assert vq.count.sum() == good.sum() and vq.codebook.isfinite().all()
    with pytest.warns(UserWarning, match="got 3 so far"):
        assert vq.utilization > 0


def test_projected_vectors():
    vq, (x, good) = ProjectedVQ(4, FastChannelVQ(24, 2, update=EMAUpdate(0.5))), with_bad_rows("nan")
    with pytest.warns(UserWarning, match="got 3 so far"):
        vq(x)
    assert vq.vq.count.sum() == good.sum() and vq.vq.codebook.isfinite().all()
