"""The query of the process group that VAR's and UniTok's quantizers make: separate because a test replaces it."""

import torch.distributed


def initialized() -> bool:
    """Whether this process belongs to a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
