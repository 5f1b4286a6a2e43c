"""The training loop of ReVQ, top to bottom (paper, sections 3.2-3.3 and Algorithm 1)."""

import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from revq.config import RunConfig, to_dict
from revq.data.atomic import check_writable_folder
from revq.data.latents import LatentStore
from revq.errors import InputError
from revq.eval.evaluate import CodeUse, LatentErrors, latent_errors, summarize_count
from revq.model.normalizer import LatentStatistics
from revq.model.revq import MODEL_FILES, LatentOrigin, ReVQ, save_model
from revq.progress import progress_bar
from revq.train.state import RunState, derived_seed, generator
from revq.train.track import Tracker


class TrainResult(NamedTuple):
    """What `train` returns."""

    model: ReVQ
    """The trained model, in eval mode; also saved in ``out/model``."""
    steps: int
    """Optimizer steps of the whole run."""
    last_epoch: CodeUse
    """Code use counted in the steps of the last epoch, while the optimizer still changed the codes.

    `revq.eval.code_use` measures the final model.
    """
    validation: LatentErrors | None
    """Errors of the final model; None without a validation store."""


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

    A run may be killed at any moment.  Called again with the same arguments, `train` resumes from the last checkpoint
    and ends with the same weights, bit for bit, on the same CPU with the same number of threads: every random number
    comes from a generator seeded by (seed, epoch, purpose), and checkpoints are replaced in one step.  Called again
    after the end, it returns the same model.

    Each epoch counts how often each code is chosen; at its end the reset (Eq. 2) moves the codes that were never chosen
    next to used ones.  The last epoch has no reset, because no training follows; ``quantizer.count`` of the returned
    model holds the counts of the last epoch.

    Args:
        config: the run (see `revq.recipes`).
        store: latents to train on.  A store smaller than a batch is one batch; otherwise a last partial batch is dropped.
        out: folder of the run.
        validation: latents on which the errors before and after the rectifier (`LatentErrors`) are measured after each
            epoch; training does not depend on them.
        device: where to train.
        log_every: steps between two records of the log.
        progress: show a bar.

    Raises:
        InputError: if the configuration is invalid; if the latents of the store do not have its ``latent_shape``, or
            some are not finite; if ``init="data"`` and the store has fewer than K vectors per codebook (one latent has
            T / G of them); if ``out`` holds another run; if training diverges.
    """
    config.validate()
    options, out, device = config.train, Path(out), torch.device(device)
    _check(config, store, out, validation, log_every)
    batch_size = min(options.batch_size, len(store))
    steps_per_epoch = len(store) // batch_size

    # The model and its optimizer.  Only the rectifier has weight decay, and its learning rate is lower.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(options.seed, 0, "modules"))
        model = ReVQ(config.model).to(device)
    codebook, rectifier = model.quantizer.codebook, list(model.rectifier.parameters())
    groups = [
        {"params": [codebook], "weight_decay": 0.0},
        {"params": rectifier, "weight_decay": options.rectifier_weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)

    # The run starts here, or where the last checkpoint was written.
    about = json.dumps([to_dict(config), store.fingerprint, validation and validation.fingerprint])
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        run = RunState.load(checkpoint, about, model, optimizer)
    else:
        run = RunState()
        _initialize(model, config, store, device)
    run.sums = run.sums.to(device)

    with (
        Tracker(out / "metrics.jsonl", step=run.step) as log,
        progress_bar("train", "step", options.epochs * steps_per_epoch, done=run.step, show=progress) as bar,
    ):
        clock = time.perf_counter()
        while run.epoch < options.epochs:
            lr = options.learning_rate * options.lr_floor ** (run.epoch / options.epochs)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.param_groups[1]["lr"] = lr * options.rectifier_lr_ratio
            order = torch.randperm(len(store), generator=generator(options.seed, run.epoch, "order"))

            model.train()
            while run.cursor < steps_per_epoch:
                rows = order[run.cursor * batch_size : (run.cursor + 1) * batch_size]
                latents = store.rows(rows).to(device)  # [B, C, h, w]

                # "separate": one loss trains the codebook, one the rectifier.  "joint" (Eq. 4): one trains both.
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

                run.cursor, run.step = run.cursor + 1, run.step + 1
                losses = torch.stack([result.quantizer_loss, result.rectifier_loss]).detach()
                run.sums += losses
                bar.update()
                if run.step % log_every == 0:
                    quantizer_loss, rectifier_loss = losses.tolist()
                    log.log(
                        kind="step",
                        epoch=run.epoch,
                        step=run.step,
                        quantizer_loss=quantizer_loss,
                        rectifier_loss=rectifier_loss,
                        lr=lr,
                        seconds=time.perf_counter() - clock,
                    )
                inside_epoch = run.cursor < steps_per_epoch
                if options.checkpoint_every and run.step % options.checkpoint_every == 0 and inside_epoch:
                    run.save(checkpoint, about, model, optimizer)

            # The end of an epoch: move the codes that were never chosen, and clear their optimizer state.
            run.last, moved_codes = summarize_count(model.quantizer.count), 0
            if run.epoch + 1 < options.epochs:
                if options.reset:
                    moved = model.quantizer.reset_(  # [G, K]
                        noise=options.reset_noise,
                        max_fraction=options.reset_max_fraction,
                        pairing=options.reset_pairing,
                        generator=generator(options.seed, run.epoch, "reset", device),
                    )
                    moved_codes = int(moved.sum())
                    optimizer.state[codebook]["exp_avg"][moved] = 0
                    optimizer.state[codebook]["exp_avg_sq"][moved] = 0
                model.quantizer.count.zero_()

            quantizer_loss, rectifier_loss = (run.sums / run.cursor).tolist()
            if not math.isfinite(quantizer_loss + rectifier_loss):
                raise InputError(
                    f"learning_rate: training diverged in epoch {run.epoch}, "
                    f"expected a rate below {options.learning_rate}"
                )
            run.errors = latent_errors(model, validation) if validation is not None else None
            log.log(
                kind="epoch",
                epoch=run.epoch,
                step=run.step,
                quantizer_loss=quantizer_loss,
                rectifier_loss=rectifier_loss,
                lr=lr,
                **run.last._asdict(),
                moved_codes=moved_codes,
                validation_quantized=run.errors and run.errors.quantized,
                validation_rectified=run.errors and run.errors.rectified,
                seconds=time.perf_counter() - clock,
            )
            held_out = f", held-out {run.errors.quantized:.4f} -> {run.errors.rectified:.4f}" if run.errors else ""
            losses_text = f"training {quantizer_loss:.4f} -> {rectifier_loss:.4f}"
            bar.set_postfix_str(f"epoch {run.epoch + 1}, {losses_text}{held_out}")
            run.epoch, run.cursor, run.sums = run.epoch + 1, 0, torch.zeros_like(run.sums)
            run.save(checkpoint, about, model, optimizer)

    model.eval()
    # The folder names the VAE of the latents, so that `revq.Tokenizer.from_pretrained` can load both.
    save_model(model, out / "model", LatentOrigin(store.plan.vae, store.plan.vae_fingerprint, store.plan.image_size))
    assert run.last is not None  # for the type checker: a run has at least one epoch
    return TrainResult(model, run.step, run.last, run.errors)


def _check(config: RunConfig, store: LatentStore, out: Path, validation: LatentStore | None, log_every: int) -> None:
    """Check the inputs of `train` before any work is done."""
    model = config.model
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder to write the run to, found a file")
    check_writable_folder(out / "model", MODEL_FILES, keep_others=True)
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


def _initialize(model: ReVQ, config: RunConfig, store: LatentStore, device: torch.device) -> None:
    """Fit the normalizer to the whole store (section 4.1) and initialize the codebooks."""
    statistics = LatentStatistics()
    for latents in store.batches(1024):
        statistics.update(latents)
    model.normalizer.fit_(statistics)
    if config.train.init == "data":
        # The codes start at K vectors of a sample.  At least K latents, or the whole store, hold K vectors per codebook
        # (see _check); no more than max(K, 4096) latents are sampled, so that they fit in memory.
        samples = min(len(store), max(config.model.num_codes, 4096))
        order = torch.randperm(len(store), generator=generator(config.train.seed, 0, "init samples"))
        latents = store.rows(order[:samples].sort().values).to(device)
        model.quantizer.initialize_(
            model.normalizer.normalize(latents), generator=generator(config.train.seed, 0, "init codes")
        )
