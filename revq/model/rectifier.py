"""The rectifier g of the paper's Eq. 3: a network on quantized latents that reduces the quantization error (Table 4)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from revq.config import RectifierConfig
from revq.errors import InputError


def build_rectifier(config: RectifierConfig, latent_shape: tuple[int, int, int]) -> nn.Module:
    """Make the rectifier that ``config`` describes.

    ``efficientvit`` and ``cnn`` are one stage of DC-AE's decoder (diffusers' `Decoder`) without upsampling, made of
    EfficientViT or residual convolution blocks; parameters have the names and shapes of the released checkpoints.
    ``mlp`` works on the flattened latent.  ``identity`` returns its input and has no parameters.

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
        for parameter in ("conv_out.weight", "conv_out.bias"):
            nn.init.zeros_(net.get_parameter(parameter))
        # A hook instead of a wrapping module, so that both forms have the same parameter names.
        net.register_forward_hook(_add_input)
    return net


class LatentMLP(nn.Module):
    """The MLP rectifier of the paper's Table 4: ``[B, C, h, w]`` -> ``[B, C, h, w]``, residual blocks on the flat latent.

    It normalizes within a sample (RMSNorm), not over the batch, so that the same tokens give the same image in any batch.

    Args:
        latent_shape: (C, h, w).
        width: hidden features.
        layers: residual blocks.
    """

    def __init__(self, latent_shape: tuple[int, int, int], width: int, layers: int) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self.latent_shape = tuple(latent_shape)
        self.conv_in = nn.Linear(size, width)  # named as in the other rectifiers
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(layers)))
        self.norm_out = nn.RMSNorm(width, eps=1e-5)
        self.conv_out = nn.Linear(width, size)

    def forward(self, latents: Tensor) -> Tensor:
        """Map normalized latents ``[B, C, h, w]``."""
        hidden = self.blocks(self.conv_in(latents.flatten(1)))
        return self.conv_out(F.silu(self.norm_out(hidden))).unflatten(1, self.latent_shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))


def _decoder_stage(config: RectifierConfig, channels: int) -> nn.Module:
    """`Decoder` with one stage, as the released model sets it (norm_type rms_norm, act_fn silu, one 5x5 scale)."""
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    return Decoder(
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


def _add_input(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return args[0] + output
