"""The training loop of ReVQ, top to bottom (paper, sections 3.2-3.3 and Algorithm 1)."""

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from revq.config import RunConfig
from revq.data.atomic import check_writable_file, check_writable_folder, folder_lock
from revq.data.hub import one_line
from revq.data.latents import LatentStore
from revq.errors import InputError
from revq.eval.evaluate import CodeUse, LatentErrors, latent_errors, summarize_count
from revq.interrupt import Interrupted, signals_wait
from revq.model.normalizer import LatentStatistics
from revq.model.revq import MODEL_FILES, WEIGHTS, LatentOrigin, ReVQ, memory_bytes, model_folder, save_model
from revq.progress import progress_bar
from revq.train.state import RunState, about_run, derived_seed, first_not_finite, generator
from revq.train.track import Tracker

_LOSSES = ("quantizer_loss", "rectifier_loss")
_ERRORS = ("validation_quantized", "validation_rectified")


class TrainResult(NamedTuple):
    """What `train` returns."""

    model: ReVQ
    """The trained model, in eval mode; also saved in `revq.model.revq.model_folder` of the run."""
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
    overwrite: bool = False,
) -> TrainResult:
    """Train a ReVQ model on the latents of ``store`` and write ``out/model``, ``out/metrics.jsonl``, ``out/checkpoint.pt``.

    A run may be killed at any moment.  Called again with the same arguments, `train` resumes from the last checkpoint
    and ends with the same weights, bit for bit, on the same CPU with the same number of threads: every random number
    comes from a generator seeded by (seed, epoch, purpose), and checkpoints are replaced in one step.  Called again
    after the end, it returns the same model.  Called again with more epochs, finished or not, it goes on to their end;
    from the checkpoint on the learning rate follows the schedule of the new length, so the result is not that of a run
    that had this length from the start.

    Ctrl-C, SIGTERM and SIGHUP end the current step, or the current epoch after its last step, save a checkpoint and raise
    `revq.interrupt.Interrupted`; a second one stops at once.

    Every weight, statistic, moment of the optimizer, loss and validation error is finite in all that is saved: otherwise
    the call raises before it writes, and the checkpoint before stays.

    Each epoch counts how often each code is chosen; at its end the reset (Eq. 2) moves the codes that were never chosen
    next to used ones.  The last epoch has no reset, because no training follows, unless ``reset_last_epoch`` asks for it;
    ``quantizer.count`` of the returned model holds the counts of the last epoch, before its reset.

    Args:
        config: the run (see `revq.recipes`).
        store: latents to train on.  A store smaller than a batch is one batch; otherwise a last partial batch is dropped.
        out: folder of the run.
        validation: latents on which the errors before and after the rectifier (`LatentErrors`) are measured after each
            epoch; training does not depend on them, except for what ``count_validation`` counts.
        device: where to train.
        log_every: steps between two records of the log.
        progress: show a bar.
        overwrite: replace another run, or a damaged checkpoint, in ``out``.  This very run is resumed all the same.

    Raises:
        InputError: if the configuration is invalid, or too large for the device's memory; if the latents of the store do
            not have its ``latent_shape``, or some are not finite; if ``init="data"`` and the store has fewer than K
            vectors per codebook (one latent has T / G of them); if ``count_validation`` has nothing to count, or an ``mlp``
            rectifier would see batches of one latent; if ``out`` holds another run, or a model without its run, and
            ``overwrite`` is False; if another process writes to ``out``; if training diverges.
        revq.interrupt.Interrupted: after a signal.
    """
    config.validate()
    out, device = Path(out), torch.device(device)
    _check(config, store, out, validation, log_every, device, overwrite)
    run = RunState()
    with folder_lock(out), run.says_what_is_saved(out / "checkpoint.pt"):
        return _train(run, config, store, out, validation, device, log_every, progress, overwrite)


