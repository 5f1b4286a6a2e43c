"""The training loop of ReVQ, top to bottom (paper, sections 3.2-3.3 and Algorithm 1)."""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from revq.config import RunConfig, to_dict
from revq.data.atomic_folder import check_replaceable
from revq.data.latents import LatentStore
from revq.errors import InputError
from revq.eval.evaluate import CodeUse, LatentErrors, latent_errors, summarize_count
from revq.model.files import MODEL_FILES, TOKENIZER, model_folder, write_model
from revq.model.normalizer import LatentStatistics
from revq.model.revq import ReVQ
from revq.progress import progress_bar
from revq.train.checkpoint import load_checkpoint, save_checkpoint
from revq.train.seeds import derived_seed, generator
from revq.train.track import Tracker


class TrainResult(NamedTuple):
    """What `train` returns."""

    model: ReVQ
    """In evaluation mode; also saved in ``out/model``."""
    steps: int
    """Optimizer steps of the whole run."""
    last_epoch: CodeUse
    """Code use as counted while the codes of the last epoch still moved; `revq.eval.evaluate.code_use` judges the end."""
    validation: LatentErrors | None
    """Of the final model; None without a validation store."""


def train(
    config: RunConfig,
    store: LatentStore,
    out: str | Path,
    *,
    validation: LatentStore | None = None,
    device: str | torch.device = "cpu",
    log_every: int = 10,
    progress: bool = True,
) -> TrainResult:
    """Train a ReVQ model on the latents of ``store`` and write ``out/model``, ``out/metrics.jsonl``, ``out/checkpoint.pt``.

    Killed at any moment and called again with the same arguments, it goes on from its last checkpoint and ends with the
    same weights, bit for bit, at the same number of threads: every random number comes from a generator seeded by (seed,
    epoch, purpose), and checkpoints are replaced in one step.  Called again after its end, it returns the same model.

    One pass counts how often each code is chosen; at its end the reset (Eq. 2) moves those never chosen next to busy
    ones.  After the last epoch nothing is reset, as no training would follow: the model's ``quantizer.count`` is then
    what the last epoch counted.

    Args:
        config: the run (see `revq.recipes`).
        store: latents to train on; fewer than a batch make one smaller batch, else a last partial batch is dropped.
        out: folder of the run.
        validation: latents for the two errors after each epoch; they influence nothing.
        device: where to train.
        log_every: steps between two records of the log.
        progress: show a bar.

    Raises:
        InputError: if the store does not fit the configuration, holds too few latents for its codebooks, or numbers
            that are not finite; if ``out`` holds another run; if training diverges.
    """
    options, out, device = config.train, Path(out), torch.device(device)
    _check(config, store, out, validation, log_every)
    batch_size = min(options.batch_size, len(store))
    steps_per_epoch = len(store) // batch_size

    # The model and its optimizer: the codebook learns fast and without weight decay, the rectifier at 5 % of its rate.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(options.seed, 0, "modules"))
        model = ReVQ(config.model).to(device)
    codebook, rectifier = model.quantizer.codebook, list(model.rectifier.parameters())
    groups = [
        {"params": [codebook], "weight_decay": 0.0},
        {"params": rectifier, "weight_decay": options.rectifier_weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)

    # Where the run stands: at its start, or where the last checkpoint says.
    about = json.dumps([to_dict(config), store.fingerprint, validation and validation.fingerprint])
    epoch = cursor = step = 0  # cursor: steps done in this epoch
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the two losses in this epoch
    last: CodeUse | None = None
    errors: LatentErrors | None = None
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = _load(checkpoint, about)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, cursor, step, sums = state["epoch"], state["cursor"], state["step"], state["sums"].to(device)
        last = CodeUse(*state["last"]) if state["last"] else None
        errors = LatentErrors(*state["errors"]) if state["errors"] else None
    else:
        _start_model(model, config, store, device)

    def save() -> None:
        state = {"about": about, "epoch": epoch, "cursor": cursor, "step": step, "sums": sums, "last": last and [*last]}
        state |= {"errors": errors and [*errors], "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, state)

    with (
        Tracker(out / "metrics.jsonl", step=step) as log,
        progress_bar("train", "step", options.epochs * steps_per_epoch, done=step, show=progress) as bar,
    ):
        clock = time.perf_counter()
        while epoch < options.epochs:
            lr = options.learning_rate * options.lr_floor ** (epoch / options.epochs)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.param_groups[1]["lr"] = lr * options.rectifier_lr_ratio
            order = torch.randperm(len(store), generator=generator(options.seed, epoch, "order"))

            model.train()
            while cursor < steps_per_epoch:
                latents = store.rows(order[cursor * batch_size : (cursor + 1) * batch_size]).to(device)  # [B, C, h, w]

                # Two losses: the first moves the codes, the second the rectifier.  Jointly (Eq. 4) the second moves both.
                result = model(latents, joint=options.loss == "joint")
                loss = result.rectifier_loss
                if options.loss == "separate":
                    loss = loss + result.quantizer_loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if options.clip_norm:
                    torch.nn.utils.clip_grad_norm_([codebook], options.clip_norm)
                    torch.nn.utils.clip_grad_norm_(rectifier, options.clip_norm)
                optimizer.step()

                cursor, step = cursor + 1, step + 1
                losses = torch.stack([result.quantizer_loss, result.rectifier_loss]).detach()
                sums += losses
                bar.update()
                if step % log_every == 0:
                    named = dict(zip(("quantizer_loss", "rectifier_loss"), losses.tolist(), strict=True))
                    log.log(kind="step", epoch=epoch, step=step, **named, lr=lr, seconds=time.perf_counter() - clock)
                if options.checkpoint_every and step % options.checkpoint_every == 0 and cursor < steps_per_epoch:
                    save()

            # The end of an epoch: move the codes that nothing chose, and let their optimizer state start anew.
            last, moved_codes = summarize_count(model.quantizer.count), 0
            if epoch + 1 < options.epochs:
                if options.reset:
                    moved = model.quantizer.reset_(  # [G, K]
                        noise=options.reset_noise,
                        max_fraction=options.reset_max_fraction,
                        pairing=options.reset_pairing,
                        generator=generator(options.seed, epoch, "reset", device),
                    )
                    moved_codes = int(moved.sum())
                    optimizer.state[codebook]["exp_avg"][moved] = 0
                    optimizer.state[codebook]["exp_avg_sq"][moved] = 0
                model.quantizer.count.zero_()

            quantizer_loss, rectifier_loss = (sums / cursor).tolist()
            if not math.isfinite(quantizer_loss + rectifier_loss):
                raise InputError(
                    f"learning_rate: training diverged in epoch {epoch}, expected a rate below {options.learning_rate}"
                )
            errors = latent_errors(model, validation) if validation is not None else None
            log.log(
                kind="epoch",
                epoch=epoch,
                step=step,
                quantizer_loss=quantizer_loss,
                rectifier_loss=rectifier_loss,
                lr=lr,
                **last._asdict(),
                moved_codes=moved_codes,
                validation_quantized=errors and errors.quantized,
                validation_rectified=errors and errors.rectified,
                seconds=time.perf_counter() - clock,
            )
            held_out = f", held-out {errors.quantized:.4f} -> {errors.rectified:.4f}" if errors else ""
            bar.set_postfix_str(f"epoch {epoch + 1}, training {quantizer_loss:.4f} -> {rectifier_loss:.4f}{held_out}")
            epoch, cursor, sums = epoch + 1, 0, torch.zeros_like(sums)
            save()

    model.eval()
    _save_model(model, store, out / "model")
    return TrainResult(model, step, last, errors)


def _check(config: RunConfig, store: LatentStore, out: Path, validation: LatentStore | None, log_every: int) -> None:
    """The inputs of `train` that can be judged before anything is done."""
    model = config.model
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder to write the run to, found a file")
    check_replaceable(out / "model", MODEL_FILES)
    for name, latents in (("store", store), ("validation", validation)):
        if latents is not None and tuple(latents.shape) != model.latent_shape:
            raise InputError(f"{name}: expected latents {model.latent_shape} as latent_shape says, got {latents.shape}")
    if validation is not None and validation.plan.vae_fingerprint != store.plan.vae_fingerprint:
        raise InputError(
            f"validation: its latents are of another VAE ({validation.plan.vae}) than the store's ({store.plan.vae})"
        )
    vectors = len(store) * model.num_tokens // model.groups
    if config.train.init == "data" and vectors < model.num_codes:
        raise InputError(
            f"num_codes: K={model.num_codes} codes start as distinct training vectors, but {store.folder} has only "
            f"{vectors} per codebook; give more latents, fewer codes or init=normal"
        )
    if log_every < 1:
        raise InputError(f"log_every: expected a number >= 1, got {log_every}")


def _start_model(model: ReVQ, config: RunConfig, store: LatentStore, device: torch.device) -> None:
    """Fit the normalizer to the whole store (section 4.1) and place the first codes."""
    statistics = LatentStatistics()
    for latents in store.batches(1024):
        statistics.update(latents)
    model.normalizer.fit_(statistics)
    if config.train.init == "data":
        samples = min(
            len(store), max(config.model.num_codes, 4096)
        )  # enough for K rows per codebook, and for the memory
        order = torch.randperm(len(store), generator=generator(config.train.seed, 0, "init samples"))
        latents = store.rows(order[:samples].sort().values).to(device)
        model.quantizer.initialize_(
            model.normalizer.normalize(latents), generator=generator(config.train.seed, 0, "init codes")
        )


def _load(path: Path, about: str) -> dict:
    state = load_checkpoint(path)
    missing = {"about", "epoch", "cursor", "step", "sums", "last", "errors", "model", "optimizer"} - state.keys()
    if missing:
        raise InputError(f"{path}: not a training checkpoint, it lacks {', '.join(sorted(missing))}")
    if state["about"] != about:
        raise InputError(f"{path}: is of a run with another configuration or other latents; give another output folder")
    return state


def _save_model(model: ReVQ, store: LatentStore, folder: Path) -> None:
    """The model folder, with the name of the VAE that `revq.Tokenizer.from_pretrained` joins it to."""
    about = {"vae": store.plan.vae, "vae_fingerprint": store.plan.vae_fingerprint, "image_size": store.plan.image_size}
    with model_folder(folder) as new:
        write_model(model, new)
        (new / TOKENIZER).write_text(json.dumps(about, indent=2) + "\n")
