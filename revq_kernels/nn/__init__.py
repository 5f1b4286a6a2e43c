"""Public names of the quantizer modules; short because it only re-exports."""

from revq_kernels.nn.channel_vq import FastChannelVQ
from revq_kernels.nn.codebook_updates import EMAUpdate, MappedCodes, ReplaceDeadCodes
from revq_kernels.nn.layout import merge_tokens, split_tokens
from revq_kernels.nn.output import QuantizerDetails, QuantizerOutput
from revq_kernels.nn.projected import ProjectedVQ
from revq_kernels.nn.residual import ResidualVQ

__all__ = [
    "EMAUpdate",
    "FastChannelVQ",
    "MappedCodes",
    "ProjectedVQ",
    "QuantizerDetails",
    "QuantizerOutput",
    "ReplaceDeadCodes",
    "ResidualVQ",
    "merge_tokens",
    "split_tokens",
]
