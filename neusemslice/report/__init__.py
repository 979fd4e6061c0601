"""Tables and figures."""

from neusemslice.report.faithfulness import Faithfulness, faithfulness
from neusemslice.report.figures import plot_outcome, plot_slicing, plot_theta_curve
from neusemslice.report.outcome import Outcome
from neusemslice.report.outcome_table import print_outcome
from neusemslice.report.readapted import print_readapted, readapted_table
from neusemslice.report.tables import print_profile, print_slice, print_slicing
from neusemslice.report.theta import ThetaCurve, theta_curve

__all__ = [
    "Faithfulness",
    "Outcome",
    "ThetaCurve",
    "faithfulness",
    "plot_outcome",
    "plot_slicing",
    "plot_theta_curve",
    "print_outcome",
    "print_profile",
    "print_readapted",
    "print_slice",
    "print_slicing",
    "readapted_table",
    "theta_curve",
]
