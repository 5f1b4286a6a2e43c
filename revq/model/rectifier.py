"""The rectifier g of the paper's Eq. 3: a network on quantized latents that undoes quantization error (Table 4)."""

from torch import Tensor, nn

from revq.config import RectifierConfig
from revq.errors import InputError


def build_rectifier(config: RectifierConfig, latent_shape: tuple[int, int, int]) -> nn.Module:
    """Make the rectifier that ``config`` describes.

    ``efficientvit`` and ``cnn`` are one stage of DC-AE's decoder (diffusers' `Decoder`) without any upsampling, of
    EfficientViT or residual convolution blocks; parameters have the names and shapes of the official checkpoints.
    ``mlp`` works on the flattened latent, ``identity`` returns its input and has no parameters.

    The ``absolute`` form predicts the latent.  The ``residual`` form adds its input, under the same parameter names, and
    starts as the identity because its last layer starts at zero.

    Args:
        config: kind, width, layers and form.
        latent_shape: (C, h, w).

    Returns:
        A module from normalized latents ``[B, C, h, w]`` to the same shape.

    Raises:
        InputError: for an unknown kind or form, or a width that is not a multiple of C (the decoder's shortcut repeats
            each latent channel width/C times).
    """
    channels = latent_shape[0]
    if config.form not in ("absolute", "residual"):
        raise InputError(f"rectifier form: expected 'absolute' or 'residual', got {config.form!r}")
    if config.kind == "identity":
        return nn.Identity()
    if config.kind == "mlp":
        from revq.model.rectifier_mlp import LatentMLP

        net = LatentMLP(latent_shape, config.width, config.layers)
    elif config.kind in ("efficientvit", "cnn"):
        if config.width % channels:
            raise InputError(
                f"rectifier width: expected a multiple of the {channels} latent channels, got {config.width}"
            )
        net = _decoder(config, channels)
    else:
        raise InputError(f"rectifier kind: expected efficientvit, cnn, mlp or identity, got {config.kind!r}")
    if config.form == "residual":
        nn.init.zeros_(net.conv_out.weight)
        nn.init.zeros_(net.conv_out.bias)
        # A hook rather than a wrapping module, so that both forms name their parameters alike.
        net.register_forward_hook(_add_input)
    return net


def _decoder(config: RectifierConfig, channels: int) -> nn.Module:
    """`Decoder` with one stage, as the official model configures it (norm_type rms_norm, act_fn silu, one 5x5 scale)."""
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
