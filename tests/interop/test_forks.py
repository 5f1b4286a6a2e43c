"""Forks of a known quantizer: what differs is refused, or stays; an unknown source that behaves the same is said to be unknown."""

import collections
import inspect
import random

import pytest
import torch
from torch import nn

import revq
from revq_kernels.interop import registry
from revq_kernels.interop.choices import Choices
from revq_kernels.interop.families.family import Call, Family
from revq_kernels.interop.fingerprints import UNKNOWN, fingerprint
from revq_kernels.interop.search import nearest
from tests.third_party_quantizers import llamagen, taming, titok

STEPS, SEEN = 0, collections.deque(maxlen=10)


class Plain(nn.Module):
    """The version that the family was written for; forks override ``forward`` or what it calls."""

    total = 0

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.log, self.steps, self.spread = {"calls": []}, 0, None

    def search(self, z):
        return torch.cdist(z, self.embedding.weight).argmin(1)

    def forward(self, z):
        return self.finish(z, self.search(z))

    def finish(self, z, indices):
        quantized = self.embedding(indices)
        return z + (quantized - z).detach(), (z - quantized).square().mean(), {"indices": indices, "usage": 1.0}


class Fast:
    def forward(self, z):
        return Plain.finish(self, z, nearest(z, self.embedding.weight))


def calls(module, vectors):
    return [Call("forward", (vectors(module.embedding.weight, 20 * vectors.batch, 4),))]


def sets_attribute(self, z, result):
    self.last_shape = tuple(z.shape)
    return result


def keeps_tensor(self, z, result):
    self.spread = z.detach().std()
    return result


def counts(self, z, result):
    self.steps += 1
    return result


def counts_in_container(self, z, result):
    self.log["calls"].append(len(z))
    return result


def counts_in_global(self, z, result):
    global STEPS
    STEPS += 1
    return result


def appends_to_global(self, z, result):
    SEEN.append(len(z))
    return result


def counts_in_class(self, z, result):
    type(self).total += 1
    return result


def changes_after_three(self, z, result):
    self.seen += self.training
    return (result[0], result[1] * (2 if self.seen > 3 else 1), result[2])


def changes_beyond_a_size(self, z, result):
    return (result[0], result[1] * (2 if len(z) > 500 else 1), result[2])


def changes_for_one(self, z, result):
    return (result[0], result[1] * (2 if len(z) == 20 else 1), result[2])


def extra(self, z, result):
    return (*result, None)


def missing(self, z, result):
    return result[:2]


def as_list(self, z, result):
    return list(result)


def other_key(self, z, result):
    return (*result[:2], {"tokens": result[2]["indices"], "usage": 1.0})


def other_dtype(self, z, result):
    return (*result[:2], {**result[2], "indices": result[2]["indices"].int()})


def other_number(self, z, result):
    return (*result[:2], {**result[2], "usage": 2.0})


def integer_for_float(self, z, result):
    return (*result[:2], {**result[2], "usage": True})


def detached(self, z, result):
    return (result[0].detach(), *result[1:])


def none_loss(self, z, result):
    return (result[0], None if self.training else result[1], result[2])


def draws(self, z, result):
    torch.rand(1)
    return result


def draws_in_python(self, z, result):
    random.random()
    return result


def freezes(self, z, result):
    self.embedding.weight.requires_grad_(False)
    return result


def without_loss_in_inference(self, z, result):
    return result if torch.is_grad_enabled() else (result[0], None, result[2])


def other_without_input_gradient(self, z, result):
    return (result[0], result[1] * (1 if z.requires_grad else 2), result[2])


def changes_beyond_a_size_in_evaluation(self, z, result):
    return (result[0], result[1] * (2 if len(z) > 500 and not self.training else 1), result[2])


FORKS = [
    sets_attribute, keeps_tensor, counts, counts_in_container, counts_in_global, appends_to_global, counts_in_class,
    changes_after_three, changes_beyond_a_size, changes_for_one, extra, missing, as_list, other_key, other_dtype, other_number,
    integer_for_float, detached, none_loss, draws, draws_in_python, freezes,
    without_loss_in_inference, other_without_input_gradient, changes_beyond_a_size_in_evaluation,
]  # fmt: skip


def fork(change):
    def forward(self, z):
        return change(self, z, Plain.forward(self, z))

    return type("Plain", (Plain,), {"forward": forward, "__module__": __name__, "change": change})


@pytest.fixture(autouse=True)
def family(monkeypatch):
    known = Family("plain", ("*.Plain",), Fast, lambda module: None, calls)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, known))
    return known


@pytest.mark.parametrize("change", FORKS, ids=lambda change: change.__name__)
def test_what_differs_is_refused(change):
    torch.manual_seed(0)
    module = fork(change)()
    global_state, states = (STEPS, list(SEEN), Plain.total), (random.getstate(), torch.get_rng_state())
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched, entry
    assert "the check failed" not in entry.note, entry
    assert (STEPS, list(SEEN), Plain.total) == global_state, "the check leaves globals as they were"
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert module.steps == 0 and module.log == {"calls": []}


