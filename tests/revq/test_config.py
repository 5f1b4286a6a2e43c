"""Configurations are data until something takes them: then an invalid one is rejected, by every entry point alike."""

import dataclasses
import json

import pytest
from pipeline_case import random_store, tiny_run

import revq
from revq.config import ModelConfig, RectifierConfig, RunConfig, TrainConfig, model_config_from_dict, to_dict
from revq.demo import demo
from revq.errors import InputError
from revq.model.rectifier import build_rectifier

MLP = RectifierConfig("mlp", 16, 1)
RECTIFIERS = [
    ({"width": 48}, "rectifier width: expected a multiple of 32 for efficientvit, got 48"),
    ({"width": 0}, "width: expected a number > 0, got 0"),
    ({"kind": "identity", "layers": -1}, "layers: expected a number > 0, got -1"),
]
MODELS = [
    ({"num_tokens": 7}, r"num_tokens: expected a divisor of the latent's 64 numbers \(4, 4, 4\), got 7"),
    ({"num_codes": 0}, "num_codes: expected a number > 0, got 0"),
    ({"latent_shape": (4, 0, 4)}, r"latent_shape: expected three positive numbers \(C, h, w\), got \(4, 0, 4\)"),
    ({"latent_shape": (4, 4)}, r"latent_shape: expected three positive numbers \(C, h, w\), got \(4, 4\)"),
    ({"num_groups": 3}, "num_groups: expected a divisor of num_tokens=16, got 3"),
    *(({"rectifier": RectifierConfig(**fields)}, message) for fields, message in RECTIFIERS),
]
TRAININGS = [
    ({"epochs": 0}, "epochs: expected a number > 0, got 0"),
    ({"clip_norm": -1}, "clip_norm: expected a number >= 0, got -1"),
    ({"lr_floor": 1.5}, "lr_floor: expected a factor of at most 1, got 1.5"),
    ({"reset_max_fraction": 2}, "reset_max_fraction: expected a share between 0 and 1, got 2"),
]


def model_of(fields) -> ModelConfig:
    return dataclasses.replace(ModelConfig((4, 4, 4), 16, 8, rectifier=MLP), **fields)


@pytest.mark.parametrize(("fields", "message"), RECTIFIERS, ids=str)
def test_rectifier(fields, message):
    with pytest.raises(InputError, match=message):
        build_rectifier(RectifierConfig(**fields), (4, 4, 4))


@pytest.mark.parametrize(("fields", "message"), MODELS, ids=str)
def test_model(tmp_path, fields, message):
    config = model_of(fields)
    with pytest.raises(InputError, match=message):
        revq.ReVQ(config)
    with pytest.raises(InputError, match=message):
        model_config_from_dict(json.loads(json.dumps(to_dict(config))))
    revq.ReVQ(model_of({})).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    with pytest.raises(InputError, match=r"config\.json: " + message):
        revq.ReVQ.from_pretrained(tmp_path / "model")


def test_run(tmp_path):
    store, run = random_store(tmp_path / "store"), tiny_run()
    runs = [(RunConfig("bad", model_of(fields)), message) for fields, message in MODELS]
    runs += [(RunConfig("bad", run.model, TrainConfig(**fields)), message) for fields, message in TRAININGS]
    for bad, message in runs:
        with pytest.raises(InputError, match=message):
            revq.train.train(bad, store, tmp_path / "run", progress=False)
        with pytest.raises(InputError, match=message):
            demo(tmp_path / "run", config=bad, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_lists_of_json_become_tuples():
    config = model_config_from_dict({"latent_shape": [4, 4, 4], "num_tokens": 16, "rectifier": to_dict(MLP)})
    assert config.latent_shape == (4, 4, 4) and config.rectifier == MLP
