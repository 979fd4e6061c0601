"""Tables and figures."""

from neusemslice.report.capacity import CapacityCurve, capacity_curve
from neusemslice.report.extended import (
    capacity_table,
    extended_table,
    left_table,
    print_extended,
)
from neusemslice.report.faithfulness import Faithfulness, faithfulness
from neusemslice.report.figures import plot_outcome, plot_slicing, plot_theta_curve
from neusemslice.report.outcome import Outcome
from neusemslice.report.outcome_table import print_outcome
from neusemslice.report.planned import plan_table
from neusemslice.report.readapted import print_readapted, readapted_table
from neusemslice.report.restructured import (
    ClassAccuracy,
    class_accuracy,
    components_table,
    print_restructured,
    refits_table,
    removed_components,
    restructured_table,
    widths_table,
)
from neusemslice.report.tables import print_profile, print_slice, print_slicing
from neusemslice.report.theta import ThetaCurve, theta_curve

__all__ = [
    "CapacityCurve",
    "ClassAccuracy",
    "Faithfulness",
    "Outcome",
    "ThetaCurve",
    "capacity_curve",
    "capacity_table",
    "class_accuracy",
    "components_table",
    "extended_table",
    "faithfulness",
    "left_table",
    "plan_table",
    "plot_outcome",
    "plot_slicing",
    "plot_theta_curve",
    "print_extended",
    "print_outcome",
    "print_profile",
    "print_readapted",
    "print_restructured",
    "print_slice",
    "print_slicing",
    "readapted_table",
    "refits_table",
    "removed_components",
    "restructured_table",
    "theta_curve",
    "widths_table",
]
