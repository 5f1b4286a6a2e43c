"""What docs/benchmarks.md says about the method: the demo, the reset and the rectifier, trained and evaluated again.

    python -m benchmarks.method demo             the demo with the shipped seed and two others
    python -m benchmarks.method reset            the demo's quantizer alone, with the reset and without it
    python -m benchmarks.method rectifier        the rectifiers of the paper's Table 4; after `make demo`

`reset` encodes the demo's crops first if runs/reset has none, and trains with the identity as rectifier, so that only
the codebooks learn; crops, seed and schedule are the same in every run.  `rectifier` reads the latents of `make demo`.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness.rows import RESULTS, Row, provenance, write
from revq import ReVQ, assets, recipes
from revq.config import RectifierConfig, RunConfig
from revq.data.encode import encode_folder
from revq.data.latents import LatentStore
from revq.data.vae import load_vae
from revq.demo import demo
from revq.eval.evaluate import code_use, latent_errors
from revq.eval.report import table
from revq.train.loop import train

SEEDS = (recipes.demo().train.seed, 1, 2)
CROPS_PER_PHOTO = 20
RESET_RUNS: list[tuple[Literal["normal", "data"], int]] = [
    ("normal", 1024),
    ("data", 1024),
    ("normal", 256),
    ("data", 256),
]
RECTIFIERS = [
    RectifierConfig(kind="efficientvit", width=64, layers=1, form="residual"),
    RectifierConfig(kind="efficientvit", width=64, layers=1, form="absolute"),
    RectifierConfig(kind="cnn", width=64, layers=1, form="residual"),
    RectifierConfig(kind="mlp", width=64, layers=1, form="residual"),
]
DEMO_COLUMNS = (
    *("training_crops", "held_out_photos", "latent_mse_quantized", "latent_mse_rectified"),
    *("rectifier_gain", "utilization", "perplexity", "bits_per_image", "kernel"),
)


def demo_rows() -> list[Row]:
    """The demo's own report, one row per seed."""
    rows = []
    for seed in SEEDS:
        config = recipes.demo()
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        with tempfile.TemporaryDirectory() as out:
            report = demo(out + "/demo", config=config, progress=False).numbers
        quality = {
            f"{name}_{metric}": round(value, 4)
            for name, values in report["quality"].items()
            for metric, value in values.items()
        }
        seconds = {f"seconds_{name.replace(' ', '_')}": value for name, value in report["seconds"].items()}
        row = {"seed": seed, **{key: report[key] for key in DEMO_COLUMNS}, **quality, **seconds}
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def reset_rows() -> list[Row]:
    """Eight trainings: from noise and from data, with 1,024 codes and 256, with the reset and without it."""
    training, held_out = _reset_stores(Path("runs/reset"))
    rows = []
    for init, num_codes in RESET_RUNS:
        for reset in (False, True):
            config = recipes.demo()
            model = dataclasses.replace(config.model, num_codes=num_codes, rectifier=RectifierConfig(kind="identity"))
            options = dataclasses.replace(config.train, init=init, reset=reset)
            trained = _trained(dataclasses.replace(config, model=model, train=options), training)
            use = code_use(trained, training)
            rows.append(
                {
                    "initialization": init,
                    "K": num_codes,
                    "reset": reset,
                    "utilization": round(use.utilization, 5),
                    "perplexity": round(use.perplexity, 1),
                    "training_mse": round(latent_errors(trained, training).quantized, 5),
                    "held_out_mse": round(latent_errors(trained, held_out).quantized, 5),
                    "crops": len(training),
                    "held_out_photos": len(held_out),
                    "epochs": options.epochs,
                }
            )
    return rows


def rectifier_rows() -> list[Row]:
    """The demo's training, once per rectifier."""
    latents = Path("runs/demo/latents")
    training, held_out = LatentStore(latents / "train"), LatentStore(latents / "held_out")
    rows = []
    for rectifier in RECTIFIERS:
        config = recipes.demo()
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, rectifier=rectifier))
        trained = _trained(config, training)
        errors = latent_errors(trained, held_out)
        rows.append(
            {
                "rectifier": rectifier.kind,
                "form": rectifier.form,
                "width": rectifier.width,
                "layers": rectifier.layers,
                "parameters": sum(parameter.numel() for parameter in trained.rectifier.parameters()),
                "held_out_quantized_mse": round(errors.quantized, 5),
                "held_out_rectified_mse": round(errors.rectified, 5),
                "gain_percent": round(100 * errors.gain, 2),
                "crops": len(training),
                "held_out_photos": len(held_out),
                "epochs": config.train.epochs,
            }
        )
    return rows


def _trained(config: RunConfig, training: LatentStore) -> ReVQ:
    with tempfile.TemporaryDirectory() as out:
        return train(config, training, out).model


def _reset_stores(folder: Path) -> tuple[LatentStore, LatentStore]:
    """The demo's training crops and held-out photos as latents."""
    if not (folder / "train").exists() or not (folder / "held_out").exists():
        vae = load_vae()
        crops: dict[str, Any] = {"image_size": 128, "batch_size": 32}
        encode_folder(assets.train_photos(), vae, out=folder / "train", crops=CROPS_PER_PHOTO, **crops)
        encode_folder(assets.held_out_photos(), vae, out=folder / "held_out", **crops)
    return LatentStore(folder / "train"), LatentStore(folder / "held_out")


MEASUREMENTS = {
    "demo": ("demo-cpu", demo_rows),
    "reset": ("reset-effect", reset_rows),
    "rectifier": ("rectifier-effect", rectifier_rows),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one measurement, print its table and write its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.method", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    name, measurement = MEASUREMENTS[options.measurement]
    source = provenance(f"python -m benchmarks.method {options.measurement}")
    rows = measurement()
    columns = list(rows[0])[:8]
    print(table(columns, [[str(row[column]) for column in columns] for row in rows]))
    print(write(name, [row | source for row in rows], options.out))


if __name__ == "__main__":
    main()