def _train(
    run: RunState,
    config: RunConfig,
    store: LatentStore,
    out: Path,
    validation: LatentStore | None,
    device: torch.device,
    log_every: int,
    progress: bool,
    overwrite: bool,
) -> TrainResult:
    """`train` after its checks."""
    options = config.train
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
    about = about_run(config, store.fingerprint, validation.fingerprint if validation is not None else None)
    checkpoint = out / "checkpoint.pt"
    if not run.resume(checkpoint, about, model, optimizer, overwrite=overwrite):
        _initialize(model, config, store, device)
    elif run.cursor == 0 and run.epoch == run.planned and run.epoch < options.epochs:
        # After its last epoch a run keeps the counts of that epoch; one that is extended goes on with new ones.
        model.quantizer.count.zero_()
        if validation is not None and options.count_validation:
            latent_errors(model, validation, count=model.quantizer.count)
    run.sums = run.sums.to(device, torch.float32 if device.type == "mps" else torch.float64)  # which MPS does not have

    with (
        Tracker(out / "metrics.jsonl", step=run.step) as log,
        progress_bar("train", "step", options.epochs * steps_per_epoch, done=run.step, show=progress) as bar,
        signals_wait() as stop,
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
                    _check_finite(run, checkpoint, _LOSSES, (quantizer_loss, rectifier_loss))
                    log.log(
                        kind="step",
                        epoch=run.epoch,
                        step=run.step,
                        quantizer_loss=quantizer_loss,
                        rectifier_loss=rectifier_loss,
                        lr=lr,
                        seconds=time.perf_counter() - clock,
                    )
                due = options.checkpoint_every and run.step % options.checkpoint_every == 0
                if (due or stop.number is not None) and run.cursor < steps_per_epoch:
                    _check_model(run, checkpoint, model, latents)
                    run.save(checkpoint, about, model, optimizer)
                    if stop.number is not None:
                        raise Interrupted(stop.number)

            # The end of an epoch: move the codes that were never chosen, and clear their optimizer state.
            run.last, moved_codes = summarize_count(model.quantizer.count), 0
            first, final = run.epoch == 0, run.epoch + 1 == options.epochs
            last_count = model.quantizer.count.clone() if final else None  # [G, K]
            if options.reset and (not first or options.reset_first_epoch) and (not final or options.reset_last_epoch):
                moved = model.quantizer.reset_(  # [G, K]
                    noise=options.reset_noise,
                    max_fraction=options.reset_max_fraction,
                    pairing=options.reset_pairing,
                    generator=generator(options.seed, run.epoch, "reset", device),
                )
                moved_codes = int(moved.sum())
                if not options.reset_keep_moments:
                    optimizer.state[codebook]["exp_avg"][moved] = 0
                    optimizer.state[codebook]["exp_avg_sq"][moved] = 0
            model.quantizer.count.zero_()

            quantizer_loss, rectifier_loss = (run.sums / run.cursor).tolist()
            _check_finite(run, checkpoint, _LOSSES, (quantizer_loss, rectifier_loss))
            if validation is not None:
                counted = model.quantizer.count if options.count_validation else None
                run.errors = latent_errors(model, validation, count=counted)
            if last_count is not None:
                model.quantizer.count.copy_(last_count)
            _check_finite(run, checkpoint, _ERRORS, run.errors or ())
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
            _check_model(run, checkpoint, model, latents)
            run.save(checkpoint, about, model, optimizer)
            if stop.number is not None:
                raise Interrupted(stop.number)

    model.eval()
    # The folder names the VAE of the latents, so that `revq.Tokenizer.from_pretrained` can load both.
    save_model(
        model, model_folder(out), LatentOrigin(store.plan.vae, store.plan.vae_fingerprint, store.plan.image_size)
    )
    assert run.last is not None  # for the type checker: a run has at least one epoch
    return TrainResult(model, run.step, run.last, run.errors)


def _check(
    config: RunConfig,
    store: LatentStore,
    out: Path,
    validation: LatentStore | None,
    log_every: int,
    device: torch.device,
    overwrite: bool,
) -> None:
    """Check the inputs of `train` before any work is done."""
    model = config.model
    check_writable_folder(out, frozenset(), keep_others=True)
    check_writable_folder(model_folder(out), MODEL_FILES, keep_others=True)
    for name in ("checkpoint.pt", "metrics.jsonl"):
        check_writable_file(out / name)
    if (model_folder(out) / WEIGHTS).exists() and not (out / "checkpoint.pt").exists() and not overwrite:
        raise InputError(
            f"{model_folder(out)}: expected a new folder or that of a run, but it holds a model without its run's "
            "checkpoint.pt; give another output folder, or overwrite it"
        )
    for name, latents in (("store", store), ("validation", validation)):
        if latents is not None and tuple(latents.shape) != model.latent_shape:
            raise InputError(f"{name}: expected latents {model.latent_shape} as latent_shape says, got {latents.shape}")
    if validation is not None and validation.plan.vae_fingerprint != store.plan.vae_fingerprint:
        raise InputError(
            f"validation: its latents are of another VAE ({validation.plan.vae}) than the store's ({store.plan.vae})"
        )
    if config.train.count_validation and validation is None:
        raise InputError("count_validation: expected validation latents to count, got none")
    if model.rectifier.kind == "mlp" and len(store) < 2:
        raise InputError(
            f"store: expected two latents or more for the BatchNorm of the mlp rectifier, got {len(store)}"
        )
    vectors = len(store) * model.num_tokens // model.groups
    if config.train.init == "data" and vectors < model.num_codes:
        raise InputError(
            f"num_codes: K={model.num_codes} codes start as distinct training vectors, but {store.folder} has only "
            f"{vectors} per codebook; give more latents, fewer codes or init=normal"
        )
    if not isinstance(log_every, int) or log_every < 1:
        raise InputError(f"log_every: expected a number >= 1, got {log_every}")
    _check_memory(config, device)
    for number, batch in enumerate(validation.batches(1024) if validation is not None else ()):
        broken = first_not_finite([("a latent", batch)])
        if broken:
            raise InputError(f"validation: expected finite latents, but {broken} after row {1024 * number}")


def _check_memory(config: RunConfig, device: torch.device) -> None:
    """Refuse a model that cannot fit into the device's memory, instead of allocating it."""
    try:
        with torch.device("meta"):  # shapes without values
            model = ReVQ(config.model)
    except RuntimeError as error:
        raise InputError(f"model: expected a size that torch can address, got more ({one_line(error)})") from None
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = 4 * weights + 8 * model.quantizer.count.numel()  # AdamW: a gradient and two moments for every weight
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[1]
    elif device.type == "cpu":
        available = memory_bytes()
    else:
        return
    if needed > available:
        codes = f"{config.model.groups} codebooks of num_codes={config.model.num_codes}"
        raise InputError(
            f"num_codes: {codes} and the rectifier need {needed / 2**30:,.1f} GiB to train, "
            f"{device} has {available / 2**30:,.1f} GiB"
        )


def _check_finite(run: RunState, checkpoint: Path, names: Sequence[str], values: Iterable[float]) -> None:
    """Raise if a loss or an error is NaN or infinite."""
    for name, value in zip(names, values, strict=False):
        if not math.isfinite(value):
            raise InputError(run.diverged(f"{name} is {value}", checkpoint))


@torch.no_grad()
def _check_model(run: RunState, checkpoint: Path, model: ReVQ, latents: torch.Tensor) -> None:
    """Raise if the losses of the model as it is now are not finite: those of the last step are of the model before it."""
    result = model.eval()(latents)  # eval mode does not count
    model.train()
    _check_finite(run, checkpoint, _LOSSES, (float(result.quantizer_loss), float(result.rectifier_loss)))


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
