"""Images to tokens and back: a ReVQ model together with its VAE, for tensors, image files and token files."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revq.data.atomic import atomic_folder, link_or_copy
from revq.data.images import SUFFIXES, NamedFile, center_crop, load_image, to_pil, to_tensor
from revq.data.latents import LatentStore
from revq.data.tokens import load_tokens, save_tokens
from revq.data.vae import FrozenVAE, load_vae
from revq.errors import InputError
from revq.model.revq import TOKENIZER, LatentOrigin, ReVQ, model_file, read_origin, save_model
from revq.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

_NAME = re.compile(f"(.+?)(?:({'|'.join(map(re.escape, sorted(SUFFIXES)))})(\\.[0-9]+)?)?", re.IGNORECASE | re.DOTALL)
"""Of a sample: stem, kind of image, and crop as `tokenize_store` writes it."""
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
            InputError: if the folder holds files that do not belong to a model folder.
        """
        save_model(self.model, folder, LatentOrigin(self.vae.name, self.vae.fingerprint, self.image_size))

    def encode(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """Tokens int64 ``[B, T]`` of images.

        Args:
            images: float ``[B, 3, image_size, image_size]`` in [-1, 1], or PIL images of any size, which are center-cropped.

        Raises:
            InputError: for a tensor of another shape or dtype, or no image.
        """
        return self.model.encode_latents(self.latents(images).to(self.model.device))

    def build_index(self, num_images: int) -> bool:
        """Before `encode` is called on many images: build a search tree if that saves time (`ReVQ.build_index`)."""
        return self.model.build_index(num_images)

    def latents(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """The VAE's latents float32 ``[B, C, h, w]`` of images as for `encode`."""
        return self.vae.encode(self._batch(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Images float32 ``[B, 3, image_size, image_size]`` in [-1, 1] of tokens ``[B, T]``.

        The same batch of tokens gives the same bits on one machine with one number of threads.

        Raises:
            InputError: for tokens of another shape or dtype, or out of range.
        """
        return self.vae.decode(self.model.decode_tokens(indices))

    def reconstruct(self, images: "Tensor | Sequence[Image]") -> Tensor:
        """``decode(encode(images))``."""
        return self.decode(self.encode(images))

    def _batch(self, images: "Tensor | Sequence[Image]") -> Tensor:
        if not isinstance(images, Tensor):
            return to_tensor([center_crop(image, self.image_size) for image in images])
        expected = (3, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(f"images: expected shape [B, {', '.join(map(str, expected))}], got {list(images.shape)}")
        return images


def tokenize_files(
    tokenizer: Tokenizer, files: Sequence[NamedFile], out: str | Path, *, batch_size: int = 16, progress: bool = True
) -> tuple[int, int]:
    """Write the tokens of images as a token file (see `revq.data.tokens`), atomically; returns (images, tokens per image).

    Raises:
        InputError: for a missing or damaged image.
    """
    _check_batch_size(batch_size)

    def latents() -> Iterator[Tensor]:
        for start in range(0, len(files), batch_size):
            yield tokenizer.latents([load_image(file.path) for file in files[start : start + batch_size]])

    return _tokenize(tokenizer.model, latents(), [file.name for file in files], out, progress)


def tokenize_store(model: ReVQ, store: LatentStore, out: str | Path, *, progress: bool = True) -> tuple[int, int]:
    """Write the tokens of stored latents as a token file, atomically; returns (latents, tokens per latent).

    A latent has the name of its image, followed by the number of the crop if an image has several.

    Raises:
        InputError: if the latents do not have the model's shape.
    """
    sources, crops = store.plan.sources, store.plan.crops
    names = [f"{source}.{crop}" for source in sources for crop in range(crops)] if crops > 1 else list(sources)
    return _tokenize(model, store.batches(_LATENTS_PER_SEARCH), names, out, progress)


def detokenize_file(
    tokenizer: Tokenizer,
    path: str | Path,
    out: str | Path,
    *,
    batch_size: int = 16,
    progress: bool = True,
    overwrite: bool = False,
) -> int:
    """Write the images of a token file as PNGs into the folder ``out``, whole or not at all; returns how many.

    Args:
        tokenizer: of the model that made the tokens.
        path: the token file.
        out: folder of the images; new or empty, unless ``overwrite``.
        batch_size: images per call of the decoder.
        progress: show a bar.
        overwrite: replace files of the same names in ``out``, and keep all others.

    Raises:
        InputError: if the file is missing, damaged or of another model, or ``out`` holds files without ``overwrite``.
    """
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
    names = _image_names(file.names, path)
    with (
        atomic_folder(out, frozenset(), keep_others=overwrite) as folder,
        progress_bar("decode", "image", len(names), show=progress) as bar,
    ):
        for start in range(0, len(names), batch_size):
            images = to_pil(tokenizer.decode(file.indices[start : start + batch_size]))
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
    model: ReVQ, batches: Iterable[Tensor], names: list[str], out: str | Path, progress: bool
) -> tuple[int, int]:
    """Write the tokens of latents ``[B, C, h, w]`` as a token file; the batches hold one latent per name."""
    model.build_index(len(names))
    tokens_per_sample = model.config.num_tokens
    parts: list[Tensor] = []
    pending: list[Tensor] = []

    def search_pending() -> None:
        if pending:
            parts.append(model.encode_latents(torch.cat(pending).to(model.device)).cpu())
            bar.update(len(parts[-1]) * tokens_per_sample)
            pending.clear()

    with progress_bar("tokenize", "token", len(names) * tokens_per_sample, show=progress, scale=True) as bar:
        for latents in batches:
            pending.append(latents)
            if sum(map(len, pending)) >= _LATENTS_PER_SEARCH:
                search_pending()
        search_pending()
    indices = torch.cat(parts)
    save_tokens(out, indices, model.config.num_codes, names=names, model=token_fingerprint(model))
    return indices.shape[0], indices.shape[1]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: expected a number >= 1, got {batch_size}")


def _image_names(names: Sequence[str], source: str | Path) -> list[str]:
    """Names of the PNGs, inside the output folder and all different, also where upper and lower case are the same.

    ``a.jpg`` becomes ``a.png``, and crop 3 of it ``a-3.png``.  Images whose names would meet keep their kind
    (``a-jpg.png``); names that still meet, or cannot be names of files, become numbers.
    """
    for name in names:
        path = PurePosixPath(name)
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise InputError(f"{source}: expected names of files inside a folder, got {_short(name)}")
    matches = [match.groups(default="") for match in map(_NAME.fullmatch, names) if match]
    for keep_kind in (False, True):
        out = [
            f"{stem}{kind.replace('.', '-') if keep_kind else ''}{crop.replace('.', '-')}.png"
            for stem, kind, crop in matches
        ]
        if _can_be_files(out):
            return out
    return [f"{row:06d}.png" for row in range(len(names))]


def _can_be_files(names: Sequence[str]) -> bool:
    """Whether these paths can all be files of one folder: each possible, all different, and none a folder of another."""
    paths = {PurePosixPath(name.casefold()) for name in names}
    folders = {parent for path in paths for parent in path.parents}
    possible = all(
        "\0" not in name
        and not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)
        and all(len(part.encode()) <= 250 for part in name.split("/"))
        for name in names
    )
    return possible and len(paths) == len(names) and not paths & folders


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:57] + "...")
