"""The rectifier g of the paper's Eq. 3: a network on quantized latents that reduces the quantization error (Table 4)."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from revq.config import RectifierConfig
from revq.errors import InputError

_RANK_RATIO = 16
"""Channels over rank, in the convolutions of the ``cnn``."""
_LAST_LAYER = {"efficientvit": "conv_out", "cnn": "conv_out", "mlp": "fc_out"}
_EARLIER_LAYERS = {"rectifier.up_blocks.0.0.conv1.weight": "cnn", "rectifier.blocks.0.norm.weight": "mlp"}
"""A tensor that only models of an earlier version hold, whose ``cnn`` and ``mlp`` had other layers."""


def build_rectifier(config: RectifierConfig, latent_shape: tuple[int, int, int]) -> nn.Module:
    """Make the rectifier that ``config`` describes.

    Parameters have the names and shapes of the released code (the released checkpoints are all ``efficientvit``).

    * ``efficientvit`` is one stage of DC-AE's decoder (diffusers' `Decoder`) without upsampling.
    * ``cnn`` has the same first and last layers.  Its blocks add RMSNorm(conv2(SiLU(conv1(x)))) to x; each of the two is
      a 3x3 convolution of low rank: to width/16 channels and back.
    * ``mlp`` is `LatentMLP`, on the flattened latent, with BatchNorm.
    * ``identity`` returns its input and has no parameters.

    The ``absolute`` form predicts the latent.  The ``residual`` form adds its input to the output, under the same
    parameter names, and starts as the identity because its last layer starts at zero.

    Args:
        config: kind, width, layers and form.
        latent_shape: (C, h, w).

    Returns:
        A module from normalized latents ``[B, C, h, w]`` to the same shape.

    Raises:
        InputError: for an invalid configuration, an unknown kind or form, or a width that is not a multiple of C (the
            decoder's shortcut repeats each latent channel width/C times).
    """
    config.validate()
    channels = latent_shape[0]
    if config.form not in ("absolute", "residual"):
        raise InputError(f"rectifier form: expected 'absolute' or 'residual', got {config.form!r}")
    if config.kind == "identity":
        return nn.Identity()
    net: nn.Module
    if config.kind == "mlp":
        net = LatentMLP(latent_shape, config.width, config.layers)
    elif config.kind in ("efficientvit", "cnn"):
        if config.width % channels:
            raise InputError(
                f"rectifier width: expected a multiple of the {channels} latent channels, got {config.width}"
            )
        net = _decoder_stage(config, channels)
    else:
        raise InputError(f"rectifier kind: expected efficientvit, cnn, mlp or identity, got {config.kind!r}")
    if config.form == "residual":
        for parameter in ("weight", "bias"):
            nn.init.zeros_(net.get_parameter(f"{_LAST_LAYER[config.kind]}.{parameter}"))
        # A hook instead of a wrapping module, so that both forms have the same parameter names.
        net.register_forward_hook(_add_input)
    return net


def refuse_earlier_rectifier(names: Iterable[str], path: str | Path) -> None:
    """Raise if the tensors of a model, by their names, include a ``cnn`` or ``mlp`` of an earlier version.

    Raises:
        InputError: naming ``path`` and the last commit that reads the file.
    """
    kinds = [_EARLIER_LAYERS[name] for name in names if name in _EARLIER_LAYERS]
    if kinds:
        raise InputError(
            f"{path}: expected the {kinds[0]} rectifier of the paper's Table 4, got that of an earlier version, which has "
            "other layers; commit 4d4a8f7 is the last that reads it"
        )


class LatentMLP(nn.Module):
    """The MLP rectifier of the paper's Table 4: ``[B, C, h, w]`` -> ``[B, C, h, w]``, residual blocks on the flat latent.

    It has BatchNorm: in training mode the output for a latent depends on its batch, and the call updates the running
    statistics; eval mode uses them, and the same tokens give the same image in any batch.

    Args:
        latent_shape: (C, h, w).
        width: hidden features.
        layers: blocks.
    """

    def __init__(self, latent_shape: tuple[int, int, int], width: int, layers: int) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self.latent_shape = tuple(latent_shape)
        self.prelayers = nn.Sequential(_MLPBlock(size, width))
        self.postlayers = nn.Sequential(*(_MLPBlock(width, width) for _ in range(layers - 1)))
        self.fc_out = nn.Linear(width, size)

    def forward(self, latents: Tensor) -> Tensor:
        """Map normalized latents ``[B, C, h, w]``.

        Raises:
            InputError: for fewer than two latents in training mode, which have no variance.
        """
        if self.training and len(latents) < 2:
            raise InputError(
                f"latents: expected at least two in training mode for the BatchNorm of the mlp rectifier, got {len(latents)}"
            )
        hidden = self.postlayers(self.prelayers(latents.flatten(1)))
        return self.fc_out(hidden).unflatten(1, self.latent_shape)


class _MLPBlock(nn.Module):
    """``[B, inputs]`` -> ``[B, outputs]``: BatchNorm of two layers, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, outputs)
        self.fc2 = nn.Linear(outputs, outputs)
        self.norm = nn.BatchNorm1d(outputs)
        self.fc3 = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.fc2(F.silu(self.fc1(hidden)))) + self.fc3(hidden)


def _decoder_stage(config: RectifierConfig, channels: int) -> nn.Module:
    """`Decoder` with one stage, as the released model sets it (norm_type rms_norm, act_fn silu, one 5x5 scale)."""
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    stage = Decoder(
        in_channels=channels,
        latent_channels=channels,
        attention_head_dim=32,
        block_type="EfficientViTBlock" if config.kind == "efficientvit" else "ResBlock",
        block_out_channels=(config.width,),
        layers_per_block=(config.layers,),
        qkv_multiscales=((5,),),
        norm_type="rms_norm",
        act_fn="silu",
        upsample_block_type="interpolate",
    )
    if config.kind == "cnn":
        for block in stage.up_blocks[0].children():
            block.conv1 = _low_rank_convolution(config.width, bias=True)
            block.conv2 = _low_rank_convolution(config.width, bias=False)
    return stage


def _low_rank_convolution(width: int, *, bias: bool) -> nn.Sequential:
    rank = max(1, width // _RANK_RATIO)
    return nn.Sequential(
        nn.Conv2d(width, rank, kernel_size=3, padding=1, bias=False),
        nn.Conv2d(rank, width, kernel_size=3, padding=1, bias=bias),
    )


def _add_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return args[0] + output
