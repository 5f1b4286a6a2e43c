"""The command line: `revq demo | encode | train | reconstruct | tokenize | detokenize | info | verify`.

A verb is a dataclass: its fields are the options, their docstrings the help.  A verb imports what it needs in `run`, so
that --help and wrong options answer at once.

One rule for outputs: what exists is refused, before any work, unless --overwrite is given; then it is replaced at the
end, in one step.  `encode` and `train` resume their own unfinished or finished work without it.  `demo` replaces an
earlier demo without it.
"""

import glob
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from revq import __version__
from revq.config import LARGEST_INT, RunConfig
from revq.config_options import options, override
from revq.errors import InputError
from revq.interrupt import signals_raise
from revq.recipes import RECIPES

if TYPE_CHECKING:
    import torch

    from revq.data.images import NamedFile
    from revq.tokenizer import Tokenizer

DESCRIPTION = (
    "Turn a frozen image VAE into a VQ-VAE: images to latents, latents to a model, images to tokens and back.\n\n"
    "revq --version prints the version."
)
_LARGEST_SIDE = 8192  # pixels; a batch of larger images does not fit into any memory


@dataclass(frozen=True)
class Demo:
    """Train on the shipped photos and show the result, in one or two minutes on two cores.

    Starts from the beginning each time.  Exits with 1 if the rectifier or the code use misses its threshold.
    """

    out: Path = Path("runs/demo")
    """Folder for the comparison of images, the plot of the losses, the log and the model."""
    overwrite: bool = False
    """Replace files of the demo's names that no demo wrote.  An earlier demo is replaced without it."""

    after_interruption: ClassVar[str] = "the next demo starts from the beginning"

    def run(self) -> int:
        """Run the demo."""
        from revq.demo import demo

        failures = demo(self.out, overwrite=self.overwrite).failures
        for failure in failures:
            print(f"revq: the demo failed: {failure}", file=sys.stderr)
        return 1 if failures else 0


@dataclass(frozen=True)
class Encode:
    """Encode a folder of images to latents on disk."""

    images: Path
    """Folder of images, with its subfolders."""
    out: Path
    """Folder of the new latent store.  An interrupted command resumes after its last finished shard."""
    vae: str = "embedded"
    """The frozen VAE: "embedded", a folder or a Hugging Face id of a diffusers autoencoder."""
    image_size: int = 128
    """Side of the square crops, in pixels."""
    crops: int = 0
    """Random crops per image; 0 takes the center crop."""
    seed: int = 0
    """Seed of the random crops."""
    batch_size: int = 16
    """Images per call of the encoder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the stored latents."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Color (red, green, blue) behind transparent pixels."""
    shard_mib: int = 256
    """Approximate size of a file of the store, in MiB."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do about an image that cannot be read: leave it out and list it, or stop."""
    trust_mtime: bool = False
    """On resume, take files whose size and time of last change are as before instead of reading them again."""
    device: str = "cpu"
    """Where the VAE runs."""
    overwrite: bool = False
    """Replace other latents in the output folder.  These very latents are resumed without it."""

    after_interruption: ClassVar[str] = "the same command keeps the finished shards, if any, and makes the others"

    def run(self) -> int:
        """Encode."""
        from revq.data.atomic import check_writable_folder
        from revq.data.encode import encode_folder
        from revq.data.images import image_files, summarize
        from revq.data.vae import load_vae

        _check_range("image_size", self.image_size, 1, _LARGEST_SIDE)
        _check_range("batch_size", self.batch_size, 1, LARGEST_INT)
        _check_range("crops", self.crops, 0, 1_000_000)
        _check_range("shard_mib", self.shard_mib, 1, 1 << 20)
        for level in self.background:
            _check_range("background", level, 0, 255)
        _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        check_writable_folder(self.out, frozenset(), keep_others=True)
        listing = image_files([self.images])  # fail before loading the VAE
        store = encode_folder(
            self.images,
            load_vae(self.vae, device=_device(self.device)),
            image_size=self.image_size,
            out=self.out,
            crops=self.crops,
            seed=self.seed,
            batch_size=self.batch_size,
            dtype=self.dtype,
            background=self.background,
            shard_bytes=self.shard_mib << 20,
            on_error=self.on_error,
            trust_mtime=self.trust_mtime,
            overwrite=self.overwrite,
        )
        print(f"{self.out}: {len(store)} latents of (C, h, w) = {store.shape}")
        print(summarize(len(store.names), [*listing.skipped, *store.skipped]))
        return 0


