"""Builds the compiled library; metadata is in pyproject.toml.

    pip install torch                              # first: the headers come from the torch you have
    pip install --no-build-isolation -e .          # REVQ_DEV=1 adds the module that the tests use

The library uses torch's stable ABI: one wheel for every Python and for torch >= 2.10.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "\nrevq builds its kernels against the torch that you have, and no torch is importable here.\n"
        "An isolated build cannot see yours.  Install torch first, then build without isolation:\n\n"
        "    pip install torch setuptools wheel ninja\n"
        "    pip install --no-build-isolation .\n"
    )

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

TORCH_2_10 = "0x020a000000000000"
ROOT = Path(__file__).resolve().parent


def files(*patterns):
    """Files below csrc, relative to the root and in a stable order."""
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern))]


# The module of the tests links the kernels without torch; the library adds the operators, which take tensors.
KERNELS = files("core/*.cpp", "cpu/search/*.cpp", "cpu/clones/*.cpp")
OPERATORS = files("cpu/*.cpp", "cpu/index/*.cpp")
HEADERS = files("**/*.h", "**/*.inl")
INCLUDE = str(ROOT / "csrc")
# -ffp-contract=off: gcc would otherwise fuse a product into a sum, which changes the last bit of a distance.
# No -ffast-math, least of all at link: gcc then switches denormals off for the whole process.
# The prefix map keeps the path of the machine that built a wheel out of its error messages.
FLAGS = [
    f"-ffile-prefix-map={ROOT}/=",
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
]


class AnyPythonWheel(bdist_wheel):
    """The library holds no Python symbol, so the wheel fits every Python 3 on its platform."""

    def get_tag(self):
        """``py3-none-<platform>``."""
        return ("py3", "none", super().get_tag()[2])


def extensions():
    """The library, and with REVQ_DEV=1 the module of the tests."""
    built = [
        CppExtension(
            "revq_kernels._C",
            [*OPERATORS, *KERNELS],
            depends=HEADERS,
            include_dirs=[INCLUDE],
            py_limited_api=True,  # leaves libtorch_python out
            extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_2_10}"],
        )
    ]
    if os.environ.get("REVQ_DEV") == "1":
        import pybind11

        built.append(
            CppExtension(
                "revq_kernels._dev",
                [*files("dev/*.cpp"), *KERNELS],
                depends=HEADERS,
                include_dirs=[INCLUDE, pybind11.get_include()],
                extra_compile_args=FLAGS,
            )
        )
    return built


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True), "bdist_wheel": AnyPythonWheel},
)
