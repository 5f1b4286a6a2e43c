"""The frozen image VAE of a ReVQ model: one of three diffusers autoencoder classes, with latents in raw units."""

import hashlib
import threading
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from revq.assets import vae_folder
from revq.data.foreign import Failure, attempt
from revq.data.hub import find_folder, hub_folder, one_line
from revq.data.json_text import read_json
from revq.errors import InputError

CLASSES = ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny")
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"


class FrozenVAE:
    """An autoencoder in eval mode and float32, without gradients.

    Latents are in the VAE's raw units: the output of its encoder and the input of its decoder.  ``scaling_factor`` and
    ``shift_factor``, which diffusion pipelines apply between the two, are not applied; `Normalizer` replaces them.

    Args:
        vae: a diffusers autoencoder; it is used itself, not a copy, and becomes float32.
        name: its name.

    Attributes:
        vae: the autoencoder.
        name: "embedded", the absolute path of a folder, or a hub id; `load_vae` accepts it.  Of a module, the name that
            diffusers loaded it by, else its class.
        class_name: diffusers' class, one of `CLASSES`.
        downscale: image pixels per latent position, along a side.
        latent_channels: C.
        device: where the weights are.
    """

    def __init__(self, vae: Any, name: str) -> None:
        self.name = name
        self.class_name = _class_name(vae)
        if self.class_name not in CLASSES:
            raise InputError(f"{name}: expected a VAE of class {', '.join(CLASSES)}, got {self.class_name}")
        if any(weight.is_meta for weight in vae.parameters()):
            raise InputError(f"{name}: expected a VAE with weights, got one on the meta device")
        config = vae.config
        if config.in_channels != 3:
            raise InputError(f"{name}: expected a VAE of RGB images (3 channels), got {config.in_channels} channels")
        self.vae = vae.eval().float().requires_grad_(False)
        self.latent_channels: int = config.latent_channels
        blocks = config.block_out_channels if self.class_name == "AutoencoderKL" else config.encoder_block_out_channels
        self.downscale = 2 ** (len(blocks) - 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where `encode` and `decode` compute."""
        return next(self.vae.parameters()).device

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the float32 weights with their names and shapes, 64 hex digits; independent of the file format."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a square image.

        Raises:
            InputError: if ``image_size`` is not a positive multiple of ``downscale``.
        """
        if image_size < 1 or image_size % self.downscale:
            raise InputError(f"image_size: expected a multiple of the VAE's {self.downscale}, got {image_size}")
        side = image_size // self.downscale
        return (self.latent_channels, side, side)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to latents; for `AutoencoderKL`, the mode of the posterior.

        Results depend on batch composition in the last bits.  To compare tokens exactly, start from stored latents.

        Args:
            images: float ``[B, 3, H, W]`` in [-1, 1], H and W multiples of ``downscale``.

        Returns:
            float32 ``[B, C, H/downscale, W/downscale]``.

        Raises:
            InputError: for another shape or dtype.
        """
        self._check_images(images)
        out = self.vae.encode(images.to(self.device, torch.float32))
        if self.class_name == "AutoencoderKL":
            return out.latent_dist.mode()
        return out.latent if self.class_name == "AutoencoderDC" else out.latents

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"images: expected float [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        if images.shape[2] % self.downscale or images.shape[3] % self.downscale:
            raise InputError(
                f"images: expected height and width to be multiples of {self.downscale}, got {tuple(images.shape[2:])}"
            )

    @torch.no_grad()
    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The means and the log-variances of the posterior, both as `encode` returns latents.

        Raises:
            InputError: if the VAE has no posterior; for another shape or dtype.
        """
        if self.class_name != "AutoencoderKL":
            raise InputError(f"log_variances: expected a VAE with a posterior (AutoencoderKL), got {self.class_name}")
        self._check_images(images)
        posterior = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents float ``[B, C, h, w]`` to images float32 ``[B, 3, h*downscale, w*downscale]``, clamped to [-1, 1].

        Raises:
            InputError: for another shape or dtype.
        """
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels or not latents.is_floating_point():
            raise InputError(
                f"latents: expected float [B, {self.latent_channels}, h, w], got {latents.dtype} {tuple(latents.shape)}"
            )
        return self.vae.decode(latents.to(self.device, torch.float32)).sample.clamp(-1, 1)


def load_vae(
    name: "str | Path | FrozenVAE | torch.nn.Module" = "embedded",
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> FrozenVAE:
    """Load a VAE of the class that its config.json names; weights of any floating dtype are converted to float32.

    Args:
        name: "embedded" for the VAE that ships with revq, a folder, a hub id (``owner/model``,
            ``owner/model/subfolder``, each with ``@revision`` if wanted), a diffusers autoencoder, which is used itself,
            or a `FrozenVAE`, which is returned.
        revision: branch, tag or commit of a hub repository.
        device: where to put the weights; by default the CPU, and for a module where it is.

    Raises:
        InputError: if there is no such folder or hub id, its files are missing or damaged, its weights are not those of
            its config.json or not finite, or its class is not one of `CLASSES`.
    """
    if isinstance(name, FrozenVAE | torch.nn.Module):
        if revision is not None:
            raise InputError(f"revision: expected none for a {type(name).__name__}, got {revision}")
        vae = name if isinstance(name, FrozenVAE) else FrozenVAE(name, _name_of(name))
        if device is not None:
            vae.vae.to(device)
        return vae
    folder = _embedded_folder() if name == "embedded" else find_folder(name, "a VAE folder", inner=True)
    if folder is None:
        hub = hub_folder(str(name), revision)
        return FrozenVAE(_load(hub.fetch, str(hub)).to(device or "cpu"), str(hub))
    if revision is not None:
        raise InputError(f"revision: expected none for a folder, got {revision}")
    label = "embedded" if name == "embedded" else str(folder)
    return FrozenVAE(_load(partial(_local_file, folder, label), label).to(device or "cpu"), label)


def _embedded_folder() -> Path:
    return Path(vae_folder())


def _class_name(vae: Any) -> str:
    """diffusers' class, also of a subclass."""
    names = [kind.__name__ for kind in type(vae).__mro__ if kind.__module__.partition(".")[0] == "diffusers"]
    return next((name for name in names if name in CLASSES), type(vae).__name__)


def _name_of(module: torch.nn.Module) -> str:
    config = getattr(module, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str | Path) or not str(name):
        return type(module).__name__
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _local_file(folder: Path, label: str, filename: str) -> Path:
    path = folder / filename
    if path.is_file():
        return path
    if filename != CONFIG:
        raise InputError(f"{label}: expected the VAE's weights, {WEIGHTS}.safetensors, which are missing")
    inner = folder / "vae"
    hint = f"; try {inner}" if (inner / CONFIG).is_file() else ""
    raise InputError(f"{label}: expected a VAE folder with a config.json, which is missing{hint}")


def _load(find: Callable[[str], Path], label: str) -> torch.nn.Module:
    """The autoencoder whose files ``find`` gives by their names."""
    config_file = find(CONFIG)
    config = read_json(config_file)
    class_name = config.get("_class_name")
    if class_name not in CLASSES:
        raise InputError(f"{config_file}: expected _class_name to be one of {', '.join(CLASSES)}, got {class_name!r}")
    if config.get("quantization_config") is not None:
        raise InputError(f"{config_file}: expected weights of a floating dtype, got quantized ones")
    files = _weight_files(find)

    def load() -> Any:
        weights = _Weights(files)
        return _filled(_empty_vae(class_name, config, 10 * len(weights.shapes) + 1000), weights, label)

    vae = attempt(load)
    if not isinstance(vae, Failure):
        return vae
    if isinstance(vae.error, InputError):
        raise vae.error
    raise InputError(f"{label}: cannot load this {class_name} ({one_line(vae.error)})") from vae.error


def _weight_files(find: Callable[[str], Path]) -> list[Path]:
    """The files of the weights: of full precision before half, safetensors before pickled files, whole before split."""
    first_error = None
    for variant in ("", ".fp16", ".bf16"):
        for suffix in ("safetensors", "bin"):
            for name in (f"{WEIGHTS}{variant}.{suffix}", f"{WEIGHTS}.{suffix}.index{variant}.json"):
                try:
                    path = find(name)
                except InputError as error:
                    first_error = first_error or error
                    continue
                if not name.endswith(".json"):
                    return [path]
                parts = read_json(path).get("weight_map")
                if not isinstance(parts, dict) or not parts or not all(map(_plain_name, parts.values())):
                    raise InputError(f"{path}: expected a weight_map from tensors to files")
                return [find(part) for part in sorted(set(parts.values()))]
    assert first_error is not None
    raise first_error


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and Path(name).suffix in (".safetensors", ".bin")


class _Weights:
    """Tensors by name.  Shapes come first: a file of few bytes can claim, or expand to, tensors of any size."""

    def __init__(self, files: list[Path]) -> None:
        from safetensors import safe_open

        self.tensors: dict[str, Callable[[], Tensor]] = {}
        self.shapes: dict[str, list[int]] = {}
        for file in files:
            if file.suffix == ".safetensors":
                opened = safe_open(file, "pt")
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    self.tensors[name] = partial(opened.get_tensor, name)
                    self.shapes[name] = opened.get_slice(name).get_shape()
            else:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
                loaded = loaded.get("state_dict", loaded)
                for name, tensor in loaded.items():
                    if not isinstance(tensor, Tensor):
                        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
                    self.tensors[name] = partial(_itself, tensor)
                    self.shapes[name] = list(tensor.shape)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _empty_vae(class_name: str, config: dict[str, Any], most_modules: int) -> Any:
    """The autoencoder without memory for its weights.

    Args:
        most_modules: more are refused, because a configuration can describe any number (``layers_per_block: 10**9``).
    """
    import diffusers
    from torch.nn.modules.module import register_module_module_registration_hook

    thread, count = threading.get_ident(), 0

    def limit(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most_modules:
            raise ValueError("config.json describes far more layers than the weights are of")

    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # about attributes of other versions
    hook = register_module_module_registration_hook(limit)
    try:
        with torch.device("meta"):
            return getattr(diffusers, class_name).from_config(config)
    finally:
        hook.remove()
        diffusers.utils.logging.set_verbosity(verbosity)


def _filled(vae: Any, weights: _Weights, label: str) -> torch.nn.Module:
    """``vae`` with ``weights`` in float32; weights that it does not have are ignored."""
    expected = vae.state_dict()
    tensors: dict[str, Callable[[], Tensor]] = dict(weights.tensors)
    shapes = dict(weights.shapes)
    vae._fix_state_dict_keys_on_load(tensors)  # names of old versions of diffusers
    vae._fix_state_dict_keys_on_load(shapes)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(
            f"{label}: the weights lack {len(missing)} tensors of this {type(vae).__name__}: {missing[0]}, ..."
        )
    if unshared := [name for name, tensor in vae.named_buffers() if name not in expected and tensor.is_meta]:
        raise InputError(f"{label}: expected all buffers to be among the weights, {unshared[0]} is not")
    for name, tensor in expected.items():
        if shapes[name] != list(tensor.shape):
            raise ValueError(f"{name} has shape {shapes[name]}, config.json asks for {list(tensor.shape)}")
    state = {}
    for name in expected:
        tensor = tensors[name]()
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor of a floating dtype, got {tensor.dtype} {tensor.layout}")
        state[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not state[name].isfinite().all():
            raise InputError(f"{label}: the weights are damaged: {name} holds NaN or infinity")
    vae.load_state_dict(state, assign=True)
    return cast(torch.nn.Module, vae)