if TYPE_CHECKING:
    ModelOptions = dict[str, Any]
    TrainOptions = dict[str, Any]
else:
    ModelOptions = options({name: recipe().model for name, recipe in RECIPES.items()})
    TrainOptions = options({name: recipe().train for name, recipe in RECIPES.items()})


@dataclass(frozen=True)
class Train:
    """Train a model on latents.  The same command again resumes from its last checkpoint; more epochs extend the run."""

    latents: Path
    """The latent store to train on."""
    out: Path
    """Folder of the run: checkpoint.pt, metrics.jsonl and, at the end, the model in model/ (beside them if the folder's
    own name is model)."""
    validation: Path | None = None
    """A latent store on which to measure the errors after each epoch."""
    recipe: Literal["demo", "paper_512t", "paper_256t", "paper_256t_large"] = "demo"
    """Values of all model and train options that are not given.  The latent shape is the store's."""
    model: ModelOptions = field(default_factory=dict)
    train: TrainOptions = field(default_factory=dict)
    device: str = "cpu"
    """Where to train."""
    overwrite: bool = False
    """Replace another run, or a damaged checkpoint, in the output folder.  This very run is resumed without it."""

    after_interruption: ClassVar[str] = "the same command goes on from there"

    def run(self) -> int:
        """Train."""
        from revq.data.latents import LatentStore
        from revq.model.revq import model_folder
        from revq.train.loop import train

        store = LatentStore(self.latents)
        recipe = RECIPES[self.recipe]()
        config = RunConfig(
            self.recipe,
            override(recipe.model, {"latent_shape": store.shape, **self.model}),
            override(recipe.train, self.train),
        )
        validation = LatentStore(self.validation) if self.validation else None
        device = _device(self.device)
        result = train(config, store, self.out, validation=validation, device=device, overwrite=self.overwrite)
        used = f"utilization {result.last_epoch.utilization:.2%}, perplexity {result.last_epoch.perplexity:.1f}"
        print(f"{model_folder(self.out)}: {result.steps} steps, in the last epoch {used}")
        if result.validation:
            errors = result.validation
            print(
                f"held-out latent MSE: quantized {errors.quantized:.4f}, rectified {errors.rectified:.4f} ({errors.gain:+.1%})"
            )
        return 0


@dataclass(frozen=True)
class Reconstruct:
    """Write a picture of images beside their reconstructions: by the VAE, and from tokens without and with rectifier."""

    model: str
    """Model folder, folder of a run, or Hugging Face id."""
    images: tuple[Path, ...]
    """Images, or folders of images."""
    out: Path
    """The picture to write, a PNG; after 16 images, further pages go to NAME-2.png, NAME-3.png, ... beside it."""
    vae: str | None = None
    """Folder or Hugging Face id of the model's VAE, if it is no longer where it was."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do about an image that cannot be read: leave it out, or stop."""
    device: str = "cpu"
    """Where to run."""
    overwrite: bool = False
    """Replace pictures that exist."""

    def run(self) -> int:
        """Reconstruct."""
        from revq.data.images import image_files, summarize
        from revq.eval.evaluate import Quality, mean_quality
        from revq.eval.report import page_paths, reconstruction_sheets, save_pages, table
        from revq.tokenizer import load_crops

        listing = image_files(self.images)
        files, skipped = listing.files, list(listing.skipped)
        paths = page_paths(self.out, len(files))
        for path in paths:
            _check_output(path, self.overwrite, files, ".png")
        tokenizer = _tokenizer(self)
        images = load_crops(files, tokenizer.image_size, on_error=self.on_error, skipped=skipped)
        qualities: list[tuple[int, dict[str, Quality]]] = []
        paths = save_pages(paths, reconstruction_sheets(tokenizer.model, tokenizer.vae, images, qualities))
        rows = [[name, f"{value.psnr:.2f}", f"{value.ssim:.4f}"] for name, value in mean_quality(qualities).items()]
        print(table(["", "PSNR dB", "SSIM"], rows))
        pages = f" on {len(paths)} pages, up to {paths[-1].name}" if len(paths) > 1 else ""
        print(f"{self.out}: {summarize(sum(count for count, _ in qualities), skipped)}{pages}")
        return 0


