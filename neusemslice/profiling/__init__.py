"""From a model and data to a profile."""

from typing import TYPE_CHECKING, Any

from neusemslice.profiling.batching import LabelsOf, batches, first_inputs, unlabelled
from neusemslice.profiling.cka import LayerSimilarity, LinearCKA, cka
from neusemslice.profiling.deeplift import Contributions, deeplift
from neusemslice.profiling.estimating import Estimate, estimate
from neusemslice.profiling.profile import METRICS, Profile
from neusemslice.profiling.profiler import Profiler
from neusemslice.profiling.sweep import LossOf, profile

if TYPE_CHECKING:
    from neusemslice.profiling.lightning import LightningProfiler as LightningProfiler
    from neusemslice.profiling.trainer import TrainerProfiler as TrainerProfiler

# Without the callbacks: a star import must not need their frameworks.
__all__ = [
    "METRICS",
    "Contributions",
    "Estimate",
    "LabelsOf",
    "LayerSimilarity",
    "LinearCKA",
    "LossOf",
    "Profile",
    "Profiler",
    "batches",
    "cka",
    "deeplift",
    "estimate",
    "first_inputs",
    "profile",
    "unlabelled",
]


def __getattr__(name: str) -> Any:
    """The callbacks, imported when asked for, because they need frameworks of their own."""
    if name == "TrainerProfiler":
        from neusemslice.profiling.trainer import TrainerProfiler

        return TrainerProfiler
    if name == "LightningProfiler":
        from neusemslice.profiling.lightning import LightningProfiler

        return LightningProfiler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
