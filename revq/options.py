"""The configuration as the command line reads it: the same fields, judged only when all of them are known.

The configuration dataclasses check themselves when they are made.  The command line first makes defaults, from a recipe
and a store that may not fit each other until an option is given, so its classes leave the checks to `checked`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from revq.config import ModelConfig, RectifierConfig, TrainConfig


@dataclass(frozen=True)
class RectifierOptions(RectifierConfig):
    """The network that undoes quantization error in the latent (Table 4 names the kinds)."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class ModelOptions(ModelConfig):
    """How a latent is cut into tokens, and the codebooks."""

    rectifier: RectifierOptions = field(default_factory=RectifierOptions)

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """How the model is trained (paper, section 4.1; docs/training.md says where the released code differs)."""

    def __post_init__(self) -> None:
        pass


_OPTIONS = {RectifierConfig: RectifierOptions, ModelConfig: ModelOptions, TrainConfig: TrainOptions}
_CONFIGS = {options: config for config, options in _OPTIONS.items()}


def unchecked(config: ModelConfig | TrainConfig) -> Any:
    """A configuration as options."""
    return _convert(config, _OPTIONS)


def checked(options: ModelOptions | TrainOptions) -> Any:
    """Options as a configuration.

    Raises:
        InputError: if they do not fit each other.
    """
    return _convert(options, _CONFIGS)


def _convert(value: Any, kinds: dict[type, type]) -> Any:
    fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return kinds[type(value)](**{name: _convert(v, kinds) if type(v) in kinds else v for name, v in fields.items()})