@dataclass(frozen=True)
class Tokenize:
    """Turn images, or the latents that `revq encode` made of them, into a token file."""

    model: str
    """Model folder, folder of a run, or Hugging Face id."""
    images: tuple[Path, ...]
    """Images, folders of images, or one latent store."""
    out: Path
    """The token file to write."""
    vae: str | None = None
    """Folder or Hugging Face id of the model's VAE, if it is no longer where it was."""
    batch_size: int = 16
    """Images per call of the encoder."""
    on_error: Literal["skip", "stop"] = "skip"
    """What to do about an image that cannot be read: leave it out and list it, or stop."""
    device: str = "cpu"
    """Where to run."""
    overwrite: bool = False
    """Replace a file that exists."""

    def run(self) -> int:
        """Tokenize."""
        from revq.data.images import image_files, summarize
        from revq.data.latents import is_latent_store
        from revq.tokenizer import tokenize_files

        _check_range("batch_size", self.batch_size, 1, LARGEST_INT)
        if len(self.images) == 1 and is_latent_store(self.images[0]):
            return self._run_on_latents()
        listing = image_files(self.images)
        files = listing.files
        _check_output(self.out, self.overwrite, files)
        count, tokens, skipped = tokenize_files(
            _tokenizer(self), files, self.out, batch_size=self.batch_size, on_error=self.on_error
        )
        print(
            f"{self.out}: {summarize(count, [*listing.skipped, *skipped])}; each of {tokens} tokens, {self.out.stat().st_size} bytes"
        )
        return 0

    def _run_on_latents(self) -> int:
        from revq.data.latents import LatentStore
        from revq.model.revq import TOKENIZER, ReVQ, model_file, read_origin
        from revq.tokenizer import tokenize_store

        _check_output(self.out, self.overwrite)
        store = LatentStore(self.images[0])
        origin = read_origin(model_file(self.model, TOKENIZER))
        if store.plan.vae_fingerprint != origin.vae_fingerprint:
            raise InputError(
                f"{self.images[0]}: its latents are of another VAE ({store.plan.vae}) than the model's ({origin.vae})"
            )
        model = ReVQ.from_pretrained(self.model, device=_device(self.device))
        count, tokens, _ = tokenize_store(model, store, self.out)
        print(f"{self.out}: {count} latents of {tokens} tokens, {self.out.stat().st_size} bytes")
        return 0


@dataclass(frozen=True)
class Detokenize:
    """Turn a token file back into images."""

    model: str
    """Model folder, folder of a run, or Hugging Face id."""
    tokens: Path
    """The token file."""
    out: Path
    """Folder for the images, PNG; new or empty unless --overwrite is given."""
    vae: str | None = None
    """Folder or Hugging Face id of the model's VAE, if it is no longer where it was."""
    batch_size: int = 16
    """Images per call of the decoder."""
    device: str = "cpu"
    """Where to run."""
    overwrite: bool = False
    """Replace files of the same names in the output folder; all others stay."""

    def run(self) -> int:
        """Detokenize."""
        from revq.data.atomic import check_writable_folder
        from revq.data.tokens import load_tokens
        from revq.tokenizer import detokenize_file

        _check_range("batch_size", self.batch_size, 1, LARGEST_INT)
        check_writable_folder(self.out, frozenset(), keep_others=self.overwrite)
        load_tokens(self.tokens)  # fail before loading the VAE
        count = detokenize_file(
            _tokenizer(self), self.tokens, self.out, batch_size=self.batch_size, overwrite=self.overwrite
        )
        print(f"{self.out}: {count} images")
        return 0


@dataclass(frozen=True)
class Info:
    """Describe a model folder, run, latent store, token file or VAE folder."""

    path: Path
    """The folder or file; "embedded" is the VAE that ships with revq."""

    def run(self) -> int:
        """Describe."""
        from revq.assets import vae_folder
        from revq.info import describe

        print(describe(vae_folder() if str(self.path) == "embedded" else self.path))
        return 0


@dataclass(frozen=True)
class Verify:
    """Compare every byte of a latent store, token file, model folder or run with its checksums."""

    path: Path
    """The folder or file."""

    def run(self) -> int:
        """Verify."""
        from revq.info import verify

        print(f"{self.path}: {verify(self.path)}, as it was written")
        return 0


