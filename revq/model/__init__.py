"""Separate because it names the public part of this room: the ReVQ model and its normalizer and rectifier."""

from revq.model.normalizer import LatentStatistics, Normalizer
from revq.model.rectifier import build_rectifier
from revq.model.revq import ReVQ, ReVQOutput

__all__ = ["LatentStatistics", "Normalizer", "ReVQ", "ReVQOutput", "build_rectifier"]
