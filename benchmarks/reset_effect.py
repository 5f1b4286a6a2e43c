"""What the non-activation reset does: the demo's quantizer alone, from noise and from data, with reset and without.

    python -m benchmarks.reset_effect            # encodes the demo's crops first if runs/reset holds none

Same crops, seed and schedule in every run; the rectifier is the identity, so only the codebooks learn.
"""

import dataclasses
import tempfile
from pathlib import Path

from benchmarks.harness.rows import provenance, write
from revq import assets, recipes
from revq.config import RectifierConfig
from revq.data.encode import encode_folder
from revq.data.latents import LatentStore
from revq.data.vae import load_vae
from revq.eval.evaluate import code_use, latent_errors
from revq.eval.report import table
from revq.train.loop import train

CROPS_PER_PHOTO = 20
RUNS = [("normal", 1024), ("data", 1024), ("normal", 256), ("data", 256)]


def stores(folder: Path) -> tuple[LatentStore, LatentStore]:
    """The demo's training crops and held-out photos as latents."""
    if not (folder / "train").exists() or not (folder / "held_out").exists():
        vae = load_vae()
        common = {"image_size": 128, "batch_size": 32}
        encode_folder(assets.train_photos(), vae, out=folder / "train", crops=CROPS_PER_PHOTO, **common)
        encode_folder(assets.held_out_photos(), vae, out=folder / "held_out", **common)
    return LatentStore(folder / "train"), LatentStore(folder / "held_out")


def main() -> None:
    """Run all eight trainings, print the table and write the rows."""
    training, held_out = stores(Path("runs/reset"))
    source, rows = provenance(), []
    for init, num_codes in RUNS:
        for reset in (False, True):
            config = recipes.demo()
            model = dataclasses.replace(config.model, num_codes=num_codes, rectifier=RectifierConfig(kind="identity"))
            options = dataclasses.replace(config.train, init=init, reset=reset)
            with tempfile.TemporaryDirectory() as out:
                trained = train(dataclasses.replace(config, model=model, train=options), training, out).model
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
                    **source,
                }
            )
    columns = list(rows[0])[:7]
    print(table(columns, [[str(row[name]) for name in columns] for row in rows]))
    print(write("reset-effect", rows))


if __name__ == "__main__":
    main()
