"""Images to tokens and back: a ReVQ model together with its VAE, for tensors, image files and token files."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from revq.data.atomic import atomic_folder, link_or_copy
from revq.data.image_batch import ImageBatches, ImageRange
from revq.data.images import NamedFile, SkippedFile, center_crop, image_suffixes, load_image, to_pil
from revq.data.latents import LatentStore
from revq.data.tokens import TokenWriter, load_tokens
from revq.data.vae import FrozenVAE, load_vae
from revq.errors import InputError
from revq.model.revq import TOKENIZER, LatentOrigin, ReVQ, model_file, read_origin, save_model
from revq.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from revq.data.image_batch import Images

_LATENTS_PER_SEARCH = 256
"""Several encoder batches share one search: a search reads all codebooks once, however many latents it is for."""


class Tokenizer:
    """Encodes square images to tokens and decodes tokens to images.

    Args:
        model: put in eval mode.
        vae: the VAE of the latents that ``model`` was trained on.
        image_size: side of the images, in pixels.

    Raises:
        InputError: if the VAE's latents of such images do not have the shape that the model reads.
    """

    def __init__(self, model: ReVQ, vae: FrozenVAE, image_size: int) -> None:
        shape = vae.latent_shape(image_size)
        if shape != model.config.latent_shape:
            raise InputError(
                f"image_size: the model reads latents {model.config.latent_shape}, "
                f"but {vae.name} gives {shape} at {image_size} pixels"
            )
        self.model, self.vae, self.image_size = model.eval(), vae, image_size
        self._batches = ImageBatches(image_size)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        vae: FrozenVAE | str | Path | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "Tokenizer":
        """Load what `save_pretrained` wrote.

        Args:
            vae: the VAE, or its folder or hub id, if it is no longer available under the name that was saved.
            revision: branch, tag or commit of a hub repository.

        Raises:
            InputError: if files are missing or damaged, or the VAE's weights differ from the one that was saved.
        """
        path = model_file(folder_or_hub_id, TOKENIZER, revision)
        origin = read_origin(path)
        if vae is None:
            vae = origin.vae
        if not isinstance(vae, FrozenVAE):
            vae = load_vae(vae, device=device)
        if vae.fingerprint != origin.vae_fingerprint:
            raise InputError(
                f"{path}: made with a VAE of fingerprint {origin.vae_fingerprint[:12]}..., "
                f"but {vae.name} has {vae.fingerprint[:12]}...: its weights are others"
            )
        return cls(ReVQ.from_pretrained(folder_or_hub_id, revision=revision, device=device), vae, origin.image_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's files and tokenizer.json (the VAE's name and fingerprint, not its weights), atomically.

        Raises:
            InputError: if a weight is not finite, or ``folder`` is a file.
        """
        save_model(self.model, folder, LatentOrigin(self.vae.name, self.vae.fingerprint, self.image_size))

    def encode(self, images: "Images", *, image_range: ImageRange = (-1, 1)) -> Tensor:
        """Tokens int64 ``[B, T]`` of images; one image is a batch of one.

        Args:
            images: a tensor ``[B, 3, image_size, image_size]`` or ``[3, image_size, image_size]``: floats in
                ``image_range``, or uint8.  Or PIL images, paths of image files, and uint8 arrays ``[H, W, 3]``, of any size,
                which are center-cropped: one, a list, or an array ``[N, H, W, 3]``.  `ImageBatches` has the rules.
            image_range: black and white of a float tensor, (-1, 1), (0, 1) or (0, 255).

        Raises:
            InputError: for another shape, dtype, type or range, values outside ``image_range``, NaN or infinity among
                them, an image file that cannot be read, or no image.
        """
        return self.model.encode_latents(self.latents(images, image_range=image_range).to(self.model.device))

    def build_index(self, num_images: int) -> bool:
        """Before `encode` is called on many images: build a search tree if that saves time (`ReVQ.build_index`)."""
        return self.model.build_index(num_images)

    def latents(self, images: "Images", *, image_range: ImageRange = (-1, 1)) -> Tensor:
        """The VAE's latents float32 ``[B, C, h, w]`` of images as for `encode`."""
        return self.vae.encode(self._batches(images, image_range))

    def decode(self, indices: Tensor) -> Tensor:
        """Images float32 ``[B, 3, image_size, image_size]`` in [-1, 1] of tokens ``[B, T]``.

        The same batch of tokens gives the same bits on one machine with one number of threads.

        Raises:
            InputError: for tokens of another shape or dtype, or out of range.
        """
        return self.vae.decode(self.model.decode_tokens(indices))

    def reconstruct(self, images: "Images", *, image_range: ImageRange = (-1, 1)) -> Tensor:
        """``decode(encode(images))``: in [-1, 1], whatever the range of the images."""
        return self.decode(self.encode(images, image_range=image_range))


