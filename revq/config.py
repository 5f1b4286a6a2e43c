"""Configurations of a model and of a training run: frozen dataclasses, written to and read from JSON.

Making or changing one checks nothing, because a field is often changed before the fields that it depends on.  Whatever
takes a configuration calls its ``validate`` first: `revq.ReVQ`, `revq.train.train`, `from_pretrained` and the command line.
Recipes (``revq/recipes.py``) are functions that return a `RunConfig`.
"""

import dataclasses
import math
import types
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from revq.errors import InputError

LARGEST_INT = 2**31 - 1
"""Of every size and count in a configuration: an index takes 32 bits in the search."""
LARGEST_FLOAT = 3.4028235677973366e38
"""From this number on, rounding to float32 gives infinity; every number of a configuration meets float32 tensors."""
MOST_BYTES = 2**40
"""Of a model's parameters, 1 TiB: a configuration that asks for more is a mistake."""
MOST_LAYERS = 1000
"""Of a rectifier: each layer is a module, which takes time and memory to make before any weight is read."""


@dataclass(frozen=True)
class RectifierConfig:
    """The network g of the paper's Eq. 3, which reduces the quantization error of a latent (Table 4 names the kinds)."""

    kind: Literal["efficientvit", "cnn", "mlp", "identity"] = "efficientvit"
    """Architecture; ``identity`` has no parameters, ``mlp`` has BatchNorm and needs batches of two or more."""
    width: int = 512
    """Channels, or features of the ``mlp``, inside the rectifier; for EfficientViT a multiple of 32, its head size."""
    layers: int = 3
    """Blocks."""
    form: Literal["absolute", "residual"] = "absolute"
    """``absolute``, as released, predicts the latent itself.  ``residual`` adds a correction to its input and starts as
    the identity (last layer zero); with little data the absolute form increases the held-out error, see docs/training.md."""

    def validate(self) -> None:
        """Check the fields and how they fit each other.

        Raises:
            InputError: naming the field.
        """
        _check_types(self, "rectifier ")
        _require_positive(self, "width", "layers")
        if self.layers > MOST_LAYERS:
            raise InputError(f"rectifier layers: expected at most {MOST_LAYERS}, got {self.layers}")
        if self.kind == "efficientvit" and self.width % 32:
            raise InputError(f"rectifier width: expected a multiple of 32 for efficientvit, got {self.width}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a ReVQ model: the latent it reads, how a latent is split into tokens, the codebooks and the rectifier."""

    latent_shape: tuple[int, int, int] = (32, 8, 8)
    """(C, h, w) of one latent of the VAE."""
    num_tokens: int = 512
    """T, tokens per sample; the code dimension is C*h*w / T."""
    num_codes: int = 16384
    """K, codes per codebook."""
    num_groups: int | None = None
    """G, codebooks; None gives every token position its own (G = T)."""
    split: Literal["channel", "space"] = "channel"
    """How a latent is split into tokens (paper, Table 3): along channels, or position by position."""
    rectifier: RectifierConfig = field(default_factory=RectifierConfig)
    """The network that reduces the quantization error (Table 4 names the kinds)."""

    def __post_init__(self) -> None:
        if isinstance(self.latent_shape, list):  # JSON has lists, not tuples
            object.__setattr__(self, "latent_shape", tuple(self.latent_shape))

    def validate(self) -> None:
        """Check the fields and how they fit each other, the rectifier's too.

        Raises:
            InputError: naming the field; also for a model of more than `MOST_BYTES`.
        """
        _check_types(self)
        self.rectifier.validate()
        _require_positive(self, "num_tokens", "num_codes")
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise InputError(f"latent_shape: expected three positive numbers (C, h, w), got {self.latent_shape}")
        if self.latent_size > LARGEST_INT:
            raise InputError(f"latent_shape: expected at most {LARGEST_INT:,} elements, got {self.latent_shape}")
        if self.latent_size % self.num_tokens:
            raise InputError(
                f"num_tokens: expected a divisor of the latent's {self.latent_size} numbers "
                f"{self.latent_shape}, got {self.num_tokens}"
            )
        if self.num_groups is not None and (self.num_groups < 1 or self.num_tokens % self.num_groups):
            raise InputError(f"num_groups: expected a divisor of num_tokens={self.num_tokens}, got {self.num_groups}")
        self.check_size(MOST_BYTES, "the limit of any model")

    def check_size(self, most: int, reason: str) -> None:
        """Check that the model's parameters and buffers can fit in ``most`` bytes, without making any of them.

        Counts the codebooks exactly, and of the rectifier what every kind has at least.

        Raises:
            InputError: naming the field that asks for the most, and ``reason``.
        """
        parts = {
            "latent_shape": 8 * self.latent_size,  # the normalizer's statistics
            "num_codes": self.groups * self.num_codes * (4 * self.code_dim + 8),
            "rectifier width": 4 * self._rectifier_parameters(),
        }
        total = sum(parts.values())
        if total > most:
            name = max(parts, key=parts.__getitem__)
            raise InputError(
                f"{name}: expected a model of at most {most / 2**30:,.1f} GiB, {reason}, "
                f"got one of at least {total / 2**30:,.1f} GiB"
            )

    def _rectifier_parameters(self) -> int:
        """A lower bound of the rectifier's parameters, without norms and biases."""
        kind, width, layers = self.rectifier.kind, self.rectifier.width, self.rectifier.layers
        if kind == "identity":
            return 0
        if kind == "mlp":
            skip = 0 if width == self.latent_size else self.latent_size * width
            return (2 * layers - 1) * width**2 + 2 * self.latent_size * width + skip
        ends = 2 * self.latent_shape[0] * width
        block = 36 * width * max(1, width // 16) if kind == "cnn" else 4 * width**2
        return layers * block + ends

    @property
    def latent_size(self) -> int:
        """Elements of one latent, C*h*w."""
        return math.prod(self.latent_shape)

    @property
    def code_dim(self) -> int:
        """d, elements of one token."""
        return self.latent_size // self.num_tokens

    @property
    def groups(self) -> int:
        """G, the number of codebooks."""
        return self.num_tokens if self.num_groups is None else self.num_groups

    @property
    def bits_per_sample(self) -> int:
        """Bits of one sample's tokens when each index takes ceil(log2 K) bits."""
        return self.num_tokens * max(1, (self.num_codes - 1).bit_length())


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained (paper, section 4.1; the released code where the two differ, see docs/training.md)."""

    epochs: int = 100
    """Passes over the latent store."""
    batch_size: int = 256
    """Latents per optimizer step."""
    learning_rate: float = 1e-2
    """Initial learning rate of the codebook."""
    rectifier_lr_ratio: float = 0.05
    """Learning rate of the rectifier, as a fraction of the codebook's."""
    rectifier_weight_decay: float = 1e-4
    """Weight decay of the rectifier; the codebook has none."""
    lr_floor: float = 0.05
    """The exponential schedule multiplies the learning rate by ``lr_floor ** (1 / epochs)`` after every epoch."""
    clip_norm: float = 1.0
    """Largest gradient norm, of the codebook and of the rectifier separately; 0 disables clipping."""
    loss: Literal["separate", "joint"] = "separate"
    """``separate``, as released: the rectifier's loss does not reach the codebook.  ``joint``: the paper's Eq. 4."""
    reset: bool = True
    """Non-activation reset at the end of each epoch (paper, Eq. 2)."""
    reset_pairing: Literal["paper", "release"] = "paper"
    """Which dead code moves next to which used code, as in the paper or as in the released code; both differ where counts
    are equal and where ``reset_max_fraction`` is reached (see `revq_kernels.reset_codes_`)."""
    reset_max_fraction: float = 1.0
    """Largest fraction of a codebook's codes that one reset may move; the release moves at most 0.2."""
    reset_noise: float = 0.1
    """Standard deviation of the noise on a moved code, in units of the normalized latent."""
    reset_first_epoch: bool = True
    """Reset at the end of the first epoch, too; the release does not."""
    reset_last_epoch: bool = False
    """Reset at the end of the last epoch, too, after which no training follows; the release does."""
    reset_keep_moments: bool = False
    """A moved code keeps its old optimizer moments, as in the release, instead of starting with zeros."""
    count_validation: bool = False
    """An epoch counts the selections of the validation before it, too, as the release does: a code that only validation
    latents choose is not dead.  Needs validation latents."""
    init: Literal["data", "normal"] = "data"
    """Initial codebook: distinct training vectors, or standard normal noise."""
    seed: int = 42
    """Seed of all random numbers of the run."""
    checkpoint_every: int = 0
    """Optimizer steps between checkpoints inside an epoch; 0 writes one at each epoch's end only."""

    def validate(self) -> None:
        """Check the fields.

        Raises:
            InputError: naming the field.
        """
        _check_types(self)
        _require_positive(self, "epochs", "batch_size", "learning_rate", "rectifier_lr_ratio", "lr_floor")
        for name in ("rectifier_weight_decay", "clip_norm", "reset_noise", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.lr_floor > 1:
            raise InputError(f"lr_floor: expected a factor of at most 1, got {self.lr_floor}")
        if not 0 <= self.reset_max_fraction <= 1:
            raise InputError(f"reset_max_fraction: expected a share between 0 and 1, got {self.reset_max_fraction}")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: the model and its training."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        """Check the model's and the training's configuration, and how they fit each other.

        Raises:
            InputError: naming the field.
        """
        _check_types(self)
        self.model.validate()
        self.train.validate()
        if self.model.rectifier.kind == "mlp" and self.train.batch_size < 2:
            raise InputError(
                f"batch_size: expected at least 2 for the BatchNorm of the mlp rectifier, got {self.train.batch_size}"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON form of a configuration dataclass."""
    return dataclasses.asdict(config)


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Rebuild a `ModelConfig` from `to_dict`'s form.

    Raises:
        InputError: for an unknown or ill-typed field, or fields that do not fit each other, naming the field.
    """
    try:
        values = dict(values)
        rectifier = RectifierConfig(**values.pop("rectifier", {}))
        config = ModelConfig(**values, rectifier=rectifier)
        config.validate()
    except TypeError as error:
        raise InputError(f"model configuration: {error}") from None
    return config


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise InputError(f"{name}: expected a number > 0, got {value!r}")


def _check_types(config: Any, prefix: str = "") -> None:
    """Check every field of a configuration against its annotation.

    Strict, because the values are written to JSON and compared on resume: True is no number, 3.0 no integer, "3" neither.

    Raises:
        InputError: for another type, an integer beyond `LARGEST_INT` (a seed may have 64 bits), or a number that is not
            finite in float32.
    """
    for name, kind in get_type_hints(type(config)).items():
        expected = _mismatch(getattr(config, name), kind, seed=name == "seed")
        if expected:
            raise InputError(f"{prefix}{name}: expected {expected}, got {_short(getattr(config, name))}")


def _mismatch(value: Any, kind: Any, *, seed: bool = False) -> str | None:
    """What an annotation expects in place of ``value``; None if the value fits."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is bool:
        return None if isinstance(value, bool) else "True or False"
    if kind is str:
        return None if isinstance(value, str) else "a text"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return None if isinstance(value, kind) else f"a {kind.__name__}"
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            return "an integer"
        low, high = (-(2**63), 2**63 - 1) if seed else (-LARGEST_INT, LARGEST_INT)
        return None if low <= value <= high else f"an integer of at most {high:,}"
    if kind is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return "a number"
        return None if abs(value) < LARGEST_FLOAT else "a finite number, also in float32"
    if origin is Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in arguments)
        *others, last = map(repr, arguments)
        return None if fits else f"{', '.join(others)} or {last}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return f"{len(arguments)} integers"
        return next(filter(None, map(_mismatch, value, arguments)), None)  # `validate` checks how many they are
    if origin in (Union, types.UnionType):  # such as int | None
        expected = [_mismatch(value, choice) for choice in arguments if choice is not type(None)]
        return None if value is None or None in expected else f"{expected[0]} or None"
    raise TypeError(f"no check for fields of type {kind}")


def _short(value: Any) -> str:
    """A value in an error message, on one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "an integer of thousands of digits"
    if isinstance(value, int) and value.bit_length() >= 200:
        text = "an integer of hundreds of digits"
    return text if len(text) <= 60 else text[:57] + "..."
