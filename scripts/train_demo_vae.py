"""Train the embedded VAE in `revq/assets/vae` on the shipped demo photos, or measure it.

    python scripts/train_demo_vae.py                # PCA start, fine-tune, write weights and metrics
    python scripts/train_demo_vae.py --evaluate     # measure the shipped weights on the held-out crops again

An interrupted run continues from its checkpoint when it is started again with the same arguments. The last weights
are kept, whatever they measure: nothing is ever chosen by looking at the held-out photos.
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
from demo_vae_start import build, start_from_pca
from diffusers import AutoencoderDC
from torch import Tensor
from tqdm import tqdm

from revq.assets import held_out_photos, train_photos, vae_folder
from revq.data.images import center_crop, load_image, random_crop, to_tensor

SIZE, FIT_CROPS_PER_PHOTO, FLOOR = 128, 4, 5e-4
SOLVED_LR, GAIN_LR = 0.1, 0.05  # as fractions of the learning rate


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
    """Write a checkpoint so that a cut-off run leaves either the old or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def groups(model: AutoencoderDC) -> list[dict]:
    """Return the optimizer's parameter groups: fresh convolutions learn fast, what the start solved learns slowly.

    The gains that end the residual branches learn slowest: each opens a branch that is still random, and a hundredth
    of that already costs half a decibel.
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
    """Return the training crops that the start is fitted on."""
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
        # Each step draws from its own seed, so that a continued run sees the crops of an uninterrupted one.
        rng = random.Random(f"{args.seed}-{step}")
        batch = to_tensor([random_crop(rng.choice(photos), SIZE, rng) for _ in range(args.batch)])
        warm = min(1.0, (step + 1) / 100)
        lr = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        result = model.decode(model.encode(batch).latent).sample
        # The mean of the logarithms is what mean PSNR measures: it keeps hard photos from ruling the gradient. The
        # floor, about 39 dB, keeps blank backgrounds from ruling it instead.
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
        path.chmod(0o644)  # it is written readable for its owner only
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
    """Measure the PCA start and the shipped weights again, and print them beside what the metrics file says."""
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
