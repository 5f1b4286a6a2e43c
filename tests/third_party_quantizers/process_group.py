"""The part of a training repository's ``dist`` module that its quantizer asks."""

import torch.distributed


def initialized() -> bool:
    """Whether this process belongs to a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
