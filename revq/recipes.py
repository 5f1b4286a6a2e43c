"""Recipes: functions that return a `RunConfig`.  The paper's three models, and the demo that two CPU cores train.

The paper and its released code disagree in places; docs/training.md lists all of them.  The choices here:

* batch of 512T: the paper's section 4.1 says 128, its Appendix F.2 and the released yaml say 256.  Here 256.
* rectifier width: F.2 says 512 (for 512T); the released yaml has 1024 for 256T with K=65,536 and 512 elsewhere.  Here
  the released values.
* codebooks: F.2 says "Num Group: 1"; the released models have one codebook per token position.  Here one per position.
* learning rate: 1e-2 (section 4.1 and the yaml), not the 5e-5 by which the released script overrides the yaml.
* schedule: "exponential" in the paper; the released factor 0.05 ** (1 / epochs) per epoch.
* loss: separate, as released; the paper's joint Eq. 4 is ``loss="joint"``.
* reset: all dead codes, each paired by rank with a used code (Eq. 2), after every epoch but the last; the released limit
  of 20 %, its pairs and the rest of its reset are ``reset_max_fraction=0.2, reset_pairing="release",
  reset_first_epoch=False, reset_last_epoch=True, reset_keep_moments=True, count_validation=True``.
"""

from collections.abc import Callable

from revq.config import ModelConfig, RectifierConfig, RunConfig, TrainConfig

_LATENT = (32, 8, 8)  # of DC-AE f32c32 at 256 pixels, and of the embedded VAE at 128


def paper_512t() -> RunConfig:
    """ReVQ-512T: 512 tokens of d=4, K = 16,384; rFID 0.82 in the paper's Table 1, 22 hours on one RTX 4090."""
    model = ModelConfig(_LATENT, num_tokens=512, num_codes=16384, rectifier=RectifierConfig(width=512, layers=3))
    return RunConfig("paper_512t", model, TrainConfig(epochs=100, batch_size=256, checkpoint_every=1000))


def paper_256t() -> RunConfig:
    """ReVQ-256T: 256 tokens of d=8, K = 65,536; rFID 2.56 in the paper's Table 1."""
    model = ModelConfig(_LATENT, num_tokens=256, num_codes=65536, rectifier=RectifierConfig(width=1024, layers=4))
    return RunConfig("paper_256t", model, TrainConfig(epochs=100, batch_size=256, checkpoint_every=1000))


def paper_256t_large() -> RunConfig:
    """ReVQ-256T with K = 262,144; rFID 1.92 in the paper's Table 1.  The codebook takes 2 GiB, with Adam's state 6 GiB."""
    model = ModelConfig(_LATENT, num_tokens=256, num_codes=262144, rectifier=RectifierConfig(width=512, layers=4))
    return RunConfig("paper_256t_large", model, TrainConfig(epochs=100, batch_size=128, checkpoint_every=1000))


def demo() -> RunConfig:
    """Two CPU cores, one or two minutes: 512 tokens, K = 256, and a small rectifier that starts as the identity.

    With a few thousand crops the released form of the rectifier, which predicts the latent itself, increases the
    held-out error; as a correction to its input it reduces the error (docs/benchmarks.md, "What the rectifier does").
    The learning rate is three times the paper's, because six epochs at 1e-2 do not train the codebook enough.
    """
    rectifier = RectifierConfig(width=64, layers=1, form="residual")
    model = ModelConfig(_LATENT, num_tokens=512, num_codes=256, rectifier=rectifier)
    return RunConfig("demo", model, TrainConfig(epochs=6, batch_size=64, learning_rate=3e-2))


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe for recipe in (demo, paper_512t, paper_256t, paper_256t_large)
}
