"""From a model and data to a profile."""

from neusemslice.profiling.batching import LabelsOf, batches, first_inputs
from neusemslice.profiling.profile import METRICS, Profile
from neusemslice.profiling.profiler import Profiler
from neusemslice.profiling.sweep import LossOf, profile

__all__ = [
    "METRICS",
    "LabelsOf",
    "LossOf",
    "Profile",
    "Profiler",
    "batches",
    "first_inputs",
    "profile",
]
