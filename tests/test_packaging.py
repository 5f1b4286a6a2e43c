"""The wheel: what is in it, what its library needs of torch, and that it runs outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import revq

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("revq", "revq_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), "."],
        cwd=source,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "REVQ_DEV"},
    )
    (built,) = out.glob("*.whl")
    return built


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"revq-{revq.__version__}-py3-none-")
    tops = {name.split("/")[0] for name in names}
    assert tops == {"revq", "revq_kernels", f"revq-{revq.__version__}.dist-info"}
    assert [name for name in names if name.endswith(".so")] == ["revq_kernels/_C.so"]
    for needed in (
        "revq/assets/vae/config.json",
        "revq/assets/vae/diffusion_pytorch_model.safetensors",
        "revq/assets/photos/SOURCES.csv",
        "revq/py.typed",
        "revq_kernels/py.typed",
    ):
        assert needed in names
    assert sum(name.startswith("revq/assets/photos/train/") for name in names) >= 90
    assert wheel.stat().st_size < 12 * 2**20


def test_library_needs_only_the_stable_abi(wheel, tmp_path):
    library = zipfile.ZipFile(wheel).extract("revq_kernels/_C.so", tmp_path)
    table = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in table.splitlines()]
    torch_symbols = [name for name in symbols if "torch" in name or "c10" in name or "aten" in name.lower()]
    assert torch_symbols
    assert all(name.startswith(("aoti_", "torch_")) for name in torch_symbols), torch_symbols
    assert not [name for name in symbols if name.startswith(("Py", "_Py"))]


def test_runs_native_without_a_compiler_and_outside_the_checkout(wheel, tmp_path):
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(fresh), "platbase": str(fresh)}))
    zipfile.ZipFile(wheel).extractall(site)
    # Torch comes from this environment by path: what is installed in it in editable mode stays out.
    (site / "torch-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
    program = (
        "import torch, revq_kernels\n"
        "x, c = torch.randn(9, 2, 4), torch.randn(2, 30, 4)\n"
        "print(revq_kernels.__file__, revq_kernels.explain(x, c))\n"
        "assert torch.equal(revq_kernels.nearest_code(x, c, impl='native'), revq_kernels.nearest_code(x, c, impl='reference'))\n"
    )
    result = subprocess.run(
        [str(fresh / "bin" / "python"), "-c", program], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout and "native: CPU tensors" in result.stdout


def test_the_package_imports_outside_the_checkout(tmp_path):
    program = "import revq, revq.config; print(revq.__version__)"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == revq.__version__, result.stderr


def test_setup_without_torch_stops_with_the_command_to_use():
    program = "import sys; sys.modules['torch'] = None; exec(open('setup.py').read())"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr
