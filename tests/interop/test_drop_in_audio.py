"""Codebooks of audio codecs: those of transformers and encodec, unmodified, and re-implementations of others."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from drop_in_case import (
    Call,
    check_call,
    check_memory,
    check_quantizer,
    check_state,
    check_training,
    graph_breaks,
    largest_tensor,
    patched,
)

import revq
from tests.third_party_quantizers import dac, snac
from tests.third_party_quantizers.without_torchaudio import imported

transformers = pytest.importorskip("transformers", reason="the unmodified package is the reference here")
pytest.importorskip("einops", reason="encodec needs it")

K, D = 512, 8
SIZES = SimpleNamespace(codebook_size=K, codebook_dim=D, hidden_size=12)
MODELS = "transformers.models"
FROZEN = {
    "encodec": f"{MODELS}.encodec.modeling_encodec EncodecEuclideanCodebook",
    "xcodec": f"{MODELS}.xcodec.modeling_xcodec XcodecEuclideanCodebook",
    "higgs": f"{MODELS}.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer HiggsAudioV2TokenizerEuclideanCodebook",
    "mimi": f"{MODELS}.mimi.modeling_mimi MimiEuclideanCodebook",
}


def kind_of(path):
    home, name = path.split()
    return getattr(imported(home), name)


def build_frozen(name):
    """A codebook with random codes; the constructor sets all to zero."""
    torch.manual_seed(0)
    module = kind_of(FROZEN[name])(SIZES)
    if name == "mimi":
        module.cluster_usage.uniform_(0.5, 2.0)
        module.embed_sum.normal_()
    else:
        module.embed.normal_()
    return module


def build_averaged(size=64, **options):
    torch.manual_seed(0)
    kind = imported("encodec.quantization.core_vq").EuclideanCodebook
    module = kind(D, size, **{"kmeans_iters": 4, "kmeans_init": True, **options})
    if module.inited:  # with counts of zero the first average would give codes of 1e5
        module.cluster_size.fill_(4.0)
        module.embed.normal_()
        module.embed_avg.copy_(module.embed * 4.0)
    return module


def build_dac():
    torch.manual_seed(0)
    return kind_of(f"{MODELS}.dac.modeling_dac DacVectorQuantize")(SIZES)


def restated(build=dac.VectorQuantize, **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # those repositories use the old weight_norm
        return build(**{"input_dim": 12, "codebook_size": K, "codebook_dim": D, **options})


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(seed):
    return (normal(seed, 2, 64, D),)


def latents(seed):
    return (normal(seed, 2, D, 64),)


def hidden(seed):
    return (normal(seed, 2, 12, 64),)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_codebook(name):
    corrected = check_quantizer(lambda: build_frozen(name), rows, method="encode", steps=0)
    assert (corrected > 0) == (name != "mimi"), "bfloat16 autocast makes the originals choose wrong codes, save Mimi's"
    check_memory(build_frozen(name), Call("encode", rows(0)), pairs=128 * K)


def test_mimi_keeps_its_codes_as_the_original():
    module = build_frozen("mimi")
    with patched(module):
        assert module._embed is None, "the check makes codes of its own"
        module.encode(*rows(0))
        kept = module._embed
        module.encode(*rows(1))
        assert module._embed is kept


@pytest.mark.parametrize(
    "options",
    [{}, {"kmeans_init": False}, {"threshold_ema_dead_code": 0, "decay": 0.8}, {"threshold_ema_dead_code": 40}],
    ids=["kmeans", "no kmeans", "no dead codes", "many dead codes"],
)
def test_averaged_codebook(options):
    check_quantizer(lambda: build_averaged(**options), rows)


def test_averaged_codebook_under_autocast():
    module = build_averaged(512, kmeans_init=False)
    call = Call("forward", (normal(0, 8, 64, D),))
    assert check_call(module, call, training=False, autocast=True) > 0
    check_call(module, call, training=True, autocast=True)


@pytest.mark.parametrize("initialized", [True, False])
def test_averaged_codebook_without_a_matrix(initialized):
    """The patched module creates neither distances, nor one-hot rows, nor the differences of k-means."""
    check_memory(build_averaged(kmeans_init=not initialized), Call("forward", (normal(0, 4, 64, D),)), pairs=256 * 64)


def test_first_batch_draws_the_same_codes():
    """With more codes than vectors k-means draws in another way than with fewer, from the same random state."""
    for length in (16, 200):
        original, fast = build_averaged(), build_averaged()
        with patched(fast):
            for module in (original, fast):
                torch.manual_seed(1)
                module.init_embed_(normal(0, length, D))
        assert original.inited == 1
        for name, value in original.named_buffers():
            torch.testing.assert_close(dict(fast.named_buffers())[name], value)


def test_first_batch_shares_the_codes_among_processes(monkeypatch):
    """By the original's own function, which some forks change or omit."""
    shared = []
    monkeypatch.setattr(imported("encodec.distrib"), "broadcast_tensors", lambda tensors: shared.append(list(tensors)))
    module = build_averaged(threshold_ema_dead_code=0)
    with patched(module):
        shared.clear()
        module(*rows(0))
        module(*rows(1))
    assert len(shared) == 1 and len(shared[0]) == 4


