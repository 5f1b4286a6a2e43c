"""Configurations are data until something takes them: then an invalid one is rejected, by every entry point alike."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
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
MODELS += [
    ({name: value}, rf"{name}: expected an integer, got {text}")
    for name in ("num_tokens", "num_codes")
    for value, text in (
        (True, "True"),
        (8.0, r"8\.0"),
        ("8", "'8'"),
        (None, "None"),
        (math.nan, "nan"),
        ([8], r"\[8\]"),
    )
]
MODELS += [
    ({"num_groups": 4.0}, r"num_groups: expected an integer or None, got 4\.0"),
    ({"num_codes": 10**11}, "num_codes: expected an integer of at most 2,147,483,647, got 100000000000"),
    ({"num_codes": 10**4000}, "num_codes: expected an integer of at most 2,147,483,647, got an integer of hundreds"),
    ({"latent_shape": (4, 4.0, 4)}, r"latent_shape: expected an integer, got \(4, 4\.0, 4\)"),
    ({"latent_shape": (4, True, 4)}, r"latent_shape: expected an integer, got \(4, True, 4\)"),
    ({"latent_shape": (2**30, 2**30, 2**30)}, "latent_shape: expected at most 2,147,483,647 elements"),
    ({"latent_shape": "444"}, "latent_shape: expected 3 integers, got '444'"),
    ({"latent_shape": 5}, "latent_shape: expected 3 integers, got 5"),
    ({"split": "diagonal"}, "split: expected 'channel' or 'space', got 'diagonal'"),
    ({"split": ["channel"]}, "split: expected 'channel' or 'space', got"),
    ({"rectifier": RectifierConfig("mlp", 16, 10**9)}, "rectifier layers: expected at most 1000, got 1000000000"),
    ({"rectifier": RectifierConfig("mlp", 16.0)}, r"rectifier width: expected an integer, got 16\.0"),
    ({"rectifier": RectifierConfig("vit")}, "rectifier kind: expected 'efficientvit', .* or 'identity', got 'vit'"),
    ({"rectifier": RectifierConfig("mlp", 16, 1, "half")}, "rectifier form: expected 'absolute' or 'residual'"),
]
_LARGE = r"expected a model of at most 1,024\.0 GiB, the limit of any model, got one of at least [0-9,]+\.[0-9] GiB"
MODELS += [
    ({"num_codes": 2**31 - 1, "num_groups": 16, "num_tokens": 64, "latent_shape": (4, 64, 64)}, f"num_codes: {_LARGE}"),
    ({"num_codes": 2**31 - 1, "num_groups": 1, "latent_shape": (64, 64, 64)}, f"num_codes: {_LARGE}"),
    ({"latent_shape": (2**14, 2**8, 2**8), "num_codes": 256}, f"num_codes: {_LARGE}"),
    ({"latent_shape": (4, -4, -4)}, r"latent_shape: expected three positive numbers \(C, h, w\), got \(4, -4, -4\)"),
    *(
        ({"rectifier": RectifierConfig(kind, width, layers)}, f"rectifier width: {_LARGE}")
        for kind in ("mlp", "cnn", "efficientvit")
        for width, layers in ((2**30, 1), (2**20, 1), (2**15, 1000))
    ),
]
NUMBERS = ("learning_rate", "rectifier_lr_ratio", "rectifier_weight_decay", "lr_floor", "clip_norm", "reset_noise")
TRAININGS = [
    *(
        ({name: value}, rf"{name}: expected a finite number, also in float32, got {re.escape(repr(value))}")
        for name in (*NUMBERS, "reset_max_fraction")
        for value in (math.nan, math.inf, -math.inf, 1e39, -1e39, 3.4028236e38, 10**40)
    ),
    *(({name: value}, f"{name}: expected a number, got") for name in NUMBERS for value in (True, "0.1", None, [1.0])),
    *(
        ({name: value}, f"{name}: expected an integer")
        for name in ("epochs", "batch_size", "checkpoint_every", "seed")
        for value in (True, 3.0, "3", None, math.inf, 10**30)
    ),
    ({"batch_size": 10**12}, "batch_size: expected an integer of at most 2,147,483,647, got 1000000000000"),
    ({"reset": 1}, "reset: expected True or False, got 1"),
    ({"loss": "both"}, "loss: expected 'separate' or 'joint', got 'both'"),
    ({"init": 0}, "init: expected 'data' or 'normal', got 0"),
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


@pytest.mark.parametrize(("fields", "message"), MODELS, ids=lambda case: str(case)[:40])
def test_model(tmp_path, fields, message):
    config = model_of(fields)
    with pytest.raises(InputError, match=message):
        revq.ReVQ(config)
    with pytest.raises(InputError, match=message):
        model_config_from_dict(json.loads(json.dumps(to_dict(config))))
    revq.ReVQ(model_of({})).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    with pytest.raises(InputError, match=r"config\.json: (" + message + ")|not valid JSON"):
        revq.ReVQ.from_pretrained(tmp_path / "model")


def test_numbers_that_python_does_not_write():
    with pytest.raises(
        InputError, match=r"latent_shape: expected an integer of at most .* got an integer of thousands"
    ):
        model_of({"latent_shape": (10**5000, 4, 4)}).validate()


def test_a_model_beyond_the_memory_is_refused_before_it_is_made(monkeypatch):
    config = model_of({"latent_shape": (4, 64, 64), "num_codes": 2**20})  # 16 codebooks of d = 1024: 64 GiB, and counts
    monkeypatch.setattr(revq.model.revq, "memory_bytes", lambda: 2**36)
    with pytest.raises(
        InputError, match=r"num_codes: expected .* at most 64\.0 GiB, the memory of this machine, got .* 64\.1"
    ):
        revq.ReVQ(config)
    with torch.device("meta"):
        assert revq.ReVQ(config).quantizer.codebook.numel() == 2**34
    kinds, widths = ("mlp", "cnn", "efficientvit", "identity"), (8, 24, 64, model_of({}).latent_size)
    for kind, width, layers in itertools.product(kinds, widths, (1, 3)):
        if kind == "efficientvit" and width % 32:
            continue
        small = model_of({"rectifier": RectifierConfig(kind, width, layers)})
        model = revq.ReVQ(small)
        made = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        small.check_size(made, "counted by hand")  # never more than there is
        fixed = sum(t.nbytes for t in (*model.quantizer.state_dict().values(), *model.normalizer.state_dict().values()))
        with pytest.raises(InputError, match="expected a model of at most"):
            small.check_size(fixed - 1, "counted by hand")


def test_run(tmp_path):
    store, run = random_store(tmp_path / "store"), tiny_run()
    runs = [(RunConfig("bad", model_of(fields)), message) for fields, message in MODELS]
    runs += [(RunConfig("bad", run.model, TrainConfig(**fields)), message) for fields, message in TRAININGS]
    for bad, message in runs:
        for call in (
            bad.validate,
            lambda bad=bad: revq.train.train(bad, store, tmp_path / "run", progress=False),
            lambda bad=bad: demo(tmp_path / "run", config=bad, progress=False),
        ):
            with pytest.raises(InputError, match=message) as caught:
                call()
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_numbers_that_are_legal():
    for values in ({"clip_norm": 1, "learning_rate": 3.4e38}, {"seed": 2**63 - 1}, {"seed": -5}, {"lr_floor": 1e-300}):
        TrainConfig(**values).validate()
    for recipe in revq.recipes.RECIPES.values():
        recipe().validate()


def test_lists_of_json_become_tuples():
    config = model_config_from_dict({"latent_shape": [4, 4, 4], "num_tokens": 16, "rectifier": to_dict(MLP)})
    assert config.latent_shape == (4, 4, 4) and config.rectifier == MLP