class TokenizeResult(NamedTuple):
    """What was written to a token file."""

    samples: int
    tokens: int
    """Tokens per sample."""
    skipped: list[SkippedFile]
    """Images that could not be read: name and reason."""


def tokenize_files(
    tokenizer: Tokenizer,
    files: Sequence[NamedFile],
    out: str | Path,
    *,
    batch_size: int = 16,
    on_error: Literal["skip", "stop"] = "skip",
    progress: bool = True,
) -> TokenizeResult:
    """Write the tokens of images as a token file (see `revq.data.tokens`), atomically and in constant memory.

    Args:
        on_error: ``skip`` leaves out an image that cannot be read and lists it in `TokenFile.skipped`; ``stop`` raises.

    Raises:
        InputError: if no image can be read; with ``on_error="stop"``, for a missing or damaged image.
    """
    _check_batch_size(batch_size)
    skipped: list[SkippedFile] = []

    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        images = load_crops(files, tokenizer.image_size, on_error=on_error, skipped=skipped)
        while batch := list(itertools.islice(images, batch_size)):
            yield tokenizer.latents([image for _, image in batch]), [name for name, _ in batch]

    return _tokenize(tokenizer.model, batches(), len(files), out, skipped, progress)


def load_crops(
    files: Sequence[NamedFile], size: int, *, on_error: Literal["skip", "stop"], skipped: list[SkippedFile]
) -> "Iterator[tuple[str, Image]]":
    """The names and center crops of image files, one at a time; at the end at least one could be read.

    Args:
        files: what to read.
        size: side of the crops, in pixels.
        on_error: ``skip`` leaves out an image that cannot be read and appends its name and the reason to ``skipped``.
        skipped: grows while the images are read.

    Raises:
        InputError: if no image can be read; with ``on_error="stop"``, for the first that cannot.
    """
    read, first = 0, ""
    for file in files:
        try:
            image = center_crop(load_image(file.path), size)
        except InputError as error:
            if on_error == "stop":
                raise
            first = first or f", the first because: {error}"
            skipped.append(SkippedFile(file.name, str(error).removeprefix(f"{file.path}: ")))
        else:
            read += 1
            yield file.name, image
    if not read:
        raise InputError(f"images: expected at least one that can be read, got {len(files)} that cannot{first}")


def tokenize_store(model: ReVQ, store: LatentStore, out: str | Path, *, progress: bool = True) -> TokenizeResult:
    """Write the tokens of stored latents as a token file, atomically and in constant memory.

    A latent has the name of its image, followed by the number of the crop if an image has several.

    Raises:
        InputError: if the latents do not have the model's shape.
    """
    if tuple(store.shape) != model.config.latent_shape:
        raise InputError(f"store: expected latents {model.config.latent_shape} as the model reads, got {store.shape}")

    def names() -> Iterator[str]:
        for name in store.names:
            yield from (f"{name}.{crop}" for crop in range(store.plan.crops)) if store.plan.crops > 1 else (name,)

    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        following = names()
        for latents in store.batches(_LATENTS_PER_SEARCH):
            yield latents, list(itertools.islice(following, len(latents)))

    return _tokenize(model, batches(), len(store), out, store.skipped, progress)


