"""The source of the methods that a family replaces, as a fingerprint, and the fingerprints of the versions that were read."""

import ast
import hashlib
import inspect
import textwrap
from typing import Any

from torch import nn

from revq_kernels.interop.facts import codes_in, function_of, named_codes
from revq_kernels.interop.families.family import Family

UNKNOWN = "unknown version: checked by behavior only"

KNOWN = frozenset(
    {
        "4a1e2a6819236a84",  # vae.VectorQuantizer
        "0d8261b82fe53f3c",  # modeling_chameleon.ChameleonVQVAEVectorQuantizer
        "491e618984e20d72",  # modeling_glm_image.GlmImageVQVAEVectorQuantizer
        "d4c9be93d3b98c1d",  # modeling_emu3.Emu3VQVAEVectorQuantizer
        "2cf91fcf90f92b4c",  # ibq.VectorQuantizer2
        "464d682819762c31",  # taming.VectorQuantizer2
        "035ee714dd29b9c7",  # simvq.SimVQ
        "557b464725c651a8",  # simvq.SimVQ1D
        "4dcc5631e84a7569",  # llamagen.VectorQuantizer
        "e37569fd66436e23",  # maskgit_vqgan.VectorQuantizer
        "c7345d6458fd4db6",  # taming.VectorQuantizer
        "55f28d78afd40d5c",  # titok.VectorQuantizer
        "1cc2a2d9889346e7",  # unitok.VectorQuantizer
        "4bf2e726d1a0e7bc",  # maskgit_vqgan.VectorQuantizer
        "27b309b4252ab157",  # maskbit.SimpleVectorizer
        "eb4832eeb4000ad0",  # unitok.VectorQuantizer
        "09a35301dd9d97bd",  # var.VectorQuantizer2
        "c0bcff9f293ca475",  # var.VectorQuantizer2
        "47749a1d1d321299",  # vector_quantize_pytorch.Codebook
        "8c22277f703bbc51",  # sim_vq.SimVQ
        "005be28a7b742503",  # modeling_encodec.EncodecEuclideanCodebook
        "a98d755aad1114e6",  # modeling_mimi.MimiEuclideanCodebook
        "1c085278ec71a599",  # core_vq.EuclideanCodebook
        "b048c5cee23915ec",  # modeling_dac.DacVectorQuantize
        "fdff099125997fc6",  # dac.VectorQuantize
    }
)
"""Fingerprints of diffusers 0.42, transformers 5.23, encodec 0.1.1, vector-quantize-pytorch 1.32, and of the quantizers that
tests/third_party_quantizers restates."""


def is_known(module: nn.Module, family: Family) -> bool:
    """Whether the source of the replaced methods, and of what they call in the same file, is that of a known version."""
    return fingerprint(type(module), family) in KNOWN


def fingerprint(kind: type, family: Family) -> str:
    """16 hexadecimal digits of the source of the replaced methods of a class and of the functions of its file that they call.

    Comments, docstrings and layout do not count.  "" if the source cannot be read (a compiled module).
    """
    methods = named_codes(kind)
    texts: dict[str, str] = {}
    pending = [(name, methods.get(name)) for name in family.replaced]
    while pending:
        name, function = pending.pop()
        if function is None or name in texts:
            continue
        try:
            texts[name] = _text(function)
        except (OSError, TypeError, SyntaxError):
            return ""
        for called in {name for code in codes_in(function.__code__) for name in code.co_names}:
            other = function_of(function.__globals__.get(called))
            same_file = other is not None and other.__module__ == function.__module__
            pending.append((called, methods.get(called) or (other if same_file else None)))
    whole = "\n".join(f"{name}: {texts[name]}" for name in sorted(texts))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _text(function: Any) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
