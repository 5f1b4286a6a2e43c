"""Exact grouped vector quantization: the operations (see `nearest_code` and `quantize`) and the modules on top of them.

Needs torch alone.  Importing registers operators and does nothing else: kernels load with the first call that uses them.
"""

from revq_kernels.dispatch import Choice, explain
from revq_kernels.functional import (
    Quantized,
    count_codes_,
    nearest_code,
    perplexity,
    quantize,
    reset_codes_,
    segment_sum,
    utilization,
)
from revq_kernels.index import CodebookIndex
from revq_kernels.native import NativeUnavailableError
from revq_kernels.nn import (
    EMAUpdate,
    FastChannelVQ,
    MappedCodes,
    ProjectedVQ,
    QuantizerDetails,
    QuantizerOutput,
    ReplaceDeadCodes,
    ResidualVQ,
    merge_tokens,
    split_tokens,
)
from revq_kernels.triton import TritonUnavailableError

__all__ = [
    "Choice",
    "CodebookIndex",
    "EMAUpdate",
    "FastChannelVQ",
    "MappedCodes",
    "NativeUnavailableError",
    "ProjectedVQ",
    "Quantized",
    "QuantizerDetails",
    "QuantizerOutput",
    "ReplaceDeadCodes",
    "ResidualVQ",
    "TritonUnavailableError",
    "count_codes_",
    "explain",
    "merge_tokens",
    "nearest_code",
    "perplexity",
    "quantize",
    "reset_codes_",
    "segment_sum",
    "split_tokens",
    "utilization",
]