def detokenize_file(
    tokenizer: Tokenizer,
    path: str | Path,
    out: str | Path,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write the images of a token file as PNGs into the folder ``out``, whole or not at all; returns how many.

    Args:
        overwrite: replace files of the same names in ``out`` and keep its other files; without it, ``out`` must be new
            or empty.

    Raises:
        InputError: if the file is missing, damaged or of another model, or ``out`` holds files without ``overwrite``.
    """
    _check_batch_size(batch_size)
    file, model = load_tokens(path), tokenizer.model
    expected = (model.config.num_codes,) * model.config.num_tokens
    if file.codes_per_position != expected:
        raise InputError(
            f"{path}: expected T={len(expected)} tokens of K={model.config.num_codes} codes as the model has, "
            f"got T={file.num_tokens} of K={file.num_codes}"
        )
    if file.model and file.model != token_fingerprint(model):
        raise InputError(
            f"{path}: made with another model (codes {file.model[:12]}..., this one has {token_fingerprint(model)[:12]}...)"
        )
    names = image_names(file.names, path)
    with (
        atomic_folder(out, frozenset(names) if overwrite else frozenset(), keep_others=overwrite) as folder,
        progress_bar("decode", "image", len(names), show=progress) as bar,
    ):
        for start, indices in zip(range(0, len(names), batch_size), file.batches(batch_size), strict=True):
            images = to_pil(tokenizer.decode(indices))
            for name, image in zip(names[start : start + batch_size], images, strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / name)
                bar.update()
        for old in Path(out).rglob("*") if overwrite else ():  # inside subfolders; `atomic_folder` keeps the others
            new = folder / old.relative_to(out)
            if old.is_file() and not new.exists() and new.parent.is_dir():
                link_or_copy(old, new)
    return len(names)


def token_fingerprint(model: ReVQ) -> str:
    """SHA-256 of the codebook and the normalizer, which define what a token means.

    The rectifier is left out: a token file stays valid when the rectifier is trained again.
    """
    digest = hashlib.sha256()
    for tensor in (model.quantizer.codebook, model.normalizer.mean, model.normalizer.std):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _tokenize(
    model: ReVQ,
    batches: Iterable[tuple[Tensor, list[str]]],
    samples: int,
    out: str | Path,
    skipped: list[SkippedFile],
    progress: bool,
) -> TokenizeResult:
    """Write the tokens of latents ``[B, *shape]`` with their names; ``skipped`` may grow while the batches are made."""
    model.build_index(samples)
    tokens, written = model.config.num_tokens, 0
    pending: list[tuple[Tensor, list[str]]] = []
    writer = TokenWriter(
        out,
        num_tokens=tokens,
        num_codes=model.config.num_codes,
        max_samples=samples,
        model=token_fingerprint(model),
    )
    with writer, progress_bar("tokenize", "token", samples * tokens, show=progress, scale=True) as bar:

        def search_pending() -> None:
            nonlocal written
            if pending:
                indices = model.encode_latents(torch.cat([latents for latents, _ in pending]).to(model.device))
                writer.append(indices, [name for _, names in pending for name in names])
                bar.update(indices.numel())
                written += len(indices)
                pending.clear()

        for batch in batches:
            pending.append(batch)
            if sum(len(latents) for latents, _ in pending) >= _LATENTS_PER_SEARCH:
                search_pending()
        search_pending()
        if not written:
            first = f", the first because: {skipped[0][1]}" if skipped else ""
            raise InputError(f"images: expected at least one that can be read, got {len(skipped)} that cannot{first}")
        for name, reason in skipped:
            writer.skip(name, reason)
    return TokenizeResult(written, tokens, skipped)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: expected a number >= 1, got {batch_size}")


def image_names(names: Sequence[str], source: str | Path) -> list[str]:
    """Names of PNG files for samples: valid on every file system, inside one folder and all different.

    ``a.jpg`` becomes ``a.png``, and its crop 3 ``a-3.png``; if that makes two names equal, or a file where another name
    has a folder, all keep their kind (``a-jpg.png``); if that does not help or a name is too long, all become numbers.

    Raises:
        InputError: for a name that is not a path inside a folder; ``source`` is named in the message.
    """
    for name in names:
        parts = name.split("/")
        if not name.strip() or "" in parts or "." in parts or ".." in parts:
            raise InputError(f"{source}: expected names of files inside a folder, got {name!r}")
    kinds = "|".join(map(re.escape, sorted(image_suffixes()[0])))
    pattern = re.compile(f"(.+?)(?:({kinds})(\\.[0-9]+)?)?", re.IGNORECASE | re.DOTALL)  # stem, kind of image, crop
    pieces = [match.groups(default="") for match in map(pattern.fullmatch, names) if match]
    short = [f"{piece[0]}{piece[2].replace('.', '-')}.png" for piece in pieces]
    long = [f"{piece[0]}{(piece[1] + piece[2]).replace('.', '-')}.png" for piece in pieces]
    numbered = [f"{row:06d}.png" for row in range(len(names))]
    return next((fitting for fitting in (short, long) if _fit_one_folder(fitting)), numbered)


def _fit_one_folder(names: Sequence[str]) -> bool:
    """Whether files of these names can exist side by side, also where upper and lower case are the same."""
    folded = {name.casefold() for name in names}
    if len(folded) != len(names):
        return False
    for name in names:
        if not name.isprintable() or any(letter in name for letter in '\\:*?"<>|'):
            return False
        encoded = name.encode()
        if len(encoded) > 1024 or any(len(part) > 255 for part in encoded.split(b"/")):
            return False
        if any(parent.as_posix().casefold() in folded for parent in PurePosixPath(name).parents):
            return False
    return True