def test_overridden_helpers():
    class Furthest(Plain):
        def search(self, z):
            return torch.cdist(z, self.embedding.weight).argmax(1)

    class Doubled(Plain):
        def finish(self, z, indices):
            quantized, loss, rest = super().finish(z, indices)
            return quantized, 2 * loss, rest

    for kind in (Furthest, Doubled):
        kind.__name__ = kind.__qualname__ = "Plain"
        (entry,) = revq.patch(kind(), verbose=False).entries
        assert not entry.patched, entry


def test_unknown_source_is_said(family):
    (entry,) = revq.patch(Plain(), verbose=False).entries
    assert entry.patched and entry.note == f"forward; {UNKNOWN}"
    other = type("Plain", (Plain,), {"search": lambda self, z: torch.cdist(z, self.embedding.weight).min(1).indices})
    assert len({fingerprint(kind, family) for kind in (Plain, other)}) == 2, "what a replaced method calls counts, too"
    known = taming.VectorQuantizer2(32, 4, beta=0.25)
    (entry,) = revq.patch(known, verbose=False).entries
    assert entry.patched and entry.note.endswith("; checked")


def test_hooks_run_as_before():
    module, seen = Plain(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    assert revq.patch(module, verbose=False).entries[0].patched
    seen.clear()
    module(torch.randn(3, 4))
    assert seen == [1]


def test_janus_returns_three_losses():
    class VectorQuantizer(llamagen.VectorQuantizer):
        def forward(self, z):
            quantized, losses, info = super().forward(z)
            return quantized, losses if self.show_usage else losses[:3], info

    module = VectorQuantizer(32, 4, 0.25, 0.0, True, False)
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched and "length" in entry.note, entry
    assert len(module(torch.randn(1, 4, 2, 2))[1]) == 3


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6])
def test_near_ties_decide_nothing(gap):
    """Pairs of codes that only rounding tells apart: a search by another order of additions takes others, which are right."""

    class Expanded(Plain):
        def search(self, z):
            codes = self.embedding.weight
            return (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T).argmin(1)

        def finish(self, z, indices):
            result = super().finish(z, indices)
            if self.training:
                self.uses += torch.bincount(indices, minlength=32)
            return result

    class FastExpanded:
        preference = 1e-6

        def forward(self, z):
            distances = torch.cdist(z, self.embedding.weight, compute_mode="donot_use_mm_for_euclid_dist")
            return self.finish(
                z, (distances - self.preference * (torch.arange(32) % 4 == 1)).argmin(1)
            )  # prefers the other one

    torch.manual_seed(0)
    module = Expanded()
    module.register_buffer("uses", torch.zeros(32))
    with torch.no_grad():
        module.embedding.weight[1::2] = module.embedding.weight[::2] * (1 + gap)
    Expanded.__name__ = Expanded.__qualname__ = "Expanded"
    registry.FAMILIES = (Family("expanded", ("*.Expanded",), FastExpanded, lambda module: None, calls),)
    (entry,) = revq.patch(module, verbose=False).entries
    assert entry.patched, entry
    revq.unpatch(module)
    FastExpanded.preference = 1.0  # more than rounding
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched and "differ" in entry.note, entry


def test_choices_follow_ties_only():
    matrix = torch.tensor([[1.0, 1.0 + 1e-7, 2.0], [1.0, 1.5, 2.0]], dtype=torch.float64)
    with Choices([torch.tensor([1, 1])]):
        assert matrix.argmin(1).tolist() == [1, 0]
        assert matrix.argmin(1).tolist() == [0, 0], "only the search in the same place"
    with Choices([torch.tensor([1, 1])]):
        assert (-matrix).max(1).indices.tolist() == [1, 0]


def test_modules_that_cannot_be_checked_get_one_line():
    with torch.device("meta"):
        (entry,) = revq.patch(titok.VectorQuantizer(32, 4), verbose=False).entries
    assert not entry.patched and entry.note == "its parameters are on the meta device: load its weights first"

    class VectorQuantizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return torch.cdist(x, self.table).argmin(1)

    class MyCodebook(VectorQuantizer):
        pass

    class FSDPModule:  # as fully_shard does: it adds this base to the class
        pass

    class ShardedCodebook(FSDPModule, MyCodebook):
        pass

    for kind, note in ((VectorQuantizer, "fast_distances"), (MyCodebook, "fast_distances"), (ShardedCodebook, "FSDP2")):
        (entry,) = revq.patch(kind(), verbose=False).entries
        assert not entry.patched and note in entry.note and ";" not in entry.note.replace("unknown class; ", ""), entry


def test_kmeans_runs_one_iteration_in_the_check(monkeypatch):
    package = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    iterations = []
    original = package.kmeans

    def kmeans(samples, num_clusters, num_iters, *args, **kwargs):
        iterations.append(num_iters)
        return original(samples, num_clusters, num_iters, *args, **kwargs)

    kmeans.__signature__ = inspect.signature(original)
    monkeypatch.setattr(package, "kmeans", kmeans)
    codebook = package.VectorQuantize(dim=4, codebook_size=32, kmeans_init=True, kmeans_iters=50)
    assert all(entry.patched for entry in revq.patch(codebook, verbose=False).entries)
    assert iterations and sum(iterations) <= 2, "the original, and its float64 run"
    assert not codebook._codebook.initted and codebook._codebook.kmeans_iters == 50
