"""Times that no search can beat on a card: fewest bytes over its bandwidth, operations over the unit that does them."""

from typing import NamedTuple

from benchmarks.harness.cases import Case


class Card(NamedTuple):
    """Rates of a card; per multiprocessor and clock where not said otherwise.

    ``tensor_fma`` counts half-precision multiply-adds with float32 accumulators.  The clock is one that the card holds
    under load, not its boost clock.
    """

    processors: int
    gigahertz: float
    gigabytes_per_s: float
    tensor_fma: int
    float_fma: int = 128
    minima: int = 64


# Sources: multiprocessors and per-clock rates from the vendor's architecture white papers and the CUDA programming
# guide's throughput table; bandwidth as a device-to-device copy reaches it (bytes read plus bytes written).
CARDS = {
    "NVIDIA H200": Card(132, 1.70, 4300.0, 2048),
    "NVIDIA GeForce RTX 4090": Card(128, 2.52, 940.0, 256),
}


class Floors(NamedTuple):
    """Milliseconds of one search, per unit that could bind."""

    memory: float
    tensor: float
    minima: float
    float_fma: float

    @property
    def tensor_core_form(self) -> float:
        """The floor of a search on the tensor cores: one pass in half precision, three-input minima of two halves."""
        return max(self.memory, self.tensor, self.minima)


def floors(case: Case, card_name: str) -> Floors | None:
    """The floors of a case, None for a card whose rates are not listed.

    tensor: d products and two numbers of the norm, in the instruction's steps of 16.  minima: one instruction per four
    pairs.  float_fma: d multiply-adds per pair on the CUDA cores.
    """
    card = CARDS.get(card_name)
    if card is None:
        return None
    clocks_per_ms = card.processors * card.gigahertz * 1e6
    slots = 16 * -(-(case.d + 2) // 16)
    return Floors(
        memory=case.bytes / card.gigabytes_per_s / 1e6,
        tensor=case.pairs * slots / (clocks_per_ms * card.tensor_fma),
        minima=case.pairs * 0.25 / (clocks_per_ms * card.minima),
        float_fma=case.pairs * case.d / (clocks_per_ms * card.float_fma),
    )
