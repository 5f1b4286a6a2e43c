"""The recipes' numbers against the paper (section 4.1, Appendix F.2) and the released checkpoints' shapes."""

import json

import pytest

from revq.config import model_config_from_dict, to_dict
from revq.recipes import RECIPES, demo, paper_256t, paper_256t_large, paper_512t

RELEASED = {  # T, K, d, rectifier width and layers, batch; the codebook of a released checkpoint is [T, K, d]
    paper_512t: (512, 16384, 4, 512, 3, 256),
    paper_256t: (256, 65536, 8, 1024, 4, 256),
    paper_256t_large: (256, 262144, 8, 512, 4, 128),
}


@pytest.mark.parametrize("recipe", RELEASED, ids=lambda recipe: recipe.__name__)
def test_paper(recipe):
    run = recipe()
    model, options = run.model, run.train
    rectifier = model.rectifier
    got = (model.num_tokens, model.num_codes, model.code_dim, rectifier.width, rectifier.layers, options.batch_size)
    assert got == RELEASED[recipe]
    assert model.groups == model.num_tokens and model.latent_shape == (32, 8, 8) and model.split == "channel"
    assert (rectifier.kind, rectifier.form) == ("efficientvit", "absolute")
    assert (options.epochs, options.learning_rate, options.rectifier_lr_ratio) == (100, 1e-2, 0.05)
    assert (options.rectifier_weight_decay, options.lr_floor, options.clip_norm) == (1e-4, 0.05, 1.0)
    assert options.loss == "separate" and options.reset


def test_demo():
    run = demo()
    assert (run.model.num_tokens, run.model.code_dim, run.model.bits_per_sample) == (512, 4, 4096)
    assert run.model.num_codes >= 256
    assert run.model.rectifier.form == "residual"


def test_names_and_json():
    assert set(RECIPES) == {"demo", "paper_512t", "paper_256t", "paper_256t_large"}
    for name, recipe in RECIPES.items():
        run = recipe()
        assert run.name == name
        assert model_config_from_dict(json.loads(json.dumps(to_dict(run.model)))) == run.model
