"""Exact grouped vector quantization: the operations (see `nearest_code` and `quantize`) and the modules on top of them.

Needs torch alone.  Importing registers operators and does nothing else: kernels load with the first call that uses them.
"""

from revq_kernels.dispatch import Choice, explain
from revq_kernels.functional import Quantized, count_codes_, nearest_code, quantize
from revq_kernels.index import CodebookIndex
from revq_kernels.native import NativeUnavailableError
from revq_kernels.nn.channel_vq import FastChannelVQ
from revq_kernels.nn.dead_codes import ReplaceDeadCodes
from revq_kernels.nn.ema import EMAUpdate
from revq_kernels.nn.layout import merge_tokens, split_tokens
from revq_kernels.nn.mapped_codes import MappedCodes
from revq_kernels.nn.output import QuantizerOutput
from revq_kernels.nn.projected import ProjectedVQ
from revq_kernels.nn.residual import ResidualVQ
from revq_kernels.reset import reset_codes_
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
    "QuantizerOutput",
    "ReplaceDeadCodes",
    "ResidualVQ",
    "TritonUnavailableError",
    "count_codes_",
    "explain",
    "merge_tokens",
    "nearest_code",
    "quantize",
    "reset_codes_",
    "split_tokens",
]