@pytest.mark.parametrize("fork", ["audiocraft.quantization.core_vq", "encoder.quantization.core_vq"])
def test_forks_of_encodec(fork):
    kind = imported("encodec.quantization.core_vq").EuclideanCodebook
    forked = type("EuclideanCodebook", (kind,), {"__module__": fork})
    report = revq.patch(forked(D, 64, kmeans_init=True), verbose=False)
    assert [(entry.family, entry.patched) for entry in report.entries] == [("encodec", True)], report


def test_residual_stages_of_encodec():
    def build():
        torch.manual_seed(0)
        kind = imported("encodec.quantization.vq").ResidualVectorQuantizer
        return kind(dimension=D, n_q=3, bins=32, kmeans_iters=3)

    check_quantizer(build, lambda seed: (normal(seed, 2, D, 64), 50), steps=5)


def test_transformers_dac():
    assert check_quantizer(build_dac, latents, method="decode_latents", steps=0) > 0
    for training in (False, True):
        check_call(build_dac(), Call("forward", hidden(0)), training=training)
    check_training(build_dac(), "forward", hidden, steps=20, lr=1e-3)
    check_state(build_dac, Call("forward", hidden(0)))
    check_memory(build_dac(), Call("forward", hidden(0)), pairs=128 * K)


def test_transformers_dac_fetches_offloaded_codes():
    calls = []
    hook = SimpleNamespace(
        pre_forward=lambda module: calls.append(("pre", module)),
        post_forward=lambda module, output: calls.append(("post", module)),
    )
    module = build_dac()
    with patched(module):
        module.codebook._hf_hook = hook
        module.decode_latents(*latents(0))
    assert calls == [("pre", module.codebook), ("post", module.codebook)]


def test_transformers_dac_with_a_zero_code():
    module = build_dac()
    module.codebook.weight.data[3] = 0
    assert "a code is zero" in str(revq.patch(module, verbose=False))


@pytest.mark.parametrize("kind", [dac.VectorQuantize, snac.VectorQuantize], ids=["dac", "snac"])
def test_reimplemented_stage(kind):
    def build():
        return restated(kind, **({"stride": 4} if kind is snac.VectorQuantize else {}))

    assert check_quantizer(build, latents, method="decode_latents", steps=0) > 0
    for training in (False, True):
        check_call(build(), Call("forward", hidden(0)), training=training)
    check_training(build(), "forward", hidden, steps=20, lr=1e-3)
    check_state(build, Call("forward", hidden(0)))
    names = [f"{proj}.{part}" for proj in ("in_proj", "out_proj") for part in ("bias", "weight_g", "weight_v")]
    assert sorted(build().state_dict()) == ["codebook.weight", *names]


def test_reimplemented_stage_under_autocast():
    """The projection runs in bfloat16; the search for its results is exact."""
    module = restated().eval()
    with patched(module), torch.autocast("cpu", torch.bfloat16):
        _, _, _, indices, z_e = module(*hidden(0))
    assert z_e.dtype == torch.bfloat16
    rows, codes = (torch.nn.functional.normalize(x.double()) for x in (z_e.mT.reshape(-1, D), module.codebook.weight))
    assert torch.equal(
        indices.flatten(), torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    )


