"""`revq info PATH` says what PATH is, with its shapes and counts (T, K, d, parameters); `revq verify PATH` reads all of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from revq.config import ModelConfig
from revq.data.json_text import read_json
from revq.errors import InputError
from revq.eval.report import pairs

if TYPE_CHECKING:
    from torch import Tensor


def describe(path: str | Path) -> str:
    """Describe a model folder, a run's folder, a latent store, a token file or a VAE's folder in a few lines.

    The kind of a folder follows from its files; a VAE and a model differ in the content of ``config.json``.

    Raises:
        InputError: if it is missing, damaged, or none of these.
    """
    path = Path(path)
    if path.is_file():
        return pairs(_token_file(path))
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if (path / "index.json").is_file():
        return pairs(_latent_store(path))
    if (path / "checkpoint.pt").is_file():  # first, because the folder of a run may hold its model, too
        return pairs(_run(path))
    if (path / "config.json").is_file():
        is_vae = str(read_json(path / "config.json").get("_class_name", "")).startswith("Autoencoder")
        return pairs(_vae(path) if is_vae else _model(path))
    raise InputError(f"{path}: expected a model, a run, a latent store, a token file or a VAE, found none of them")


def verify(path: str | Path) -> str:
    """Compare every byte of a latent store, token file, model folder or run with its checksums; returns what it was.

    Raises:
        InputError: naming the first file that is missing or damaged; if it is none of these.
    """
    from revq.data.latents import LatentStore
    from revq.data.tokens import load_tokens
    from revq.model.revq import CONFIG, TOKENIZER, WEIGHTS, ReVQ, model_folder, read_origin
    from revq.train.state import load_checkpoint

    path = Path(path)
    if path.is_file():
        load_tokens(path).verify()
        return "token file"
    if (path / "index.json").is_file():
        LatentStore(path).verify()
        return "latent store"
    parts = []
    if (path / "checkpoint.pt").is_file():
        load_checkpoint(path / "checkpoint.pt")
        parts.append("checkpoint")
    for folder in dict.fromkeys((path, model_folder(path))):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            ReVQ.from_pretrained(folder)
            if (folder / TOKENIZER).is_file():
                read_origin(folder / TOKENIZER)
            parts.append("model")
    if not parts:
        raise InputError(f"{path}: expected a latent store, a token file, a model or a run, found none of them")
    return " and ".join(parts)


def _token_file(path: Path) -> list[tuple[str, str]]:
    from revq.data.tokens import bits_per_index, load_tokens

    file = load_tokens(path)
    samples, tokens = len(file), file.num_tokens
    return [
        ("token file", str(path)),
        ("samples", f"{samples}"),
        ("tokens per sample", f"T = {tokens}"),
        ("codes per codebook", f"K = {file.num_codes}"),
        ("bits", f"{bits_per_index(file.num_codes)} per token, {file.bits_per_sample} per sample"),
        ("model", file.model or "unknown"),
    ]


def _latent_store(path: Path) -> list[tuple[str, str]]:
    from revq.data.latents import LatentStore

    store = LatentStore(path)
    plan = store.plan
    crops = f"{plan.crops} random crops each (seed {plan.seed})" if plan.crops else "the center crop of each"
    return [
        ("latent store", str(path)),
        ("latents", f"{len(store)} of (C, h, w) = {store.shape}, {plan.dtype}"),
        ("images", f"{len(store.names)}, {crops}, {plan.image_size} px, {len(store.skipped)} skipped"),
        ("VAE", f"{plan.vae}, weights {plan.vae_fingerprint[:12] or 'unknown'}"),
        ("fingerprint", store.fingerprint[:12]),
    ]


def _vae(path: Path) -> list[tuple[str, str]]:
    from revq.data.vae import load_vae

    vae = load_vae(path)
    return [
        ("VAE", str(path)),
        ("class", vae.class_name),
        ("latent channels", f"C = {vae.latent_channels}"),
        ("downscale", f"{vae.downscale} pixels per latent position"),
        ("parameters", _count(vae.vae.parameters())),
        ("weights", vae.fingerprint[:12]),
    ]


def _model(path: Path) -> list[tuple[str, str]]:
    from revq.eval.evaluate import summarize_count
    from revq.model.revq import TOKENIZER, ReVQ, read_origin

    model = ReVQ.from_pretrained(path)
    facts = [("ReVQ model", str(path)), *shape_facts(model.config)]
    facts.append(("rectifier parameters", _count(model.rectifier.parameters())))
    if int(model.quantizer.count.sum()):
        use = summarize_count(model.quantizer.count)
        facts.append(
            ("utilization", f"{use.utilization:.2%} in the last training epoch, perplexity {use.perplexity:.1f}")
        )
    if (path / TOKENIZER).is_file():
        origin = read_origin(path / TOKENIZER)
        facts.append(("VAE", f"{origin.vae}, weights {origin.vae_fingerprint[:12]}"))
        facts.append(("image size", f"{origin.image_size} px"))
    return facts


def _run(path: Path) -> list[tuple[str, str]]:
    from revq.model.revq import CONFIG, model_folder
    from revq.train.state import load_checkpoint, read_about

    checkpoint = path / "checkpoint.pt"
    state = load_checkpoint(checkpoint)
    config, _, _ = read_about(state, checkpoint)
    train = config.get("train")
    epochs = train.get("epochs") if isinstance(train, dict) else None
    if not all(type(number) is int for number in (epochs, state.get("epoch"), state.get("step"))):
        raise InputError(f"{checkpoint}: not a training checkpoint")
    facts = [
        ("training run", str(path)),
        ("recipe", str(config.get("name"))),
        ("checkpoint", f"after {state['epoch']} of {epochs} epochs, step {state['step']}"),
    ]
    finished = (model_folder(path) / CONFIG).is_file()
    return facts + (_model(model_folder(path)) if finished else [("model", "not finished yet")])


def shape_facts(config: ModelConfig) -> list[tuple[str, str]]:
    """Pairs (label, value) for the lines that describe a `ModelConfig`."""
    rectifier = config.rectifier
    return [
        ("latent", f"(C, h, w) = {config.latent_shape}"),
        ("tokens per sample", f"T = {config.num_tokens} of d = {config.code_dim}, {config.split} split"),
        ("codebooks", f"G = {config.groups}"),
        ("codes per codebook", f"K = {config.num_codes}"),
        ("bits per sample", f"{config.bits_per_sample}"),
        ("rectifier", f"{rectifier.kind}, width {rectifier.width}, {rectifier.layers} layers, {rectifier.form}"),
    ]


def _count(parameters: "Iterable[Tensor]") -> str:
    """The number of all elements of the parameters, as text such as 1,234,567."""
    return f"{sum(parameter.numel() for parameter in parameters):,}"
