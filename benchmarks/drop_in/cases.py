"""Every quantizer of the drop-in table."""

from benchmarks.drop_in.case import DropInCase

CASES: tuple[DropInCase, ...] = ()
