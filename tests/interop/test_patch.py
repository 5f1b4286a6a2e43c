"""revq.patch, unpatch and like on a small quantizer of the tests, so that a failure comes from them."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from drop_in_case import check_quantizer
from torch import nn

import revq
from revq_kernels import interop
from revq_kernels.interop import registry
from revq_kernels.interop.families.family import Call, Family, Vectors
from revq_kernels.interop.search import nearest
from revq_kernels.interop.verify import errors

CODES, DIM = 64, 4


class ToyQuantizer(nn.Module):
    """A quantizer with torch.cdist, a commitment loss and a usage buffer."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.embedding = nn.Embedding(CODES, dim)
        self.register_buffer("usage", torch.zeros(CODES))

    def forward(self, z):
        indices = torch.cdist(z, self.embedding.weight).argmin(dim=1)
        return self.finish(z, indices)

    def finish(self, z, indices):
        quantized = self.embedding(indices)
        if self.training:
            self.usage.mul_(0.9).add_(torch.bincount(indices, minlength=CODES), alpha=0.1)
        loss = F.mse_loss(z, quantized.detach()) + 0.25 * F.mse_loss(quantized, z.detach())
        return z + (quantized - z).detach(), loss, indices


class Right:
    def forward(self, z):
        return self.finish(z, nearest(z, self.embedding.weight))


class WrongIndex:
    def forward(self, z):
        return self.finish(z, nearest(z, self.embedding.weight).roll(1))


class WrongLoss:
    def forward(self, z):
        indices = nearest(z, self.embedding.weight)
        quantized = self.embedding(indices)
        if self.training:
            self.usage.mul_(0.9).add_(torch.bincount(indices, minlength=CODES), alpha=0.1)
        loss = F.mse_loss(z, quantized.detach()) + F.mse_loss(quantized, z.detach())
        return z + (quantized - z).detach(), loss, indices


class WrongGradient:
    def forward(self, z):
        quantized, loss, indices = self.finish(z, nearest(z, self.embedding.weight))
        return quantized.detach(), loss, indices


class WrongBuffer:
    def forward(self, z):
        result = self.finish(z, nearest(z, self.embedding.weight))
        if self.training:
            self.usage.mul_(0.9)
        return result


class WrongShape:
    def forward(self, z):
        quantized, loss, indices = self.finish(z, nearest(z, self.embedding.weight))
        return quantized, loss, indices[:, None]


class Fails:
    def forward(self, z):
        raise RuntimeError("out of order")


def toy_family(methods=Right):
    return Family(
        f"toys ({methods.__name__})",
        ("*.ToyQuantizer",),
        methods,
        lambda module: None if module.embedding.weight.shape[1] == DIM else "d is not 4",
        lambda module, vectors: [Call("forward", (vectors(module.embedding.weight, 40, DIM),))],
    )


@pytest.fixture
def known(monkeypatch):
    def know(*methods):
        monkeypatch.setattr(registry, "FAMILIES", tuple(toy_family(each) for each in methods))

    know(Right)
    return know


def build():
    torch.manual_seed(0)
    return ToyQuantizer()


