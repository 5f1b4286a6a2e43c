"""The command line: from images to tokens and back, and every wrong input gives one line and exit code 2."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cli_case import ROOT, SMALL, revq_main, snapshot, subprocess_revq
from PIL import Image
from tiny_vae import IMAGE_SIZE, LATENT_SHAPE, save_photos, save_tiny_vae

import revq
import revq.cli
import revq.data.latents
import revq.data.vae
import revq.model.revq
import revq.tokenizer
from revq.cli import main
from revq.data.images import center_crop, load_image, to_pil
from revq.data.latent_writer import save_latents
from revq.data.tokens import load_tokens, save_tokens


def test_latents_to_tokens(made, tmp_path, capsys):
    """A store and its images give the same tokens; the progress bar shows tokens per second."""
    model = ("--model", made / "run" / "model")
    assert revq_main("tokenize", *model, "--images", made / "held_out", "--out", tmp_path / "tokens") == 0
    error = capsys.readouterr().err
    assert "tokenize: 100%" in error and "token/s" in error
    file = load_tokens(tmp_path / "tokens")
    assert file.indices.shape == (9, 16) and file.names == load_tokens(made / "tokens").names
    tokenizer = revq.Tokenizer.from_pretrained(made / "run" / "model")
    store = revq.data.latents.LatentStore(made / "held_out")
    assert torch.equal(file.indices, tokenizer.model.encode_latents(store.rows(range(9))))
    assert revq_main("tokenize", *model, "--images", made / "latents", "--out", tmp_path / "crops") == 0
    crops = load_tokens(tmp_path / "crops")
    assert crops.indices.shape == (36, 16) and crops.names[5] == "photo-02.png.1"
    other = save_latents(tmp_path / "other", store.rows(range(9)), vae_fingerprint="0" * 64)
    assert revq_main("tokenize", *model, "--images", other.folder, "--out", tmp_path / "none") == 2
    assert "its latents are of another VAE" in capsys.readouterr().err


def test_images_to_tokens_to_images(made, tmp_path, capsys):
    tokenizer = revq.Tokenizer.from_pretrained(made / "run" / "model")
    file = load_tokens(made / "tokens")
    assert file.indices.shape == (9, 16) and file.num_codes == 8 and file.names[-1] == "sub/photo-00.png"
    images = [load_image(made / "photos" / name) for name in file.names]
    assert torch.equal(file.indices, tokenizer.encode(images))

    assert (
        revq_main("detokenize", "--model", made / "run" / "model", "--tokens", made / "tokens", "--out", tmp_path / "d")
        == 0
    )
    expected = to_pil(tokenizer.decode(file.indices))
    for name, picture in zip(file.names, expected, strict=True):
        with Image.open(tmp_path / "d" / name) as written:
            assert written.tobytes() == picture.tobytes()
    assert len([path for path in (tmp_path / "d").rglob("*") if path.is_file()]) == 9

    capsys.readouterr()
    files = [made / "photos" / name for name in file.names[:3]]
    picture = tmp_path / "picture.png"
    assert revq_main("reconstruct", "--model", made / "run" / "model", "--images", *files, "--out", picture) == 0
    assert "rectified" in capsys.readouterr().out
    with Image.open(picture) as sheet:
        assert sheet.size == (4 * (IMAGE_SIZE + 4) + 4, 22 + 3 * (IMAGE_SIZE + 4 + 16))
        assert (
            sheet.crop((4, 22, 4 + IMAGE_SIZE, 22 + IMAGE_SIZE)).tobytes()
            == center_crop(images[0], IMAGE_SIZE).tobytes()
        )


def test_recipe_and_overrides_reach_the_model(made, tmp_path):
    config = json.loads((made / "run" / "model" / "config.json").read_text())
    assert (config["num_tokens"], config["num_codes"], tuple(config["latent_shape"])) == (16, 8, LATENT_SHAPE)
    assert config["rectifier"] == {
        "kind": "mlp",
        "width": 64,
        "layers": 1,
        "form": "residual",
    }  # the demo's, except kind
    options = (
        "--recipe",
        "paper_256t",
        "--model.num-codes",
        8,
        "--model.rectifier.kind",
        "mlp",
        "--model.rectifier.width",
        8,
    )
    run = ("train", "--latents", made / "latents", "--out", tmp_path / "r", *options, "--train.epochs", 1)
    assert revq_main(*run) == 0
    config = json.loads((tmp_path / "r" / "model" / "config.json").read_text())
    assert (config["num_tokens"], config["rectifier"]["layers"], config["rectifier"]["form"]) == (256, 4, "absolute")


def test_options_and_recipe_in_any_order_and_form(made, tmp_path, monkeypatch):
    """What `train` receives: the recipe's values, the store's latent shape, and the options that were given."""
    import revq.train.loop

    received = []

    def receive(config, *arguments, **options):
        received.append(config)
        raise revq.InputError("stopped")

    monkeypatch.setattr(revq.train.loop, "train", receive)
    for recipe, given, expected in (
        (["--recipe=paper_256t_large"], [], {}),
        (["--recipe", "paper_512t"], ["--model.num-codes", "512"], {"num_codes": 512}),
        ([], ["--model.num-groups", "4", "--model.num-tokens", "16"], {"num_groups": 4, "num_tokens": 16}),
        (["--recipe", "paper_256t"], ["--model.latent-shape", "4", "4", "4"], {"latent_shape": (4, 4, 4)}),
    ):
        name = recipe[-1].removeprefix("--recipe=") if recipe else "demo"
        store = ["--latents", str(made / "latents"), "--out", str(tmp_path / "r")]
        for arguments in ([*given, *recipe, *store], [*store, *recipe, *given]):
            assert revq_main("train", *arguments, "--train.no-reset") == 2
            run = revq.recipes.RECIPES[name]()
            model = dataclasses.replace(run.model, **({"latent_shape": LATENT_SHAPE} | expected))
            assert received.pop() == dataclasses.replace(
                run, model=model, train=dataclasses.replace(run.train, reset=False)
            )


def test_train_again_continues_and_refuses_another_run(made, capsys):
    before = (made / "run" / "model" / "model.safetensors").read_bytes()
    run = ("train", "--latents", made / "latents", "--validation", made / "held_out", "--out", made / "run", *SMALL)
    assert revq_main(*run) == 0
    assert (made / "run" / "model" / "model.safetensors").read_bytes() == before
    assert revq_main(*run, "--train.seed", 1, "--train.learning-rate", 0.1) == 2
    assert "(train.learning_rate 0.03 -> 0.1, train.seed 42 -> 1)" in capsys.readouterr().err


def test_info(made, capsys):
    expected = {
        "photos/../latents": ("36 of (C, h, w) = (4, 8, 8), float32", "4 random crops each", f"{IMAGE_SIZE} px"),
        "run/model": ("T = 16", "K = 8", "d = 16", "48", "utilization", "mlp, width 64", f"{IMAGE_SIZE} px"),
        "run": ("after 2 of 2 epochs", "T = 16"),
        "tokens": ("T = 16", "K = 8", "3 per token, 48 per sample"),
        "vae": ("AutoencoderDC", "C = 4", "4 pixels per latent position"),
    }
    for path, texts in expected.items():
        assert revq_main("info", made / path) == 0
        printed = capsys.readouterr().out
        for text in texts:
            assert text in printed, path


def test_verify(made, tmp_path, capsys):
    """Every artifact is as it was written; one flipped bit in the data of each is found."""
    for name, kind, file in (
        ("latents", "latent store", "latents-*.safetensors"),
        ("latents", "latent store", "sources-*.safetensors"),
        ("run", "checkpoint and model", "checkpoint.pt"),
        ("run", "checkpoint and model", "model/model.safetensors"),
        ("run/model", "model", "model.safetensors"),
        ("tokens", "token file", None),
    ):
        copy = shutil.copytree(made / name, tmp_path / "copy") if file else shutil.copy(made / name, tmp_path / "copy")
        assert revq_main("verify", copy) == 0
        assert capsys.readouterr().out == f"{copy}: {kind}, as it was written\n"
        (path,) = copy.glob(file) if file else [copy]
        data = bytearray(path.read_bytes())
        data[-len(data) // 3] ^= 4
        path.write_bytes(data)
        assert revq_main("verify", copy) == 2, (name, file)
        assert capsys.readouterr().err.count(f"error: {path}: damaged") == 1
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    assert revq_main("verify", tmp_path) == 2


def damaged(path, target):
    """A copy of a file or folder in which the largest file is truncated to half its size."""
    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return target


def bad_inputs(made, tmp):
    """name -> (arguments, text of the message); no output may appear at OUT."""
    photos, vae, latents, model, out = (
        made / "photos",
        made / "vae",
        made / "latents",
        made / "run" / "model",
        tmp / "OUT",
    )
    (tmp / "empty").mkdir()
    bad_photos = tmp / "bad_photos"
    save_photos(bad_photos, 2)
    (bad_photos / "zz.png").write_bytes((bad_photos / "photo-01.png").read_bytes()[:200])
    (tmp / "text.png").write_text("not an image")
    other_vae = save_tiny_vae(tmp / "other_vae", seed=1)
    save_tokens(tmp / "long_tokens", torch.zeros(2, 17, dtype=torch.int64), 8)
    save_tokens(tmp / "foreign_tokens", torch.zeros(2, 16, dtype=torch.int64), 8, model="0" * 64)
    save_tokens(tmp / "evil_tokens", torch.zeros(1, 16, dtype=torch.int64), 8, names=["../evil.png"])
    shutil.copytree(made / "run", tmp / "bad_run")
    os.truncate(tmp / "bad_run" / "checkpoint.pt", 1000)
    full = tmp / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    encode, train = ["encode", "--out", out, "--image-size", IMAGE_SIZE], ["train", *SMALL]
    photo = sorted(path for path in photos.rglob("*") if path.is_file())[0]
    shutil.copytree(model, tmp / "no_description")
    (tmp / "no_description" / "tokenizer.json").write_text("{}")
    tokenize, reconstruct = ["tokenize", "--out", out], ["reconstruct", "--out", tmp / "OUT.png"]
    detokenize = ["detokenize", "--model", model]
    os.mkfifo(tmp / "pipe")
    os.mkfifo(tmp / "pipe.png")
    (tmp / "bad_alone").mkdir()
    (tmp / "bad_alone" / "a.png").write_bytes(b"no picture")
    shutil.copytree(made / "run", tmp / "no_run")
    (tmp / "no_run" / "checkpoint.pt").unlink()
    for name, text in (
        ("deep", b'{"num_codes": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        ("huge", b'{"num_codes": 1e999}'),
        ("binary", b'{"num_codes": "\xff"}'),
    ):
        shutil.copytree(model, tmp / name)
        (tmp / name / "config.json").write_bytes(text)
    shutil.copytree(model, tmp / "huge_size")
    (tmp / "huge_size" / "tokenizer.json").write_text('{"vae": "a", "vae_fingerprint": "b", "image_size": 1e999}')
    return {
        "encode: missing folder": ([*encode, "--images", tmp / "nowhere"], "nowhere"),
        "encode: empty folder": ([*encode, "--images", tmp / "empty"], "empty"),
        "encode: damaged image": (
            [*encode, "--images", bad_photos, "--vae", vae, "--on-error", "stop"],
            "zz.png",
        ),
        "encode: no good image": ([*encode, "--images", tmp / "bad_alone", "--vae", vae], "at least one"),
        "encode: missing VAE": ([*encode, "--images", photos, "--vae", tmp / "no_vae"], "no_vae"),
        "encode: damaged VAE": ([*encode, "--images", photos, "--vae", damaged(vae, tmp / "bad_vae")], "bad_vae"),
        "encode: image size": (
            ["encode", "--images", photos, "--out", out, "--image-size", 30, "--vae", vae],
            "image_size",
        ),
        "encode: full output": (["encode", "--images", photos, "--out", full, "--vae", vae], "full: expected"),
        "encode: device": ([*encode, "--images", photos, "--vae", vae, "--device", "toaster"], "device"),
        "train: device without values": ([*train, "--latents", latents, "--out", out, "--device", "meta"], "device"),
        "train: missing latents": ([*train, "--latents", tmp / "nowhere", "--out", out], "nowhere"),
        "train: damaged latents": (
            [*train, "--latents", damaged(latents, tmp / "bad_store"), "--out", out],
            "bad_store",
        ),
        "train: damaged validation": (
            [*train, "--latents", latents, "--validation", tmp / "bad_store", "--out", out],
            "bad_store",
        ),
        "train: too many codes": (
            ["train", "--latents", latents, "--out", out, "--model.num-tokens", 16],
            "num_codes: K=256",
        ),
        "train: tokens do not divide": (
            ["train", "--latents", latents, "--out", out, "--model.num-tokens", 7],
            "num_tokens",
        ),
        "train: a number out of range": (
            [*train, "--latents", latents, "--out", out, "--train.batch-size", 0],
            "batch_size",
        ),
        "train: damaged checkpoint": (
            [*train, "--latents", latents, "--out", tmp / "bad_run"],
            "checkpoint.pt: damaged",
        ),
        "tokenize: missing model": ([*tokenize, "--model", tmp / "nowhere", "--images", photos], "nowhere"),
        "tokenize: damaged model": (
            [*tokenize, "--model", damaged(model, tmp / "bad_model"), "--images", photos],
            "bad_model",
        ),
        "tokenize: missing image": ([*tokenize, "--model", model, "--images", tmp / "no.png"], "no.png"),
        "tokenize: damaged image": (
            [*tokenize, "--model", model, "--images", bad_photos, "--on-error", "stop"],
            "zz.png",
        ),
        "reconstruct: damaged image": (
            [*reconstruct, "--model", model, "--images", bad_photos, "--on-error", "stop"],
            "zz.png",
        ),
        "train: not a number": ([*train, "--latents", latents, "--out", out, "--train.clip-norm", "nan"], "clip_norm"),
        "train: not in float32": (
            [*train, "--latents", latents, "--out", out, "--train.learning-rate", "1e39"],
            "learning_rate",
        ),
        "train: diverges": (
            [*train, "--latents", latents, "--out", tmp / "diverges", "--train.learning-rate", "3e38"],
            "learning_rate: training diverged in epoch 0",
        ),
        "train: absurd codes": (
            [*train, "--latents", latents, "--out", out, "--model.num-codes", 10**11],
            "num_codes: expected an integer of at most 2,147,483,647",
        ),
        "train: beyond memory": (
            [*train, "--latents", latents, "--out", out, "--model.num-codes", 2**31 - 1, "--train.init", "normal"],
            "num_codes: expected a model of at most",
        ),
        "train: absurd batch": (
            [*train, "--latents", latents, "--out", out, "--train.batch-size", 10**12],
            "batch_size",
        ),
        "train: absurd layers": (
            [*train, "--latents", latents, "--out", out, "--model.rectifier.layers", 10**9],
            "rectifier layers",
        ),
        "train: absurd width": (
            [*train, "--latents", latents, "--out", out, "--model.rectifier.width", 2**31 - 1],
            "rectifier width: expected a model of at most",
        ),
        "train: absurd seed": ([*train, "--latents", latents, "--out", out, "--train.seed", 10**30], "seed"),
        "encode: absurd size": (
            ["encode", "--images", photos, "--out", out, "--vae", vae, "--image-size", 2**40],
            "image_size",
        ),
        "encode: absurd crops": ([*encode, "--images", photos, "--vae", vae, "--crops", 10**12], "crops"),
        "encode: absurd batch": ([*encode, "--images", photos, "--vae", vae, "--batch-size", 10**12], "batch_size"),
        "encode: absurd seed": ([*encode, "--images", photos, "--vae", vae, "--seed", 10**30], "seed"),
        "encode: absurd color": ([*encode, "--images", photos, "--vae", vae, "--background", 0, 256, 0], "background"),
        "encode: onto a pipe": (["encode", "--images", photos, "--vae", vae, "--out", tmp / "pipe"], "a pipe"),
        "train: onto a pipe": ([*train, "--latents", latents, "--out", tmp / "pipe"], "a pipe"),
        "demo: onto a pipe": (["demo", "--out", tmp / "pipe"], "a pipe"),
        "tokenize: onto a pipe": (
            ["tokenize", "--model", model, "--images", photos, "--out", tmp / "pipe", "--overwrite"],
            "a pipe",
        ),
        "tokenize: onto a device": (
            ["tokenize", "--model", model, "--images", photos, "--out", "/dev/null", "--overwrite"],
            "a device",
        ),
        "reconstruct: onto a pipe": (
            ["reconstruct", "--model", model, "--images", photos, "--out", tmp / "pipe.png", "--overwrite"],
            "a pipe",
        ),
        "detokenize: onto a pipe": ([*detokenize, "--tokens", made / "tokens", "--out", tmp / "pipe"], "a pipe"),
        "tokenize: a file that exists": (
            ["tokenize", "--model", model, "--images", photos, "--out", tmp / "long_tokens"],
            "exists already",
        ),
        "tokenize: latents onto a file": (
            ["tokenize", "--model", model, "--images", latents, "--out", tmp / "long_tokens"],
            "exists already",
        ),
        "reconstruct: a picture that exists": (
            ["reconstruct", "--model", model, "--images", photos, "--out", tmp / "text.png"],
            "exists already",
        ),
        "encode: other latents": (
            ["encode", "--images", photos, "--out", latents, "--image-size", IMAGE_SIZE, "--vae", vae],
            "crops",
        ),
        "train: a model without its run": (
            [*train, "--latents", latents, "--out", tmp / "no_run"],
            "holds a model without its run",
        ),
        "demo: files of another origin": (["demo", "--out", tmp / "no_run"], "of another origin"),
        "info: deeply nested": (["info", tmp / "deep"], "nested too deeply"),
        "info: an infinite number": (["info", tmp / "huge"], "1e999"),
        "info: not text": (["info", tmp / "binary"], "UTF-8"),
        "tokenize: a deep configuration": (
            [*tokenize, "--model", tmp / "deep", "--images", photos],
            "nested too deeply",
        ),
        "tokenize: an infinite size": ([*tokenize, "--model", tmp / "huge_size", "--images", photos], "1e999"),
        "tokenize: another VAE": ([*tokenize, "--model", model, "--images", photos, "--vae", other_vae], "fingerprint"),
        "reconstruct: not an image": ([*reconstruct, "--model", model, "--images", tmp / "text.png"], "text.png"),
        "reconstruct: missing VAE": (
            [*reconstruct, "--model", model, "--images", photos, "--vae", tmp / "no_vae"],
            "no_vae",
        ),
        "reconstruct: not a PNG": (["reconstruct", "--out", out, "--model", model, "--images", photos], "ends in .png"),
        "tokenize: batch size": ([*tokenize, "--model", model, "--images", photos, "--batch-size", -1], "batch_size"),
        "tokenize: over an input": (
            ["tokenize", "--model", model, "--images", photo, "--out", photo],
            "one of the images that are read",
        ),
        "tokenize: onto a folder": (
            ["tokenize", "--model", model, "--images", photos, "--out", full],
            "found a folder",
        ),
        "train: onto a file": ([*train, "--latents", latents, "--out", tmp / "text.png"], "found a file"),
        "encode: a mistyped path": ([*encode, "--images", photos, "--vae", "revq/slip"], "in revq/"),
        "detokenize: batch size": (
            [*detokenize, "--tokens", made / "tokens", "--out", out, "--batch-size", 0],
            "batch_size",
        ),
        "detokenize: missing tokens": ([*detokenize, "--tokens", tmp / "nowhere", "--out", out], "nowhere"),
        "detokenize: damaged tokens": (
            [*detokenize, "--tokens", damaged(made / "tokens", tmp / "bad_t"), "--out", out],
            "bad_t",
        ),
        "detokenize: another shape": ([*detokenize, "--tokens", tmp / "long_tokens", "--out", out], "T=16"),
        "detokenize: another model": ([*detokenize, "--tokens", tmp / "foreign_tokens", "--out", out], "another model"),
        "detokenize: escaping names": ([*detokenize, "--tokens", tmp / "evil_tokens", "--out", out], "evil.png"),
        "detokenize: full output": ([*detokenize, "--tokens", made / "tokens", "--out", full], "full: expected"),
        "info: missing": (["info", tmp / "nowhere"], "nowhere"),
        "info: nothing known": (["info", full], "full"),
        "info: not a token file": (["info", tmp / "text.png"], "text.png"),
        "info: damaged model": (["info", tmp / "bad_model"], "bad_model"),
        "info: damaged tokenizer": (["info", tmp / "no_description"], "tokenizer.json"),
        "info: damaged store": (["info", tmp / "bad_store"], "bad_store"),
        "info: damaged run": (["info", tmp / "bad_run"], "checkpoint.pt"),
    }


def test_every_bad_input_is_one_line_and_leaves_nothing(made, tmp_path, capsys):
    cases = bad_inputs(made, tmp_path)
    before = snapshot(tmp_path)
    for name, (arguments, expected) in cases.items():
        capsys.readouterr()
        assert revq_main(*arguments) == 2, name
        if name == "train: diverges":  # its log is written
            assert not (tmp_path / "diverges" / "checkpoint.pt").exists()
            shutil.rmtree(tmp_path / "diverges")
        errors = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "revq: error:" in line]
        assert len(errors) == 1 and errors[0].startswith("revq: error: ") and expected in errors[0], (name, errors)
        assert snapshot(tmp_path) == before, name
    assert (made / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments", [[], ["bake"], ["encode"], ["train", "--recipe", "soup"], ["info", "a", "b"], ["demo", "--fast"]]
)
def test_wrong_options_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["encode", "train", "reconstruct", "tokenize", "detokenize", "info", "verify", "demo"])
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: revq {verb}" in printed
    if verb == "train":
        for option in ("--recipe", "--model.num-codes", "--model.rectifier.form", "--train.learning-rate", "codebook"):
            assert option in printed
        words = " ".join(printed.replace("│", " ").split())
        assert "Recipes: demo 256, paper_512t 16384, paper_256t 65536, paper_256t_large 262144." in words
        assert "normalized latent. All recipes: 0.1." in words


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom revq.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'diffusers', 'PIL', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    out, errors = subprocess_revq(code=code).communicate(timeout=60)
    assert out.strip().endswith("HEAVY []"), errors


def test_module_form_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "revq", "info", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("revq: error: ") and done.stderr.count("\n") == 1 and done.stdout == ""


def test_version(capsys):
    for option in ("--version", "-V"):
        assert revq_main(option) == 0
        assert capsys.readouterr().out == f"revq {revq.__version__}\n"


def test_a_failing_demo_exits_with_1(monkeypatch, capsys, tmp_path):
    import revq.demo

    monkeypatch.setattr(revq.demo, "demo", lambda out, overwrite: revq.demo.DemoResult({}, ["the rectifier fails"]))
    assert revq_main("demo", "--out", tmp_path) == 1
    assert capsys.readouterr().err == "revq: the demo failed: the rectifier fails\n"
    monkeypatch.setattr(revq.demo, "demo", lambda out, overwrite: revq.demo.DemoResult({}, []))
    assert revq_main("demo") == 0
