"""Every quantizer of the drop-in table."""

from benchmarks.drop_in import audio_codebooks, generation, images, lucidrains
from benchmarks.drop_in.case import DropInCase

CASES: tuple[DropInCase, ...] = (*images.CASES, *generation.CASES, *lucidrains.CASES, *audio_codebooks.CASES)
assert len({case.quantizer for case in CASES}) == len(CASES), "rows are found by the name of the quantizer"
