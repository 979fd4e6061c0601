"""Tables and figures."""

from neusemslice.report.figures import plot_outcome, plot_slicing
from neusemslice.report.outcome import Outcome
from neusemslice.report.table import print_outcome

__all__ = ["Outcome", "plot_outcome", "plot_slicing", "print_outcome"]
