"""From a model and data to a profile."""

from neusemslice.profiling.batching import LabelsOf, batches
from neusemslice.profiling.profile import METRICS, LossOf, Profile, profile

__all__ = ["METRICS", "LabelsOf", "LossOf", "Profile", "batches", "profile"]
