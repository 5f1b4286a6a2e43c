"""Training: `train` and its result."""

from revq.train.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
