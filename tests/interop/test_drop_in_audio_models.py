"""Whole audio codecs of transformers and encodec, unmodified, from small configurations: encode and decode."""

import pytest
import torch
from drop_in_case import named_tensors, patched

from tests.third_party_quantizers.without_torchaudio import imported

transformers = pytest.importorskip("transformers", reason="the unmodified package is the reference here")
pytest.importorskip("einops", reason="encodec needs it")

DAC = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [4, 4]}
HUBERT = {
    "model_type": "hubert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 8],
    "conv_stride": [8, 8, 5],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "conv_bias": False,
    "mask_time_prob": 0.0,
}


def encodec():
    config = transformers.EncodecConfig(
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=64,
        target_bandwidths=[54.0],
        num_lstm_layers=1,
    )
    return transformers.EncodecModel(config)


def mimi():
    config = transformers.MimiConfig(
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=64,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=3,
        upsample_groups=16,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.MimiModel(config)


def dac():
    return transformers.DacModel(transformers.DacConfig(**DAC, n_codebooks=3, codebook_size=64))


def semantic(kind, config, **options):
    """X-Codec and Higgs Audio combine DAC's encoder and HuBERT's, which must have the same 320 samples per frame."""
    ratios = {"downsampling_ratios": [8, 8, 5], "upsampling_ratios": [8, 8, 5]}
    acoustic = {"model_type": "dac", **DAC, **ratios, "hidden_size": 32}
    sizes = {"sample_rate": 16000, "codebook_size": 64, "target_bandwidths": [0.95], **options}
    return kind(config(acoustic_model_config=acoustic, semantic_model_config=HUBERT, **sizes))


def xcodec():
    return semantic(transformers.XcodecModel, transformers.XcodecConfig)


def higgs():
    home = imported("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    return semantic(home.HiggsAudioV2TokenizerModel, transformers.HiggsAudioV2TokenizerConfig, codebook_dim=8)


def encodec_package():
    seanet, vq, model = (imported(f"encodec.{name}") for name in ("modules.seanet", "quantization.vq", "model"))
    sizes = {"dimension": 16, "n_filters": 4, "ratios": [4, 2], "lstm": 1}
    quantizer = vq.ResidualVectorQuantizer(dimension=16, n_q=3, bins=64, kmeans_init=False)
    return model.EncodecModel(
        seanet.SEANetEncoder(**sizes), seanet.SEANetDecoder(**sizes), quantizer, [36.0], 16000, 1, name="small"
    )


MODELS = {
    "encodec": encodec,
    "mimi": mimi,
    "dac": dac,
    "xcodec": xcodec,
    "higgs": higgs,
    "encodec package": encodec_package,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # encodec uses the old weight_norm
@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("embed", "embed_sum")):
            buffer.normal_(std=0.1 if "encodec" in name else 1.0)  # constructors set them to zero
    wave = torch.randn(2, 1, 6400 if name in ("xcodec", "higgs") else 800, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = dict(named_tensors(model.encode(wave))), dict(named_tensors(model(wave)))
        with patched(model, verify=True) as report:
            assert sum("odebook" in entry.kind or "VectorQuantize" in entry.kind for entry in report.entries) >= 3
            after = dict(named_tensors(model.encode(wave))), dict(named_tensors(model(wave)))
    codes = [value for value in before[0].values() if not value.is_floating_point()]
    assert codes and codes[0].unique().numel() > 4, "the model uses too few codes to tell"
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert torch.equal(new[key], value), key
