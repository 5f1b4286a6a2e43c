"""Train the embedded VAE in `revq/assets/vae` on the shipped demo photos, or measure it.

    python scripts/train_demo_vae.py                # start from a PCA, fine-tune, write weights and metrics
    python scripts/train_demo_vae.py --evaluate     # measure the shipped weights on the held-out crops again

An interrupted run continues from its checkpoint when it is started again with the same arguments. The weights after the
last step are kept; nothing is selected by its result on the held-out photos.

The network is a diffusers `AutoencoderDC` that starts as a PCA of 16x16 patches. From random weights it would need far
more training than a laptop can give to become better than a PCA. Its shortcuts make this start possible: a pixel-unshuffle
from c to 4c channels loses nothing, so with zero residual branches the network is linear, and its few convolutions are
solved for by least squares, one after another.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from revq.assets import held_out_photos, train_photos, vae_folder
from revq.data.images import center_crop, load_image, random_crop, to_tensor

CHAIN, LAYERS, LATENTS = (16, 16, 64, 64, 64), (0, 1, 1, 2, 3), 32
CONSTANT = (
    6.0  # value of the unused decoder channels: it dominates the last RMSNorm, whose scale is then nearly constant
)
LIFT = 1.6  # added before the last ReLU, so that pixel values stay positive, and subtracted after it
SIZE, FIT_CROPS_PER_PHOTO, FLOOR = 128, 4, 5e-4
SOLVED_LR, GAIN_LR = 0.1, 0.05  # as fractions of the learning rate


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
    """Return a [B, C, H, W] map as a matrix with one row of C channels per position."""
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
    # A small ridge term, because channels that are still constant would make the system singular.
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
    norm that ends each residual branch stays at zero, so the branches add nothing until they are trained.
    """
    encoder, decoder = model.encoder, model.decoder
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.zero_()
    norms = [module.norm for module in model.modules() if type(module).__name__ == "ResBlock"]
    for norm in norms:
        norm.weight.zero_()
        norm.bias.zero_()

    # Encoder. Half resolution: the pixels, so that the next step, 16 -> 64 channels, is a lossless unshuffle.
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
    # The latents: components of a 16x16 patch, half-whitened, minus the contribution of the averaging shortcut.
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
    """Return the best linear reconstruction of `images` from the latents at the same position."""
    conv = nn.Conv2d(LATENTS, 768, 3, padding=1)
    solve(conv, latents, patches(images, 16))
    return F.pixel_shuffle(conv(latents), 16)


def solve_up(up: nn.Module, features: Tensor, target: Tensor, kernel: int) -> None:
    """Solve the convolution of an upsampling block for `target` minus the contribution of its repeating shortcut."""
    shortcut = F.pixel_shuffle(features.repeat_interleave(up.repeats, dim=1), up.factor)
    solve(up.conv, features, F.pixel_unshuffle(target - shortcut, up.factor), kernel)


def psnr(model: AutoencoderDC, images: Tensor) -> list[float]:
    """Return the PSNR in dB of each image's reconstruction, clamped to the valid range."""
    with torch.no_grad():
        result = model.decode(model.encode(images).latent).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (result - images).square().mean((1, 2, 3)))).tolist()


def measure(model: AutoencoderDC) -> dict[str, float]:
    """Return the mean PSNR over the held-out center crops, at 128 and at 256 pixels."""
    photos = [load_image(path) for path in held_out_photos()]
    sizes = {size: to_tensor([center_crop(photo, size) for photo in photos]) for size in (128, 256)}
    return {f"psnr_{size}": round(float(np.mean(psnr(model, images))), 3) for size, images in sizes.items()}


