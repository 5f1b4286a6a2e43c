"""Files of earlier commits load and give what they gave: a folder here is a row, a kind of file a column."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_row import quantizers
from safetensors.torch import load_file

import revq
from revq.config import RunConfig, TrainConfig, model_config_from_dict
from revq.data import LatentStore, load_tokens
from revq.errors import InputError
from revq.tokenizer import token_fingerprint
from revq.train import read_records, train
from revq.train.state import load_checkpoint

HERE = Path(__file__).parent
ROWS = sorted(path.name for path in HERE.iterdir() if (path / "expected.json").is_file())
EARLIER_MLP = {"58acdd7"}  # the runs there have an mlp of other layers, which is refused
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order, on another machine
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(params=ROWS)
def row(request):
    """The folder of one format version."""
    return HERE / request.param


@pytest.fixture
def expected(row):
    """What the files of the row must give."""
    return load_file(row / "expected.safetensors") | json.loads((row / "expected.json").read_text())


def test_model_folder(row, expected):
    model = revq.Tokenizer.from_pretrained(row / "model").model
    assert torch.equal(model.quantizer.codebook, expected["codebook"])
    assert torch.equal(model.normalizer.mean, expected["normalizer.mean"])
    assert torch.equal(model.encode_latents(expected["latents"]), expected["latent_tokens"])
    torch.testing.assert_close(model.decode_tokens(expected["tokens"]), expected["decoded"], **CLOSE)


def test_latent_store(row, expected):
    store = LatentStore(row / "latents")
    assert torch.equal(store.rows(range(len(store))), expected["latents"])
    assert store.fingerprint == expected["fingerprint"]


def test_token_file(row, expected):
    tokens = load_tokens(row / "tokens.safetensors")
    assert torch.equal(tokens.indices, expected["tokens"])
    assert [*tokens.names] == expected["names"] and tokens.model == expected["model"]
    assert tokens.model == token_fingerprint(revq.ReVQ.from_pretrained(row / "model"))


@pytest.mark.parametrize("name", ["run", "interrupted"])
def test_checkpoint(row, name, tmp_path, one_thread):
    """A finished run returns its model; an interrupted run ends with the model of the finished run."""
    out = shutil.copytree(row / name, tmp_path / name)
    config = json.loads(load_checkpoint(out / "checkpoint.pt")["about"])[0]
    run = RunConfig(config["name"], model_config_from_dict(config["model"]), TrainConfig(**config["train"]))
    store = LatentStore(row / "latents")
    if row.name in EARLIER_MLP:
        with pytest.raises(
            InputError, match=r"checkpoint\.pt: expected the mlp .* commit 4d4a8f7 is the last that reads it"
        ):
            train(run, store, out, validation=store, progress=False)
        return
    result = train(run, store, out, validation=store, progress=False)
    finished = load_checkpoint(row / "run" / "checkpoint.pt")
    assert result.steps == finished["step"]
    for key, value in result.model.state_dict().items():
        torch.testing.assert_close(value, finished["model"][key], **(CLOSE if name == "interrupted" else EXACT))
    assert [*result.last_epoch] == pytest.approx(finished["last"])
    assert [*result.validation] == pytest.approx(finished["errors"], rel=1e-4)
    epochs = [record for record in read_records(out / "metrics.jsonl") if record["kind"] == "epoch"]
    assert len(epochs) == run.train.epochs
    assert all(record["utilization"] > 0 and record["validation_quantized"] > 0 for record in epochs)


@pytest.mark.parametrize("name", list(quantizers()))
def test_state_dicts(row, expected, name):
    quantizer = quantizers()[name]
    states = load_file(row / "quantizers.safetensors")
    state = {key.removeprefix(f"{name}."): value for key, value in states.items() if key.startswith(f"{name}.")}
    quantizer.load_state_dict(state, strict=True)
    with torch.no_grad():
        result = quantizer.eval()(expected["x6" if name == "projected" else "x"])
    assert torch.equal(result.indices, expected[f"{name}.indices"])
    torch.testing.assert_close(result.quantized, expected[f"{name}.quantized"], **CLOSE)
