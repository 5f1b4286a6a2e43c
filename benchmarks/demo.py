"""The demo's own report as rows: the shipped seed and two others.

python -m benchmarks.demo
"""

import dataclasses
import tempfile

from benchmarks.harness.rows import provenance, write
from revq import recipes
from revq.demo import demo

SEEDS = (recipes.demo().train.seed, 1, 2)


def main() -> None:
    """Run the demo once per seed and write the rows."""
    source, rows = provenance(), []
    for seed in SEEDS:
        config = recipes.demo()
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        with tempfile.TemporaryDirectory() as out:
            numbers = demo(out + "/demo", config=config, progress=False).numbers
        quality = {
            f"{name}_{metric}": round(value, 4)
            for name, values in numbers["quality"].items()
            for metric, value in values.items()
        }
        seconds = {f"seconds_{name.replace(' ', '_')}": value for name, value in numbers["seconds"].items()}
        keys = ("training_crops", "held_out_photos", "latent_mse_quantized", "latent_mse_rectified")
        keys += ("rectifier_gain", "utilization", "perplexity", "bits_per_image", "kernel")
        row = {"seed": seed, **{key: numbers[key] for key in keys}, **quality, **seconds}
        rows.append({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()} | source)
    print(write("demo-cpu", rows))


if __name__ == "__main__":
    main()