def load() -> AutoencoderDC:
    """Return the shipped weights in single precision."""
    return AutoencoderDC.from_pretrained(vae_folder(), torch_dtype=torch.float32, low_cpu_mem_usage=False)


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that an interrupted run leaves either the old or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def groups(model: AutoencoderDC) -> list[dict]:
    """Return the optimizer's parameter groups: random convolutions learn fast, those that the PCA start solved slowly.

    The gains that end the residual branches learn slowest: each scales a branch that is still random, and even a small
    gain lowers the PSNR.
    """
    fresh, gains = [], []
    for module in model.modules():
        if type(module).__name__ == "ResBlock":
            fresh += [*module.conv1.parameters(), *module.conv2.parameters()]
            gains += module.norm.parameters()
    known = {id(parameter) for parameter in fresh + gains}
    solved = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": p, "scale": scale} for p, scale in ((fresh, 1.0), (solved, SOLVED_LR), (gains, GAIN_LR))]


def fit_crops(photos: list, seed: int) -> Tensor:
    """Return the training crops on which the PCA start is fitted."""
    rng = random.Random(seed)
    return to_tensor([random_crop(photo, SIZE, rng) for photo in photos for _ in range(FIT_CROPS_PER_PHOTO)])


def train(args: argparse.Namespace) -> tuple[AutoencoderDC, dict]:
    """Fine-tune from the PCA start; return the model and the numbers of the run so far."""
    torch.manual_seed(args.seed)
    photos = [load_image(path) for path in train_photos()]
    fit = fit_crops(photos, args.seed)
    model = build()
    start_from_pca(model, fit)
    numbers = {"pca_start": measure(model)}
    start_from_pca(model, fit, decoder_kernel=3)
    numbers["linear_start"] = measure(model)
    print(numbers)
    optimizer = torch.optim.Adam(groups(model))
    first, seconds, path = 0, 0.0, args.checkpoint
    path.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    if path.exists() and (state := torch.load(path, weights_only=True))["arguments"] == arguments:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=10)
    began, average = time.perf_counter() - seconds, 0.0
    for step in bar:
        # Each step has its own seed, so that a continued run draws the crops of an uninterrupted one.
        rng = random.Random(f"{args.seed}-{step}")
        batch = to_tensor([random_crop(rng.choice(photos), SIZE, rng) for _ in range(args.batch)])
        warm = min(1.0, (step + 1) / 100)
        lr = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        result = model.decode(model.encode(batch).latent).sample
        # The mean of the logarithms corresponds to the mean PSNR; a mean of squared errors would be dominated by hard
        # photos. The floor, about 39 dB, prevents blank backgrounds from dominating instead.
        loss = ((result - batch).square().mean((1, 2, 3)) + FLOOR).log().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decibel = 10 * math.log10(4) - 10 / math.log(10) * loss.item()
        average += (decibel - average) / min(step - first + 1, 200)
        bar.set_postfix_str(f"train {average:.2f} dB, lr {lr:.1e}", refresh=False)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - began
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_atomically({**state, "seconds": seconds, "arguments": arguments}, path)
    return model, {**numbers, "arguments": arguments, "train_seconds": round(seconds), "train_photos": len(photos)}


def write(model: AutoencoderDC, numbers: dict) -> None:
    """Write the fp16 weights, measure them as they will be loaded, and write the numbers beside them."""
    folder = vae_folder()
    model.half().save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors creates files with mode 0600
    shipped = load()
    names = [path.name for path in held_out_photos()]
    (folder / "held_out.txt").write_text("\n".join(names) + "\n")
    numbers |= {
        "final": measure(shipped), "held_out_photos": len(names), "parameters": shipped.num_parameters(),
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(), "device": "cpu",
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


def evaluate(seed: int) -> None:
    """Measure the PCA start and the shipped weights again, and print the results beside those in the metrics file."""
    recorded = json.loads((vae_folder() / "metrics.json").read_text())
    start, shipped = build(), load()
    start_from_pca(start, fit_crops([load_image(path) for path in train_photos()], seed))
    for name, model in (("pca_start", start), ("final", shipped)):
        print(f"{name}: recorded {recorded[name]}, measured now {measure(model)}")


def main() -> None:
    """Train and write, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="only measure the shipped weights")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/demo_vae.pt"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args.seed)
    else:
        write(*train(args))


if __name__ == "__main__":
    main()
