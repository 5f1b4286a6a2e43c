"""One arrow, one way: revq -> revq_kernels -> torch; nothing imports tests or benchmarks; importing does nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def module_level_imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_kernels_need_torch_alone():
    files = sorted((ROOT / "revq_kernels").rglob("*.py"))
    assert len(files) > 8
    for path in files:
        allowed = {"revq_kernels", "torch"}
        if path.parent.name == "testing":
            allowed |= {"numpy"}
        if path.parent.name == "triton" and path.name != "__init__.py":
            allowed |= {"triton"}
        assert not imports_of(path) - sys.stdlib_module_names - allowed, path


def test_nothing_imports_tests_or_benchmarks():
    for package in ("revq", "revq_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert not imports_of(path) & {"tests", "benchmarks", "torchvision"}, path


def test_heavy_libraries_are_imported_inside_functions_only():
    for path in (ROOT / "revq").rglob("*.py"):
        heavy = module_level_imports_of(path) & {"diffusers", "matplotlib", "PIL", "tqdm", "huggingface_hub"}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} when it is imported"


@pytest.mark.parametrize("package", ["revq_kernels", "revq"])
def test_importing_loads_nothing_heavy_and_takes_no_device(package):
    program = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        f"import {package}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps({'new': sorted(new), 'cuda': torch.cuda.is_initialized(),\n"
        "                  'all': sorted({name.split('.')[0] for name in sys.modules})}))\n"
    )
    result = json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)
    assert not result["cuda"]
    assert not set(result["new"]) & {"triton", "diffusers", "PIL", "matplotlib", "tqdm", "tyro"}, result["new"]
    assert not set(result["all"]) & {"triton", "diffusers"}
    if package == "revq_kernels":
        assert "numpy" not in result["new"]
        assert set(result["new"]) - sys.stdlib_module_names <= {"revq_kernels", "torch"}
