"""`AutomaticIndex`: the same results as brute force, whoever changes the codebook; a tree where it pays, and only there."""

import copy
import pickle
import threading

import pytest
import torch

from revq_kernels import FastChannelVQ, automatic, native, nearest_code, quantize
from revq_kernels.automatic import LEAST_ROWS, AutomaticIndex

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"native: {native.load()}")
G, K, D = 2, 4096, 4


@pytest.fixture
def x():
    return torch.randn(100, G, D)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """A tree is tried with the first call."""
    monkeypatch.setattr(automatic, "ROWS_PER_LEVEL", 1)
    monkeypatch.setattr(automatic, "LEAST_WORK", 1)


def searching(codebook, x):
    """An automatic index that has chosen the tree."""
    search = AutomaticIndex()
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
    assert search.index is not None and str(search).startswith("tree: visits"), str(search)
    return search


def fused_adamw(codebook):
    parameter = torch.nn.Parameter(codebook)  # the same memory
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def data_copy(codebook):
    codebook.data.copy_(torch.randn_like(codebook))


def native_operator(codebook):
    codebook.numpy()[1, 4000] += 100  # any code that writes memory without torch


def inference_mode(codebook):
    with torch.inference_mode():
        codebook[0, :100] += 3.0


def one_bit(codebook):
    codebook.view(-1).numpy().view("int32")[-1] ^= 1


CHANGES = [fused_adamw, data_copy, native_operator, inference_mode, one_bit]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_of_the_codebook_is_seen(change, x):
    codebook = torch.randn(G, K, D)
    search = searching(codebook, x)
    for _ in range(3):
        while search.index is None:
            search.nearest_code(x, codebook)
        tree = search.index
        change(codebook)
        assert not tree.holds(codebook)
        assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
        assert tree.holds(codebook), "it was refit"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_of_the_module_in_eval_mode_too(change):
    vq, latents = FastChannelVQ(K, D, num_groups=G).eval(), torch.randn(100, G, D)
    for _ in range(3):
        with torch.no_grad():
            out = vq(latents)
            assert torch.equal(vq.encode(latents), out.indices)
        truth = quantize(latents, vq.codebook.detach())
        assert torch.equal(out.indices, truth.indices) and torch.equal(out.quantized, truth.quantized)
        change(vq.codebook.detach())
    assert vq.automatic._rows < 1000, "a tree was at work"


def test_made_in_inference_mode_and_used_outside(x):
    codebook, search = torch.randn(G, K, D), AutomaticIndex()
    with torch.inference_mode():
        search.nearest_code(x, codebook)
    codebook.mul_(2)
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
    with torch.inference_mode():
        codebook.mul_(2)
        assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_strides_and_shapes(dtype, x):
    codebook = torch.randn(G, D, K).to(dtype).transpose(1, 2)
    search = searching(codebook, x.to(dtype))
    codebook.mul_(1.5)
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
    other = torch.randn(G, K + 5, D)
    assert torch.equal(search.nearest_code(x, other), nearest_code(x, other))
    assert search.index.shape == (G, K + 5, D)


def test_it_waits_until_brute_force_has_cost_as_much_as_a_build(x, monkeypatch):
    monkeypatch.setattr(automatic, "ROWS_PER_LEVEL", 64)
    monkeypatch.setattr(automatic, "ROWS_EXPONENT", 0)
    search, codebook, calls = AutomaticIndex(), torch.randn(G, K, D), 0
    while search.index is None:
        search.nearest_code(x, codebook)
        calls += 1
    assert calls == -(-64 * 9 // 100)  # 256 leaves: 9 bits
    search = AutomaticIndex()
    monkeypatch.setattr(automatic, "LEAST_WORK", 7 * x.numel() * K)
    for _ in range(6):
        search.nearest_code(x, codebook)
    assert search.index is None
    search.nearest_code(x, codebook)
    assert search.index is not None


def test_a_tree_that_does_not_pay_is_given_up_and_tried_later(monkeypatch):
    """Gaussian data at d = 16: the small trial tells.  Later, with a blind small trial, the larger one does."""
    monkeypatch.setattr(automatic, "LEAST_WORK", 1)
    x, codebook = torch.randn(1000, 1, 16), torch.randn(1, K, 16)
    search = AutomaticIndex()
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
    assert search.index is None and "a tree would cost" in str(search)
    assert str(search).startswith("brute force") and search._patience == automatic.BACKOFF
    search._rows = 10**9
    monkeypatch.setattr(automatic, "HOPELESS_COST", 9.0)
    search.nearest_code(x, codebook)
    assert search.index is None and "a tree of one group cost" in str(search)
    assert search._patience == automatic.BACKOFF**2


def test_a_tree_that_stops_paying_is_given_up(x):
    codebook = torch.randn(G, K, D)
    search = searching(codebook, x)
    lost = x * float("inf")  # only a scan answers these
    assert torch.equal(search.nearest_code(lost, codebook), nearest_code(lost, codebook))
    assert search.index is None and "the tree cost 100% of all leaves" in str(search)
    assert search._patience == automatic.BACKOFF


def test_a_tree_whose_splits_the_codes_have_left_is_grown_anew_in_its_time(x):
    codebook = torch.randn(G, K, D)
    search = searching(codebook, x)
    codebook.copy_(torch.randn(G, K, D))
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
    assert search.index is None and search._patience == 1
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook))
    assert search.index.fits and search.index.visited < 0.05


