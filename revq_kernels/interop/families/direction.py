"""Codebooks of audio codecs that search by direction and return the code as it is: DAC and SNAC.

The residual quantizers around them stay as they are.
"""

from torch import Tensor, nn

from revq_kernels.interop.family import Call, Family, Vectors
from revq_kernels.interop.search import has_zero_code, nearest_normalized


class _TransformersDac:
    """transformers 5.23: DacVectorQuantize."""

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hook = getattr(self.codebook, "_hf_hook", None)  # accelerate's: brings offloaded weights that are read directly
        if hook is not None:
            hook.pre_forward(self.codebook)
        # the original adds |c|^2 where a distance subtracts it: one and the same order among codes of length 1
        indices = nearest_normalized(hidden_states.transpose(1, 2), self.codebook.weight)
        if hook is not None:
            hook.post_forward(self.codebook, ())
        return self.codebook(indices).transpose(1, 2), indices


class _Dac:
    """descript-audio-codec's and SNAC's VectorQuantize."""

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        indices = nearest_normalized(latents.transpose(1, 2), self.codebook.weight)
        return self.decode_code(indices), indices


def _unfit_dac(module: nn.Module) -> str | None:
    if not isinstance(module.codebook, nn.Embedding):
        return f"codebook is {type(module.codebook).__name__}, expected Embedding"
    shape = tuple(module.codebook.weight.shape)
    return (
        None if shape[1] == module.codebook_dim else f"codebook.weight is {shape}, expected [K, {module.codebook_dim}]"
    )


def _unfit_transformers_dac(module: nn.Module) -> str | None:
    if has_zero_code(module.codebook.weight):
        return "a code is zero, and its sign of |c|^2 then matters"
    return _unfit_dac(module)


def _calls_dac(module: nn.Module, vectors: Vectors) -> list[Call]:
    table = module.codebook.weight
    latents, hidden = vectors(table, 2, module.codebook_dim, 32), vectors(table, 2, module.in_proj.in_channels, 32)
    return [Call("decode_latents", (latents,)), Call("forward", (hidden,))]


FAMILIES = (
    Family(
        "transformers DAC",
        ("transformers.models.dac.modeling_dac.DacVectorQuantize",),
        _TransformersDac,
        _unfit_transformers_dac,
        _calls_dac,
    ),
    Family("descript-audio-codec", ("*.VectorQuantize",), _Dac, _unfit_dac, _calls_dac),
)