def inputs(seed):
    return (torch.randn(40, DIM, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.usefixtures("known")
def test_all_checks():
    check_quantizer(build, inputs)


@pytest.mark.parametrize(
    ("methods", "reason"),
    [
        (WrongIndex, "result: result[2]: 40 of 40 differ"),
        (WrongLoss, "result: result[1] is off by"),
        (WrongGradient, "gradients: arguments[0][0] is off by"),
        (WrongBuffer, "state: usage is off by"),
        (WrongShape, "result[2] is torch.int64 (40, 1), the original's torch.int64 (40,)"),
        (Fails, "the check failed: RuntimeError: out of order"),
    ],
)
def test_the_check_finds_what_is_wrong(known, methods, reason):
    known(methods)
    module = build()
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched and type(module) is ToyQuantizer
    assert reason in entry.note, entry.note
    (entry,) = revq.patch(module, verify=False, verbose=False).entries
    assert entry.patched and entry.note == "forward; not checked"


def test_the_first_family_that_fits_is_taken(known):
    known(WrongIndex, Right)
    module = build()
    assert revq.patch(module, verbose=False).entries[0].patched
    assert type(module).__mro__[1] is Right
    known(WrongIndex, WrongLoss)
    (entry,) = revq.patch(build(), verbose=False).entries
    assert not entry.patched and entry.note.count("no toys (") == 2


def test_wrong_codes_of_the_original_do_not_prevent_the_patch(known):
    """At an offset of 4,096 torch.cdist suffers from cancellation; the float64 run decides which code is right."""
    torch.manual_seed(1)
    table = torch.randn(CODES, DIM) + 4096
    module = ToyQuantizer()
    module.embedding.weight.data.copy_(table)
    z = torch.randn(400, DIM) + 4096
    wrong = (module(z)[2] != torch.cdist(z.double(), table.double()).argmin(1)).sum()
    assert wrong > 0, "no error of the original to correct"
    assert revq.patch(module, verbose=False).entries[0].patched
    assert torch.equal(module(z)[2], torch.cdist(z.double(), table.double()).argmin(1))


@pytest.mark.usefixtures("known")
def test_what_is_left_and_why(capsys):
    hooked, newer = build(), build()
    wide = ToyQuantizer(2 * DIM)
    hooked.forward = hooked.forward

    class Newer(ToyQuantizer):
        def forward(self, z, temperature=1.0):
            return super().forward(z)

    Newer.__name__ = "ToyQuantizer"
    newer.__class__ = Newer

    class OtherCodebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(4, 4))

    class LFQ(nn.Module):
        pass

    model = nn.ModuleDict({"wide": wide, "hooked": hooked, "newer": newer, "other": OtherCodebook(), "lfq": LFQ()})
    before = {name: type(module) for name, module in model.named_modules()}
    report = revq.patch(model)
    notes = {entry.module: entry.note for entry in report.entries}
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(entry.patched for entry in report.entries)
    assert notes["wide"] == "d is not 4" and "set on the instance" in notes["hooked"]
    assert notes["newer"] == "'forward' takes (z, temperature); known is (z)"
    assert "revq.fast_distances()" in notes["other"] and "signs" in notes["lfq"]
    printed = capsys.readouterr().out
    assert printed.strip() == str(report) and all(name in printed for name in notes)


@pytest.mark.usefixtures("known")
def test_block_copies_and_pickles():
    model = nn.Sequential(build(), nn.Linear(DIM, DIM))
    (z,) = inputs(0)
    expected = model[0](z)
    with revq.patch(model, verbose=False) as report:
        assert report.model is model and type(model[0]).__mro__[1] is Right
        again = revq.patch(model, verbose=False)
        assert again.entries[0].note == "already patched"
        copied = copy.deepcopy(model)
        loaded = pickle.loads(pickle.dumps(model))
        for other in (copied, loaded):
            assert type(other[0]) is type(model[0]) and other[0].embedding.weight is not model[0].embedding.weight
            assert all(torch.equal(a, b) for a, b in zip(other[0](z), expected, strict=True))
            revq.unpatch(other)
            assert type(other[0]) is ToyQuantizer
    assert type(model[0]) is ToyQuantizer
    with pytest.raises(ZeroDivisionError), revq.patch(model, verbose=False):
        raise ZeroDivisionError
    assert type(model[0]) is ToyQuantizer


@pytest.mark.usefixtures("known")
def test_patching_changes_neither_state_nor_random_numbers():
    module = build().train()
    state, held = copy.deepcopy(module.state_dict()), dict(vars(module))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    revq.patch(module, verbose=False)
    assert torch.equal(torch.rand(3), expected) and module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert vars(module) == held and module.embedding.weight.grad is None


@pytest.mark.usefixtures("known")
def test_like_is_another_module_with_the_same_tensors():
    module = build()
    model = nn.Sequential(nn.Linear(DIM, DIM), module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model[1] = shared = revq.like(module)
    assert type(module) is ToyQuantizer and shared.embedding.weight is module.embedding.weight
    assert shared.usage is module.usage and shared.embedding is not module.embedding
    before = module.embedding.weight.clone()
    model(inputs(0)[0])[1].backward()
    optimizer.step()
    assert not torch.equal(before, module.embedding.weight), "the optimizer holds the same parameter"
    shared.eval()
    assert module.training, "modes are each module's own"
    shared.register_forward_hook(lambda *_: None)
    assert not module._forward_hooks


@pytest.mark.parametrize("call", [revq.patch, revq.unpatch, revq.like])
def test_only_modules_are_accepted(call):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        call(3)


@pytest.mark.usefixtures("known")
def test_like_gives_the_reason():
    with pytest.raises(ValueError, match="expected a quantizer of a known family, got Linear"):
        revq.like(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="d is not 4"):
        revq.like(ToyQuantizer(2 * DIM))


def test_random_batches_look_like_the_codebook():
    table = torch.randn(100, 4) * 3 + 50
    batch = Vectors()(table.bfloat16(), 1000, 4)
    assert batch.dtype is torch.bfloat16 and torch.equal(batch, Vectors()(table.bfloat16(), 1000, 4))
    assert abs(batch.float().mean() - 50) < 0.5 and abs(batch.float().std() - 3) < 0.3
    assert Vectors()(torch.zeros(4, 4), 8).std() > 0, "a codebook of zeros still gets vectors that differ"


def test_search_in_every_dtype():
    x, codebook = torch.randn(3, 50, DIM), torch.randn(CODES, DIM)
    expected = torch.cdist(x.double(), codebook.double()).argmin(-1)
    assert torch.equal(nearest(x, codebook), expected)
    assert torch.equal(nearest(x.double(), codebook), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest(x, codebook), expected)
    half = x.bfloat16()
    assert torch.equal(nearest(half, codebook), torch.cdist(half.double(), codebook.double()).argmin(-1))


def test_errors_of_infinities_and_nothing():
    inf = torch.tensor([float("inf"), float("nan"), 1.0])
    error, allowed = errors(inf, inf, inf.double())
    assert error == 0 and allowed >= 0
    assert errors(inf[:0], inf[:0], inf[:0].double()) == (0, 0)
    error, allowed = errors(torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([1.0]).double())
    assert not error <= allowed


@pytest.mark.usefixtures("known")
def test_a_block_undoes_its_own_patch_only():
    model = nn.Sequential(build(), build())
    revq.patch(model[0], verbose=False)
    with revq.patch(model, verbose=False):
        assert type(model[1]).__mro__[1] is Right
    assert type(model[0]).__mro__[1] is Right and type(model[1]) is ToyQuantizer
    revq.unpatch(model)
    assert type(model[0]) is ToyQuantizer


@pytest.mark.usefixtures("known")
def test_the_check_seeds_no_gpu(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it seeds every device of the process"))
    assert revq.patch(ToyQuantizer(), verbose=False).entries[0].patched


@pytest.mark.usefixtures("known")
def test_patching_in_inference_mode_and_with_another_default_device():
    with torch.inference_mode():
        assert revq.patch(build(), verbose=False).entries[0].patched
    module = build()
    with torch.device("meta"):
        assert revq.patch(module, verbose=False).entries[0].patched


WITH_TORCH_ALONE = """
import sys

for name in ("diffusers", "matplotlib", "PIL", "tqdm", "transformers", "triton", "tyro", "vector_quantize_pytorch"):
    sys.modules[name] = None  # an import of it raises

import torch
from torch import nn

import revq


class SimpleVectorizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 4)
        self.commitment_cost, self.entropy_loss_weight, self.use_l2_normalization = 0.25, 0.0, False

    def get_codebook_entry(self, indices):
        return self.embedding(indices)

    def forward(self, z):
        z = z.permute(0, 2, 3, 1).contiguous()
        indices = torch.cdist(z.flatten(0, 2), self.embedding.weight).argmin(1)
        rows = self.get_codebook_entry(indices).view(z.shape)
        commitment = self.commitment_cost * (rows.detach() - z).square().mean()
        codebook = (rows - z.detach()).square().mean()
        zero = torch.zeros(())
        return (z + (rows - z).detach()).permute(0, 3, 1, 2).contiguous(), {
            "quantizer_loss": commitment + codebook,
            "commitment_loss": commitment,
            "codebook_loss": codebook,
            "entropy_loss": zero,
            "per_sample_entropy": zero,
            "avg_entropy": zero,
            "min_encoding_indices": indices.view(z.shape[:-1]),
        }


quantizer, z = SimpleVectorizer(), torch.randn(2, 4, 3, 3)
expected, _ = quantizer(z)
(entry,) = revq.patch(quantizer, verbose=False).entries
assert entry.patched and entry.family == "MaskBit SimpleVectorizer" and entry.note == "forward; unknown version: checked by behavior only", entry
assert torch.equal(quantizer(z)[0], expected)
revq.unpatch(quantizer)
assert torch.equal(revq.like(quantizer)(z)[0], expected)
x, codes = torch.randn(5, 4), quantizer.embedding.weight
with revq.fast_distances():
    nearest = torch.cdist(x, codes).argmin(1)
assert torch.equal(nearest, torch.cdist(x, codes).argmin(1))
"""


def test_torch_is_all_that_is_needed():
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", WITH_TORCH_ALONE], check=True, cwd=root)


def test_public_names_are_the_functions_themselves():
    """A module of the same name would hide a function of the package."""
    for name in ("patch", "unpatch", "like", "Patched", "fast_distances"):
        assert getattr(interop, name) is getattr(revq, name)
