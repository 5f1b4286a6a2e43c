"""What a type checker knows of the public names; `make check` runs mypy on this file, nothing runs it.

A name that is `Any` to a type checker fails here, because `Any` is not the asserted type.
"""

from torch import Tensor
from typing_extensions import assert_type

import revq
import revq_kernels
from revq.eval.evaluate import CodeUse
from revq.model import ReVQ as ReVQClass
from revq.tokenizer import Tokenizer as TokenizerClass


def tokenizer(tokens: Tensor) -> None:
    loaded = revq.Tokenizer.from_pretrained("folder")
    assert_type(loaded, TokenizerClass)
    assert_type(loaded.decode(tokens), Tensor)
    assert_type(loaded.image_size, int)


def model(config: revq.RunConfig, store: revq.LatentStore) -> None:
    assert_type(revq.ReVQ(config.model), ReVQClass)
    result = revq.train.train(config, store, "runs/x")
    assert_type(result.model, ReVQClass)
    assert_type(result.last_epoch, CodeUse)
    assert_type(revq.recipes.demo(), revq.RunConfig)


def kernels(x: Tensor, codebook: Tensor) -> None:
    assert_type(revq_kernels.nearest_code(x, codebook), Tensor)
    assert_type(revq_kernels.quantize(x, codebook), revq_kernels.Quantized)
    assert_type(revq_kernels.segment_sum(x, codebook, 4), Tensor)
    assert_type(revq_kernels.FastChannelVQ(4, 4).quantize(x), revq_kernels.QuantizerDetails)


def drop_in(quantizer: revq.FastChannelVQ) -> None:
    assert_type(str(revq.patch(quantizer)), str)
    with revq.patch(quantizer) as report:
        assert_type(report, revq.Patched)
