"""Build a diffusers `AutoencoderDC` that starts as a PCA of 16x16 patches, for `train_demo_vae.py`.

From random weights this network needs far more training than a laptop can give before it beats a PCA, so it starts
there. Its shortcuts make that possible: a pixel-unshuffle from c to 4c channels loses nothing, so with the residual
branches at zero the network is linear, and its few convolutions are solved for by least squares, one after another.
"""

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn
from torch.nn import functional as F

CHAIN, LAYERS, LATENTS = (16, 16, 64, 64, 64), (0, 1, 1, 2, 3), 32
CONSTANT = 6.0  # held by the spare decoder channels, so that the last RMSNorm scales by nearly a constant
LIFT = 1.6  # carries pixel values past the last ReLU, and is taken off again after it


def build() -> AutoencoderDC:
    """Return the untrained network: 16x smaller latents of 32 channels, plain residual blocks, no attention."""
    side = {
        "block_types": "ResBlock",
        "block_out_channels": CHAIN,
        "layers_per_block": LAYERS,
        "qkv_multiscales": ((),) * len(CHAIN),
    }
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENTS,
        **{f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in side.items()},
    )


def principal(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the `count` strongest principal directions (as columns, strongest first) of the rows."""
    mean = samples.mean(0)
    directions = torch.linalg.eigh(torch.cov((samples - mean).T))[1]
    return mean, directions.flip(1)[:, :count]


def rows(maps: Tensor) -> Tensor:
    """Return a [B, C, H, W] map as rows of C numbers."""
    return maps.movedim(1, -1).flatten(0, 2)


def patches(images: Tensor, size: int) -> Tensor:
    """Return [B, 3 * size^2, H / size, W / size]: each pixel-unshuffled patch as one position."""
    return F.pixel_unshuffle(images, size)


@torch.no_grad()
def solve(conv: nn.Conv2d, inputs: Tensor, target: Tensor, kernel: int = 1) -> None:
    """Set a 3x3 convolution to the least-squares map from `inputs` to `target`, with its center tap or all nine."""
    x = inputs if kernel == 1 else F.unfold(inputs, 3, padding=1).unflatten(2, inputs.shape[2:])
    x = F.pad(rows(x).double(), (0, 1), value=1.0)
    y = rows(target).double()
    gram = x.T @ x
    # A hair of ridge keeps channels that are still constant from making the system singular.
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, x.T @ y).T.float()
    conv.weight.zero_()
    if kernel == 1:
        conv.weight[:, :, 1, 1] = weights[:, :-1]
    else:
        conv.weight.copy_(weights[:, :-1].unflatten(1, (-1, 3, 3)))
    conv.bias.copy_(weights[:, -1])


@torch.no_grad()
def start_from_pca(model: AutoencoderDC, images: Tensor, decoder_kernel: int = 1) -> None:
    """Set the weights so that the network is a PCA of 16x16 patches, fitted on `images` ([B, 3, H, W] in [-1, 1]).

    With `decoder_kernel` 3 the decoder's least-squares maps also see the neighboring latents, still linearly. The
    norm that ends each residual branch stays at zero: the branches add nothing yet, and training opens them gently.
    """
    encoder, decoder = model.encoder, model.decoder
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.zero_()
    norms = [module.norm for module in model.modules() if type(module).__name__ == "ResBlock"]
    for norm in norms:
        norm.weight.zero_()
        norm.bias.zero_()

    # Encoder. Half resolution: the pixels themselves, so that the next step, 16 -> 64, is a lossless unshuffle.
    encoder.conv_in.conv.weight.zero_()
    for color in range(3):
        encoder.conv_in.conv.weight[color, color, 1, 1] = 1.0
    downs = [encoder.down_blocks[level][-1] for level in (1, 2, 3)]
    downs[0].conv.weight.zero_()
    features = downs[0](encoder.conv_in(images))
    # Then 64 -> 64 twice: each 4x4, later each 8x8 patch is reduced to its 16 strongest components.
    for down, size in ((downs[1], 4), (downs[2], 8)):
        target = patches(images, size)
        mean, directions = principal(rows(target), 16)
        solve(down.conv, features, ((rows(target) - mean) @ directions).unflatten(0, target[:, 0].shape).movedim(-1, 1))
        features = down(features)
    # The latents: components of a 16x16 patch, half-whitened, less what the averaging shortcut brings anyway.
    target = patches(images, 16)
    mean, directions = principal(rows(target), LATENTS)
    scores = (rows(target) - mean) @ directions
    latents = (scores / scores.std(0).sqrt()).unflatten(0, target[:, 0].shape).movedim(-1, 1)
    solve(encoder.conv_out, features, latents - features.unflatten(1, (LATENTS, -1)).mean(2))
    latents = model.encode(images).latent

    # Decoder. Eighth resolution: 64 components of each 8x8 patch of the PCA's own reconstruction.
    decoder.conv_in.weight.zero_()
    features = latents.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    ups = [decoder.up_blocks[level][0] for level in (3, 2, 1)]
    wanted = F.pixel_unshuffle(images, 8)
    mean, directions = principal(rows(F.pixel_unshuffle(reconstruct(latents, images), 8)), 64)
    wanted = ((rows(wanted) - mean) @ directions).unflatten(0, wanted[:, 0].shape).movedim(-1, 1)
    solve_up(ups[0], features, wanted, decoder_kernel)
    features = ups[0](features)
    # Quarter resolution: the 4x4 pixels in the order the last two shuffles expect, and the constant channels.
    halves = F.pixel_unshuffle(images, 2)
    halves = torch.cat([halves, halves.new_full((len(halves), 4, *halves.shape[2:]), CONSTANT)], dim=1)
    solve_up(ups[1], features, F.pixel_unshuffle(halves, 2), decoder_kernel)
    ups[2].conv.weight.zero_()
    rms = ((4 * CONSTANT**2 + images.square().mean() * 12) / 16).sqrt()
    decoder.norm_out.weight.fill_(rms)
    decoder.norm_out.bias.fill_(LIFT)
    decoder.conv_out.conv.weight.zero_()
    for channel in range(12):
        decoder.conv_out.conv.weight[channel, channel, 1, 1] = 1.0
    decoder.conv_out.conv.bias.fill_(-LIFT)


def reconstruct(latents: Tensor, images: Tensor) -> Tensor:
    """Return the best linear reconstruction of `images` from the latents at the same place."""
    conv = nn.Conv2d(LATENTS, 768, 3, padding=1)
    solve(conv, latents, patches(images, 16))
    return F.pixel_shuffle(conv(latents), 16)


def solve_up(up: nn.Module, features: Tensor, target: Tensor, kernel: int) -> None:
    """Solve the convolution of an upsampling block for `target`, less what its repeating shortcut brings."""
    shortcut = F.pixel_shuffle(features.repeat_interleave(up.repeats, dim=1), up.factor)
    solve(up.conv, features, F.pixel_unshuffle(target - shortcut, up.factor), kernel)
