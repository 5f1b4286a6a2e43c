"""The rectifiers of the paper's Table 4 on the demo's latents, in both forms: held-out error before and after.

python -m benchmarks.rectifier_effect        # after `make demo`, whose latents it reads
"""

import dataclasses
import tempfile
from pathlib import Path

from benchmarks.harness.rows import provenance, write
from revq import recipes
from revq.config import RectifierConfig
from revq.data.latents import LatentStore
from revq.eval.evaluate import latent_errors
from revq.eval.report import table
from revq.train.loop import train

RUNS = [
    RectifierConfig(kind="efficientvit", width=64, layers=1, form="residual"),
    RectifierConfig(kind="efficientvit", width=64, layers=1, form="absolute"),
    RectifierConfig(kind="cnn", width=64, layers=1, form="residual"),
    RectifierConfig(kind="mlp", width=64, layers=1, form="residual"),
]


def main() -> None:
    """Train the demo once per rectifier and write the rows."""
    latents = Path("runs/demo/latents")
    training, held_out = LatentStore(latents / "train"), LatentStore(latents / "held_out")
    source, rows = provenance(), []
    for rectifier in RUNS:
        config = recipes.demo()
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, rectifier=rectifier))
        with tempfile.TemporaryDirectory() as out:
            trained = train(config, training, out).model
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
                **source,
            }
        )
    columns = list(rows[0])[:8]
    print(table(columns, [[str(row[name]) for name in columns] for row in rows]))
    print(write("rectifier-effect", rows))


if __name__ == "__main__":
    main()
