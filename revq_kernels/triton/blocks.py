"""Block sizes of the kernels, and the analytic defaults by code dimension and architecture.

A default is the largest tile whose scores, lanes and operands fit the registers without a spill, and the shared memory;
tests/kernels/test_aot.py compiles them all.
"""

from dataclasses import dataclass

MIN_LONG_D = 17
"""From here on tensor cores multiply packed rows (long_vectors.py): packing within the first pass would take longer."""


@dataclass(frozen=True)
class DirectConfig:
    """Block sizes of the direct form, dense and as a fallback."""

    block_queries: int = 16
    block_codes: int = 128
    num_warps: int = 4
    register_dims: int = 16
    """Up to this code dimension the queries' numbers stay in registers; above, every tile of codes reads them again."""
    dim_step: int = 4
    fallback_queries: int = 4
    fallback_codes: int = 256
    fallback_warps: int = 4
    flag_block: int = 256


@dataclass(frozen=True)
class FirstPassConfig:
    """Block sizes of a first pass; `lanes` views a tile's columns as [A, B, C, E] (see lanes.py)."""

    form: str
    block_queries: int
    block_codes: int
    lanes: tuple[int, int, int, int]
    cell_tiles: int
    num_warps: int
    parts: int = 1
    """float16 parts of a number on tensor cores: 1, or 3 products of two."""
    depth: int = 0
    """Numbers of a vector that one product takes, a power of two (tensor cores)."""
    unroll: int = 1
    """Tiles that follow one another without a branch (fma)."""

    @property
    def codes_per_step(self) -> int:
        """Codes between two updates of the lanes."""
        return self.block_codes * self.cell_tiles


def default_direct(d: int) -> DirectConfig:
    """Half the tile where the numbers of the queries take the registers."""
    return DirectConfig(block_codes=64, fallback_codes=128) if 8 < d <= 16 else DirectConfig()


def default_first_pass(form: str, d: int, arch: str, contiguous: bool = True) -> FirstPassConfig:
    """The default for "tensor_core" or "fma"; ``contiguous`` says whether the codebook is."""
    if form == "fma":
        if d <= 8:
            return FirstPassConfig(form, 64, 32, (1, 1, 32, 1), 16 if d <= 4 else 32, 4, unroll=2)
        if d <= 16:
            return FirstPassConfig(form, 32, 32, (1, 1, 32, 1), 16, 4)
        return FirstPassConfig(form, 8, 512, (1, 4, 128, 1), 4, 4)
    if d >= MIN_LONG_D:
        queries, codes, cell_tiles, warps = _long_tile(d, "sm_90" if arch == "interpreter" else arch)
        lanes = {32: (4, 1, 8, 1), 64: (8, 1, 4, 2), 128: (8, 2, 4, 2), 256: (8, 4, 4, 2)}[codes]
        return FirstPassConfig(form, queries, codes, lanes, cell_tiles, warps, depth=128)
    depth = max(2, 1 << (d - 1).bit_length())
    if arch.startswith("gfx"):
        return FirstPassConfig(form, 64, 64, (8, 1, 4, 2), 16, 4, depth=depth)
    if arch in ("sm_80", "sm_86", "sm_89"):
        return FirstPassConfig(form, 128, 128, (2, 2, 16, 2), 16, 8, depth=depth)
    if arch in ("sm_90", "interpreter") and contiguous and 4 <= d <= 8:
        return FirstPassConfig(form, 128, 256, (8, 4, 4, 2), 8, 8, depth=depth)
    return FirstPassConfig(form, 128, 128, (8, 2, 4, 2), 16, 8, depth=depth)


def _long_tile(d: int, arch: str) -> tuple[int, int, int, int]:
    """(queries, codes, tiles of a cell, warps) over packed rows: queries stay in shared memory, codes pass twice buffered."""
    if arch.startswith("gfx"):
        return (64, 32, 16, 4) if d > 256 else (64, 64, 16, 4) if d > 128 else (64, 128, 8, 8)
    if arch in ("sm_80", "sm_86", "sm_89"):
        if d > 256:
            return (64, 64, 16, 4) if arch == "sm_80" else (32, 64, 16, 4)
        return (128, 64, 16, 8) if d > 128 else (128, 128, 8, 8)
    if d > 256:
        return 64, 64, 16, 4
    if arch == "sm_90":
        return (128, 256, 4, 8) if d <= 128 else (128, 128, 8, 8)
    return 64, 128, 8, 4
