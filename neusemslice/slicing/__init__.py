"""From a profile to critical sets, semantic components and slices."""

from neusemslice.slicing.scores import SCORES, Score, critical_sets, shares
from neusemslice.slicing.semantic import SemanticSlicing, slice_profile
from neusemslice.slicing.slice import Slice

__all__ = [
    "SCORES",
    "Score",
    "SemanticSlicing",
    "Slice",
    "critical_sets",
    "shares",
    "slice_profile",
]