def test_reimplemented_stage_with_new_weight_norm():
    def build():
        module = restated()
        for name in ("in_proj", "out_proj"):
            conv = torch.nn.Conv1d(*((12, D) if name == "in_proj" else (D, 12)), 1)
            setattr(module, name, torch.nn.utils.parametrizations.weight_norm(conv))
        return module

    check_call(build(), Call("forward", hidden(0)), training=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_reimplemented_residual_stages(dropout):
    def build():
        return restated(
            dac.ResidualVectorQuantize,
            input_dim=12,
            n_codebooks=3,
            codebook_size=64,
            codebook_dim=4,
            quantizer_dropout=dropout,
        )

    for training in (False, True):
        check_call(build(), Call("forward", hidden(0)), training=training)
    check_call(build(), Call("forward", (*hidden(0), 2)), training=False)
    check_call(build(), Call("from_latents", (normal(0, 2, 12, 20),)), training=False)
    check_training(build(), "forward", hidden, steps=5, lr=1e-3)
    module = build()
    module(*hidden(0))["z"].sum().backward()  # in training mode the module holds tensors with a graph
    revq.like(module)


@pytest.mark.parametrize("build", [lambda: build_frozen("encodec"), lambda: build_frozen("mimi"), build_dac, restated])
def test_half_precision(build):
    """The search of bfloat16 codes and vectors is exact."""
    module = build().eval().bfloat16()
    method, inputs = ("decode_latents", latents) if hasattr(module, "decode_latents") else ("encode", rows)
    check_call(module, Call(method, tuple(value.bfloat16() for value in inputs(0))), training=False)


@pytest.mark.parametrize(
    ("build", "method", "inputs"),
    [
        (lambda: build_frozen("encodec"), "encode", rows),
        (lambda: build_frozen("mimi"), "encode", rows),
        (lambda: build_averaged(kmeans_init=False), "forward", rows),
        (lambda: build_averaged(), "forward", rows),
        (build_dac, "forward", hidden),
        (restated, "forward", hidden),
    ],
    ids=["encodec", "mimi", "averaged", "kmeans", "dac", "restated"],
)
def test_no_new_graph_break(build, method, inputs):
    call = Call(method, inputs(0))
    before = graph_breaks(build(), call)
    module = build()
    with patched(module):
        assert graph_breaks(module, call) <= before


def scaled_average(self, x):
    result = imported("encodec.quantization.core_vq").EuclideanCodebook.forward(self, x)
    if self.training:
        self.embed.data.mul_(1.01)
    return result


CHANGED = {
    "other parameter": (lambda: build_frozen("encodec"), {"quantize": lambda self, x: x}, "takes (x)"),
    "largest distance": (
        lambda: build_frozen("xcodec"),
        {"quantize": lambda self, hidden_states: torch.cdist(hidden_states, self.embed).argmax(1)},
        "differ",
    ),
    "other metric": (
        lambda: build_frozen("mimi"),
        {"quantize": lambda self, hidden_states: (hidden_states @ self.embed.T).argmax(1)},
        "differ",
    ),
    "other average": (lambda: build_averaged(kmeans_init=False), {"forward": scaled_average}, "state: embed"),
    "no k-means": (lambda: build_averaged(), {"init_embed_": lambda self, data: None}, "no function 'kmeans'"),
    "no normalization": (
        build_dac,
        {
            "decode_latents": lambda self, hidden_states: (
                hidden_states,
                torch.cdist(hidden_states.mT, self.codebook.weight[None]).argmin(-1),
            )
        },
        "differ",
    ),
    "not a stage of DAC": (restated, {"decode_latents": None}, "no method 'decode_latents'"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_class_is_left(case):
    build, names, reason = CHANGED[case]
    module = build()
    own = {"__module__": type(module).__module__, "__qualname__": type(module).__qualname__}
    module.__class__ = type(type(module).__name__, (type(module),), {**names, **own})
    (entry,) = revq.patch(module, verbose=False).entries
    assert not entry.patched and reason in entry.note, entry


def test_other_modules_of_the_same_name_are_left():
    lucidrains = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(dim=8, codebook_size=16)
    families = {
        e.module: e.note for e in revq.patch(lucidrains, verbose=False).entries if e.family == "descript-audio-codec"
    }
    assert all("no method 'decode_latents'" in note for note in families.values())

    class EuclideanCodebook(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Parameter(torch.randn(2, 8, 4))

        def init_embed_(self, data): ...
        def quantize(self, x): ...
        def forward(self, x): ...

    (entry,) = revq.patch(EuclideanCodebook(), verbose=False).entries
    assert not entry.patched and "codebook_size" in entry.note


def test_memory_is_that_of_the_vectors():
    """With sixteen times the codes, the largest tensor (apart from the codes) has the same size."""
    module = build_frozen("encodec")
    with patched(module):
        assert largest_tensor(module, Call("encode", rows(0))) <= max(2 * 64 * D, K * D)
