"""Writes one file of each kind that revq keeps on disk, and what each must give: ``python tests/formats/make_row.py FOLDER``.

Run it from the root of the commit whose formats the new row preserves.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import revq
from revq import assets
from revq.config import ModelConfig, RectifierConfig, RunConfig, TrainConfig
from revq.data import LatentStore, encode_folder, image_files, load_tokens
from revq.tokenizer import Tokenizer, tokenize_files
from revq.train import state, train
from revq_kernels import EMAUpdate, FastChannelVQ, MappedCodes, ProjectedVQ, ReplaceDeadCodes, ResidualVQ

EFFICIENTVIT = RectifierConfig(width=32, layers=1, form="residual")
MLP = RectifierConfig("mlp", width=8, layers=1, form="residual")


def run_of(rectifier: RectifierConfig, **options) -> RunConfig:
    """A run of seconds on latents ``[B, 32, 2, 2]``."""
    model = ModelConfig((32, 2, 2), num_tokens=16, num_codes=8, rectifier=rectifier)
    return RunConfig("formats", model, TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, **options))


def quantizers() -> dict[str, torch.nn.Module]:
    """One quantizer of each kind of state; ``projected`` reads ``x6`` ``[3, 4, 6]``, the others ``x`` ``[3, 4, 4]``."""
    return {
        "plain": FastChannelVQ(8, 4, num_groups=2),
        "ema": FastChannelVQ(8, 4, update=EMAUpdate(), dead_codes=ReplaceDeadCodes(every=2)),
        "mapped": FastChannelVQ(8, 4, codes=MappedCodes(torch.randn(8, 4), torch.nn.Linear(4, 4))),
        "projected": ProjectedVQ(6, FastChannelVQ(8, 4, layout="BLC", split="space")),
        "residual": ResidualVQ([FastChannelVQ(8, 4), FastChannelVQ(8, 4)]),
    }


def interrupt(run: RunConfig, store: LatentStore, out: Path, step: int) -> None:
    """Train until the checkpoint of ``step`` is written."""
    save = state.save_checkpoint

    def save_and_stop(path: Path, values: dict) -> None:
        save(path, values)
        if values["step"] == step:
            raise KeyboardInterrupt

    state.save_checkpoint = save_and_stop
    try:
        train(run, store, out, validation=store, progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        state.save_checkpoint = save


def make(out: Path) -> None:
    """Write the row."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    photos = assets.held_out_photos()[:6]
    options = {"image_size": 32, "crops": 2, "dtype": "bfloat16", "shard_bytes": 2048, "progress": False}
    store = encode_folder(photos, revq.load_vae(), out=out / "latents", **options)

    train(run_of(EFFICIENTVIT), store, out / "whole", progress=False)
    (out / "whole" / "model").rename(out / "model")
    shutil.rmtree(out / "whole")
    run = run_of(MLP, checkpoint_every=1)
    train(run, store, out / "run", validation=store, progress=False)
    shutil.rmtree(out / "run" / "model")
    interrupt(run, store, out / "interrupted", step=4)

    tokenizer = Tokenizer.from_pretrained(out / "model")
    tokenize_files(tokenizer, image_files(photos).files, out / "tokens.safetensors", batch_size=6)
    tokens, latents, model = load_tokens(out / "tokens.safetensors"), store.rows(range(len(store))), tokenizer.model
    expected = {
        "latents": latents,
        "latent_tokens": model.encode_latents(latents),
        "tokens": tokens.indices,
        "decoded": model.decode_tokens(tokens.indices),
        "normalizer.mean": model.normalizer.mean,
        "codebook": model.quantizer.codebook,
        "x": torch.randn(3, 4, 4),
        "x6": torch.randn(3, 4, 6),
    }
    states = {}
    for name, quantizer in quantizers().items():
        x = expected["x6" if name == "projected" else "x"]
        for _ in range(3):
            quantizer.train()(x)
        with torch.no_grad():
            result = quantizer.eval()(x)
        states |= {f"{name}.{key}": value.clone() for key, value in quantizer.state_dict().items()}
        expected |= {f"{name}.indices": result.indices, f"{name}.quantized": result.quantized}
    save_file({key: value.contiguous() for key, value in states.items()}, out / "quantizers.safetensors")
    save_file(
        {key: value.detach().clone().contiguous() for key, value in expected.items()}, out / "expected.safetensors"
    )
    facts = {"names": [*tokens.names], "model": tokens.model, "fingerprint": store.fingerprint}
    (out / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)
