"""From a profile to critical sets, semantic components and slices."""

from neusemslice.slicing.baselines import category_slice, global_slice
from neusemslice.slicing.explain import ClassExplanation, Component, NeuronExplanation
from neusemslice.slicing.scores import SCORES, Score, critical_sets, shares
from neusemslice.slicing.semantic import SemanticSlicing, slice_profile
from neusemslice.slicing.size import parameters_in_use
from neusemslice.slicing.slice import SiteShare, Slice

__all__ = [
    "SCORES",
    "ClassExplanation",
    "Component",
    "NeuronExplanation",
    "Score",
    "SemanticSlicing",
    "SiteShare",
    "Slice",
    "category_slice",
    "critical_sets",
    "global_slice",
    "parameters_in_use",
    "shares",
    "slice_profile",
]
