"""Image files to token files and back, a batch at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from revq.data.atomic_folder import atomic_folder
from revq.data.latents import LatentStore
from revq.data.tokens import load_tokens, save_tokens
from revq.errors import InputError
from revq.progress import progress_bar

if TYPE_CHECKING:
    from revq.model.revq import ReVQ
    from revq.tokenizer import Tokenizer


_SEARCHED_TOGETHER = 256
"""Latents per search, of several of the encoder's batches: the search goes through all codebooks once for all of them."""


class NamedFile(NamedTuple):
    """An image file, and its name as a path inside the folder that was given."""

    name: str
    path: Path


def image_files(places: Sequence[str | Path]) -> list[NamedFile]:
    """The images that ``places``, files and folders, stand for.

    Raises:
        InputError: if nothing is given, a place is missing, or a folder holds no image.
    """
    from revq.data.images import list_images

    files = []
    for place in map(Path, places):
        found = [place] if place.is_file() else list_images(place)
        files += [NamedFile(path.name if path == place else path.relative_to(place).as_posix(), path) for path in found]
    if not files:
        raise InputError("images: expected at least one file or folder, got none")
    return files


def tokenize_files(
    tokenizer: "Tokenizer", files: Sequence[NamedFile], out: str | Path, *, batch_size: int = 16, progress: bool = True
) -> tuple[int, int]:
    """Write the tokens of images as a token file (see `revq.data.tokens`), atomically; returns (images, tokens per image).

    Raises:
        InputError: for a missing or damaged image.
    """
    from revq.data.images import load_image

    _check_batch_size(batch_size)

    def latents() -> Iterator[Tensor]:
        for start in range(0, len(files), batch_size):
            yield tokenizer.latents([load_image(file.path) for file in files[start : start + batch_size]])

    return _tokenize(tokenizer.model, latents(), [file.name for file in files], out, progress)


def tokenize_store(model: "ReVQ", store: LatentStore, out: str | Path, *, progress: bool = True) -> tuple[int, int]:
    """Write the tokens of stored latents as a token file, atomically; returns (latents, tokens per latent).

    A latent's name is its image's, with the number of the crop behind it where an image has several.

    Raises:
        InputError: if the latents do not have the model's shape.
    """
    sources, crops = store.plan.sources, store.plan.crops
    names = [f"{source}.{crop}" for source in sources for crop in range(crops)] if crops > 1 else list(sources)
    return _tokenize(model, store.batches(_SEARCHED_TOGETHER), names, out, progress)


def _tokenize(
    model: "ReVQ", batches: Iterable[Tensor], names: list[str], out: str | Path, progress: bool
) -> tuple[int, int]:
    """Latents ``[B, C, h, w]``, as many as names in all, to a token file."""
    per_sample, device = model.config.num_tokens, model.quantizer.codebook.device
    parts: list[Tensor] = []
    waiting: list[Tensor] = []

    def search() -> None:
        if waiting:
            parts.append(model.encode_latents(torch.cat(waiting).to(device)).cpu())
            bar.update(len(parts[-1]) * per_sample)
            waiting.clear()

    with progress_bar("tokenize", "token", len(names) * per_sample, show=progress, scale=True) as bar:
        for latents in batches:
            waiting.append(latents)
            if sum(map(len, waiting)) >= _SEARCHED_TOGETHER:
                search()
        search()
    indices = torch.cat(parts)
    save_tokens(out, indices, model.config.num_codes, names=names, model=token_fingerprint(model))
    return tuple(indices.shape)


def detokenize_file(
    tokenizer: "Tokenizer", path: str | Path, out: str | Path, *, batch_size: int = 16, progress: bool = True
) -> int:
    """Write the images of a token file as PNGs into the new folder ``out``, whole or not at all; returns how many.

    Raises:
        InputError: if the file is missing or damaged or of another model, or ``out`` holds something already.
    """
    from revq.data.images import to_pil

    _check_batch_size(batch_size)
    file, model = load_tokens(path), tokenizer.model
    expected = (model.config.num_tokens, model.config.num_codes)
    if (file.indices.shape[1], file.num_codes) != expected:
        raise InputError(
            f"{path}: expected T={expected[0]} tokens of K={expected[1]} codes as the model has, "
            f"got T={file.indices.shape[1]} of K={file.num_codes}"
        )
    if file.model and file.model != token_fingerprint(model):
        raise InputError(
            f"{path}: made with another model (codes {file.model[:12]}..., this one has {token_fingerprint(model)[:12]}...)"
        )
    names = _picture_names(file.names, path)
    with atomic_folder(out, frozenset()) as folder, progress_bar("decode", "image", len(names), show=progress) as bar:
        for start in range(0, len(names), batch_size):
            pictures = to_pil(tokenizer.decode(file.indices[start : start + batch_size]))
            for name, picture in zip(names[start : start + batch_size], pictures, strict=True):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(folder / name)
                bar.update()
    return len(names)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: expected a number >= 1, got {batch_size}")


def check_output(out: str | Path, files: Sequence[NamedFile], suffix: str | None = None) -> None:
    """Refuse, before any work is done, an output file that cannot be written or is one of the inputs.

    Raises:
        InputError: naming the file.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, found a folder")
    if out.exists() and any(out.samefile(file.path) for file in files):
        raise InputError(f"{out}: expected a file to write, got one of the images that are read")
    if suffix and out.suffix.lower() != suffix:
        raise InputError(f"{out}: expected a name that ends in {suffix}")


def token_fingerprint(model: "ReVQ") -> str:
    """sha256 of what gives a token its meaning: the codebook and the normalizer (the rectifier may be trained anew)."""
    digest = hashlib.sha256()
    for tensor in (model.quantizer.codebook, model.normalizer.mean, model.normalizer.std):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _picture_names(names: Sequence[str], source: str | Path) -> list[str]:
    """File names for the pictures: a.jpg becomes a.png, or a.jpg.png where two would meet; never outside the folder."""
    for name in names:
        if not PurePosixPath(name).name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{source}: expected names of files inside a folder, got {name!r}")
    short = [PurePosixPath(name).with_suffix(".png").as_posix() for name in names]
    if len(set(short)) == len(short):
        return short
    long = [name + ".png" for name in names]
    return (
        long
        if len(set(long)) == len(long)
        else [f"{row:06d}-{PurePosixPath(n).stem}.png" for row, n in enumerate(names)]
    )
