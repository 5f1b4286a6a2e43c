"""The command line: `revq demo | encode | train | reconstruct | tokenize | detokenize | info`.

A verb is a dataclass: its fields are the options, their docstrings the help.  Everything heavy is imported in `run`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

from revq import recipes
from revq.allocator import keep_freed_memory
from revq.config import RunConfig
from revq.errors import InputError
from revq.options import ModelOptions, TrainOptions, checked, unchecked

if TYPE_CHECKING:
    import torch

    from revq.tokenizer import Tokenizer

DESCRIPTION = "Turn a frozen image VAE into a VQ-VAE: images to latents, latents to a model, images to tokens and back."


@dataclass(frozen=True)
class Demo:
    """Train on the shipped photos and show the result, in one or two minutes on two cores.

    Starts afresh each time.  Exits with 1 if the rectifier or the codebooks miss their mark.
    """

    out: Path = Path("runs/demo")
    """Folder for the picture, the plot, the log and the model."""

    def run(self) -> int:
        """Run the demo."""
        from revq.demo import demo

        failures = demo(self.out).failures
        for failure in failures:
            print(f"revq: the demo failed: {failure}", file=sys.stderr)
        return 1 if failures else 0


@dataclass(frozen=True)
class Encode:
    """Encode a folder of images to latents on disk."""

    images: Path
    """Folder of images; subfolders count."""
    out: Path
    """Folder of the new latent store.  An interrupted command goes on from its last finished shard."""
    vae: str = "embedded"
    """The frozen VAE: "embedded", a folder or a Hugging Face id of a diffusers autoencoder."""
    image_size: int = 128
    """Side of the square crops, in pixels."""
    crops: int = 0
    """Random crops per image; 0 takes the center crop."""
    seed: int = 0
    """Of the random crops."""
    batch_size: int = 16
    """Images per call of the encoder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """How latents are stored."""
    device: str = "cpu"
    """Where the VAE runs."""

    def run(self) -> int:
        """Encode."""
        from revq.data.encode import encode_folder
        from revq.data.images import list_images
        from revq.data.vae import load_vae

        list_images(self.images)  # a wrong folder is told before the VAE takes its seconds
        vae = load_vae(self.vae, device=_device(self.device))
        options = {name: getattr(self, name) for name in ("image_size", "out", "crops", "seed", "batch_size", "dtype")}
        store = encode_folder(self.images, vae, **options)
        print(f"{self.out}: {len(store)} latents of (C, h, w) = {store.shape}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a model on latents.  The same command again goes on from its last checkpoint."""

    latents: Path
    """The latent store to train on."""
    out: Path
    """Folder of the run: checkpoint.pt, metrics.jsonl and, in the end, model/."""
    validation: Path | None = None
    """A latent store to judge each epoch on."""
    recipe: Literal["demo", "paper_512t", "paper_256t", "paper_256t_large"] = "demo"
    """Gives all options below their defaults.  The latent shape is the store's."""
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    device: str = "cpu"
    """Where to train."""

    def run(self) -> int:
        """Train."""
        from revq.data.latents import LatentStore
        from revq.train.loop import train

        config = RunConfig(self.recipe, checked(self.model), checked(self.train))
        validation = LatentStore(self.validation) if self.validation else None
        result = train(config, LatentStore(self.latents), self.out, validation=validation, device=_device(self.device))
        used = f"utilization {result.last_epoch.utilization:.2%}, perplexity {result.last_epoch.perplexity:.1f}"
        print(f"{self.out / 'model'}: {result.steps} steps, in the last epoch {used}")
        if result.validation:
            errors = result.validation
            print(
                f"held-out latent MSE: quantized {errors.quantized:.4f}, rectified {errors.rectified:.4f} ({errors.gain:+.1%})"
            )
        return 0


@dataclass(frozen=True)
class Reconstruct:
    """Draw images beside what the VAE, the tokens and the rectifier make of them."""

    model: str
    """Model folder or Hugging Face id."""
    images: tuple[Path, ...]
    """Images, or folders of images."""
    out: Path
    """The picture to write, a PNG."""
    vae: str | None = None
    """Where the model's VAE is, if not where it was."""
    device: str = "cpu"
    """Where to run."""

    def run(self) -> int:
        """Reconstruct."""
        from revq.data.images import center_crop, load_image, to_pil, to_tensor
        from revq.data.tokenize import check_output, image_files
        from revq.eval.evaluate import image_quality, reconstruct
        from revq.eval.report import save_comparison, table

        files = image_files(self.images)
        check_output(self.out, files, ".png")
        tokenizer = _tokenizer(self)
        originals = to_tensor([center_crop(load_image(file.path), tokenizer.image_size) for file in files])
        pictures = reconstruct(tokenizer.model, tokenizer.vae, originals)
        labels = ("original", "VAE", "quantized", "rectified")
        save_comparison(self.out, [(label, to_pil(images)) for label, images in zip(labels, pictures, strict=True)])
        rows = [[name, f"{value.psnr:.2f}", f"{value.ssim:.4f}"] for name, value in image_quality(pictures).items()]
        print(table(["", "PSNR dB", "SSIM"], rows))
        print(f"{self.out}: {len(files)} images")
        return 0


@dataclass(frozen=True)
class Tokenize:
    """Turn images, or the latents that `revq encode` made of them, into a token file."""

    model: str
    """Model folder or Hugging Face id."""
    images: tuple[Path, ...]
    """Images, folders of images, or one latent store."""
    out: Path
    """The token file to write."""
    vae: str | None = None
    """Where the model's VAE is, if not where it was."""
    batch_size: int = 16
    """Images per call of the encoder."""
    device: str = "cpu"
    """Where to run."""

    def run(self) -> int:
        """Tokenize."""
        from revq.data.latents import is_latent_store
        from revq.data.tokenize import check_output, image_files, tokenize_files

        if len(self.images) == 1 and is_latent_store(self.images[0]):
            return self._run_on_latents()
        files = image_files(self.images)
        check_output(self.out, files)
        count, tokens = tokenize_files(_tokenizer(self), files, self.out, batch_size=self.batch_size)
        print(f"{self.out}: {count} images of {tokens} tokens, {self.out.stat().st_size} bytes")
        return 0

    def _run_on_latents(self) -> int:
        from revq.data.latents import LatentStore
        from revq.data.tokenize import check_output, tokenize_store
        from revq.model.files import TOKENIZER, model_file
        from revq.model.revq import ReVQ
        from revq.tokenizer import read_description

        check_output(self.out, [])
        store = LatentStore(self.images[0])
        name, fingerprint, _ = read_description(model_file(self.model, TOKENIZER, None))
        if store.plan.vae_fingerprint != fingerprint:
            raise InputError(
                f"{self.images[0]}: its latents are of another VAE ({store.plan.vae}) than the model's ({name})"
            )
        model = ReVQ.from_pretrained(self.model, device=_device(self.device))
        count, tokens = tokenize_store(model, store, self.out)
        print(f"{self.out}: {count} latents of {tokens} tokens, {self.out.stat().st_size} bytes")
        return 0


@dataclass(frozen=True)
class Detokenize:
    """Turn a token file back into images."""

    model: str
    """Model folder or Hugging Face id."""
    tokens: Path
    """The token file."""
    out: Path
    """New folder for the images, PNG."""
    vae: str | None = None
    """Where the model's VAE is, if not where it was."""
    batch_size: int = 16
    """Images per call of the decoder."""
    device: str = "cpu"
    """Where to run."""

    def run(self) -> int:
        """Detokenize."""
        from revq.data.tokenize import detokenize_file
        from revq.data.tokens import load_tokens

        load_tokens(self.tokens)  # a wrong file is told before the VAE takes its seconds
        count = detokenize_file(_tokenizer(self), self.tokens, self.out, batch_size=self.batch_size)
        print(f"{self.out}: {count} images")
        return 0


@dataclass(frozen=True)
class Info:
    """Say what a model folder, run, latent store, token file or VAE folder is."""

    path: Path
    """What to look at; "embedded" is the VAE that comes with revq."""

    def run(self) -> int:
        """Describe."""
        from revq.assets import vae_folder
        from revq.info import describe

        print(describe(vae_folder() if str(self.path) == "embedded" else self.path))
        return 0


Verb = Demo | Encode | Train | Reconstruct | Tokenize | Detokenize | Info


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 if the demo misses its mark, 2 for bad input, 130 on Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    try:
        return _parse(argv).run()
    except ModuleNotFoundError as error:
        return _fail(f"the Python package {error.name} is missing: pip install 'revq[train]'")
    except (InputError, OSError) as error:  # OSError: no permission, no room on the disk
        return _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        resumes = argv[:1] in (["encode"], ["train"])
        print(
            "\nrevq: interrupted"
            + ("; the same command goes on from its last finished shard or checkpoint" if resumes else ""),
            file=sys.stderr,
        )
        return 130


def _parse(argv: list[str]) -> Verb:
    """The verb with its options; tyro itself exits with 2 for a wrong option and with 0 after --help."""
    import tyro

    def verb(kind: type, *config: object, **default: object) -> object:
        return Annotated[(kind, tyro.conf.subcommand(kind.__name__.lower(), **default), *config)]

    train = dict(zip(("model", "train"), _recipe_in(argv), strict=True))
    verbs = (
        verb(Demo),
        verb(Encode),
        verb(Train, default=Train(tyro.MISSING, tyro.MISSING, **train)),
        verb(Reconstruct),
        verb(Tokenize),
        verb(Detokenize),
        verb(Info, tyro.conf.PositionalRequiredArgs),
    )
    return tyro.cli(Union[verbs], args=argv, prog="revq", description=DESCRIPTION)  # noqa: UP007 - made at run time


def _recipe_in(argv: list[str]) -> tuple[ModelOptions, TrainOptions]:
    """The options of the recipe that ``argv`` names, at the latent shape of the store that it names.

    They are the defaults of all other options of `Train`, so they must be known before these are read.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--recipe", default="demo")
    early.add_argument("--latents")
    try:
        found, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:  # tyro tells it better
        found = early.parse_args([])
    run = recipes.RECIPES.get(found.recipe, recipes.demo)()
    model, options = unchecked(run.model), unchecked(run.train)
    if argv[:1] == ["train"] and found.latents is not None and not {"-h", "--help"} & set(argv):
        from revq.data.latents import LatentStore

        model = dataclasses.replace(model, latent_shape=LatentStore(found.latents).shape)
    return model, options


def _tokenizer(verb: Reconstruct | Tokenize | Detokenize) -> "Tokenizer":
    from revq.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(verb.model, vae=verb.vae, device=_device(verb.device))


def _device(name: str) -> "torch.device":
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown names, missing drivers and builds without CUDA
        raise InputError(f"device: expected cpu or an accelerator of this machine, got {name!r} ({error})") from None
    return torch.device(name)


def _fail(message: str) -> int:
    print(f"revq: error: {message}", file=sys.stderr)
    return 2