Verb = Demo | Encode | Train | Reconstruct | Tokenize | Detokenize | Info | Verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    0, 1 if the demo misses a threshold, 2 for bad input or a full disk, 128 + its number after a signal (130 on Ctrl-C,
    143 on SIGTERM).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    verb, before = None, None
    try:
        with signals_raise():
            if argv[:1] in (["--version"], ["-V"]):
                print(f"revq {__version__}")
                code = 0
            else:
                verb = _parse(argv)
                before = _outputs(verb)
                code = verb.run()
            sys.stdout.flush()
            return code
    except ModuleNotFoundError as error:
        return _fail(f"the Python package {error.name} is missing: pip install 'revq[train]'")
    except (InputError, OSError) as error:  # OSError: no permission, disk full
        return _fail(" ".join(str(error).split()))
    except KeyboardInterrupt as error:
        print(f"\nrevq: interrupted{_after_interruption(verb, before, error)}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()  # torch has no type of its own for this on the CPU
        if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
            return _fail("not enough memory; give a smaller batch size, image size or model")
        raise


def _outputs(verb: "Verb | None") -> dict[Path, tuple[int, ...]]:
    """The files at the output of a verb, with what changes when they are replaced."""
    out = getattr(verb, "out", None)
    if out is None:
        return {}
    found = (
        [out, *out.parent.glob(f"{glob.escape(out.stem)}-*{glob.escape(out.suffix)}")]
        if isinstance(verb, Reconstruct)
        else [out]
    )
    stats = {path: path.stat() for path in found if path.exists()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _after_interruption(verb: "Verb | None", before: "dict[Path, tuple[int, ...]] | None", error: BaseException) -> str:
    """What is on disk after an interruption, and what the same command does next."""
    if verb is None or isinstance(verb, Info | Verify):
        return ""
    if isinstance(verb, Train):
        saved = getattr(error, "saved", "")
        return f"; {saved}, {verb.after_interruption}" if saved else "; this call saved nothing"
    if isinstance(verb, Demo | Encode):
        return f"; {verb.after_interruption}"
    written = sorted(str(path) for path, stat in _outputs(verb).items() if (before or {}).get(path) != stat)
    return f"; written: {', '.join(written)}" if written else "; nothing was written"


def _parse(argv: list[str]) -> Verb:
    """The verb with its options; tyro exits with 2 for a wrong option and with 0 after --help."""
    import tyro

    def verb(kind: type, *config: object) -> object:
        annotated = (kind, tyro.conf.subcommand(kind.__name__.lower()), *config)
        return Annotated[annotated]

    verbs: Any = Union[  # noqa: UP007 - made at run time
        verb(Demo),
        verb(Encode),
        verb(Train),
        verb(Reconstruct),
        verb(Tokenize),
        verb(Detokenize),
        verb(Info, tyro.conf.PositionalRequiredArgs),
        verb(Verify, tyro.conf.PositionalRequiredArgs),
    ]
    return tyro.cli(verbs, args=argv, prog="revq", description=DESCRIPTION)


def _tokenizer(verb: Reconstruct | Tokenize | Detokenize) -> "Tokenizer":
    from revq.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(verb.model, vae=verb.vae, device=_device(verb.device))


def _device(name: str) -> "torch.device":
    import torch

    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:  # unknown names, missing drivers and builds without CUDA
        raise InputError(f"device: expected cpu or an accelerator of this machine, got {name!r} ({error})") from None
    return torch.device(name)


def _check_output(out: Path, overwrite: bool, files: "Sequence[NamedFile]" = (), suffix: str | None = None) -> None:
    """Reject, before any work is done, an output file that cannot be written, is one of the inputs, or exists.

    Raises:
        InputError: naming the file.
    """
    from revq.data.atomic import check_writable_file

    check_writable_file(out)
    if out.exists() and any(out.samefile(file.path) for file in files):
        raise InputError(f"{out}: expected a file to write, got one of the images that are read")
    if suffix and out.suffix.lower() != suffix:
        raise InputError(f"{out}: expected a name that ends in {suffix}")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; give another name, or --overwrite to replace it")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(
            f"{name}: expected a number from {low:,} to {high:,}, got {value if abs(value) < 10**30 else 'more'}"
        )


def _fail(message: str) -> int:
    print(f"revq: error: {message}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        try:
            sys.stdout.flush()
        except OSError:  # what cannot be printed is lost; Python would try again at its end, and report it once more
            with Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), sys.stdout.fileno())
    return 2
