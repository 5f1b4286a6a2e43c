"""The house: one arrow revq -> revq_kernels -> torch, no import cycles, importing does nothing, files of one reason."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import revq_kernels
from revq_kernels import native

ROOT = Path(__file__).parent.parent
PACKAGES = ("revq", "revq_kernels")

# Imports inside functions, and why they are there.  Everything else is imported at the top of its file.
LAZY_LIBRARIES = {
    "PIL": "optional, for images only",
    "diffusers": "optional, takes seconds to import",
    "huggingface_hub": "optional, for hub names only",
    "matplotlib": "optional, for plots only",
    "safetensors": "optional for the kernels; one reader needs it",
    "torch": "takes a second to import, which --help and errors of the command line do not need",
    "tqdm": "optional, for progress bars only",
    "tyro": "optional, for the command line only",
}
LAZY_MODULES = {
    "revq/cli.py": "each verb loads only what it uses, so that --help and errors come at once",
    "revq/info.py": "each kind of file loads only what describes it",
}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports at run time, and whether it does so inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                for alias in child.names:
                    submodule = f"{child.module}.{alias.name}"
                    yield (submodule if submodule in MODULES else child.module or ""), inside
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, inside or function)

    yield from walk(ast.parse(path.read_text()), False)


MODULES = {name_of(path): path for path in sources("revq", "revq_kernels", "benchmarks")}


def graph(packages: tuple[str, ...] = PACKAGES) -> dict[str, set[str]]:
    return {name_of(path): {name for name, _ in imports(path) if name in MODULES} for path in sources(*packages)}


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module, and modules that import themselves."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, next_of: dict[str, set[str]], out: list[str]) -> None:
        stack = [(node, iter(sorted(next_of.get(node, ()))))]
        seen.add(node)
        while stack:
            _, rest = stack[-1]
            following = next((name for name in rest if name not in seen), None)
            if following is None:
                out.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(sorted(next_of.get(following, ())))))

    for node in edges:
        if node not in seen:
            visit(node, edges, order)
    backward: dict[str, set[str]] = {node: set() for node in edges}
    for node, targets in edges.items():
        for target in targets:
            backward.setdefault(target, set()).add(node)
    seen.clear()
    found = []
    for node in reversed(order):
        if node not in seen:
            component: list[str] = []
            visit(node, backward, component)
            if len(component) > 1 or node in edges.get(node, ()):
                found.append(sorted(component))
    return found


def test_the_cycle_finder_finds_cycles():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a", "d"}}) == [["d"], ["b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []


def test_no_import_cycles_counting_imports_inside_functions():
    assert len(MODULES) > 50
    assert cycles(graph((*PACKAGES, "benchmarks"))) == []


def test_no_upward_arrow():
    for name, targets in graph().items():
        upward = ("revq.", "benchmarks", "tests") if name.startswith("revq_kernels") else ("benchmarks", "tests")
        assert not [t for t in targets if t == "revq" or t.startswith(upward)] or name.startswith("revq."), name
    for path in sources(*PACKAGES):
        roots = {name.split(".")[0] for name, _ in imports(path)}
        assert not roots & {"tests", "benchmarks", "torchvision"}, path
        assert not (path.is_relative_to(ROOT / "revq_kernels") and "revq" in roots), path


def test_nothing_of_the_kernels_imports_interop():
    """The drop-in layer stands above the modules, so that its families can use them."""
    for name, targets in graph(("revq_kernels",)).items():
        if not name.startswith("revq_kernels.interop"):
            assert not [target for target in targets if target.startswith("revq_kernels.interop")], name
    for name, targets in graph(("revq_kernels",)).items():
        if name.startswith("revq_kernels.interop.families."):
            assert "revq_kernels.interop.registry" not in targets, name


def test_kernels_need_torch_alone():
    for path in sources("revq_kernels"):
        allowed = {"revq_kernels", "torch"}
        if path.parent.name == "testing":
            allowed |= {"numpy"}
        if path.parent.name == "triton" and path.name != "__init__.py":
            allowed |= {"triton"}
        if path.is_relative_to(ROOT / "revq_kernels" / "interop"):
            allowed |= {name.split(".")[0] for name, inside in imports(path) if inside} & set(LAZY_LIBRARIES)
        assert not {name.split(".")[0] for name, _ in imports(path)} - sys.stdlib_module_names - allowed, path


def test_imports_inside_functions_are_named_with_their_reason():
    used: set[str] = set()
    for path in sources(*PACKAGES):
        file = path.relative_to(ROOT).as_posix()
        for name, inside in imports(path):
            root = name.split(".")[0]
            if not inside:
                assert root not in LAZY_LIBRARIES or root in ("safetensors", "torch"), (
                    f"{file} imports {name} at its top"
                )
            elif root in PACKAGES:
                assert file in LAZY_MODULES, f"{file} imports {name} inside a function"
                used.add(file)
            else:
                assert root in LAZY_LIBRARIES or root in sys.stdlib_module_names, f"{file}: {name} inside a function"
    assert used == set(LAZY_MODULES), "files that import nothing lazily any more"


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_loads_nothing_heavy_and_takes_no_device(package):
    program = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        f"import {package}\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps({'new': sorted(new), 'cuda': torch.cuda.is_initialized(),\n"
        "                  'interop': 'revq_kernels.interop' in sys.modules,\n"
        "                  'all': sorted({name.split('.')[0] for name in sys.modules})}))\n"
    )
    result = json.loads(
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True).stdout
    )
    assert not result["cuda"] and not result["interop"]
    assert not set(result["new"]) & {"triton", "diffusers", "PIL", "matplotlib", "tqdm", "tyro"}, result["new"]
    assert not set(result["all"]) & {"triton", "diffusers"}
    if package == "revq_kernels":
        assert "numpy" not in result["new"]
        assert set(result["new"]) - sys.stdlib_module_names <= {"revq_kernels", "torch"}


def test_a_call_of_the_quantizer_passes_few_files():
    """`FastChannelVQ.forward` reaches the operator through at most nine of our files."""
    passed: list[str] = []
    reached = False

    def note(frame, event, argument):
        nonlocal reached
        file = frame.f_code.co_filename
        if not reached and event == "call":
            reached = file.endswith("torch/_ops.py") and frame.f_code.co_name == "__call__"
            folder = str(Path(revq_kernels.__file__).parent)
            if file.startswith(folder) and file not in passed:
                passed.append(file)

    native.load()
    vq, x = revq_kernels.FastChannelVQ(16, 4), torch.randn(2, 6, 4)
    vq(x)
    sys.setprofile(note)
    try:
        vq(x)
    finally:
        sys.setprofile(None)
    assert reached and 2 <= len(passed) <= 9, passed


def lines_of_code() -> dict[str, int]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [Path(name) for name in listed] or [p.relative_to(ROOT) for p in ROOT.rglob("*")]
    kinds = {".py", ".cpp", ".h", ".inl", ".cu"}
    return {
        p.as_posix(): len((ROOT / p).read_text().splitlines())
        for p in files
        if p.suffix in kinds and (ROOT / p).is_file()
    }


def test_no_file_over_500_lines():
    long = {name: lines for name, lines in lines_of_code().items() if lines > 500}
    assert not long, long


def test_few_files():
    python = [name for name in lines_of_code() if name.endswith(".py")]
    benchmarks = [name for name in python if name.startswith("benchmarks/")]
    product = [name for name in python if not name.startswith(("benchmarks/", "tests/"))]
    assert 30 < len(product) <= 102, len(product)
    assert len(benchmarks) <= 28, len(benchmarks)


def test_a_short_file_says_why_it_is_one():
    """In the first line of its docstring."""
    for name, lines in lines_of_code().items():
        if name.endswith(".py") and not name.startswith("tests/") and lines < 40:
            first = (ast.get_docstring(ast.parse((ROOT / name).read_text())) or "").split("\n")[0]
            assert any(word in first for word in ("because", "so that", "short")), f"{name}: {first!r}"


def test_no_drawers():
    drawers = [name for name in lines_of_code() if Path(name).stem in {"util", "utils", "helpers", "misc", "common"}]
    assert not drawers, drawers
