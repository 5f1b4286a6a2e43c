"""One artifact of each kind, made by the command line once for all files of tests."""

import pytest
from cli_case import SMALL, revq_main
from tiny_vae import IMAGE_SIZE, save_photos, save_tiny_vae


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """One artifact of each kind, made by the command line: photos, vae, latents, held_out, run, tokens."""
    folder = tmp_path_factory.mktemp("cli")
    save_photos(folder / "photos", 9)
    save_tiny_vae(folder / "vae")
    size = ("--image-size", IMAGE_SIZE, "--vae", folder / "vae")
    assert revq_main("encode", "--images", folder / "photos", "--out", folder / "latents", "--crops", 4, *size) == 0
    assert revq_main("encode", "--images", folder / "photos", "--out", folder / "held_out", *size) == 0
    run = (
        "train",
        "--latents",
        folder / "latents",
        "--validation",
        folder / "held_out",
        "--out",
        folder / "run",
        *SMALL,
    )
    assert revq_main(*run) == 0
    model = ("--model", folder / "run" / "model", "--images", folder / "photos")
    assert revq_main("tokenize", *model, "--out", folder / "tokens") == 0
    return folder
