"""The demo: trains a tokenizer on the shipped photos in one or two minutes on two CPU cores, and measures it.

It trains on random crops of the training photos and measures on center crops of the held-out photos; training does not
depend on the held-out photos.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from revq import assets, recipes
from revq.config import RunConfig, to_dict
from revq.data.atomic import atomic_file, check_writable_folder, folder_lock
from revq.data.encode import encode_folder
from revq.data.images import center_crop, load_image, to_pil, to_tensor
from revq.data.vae import FrozenVAE, load_vae
from revq.errors import InputError
from revq.eval.evaluate import LABELS, Reconstructions, code_use, image_quality, latent_errors, reconstruct
from revq.eval.report import pairs, save_comparison, save_loss_plot, table
from revq.model.revq import MODEL_FILES, ReVQ, model_folder
from revq.train.loop import train
from revq.train.track import read_records
from revq_kernels import explain, split_tokens

LEAST_GAIN = 0.02
"""The rectifier must reduce the held-out latent error by at least this fraction."""
LEAST_UTILIZATION = 0.97
"""At least this fraction of the codes must be chosen in one pass over the training latents."""

_WRITES = ("latents", "checkpoint.pt", "metrics.jsonl", "model", "comparison.png", "loss.png", "demo.json")
_SHOWN = 8  # photos in comparison.png


class DemoResult(NamedTuple):
    """What `demo` measured."""

    numbers: dict[str, Any]
    """The measurements, as in ``demo.json``."""
    failures: list[str]
    """One line for each threshold that was missed; empty on success."""


def demo(
    out: str | Path = "runs/demo",
    *,
    config: RunConfig | None = None,
    crops: int = 8192,
    image_size: int = 128,
    vae: FrozenVAE | None = None,
    photos: Sequence[Path] | None = None,
    held_out: Sequence[Path] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> DemoResult:
    """Run the demo, print its report and write ``comparison.png, loss.png, metrics.jsonl, demo.json, model/, latents/``.

    Every call starts from the beginning, also after an interruption, and replaces the files of an earlier demo.

    Args:
        out: folder to write to.
        config: the run; default `recipes.demo`.
        crops: number of training crops; rounded up to the same number per photo.
        image_size: side of a crop in pixels.
        vae: the VAE; default the embedded one.
        photos: training photos; default the shipped ones.
        held_out: photos to measure on; default the shipped ones.
        overwrite: replace files of the demo's names that no demo wrote.
        progress: show bars.

    Raises:
        InputError: if the configuration is invalid, another process writes to ``out``, or ``out`` holds files of the demo's
            names that no demo wrote and ``overwrite`` is False.
    """
    config, out = config or recipes.demo(), Path(out)
    config.validate()
    photos = list(assets.train_photos() if photos is None else photos)
    held_out = list(assets.held_out_photos() if held_out is None else held_out)
    check_writable_folder(out, frozenset(), keep_others=True)
    with folder_lock(out / "demo"):  # another demo; `train` and `encode_folder` hold locks of their own
        with folder_lock(out):
            _make_room(out, config, overwrite)
        return _demo(out, config, crops, image_size, vae, photos, held_out, progress)


def _demo(
    out: Path,
    config: RunConfig,
    crops: int,
    image_size: int,
    vae: FrozenVAE | None,
    photos: Sequence[Path],
    held_out: Sequence[Path],
    progress: bool,
) -> DemoResult:
    """`demo` in a folder that is ready."""
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)

    with clock("load the VAE"):
        vae = load_vae() if vae is None else vae
    per_photo = -(-crops // len(photos))
    print(
        f"Encoding {per_photo * len(photos)} random crops of {len(photos)} photos, {image_size} px, with {vae.class_name}"
    )
    with clock("encode"):
        store = encode_folder(
            photos,
            vae,
            image_size=image_size,
            out=out / "latents" / "train",
            crops=per_photo,
            batch_size=32,
            progress=progress,
        )
        held_out_store = encode_folder(
            held_out, vae, image_size=image_size, out=out / "latents" / "held_out", batch_size=32, progress=False
        )

    model = config.model
    print(f"Training {model.groups} codebooks of {model.num_codes} codes for {config.train.epochs} epochs")
    with clock("train"):
        trained = train(config, store, out, validation=held_out_store, progress=progress).model

    with clock("evaluate"):
        use, errors = code_use(trained, store), latent_errors(trained, held_out_store)
        originals = to_tensor([center_crop(load_image(path), image_size) for path in held_out])
        pictures = reconstruct(trained, vae, originals)
        quality = image_quality(pictures)
        _draw(out, pictures, [path.name for path in held_out])

    numbers = {
        "vae": vae.name,
        "training_crops": len(store),
        "held_out_photos": len(held_out_store),
        "quality": {name: value._asdict() for name, value in quality.items()},
        "latent_mse_quantized": errors.quantized,
        "latent_mse_rectified": errors.rectified,
        "rectifier_gain": errors.gain,
        **use._asdict(),
        "num_tokens": model.num_tokens,
        "num_codes": model.num_codes,
        "bits_per_image": model.bits_per_sample,
        "kernel": _kernel(trained, held_out_store.rows([0])),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    with atomic_file(out / "demo.json") as path:
        path.write_text(json.dumps({"demo": to_dict(config), **numbers}, indent=1) + "\n")
    print(_report(numbers, image_size))
    folder = model_folder(out)
    print(f"\nPicture    {out / 'comparison.png'}\nLosses     {out / 'loss.png'}, {out / 'metrics.jsonl'}")
    print(f'Model      {folder}: revq.Tokenizer.from_pretrained("{folder}")')
    return DemoResult(numbers, _failures(numbers))


def _failures(numbers: dict[str, Any]) -> list[str]:
    failures = []
    if not numbers["rectifier_gain"] >= LEAST_GAIN:
        failures.append(
            f"the rectifier lowers the held-out latent MSE by {numbers['rectifier_gain']:.2%}, expected {LEAST_GAIN:.0%} or more"
        )
    if not numbers["utilization"] >= LEAST_UTILIZATION:
        failures.append(f"utilization is {numbers['utilization']:.2%}, expected {LEAST_UTILIZATION:.0%} or more")
    return failures


def _report(numbers: dict[str, Any], image_size: int) -> str:
    """The two tables that are printed: image quality, and properties of the run."""
    mse = {"quantized": numbers["latent_mse_quantized"], "rectified": numbers["latent_mse_rectified"]}
    labels = {"vae": "VAE alone", "quantized": "quantized", "rectified": "quantized and rectified"}
    rows = [
        [labels[name], f"{value['psnr']:.2f}", f"{value['ssim']:.4f}", f"{mse[name]:.4f}" if name in mse else "0"]
        for name, value in numbers["quality"].items()
    ]
    bits = numbers["bits_per_image"]
    facts = [
        ("rectifier", f"{numbers['rectifier_gain']:.1%} less held-out latent MSE"),
        (
            "codebook utilization",
            f"{numbers['utilization']:.2%} of the codes, {numbers['lowest_utilization']:.1%} in the worst codebook",
        ),
        ("codebook perplexity", f"{numbers['perplexity']:.1f} of {numbers['num_codes']}"),
        ("tokens per image", f"{numbers['num_tokens']}"),
        ("bits per image", f"{bits} ({bits / image_size**2:.2f} bits per pixel, {bits / 8:.0f} bytes)"),
        ("kernel", numbers["kernel"]),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in numbers["seconds"].items()),
        ("seconds, in all", f"{sum(numbers['seconds'].values()):.1f} on {numbers['threads']} threads"),
    ]
    title = f"\n{numbers['held_out_photos']} held-out photos, {image_size} px"
    return "\n".join([title, "", table(["", "PSNR dB", "SSIM", "latent MSE"], rows), "", pairs(facts)])


def _draw(out: Path, pictures: Reconstructions, names: Sequence[str]) -> None:
    count = len(pictures.original)
    shown = sorted({count * place // _SHOWN for place in range(_SHOWN)})  # evenly spaced, because neighbors are alike
    save_comparison(
        out / "comparison.png",
        [(label, to_pil(images[shown])) for label, images in zip(LABELS, pictures, strict=True)],
        [names[number] for number in shown],
    )
    save_loss_plot(out / "loss.png", read_records(out / "metrics.jsonl"))


def _kernel(model: ReVQ, latents: torch.Tensor) -> str:
    """The implementation that searches these latents, and the reason."""
    tokens = split_tokens(model.normalizer.normalize(latents), model.config.code_dim, model.config.split)
    return str(explain(tokens.reshape(-1, model.config.groups, model.config.code_dim), model.quantizer.codebook))


def _make_room(out: Path, config: RunConfig, overwrite: bool) -> None:
    """Remove the files of an earlier demo from ``out`` and mark the folder as a demo's; keep all other files."""
    names = _WRITES if model_folder(out) != out else (*_WRITES, *sorted(MODEL_FILES))
    present = [out / name for name in names if (out / name).exists() or (out / name).is_symlink()]
    if present and not (out / "demo.json").is_file() and not overwrite:
        raise InputError(
            f"{out}: expected a new folder or an earlier demo's, but it holds {present[0].name} of another origin; "
            "give another output folder, or overwrite it"
        )
    for path in present:
        if path.name != "demo.json":  # the mark, which is replaced below
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with atomic_file(out / "demo.json") as path:
        path.write_text(json.dumps({"demo": to_dict(config)}, indent=1) + "\n")


class _Clock:
    """``with clock("stage")`` records the wall time of a stage in seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._name, self._start = seconds, "", 0.0

    def __call__(self, name: str) -> "_Clock":
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start
