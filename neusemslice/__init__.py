"""Find which neurons of a trained network carry which classes, and maintain the network with it.

import neusemslice as nss

profile = nss.profile(model, loader)
slicing = nss.slice(profile, threshold=0.95)
small = nss.restructure(model, slicing, calibration=loader, macs=0.5)
fitted = nss.readapt(model, slicing, new_loader, budget=0.2)
grown = nss.extend(model, slicing, new_classes_loader)
"""

from neusemslice import ops, optim
from neusemslice.maintain import extend, readapt, restructure
from neusemslice.profiling import Profile, Profiler, profile
from neusemslice.report import (
    CapacityCurve,
    Faithfulness,
    ThetaCurve,
    capacity_curve,
    faithfulness,
    theta_curve,
)
from neusemslice.slicing import SemanticSlicing, Slice, category_slice, global_slice
from neusemslice.slicing import slice_profile as slice  # noqa: A004

__all__ = [
    "CapacityCurve",
    "Faithfulness",
    "Profile",
    "Profiler",
    "SemanticSlicing",
    "Slice",
    "ThetaCurve",
    "capacity_curve",
    "category_slice",
    "extend",
    "faithfulness",
    "global_slice",
    "ops",
    "optim",
    "profile",
    "readapt",
    "restructure",
    "slice",
    "theta_curve",
]