def test_queries_too_few_to_pay_for_the_comparison_run_brute_force(x, monkeypatch):
    codebook = torch.randn(G, K, D)
    search = searching(codebook, x)
    tree = search.index
    monkeypatch.setattr(type(tree), "holds", None)  # would fail
    few = x[: LEAST_ROWS - 1]
    assert torch.equal(search.nearest_code(few, codebook), nearest_code(few, codebook))


def test_small_codebooks_never_grow_a_tree(x):
    codebook, search = torch.randn(G, K - 1, D), AutomaticIndex()
    search.nearest_code(x, codebook)
    assert search.index is None


def test_what_is_small_stays_small_until_forget(x):
    """The first codebook has too few codes for any call to be large."""
    search, codebook = AutomaticIndex(), torch.randn(G, K, D)
    search.nearest_code(x, torch.randn(G, 100, D))
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook)) and search.index is None
    search.forget()
    assert torch.equal(search.nearest_code(x, codebook), nearest_code(x, codebook)) and search.index is not None


def test_gradients_are_those_of_quantize(x):
    codebook = torch.randn(G, K, D, requires_grad=True)
    search = searching(codebook.detach(), x)
    weight = torch.randn(100, G, D)
    (ours,) = torch.autograd.grad((search.quantize(x, codebook).quantized * weight).sum(), codebook)
    (theirs,) = torch.autograd.grad((quantize(x, codebook).quantized * weight).sum(), codebook)
    assert torch.equal(ours, theirs) and search.index is not None
    with torch.no_grad():
        assert not search.quantize(x, codebook).quantized.requires_grad


def test_copies_and_pickles_start_anew_and_training_frees_the_tree():
    vq, latents = FastChannelVQ(K, D, num_groups=G).eval(), torch.randn(100, G, D)
    vq.encode(latents)
    assert vq.automatic.index is not None
    for other in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq))):
        assert other.automatic.index is None
        assert torch.equal(other.encode(latents), vq.encode(latents))
    vq.train()
    assert vq.automatic.index is None
    vq.encode(latents)
    assert vq.automatic.index is None and set(vq.state_dict()) == {"codebook", "count"}


def test_compilers_and_tracers_see_the_plain_operator(x, monkeypatch):
    vq, latents = FastChannelVQ(K, D, num_groups=G).eval(), torch.randn(100, G, D)
    expected = vq.encode(latents)
    assert torch.equal(torch.compile(vq.encode, fullgraph=True, backend="aot_eager")(latents), expected)
    program = torch.export.export(vq, (latents,))
    with torch.no_grad():
        vq.codebook.mul_(-1)
    assert torch.equal(program.module()(latents).indices, nearest_code(latents, vq.codebook)), "no tree was baked in"
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    search = AutomaticIndex()
    search.nearest_code(x, torch.randn(G, K, D))
    assert search.index is None


def test_a_second_thread_runs_brute_force(x):
    codebook = torch.randn(G, K, D)
    search, found = searching(codebook, x), []
    with search._lock:
        thread = threading.Thread(target=lambda: found.append(search.nearest_code(x, codebook)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], nearest_code(x, codebook))


def test_errors_are_those_of_nearest_code(x):
    search = searching(torch.randn(G, K, D), x)
    for wrong, codebook, error in (
        (x.double(), torch.randn(G, K, D), TypeError),
        (x, torch.randn(G, K, D).double(), TypeError),
        (x[:, :1], torch.randn(G, K, D), ValueError),
        (x.numpy(), torch.randn(G, K, D), TypeError),
    ):
        with pytest.raises(error):
            search.nearest_code(wrong, codebook)
