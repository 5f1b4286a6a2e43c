"""Imports third-party modules where torchaudio is absent: separate because it holds no quantizer.

These modules import torchaudio for tasks other than quantization.
"""

import importlib.util
import sys
from types import ModuleType


def imported(name: str) -> ModuleType:
    """Import a module; if torchaudio is not installed, an empty module replaces it during the import."""
    missing = "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is None
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        return importlib.import_module(name)
    finally:
        if missing:
            del sys.modules["torchaudio"]
