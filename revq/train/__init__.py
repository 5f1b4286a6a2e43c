"""Separate because it names the public part of this room: `train`, its result, and the reader of its log."""

from revq.train.loop import TrainResult, train
from revq.train.track import read_records

__all__ = ["TrainResult", "read_records", "train"]
