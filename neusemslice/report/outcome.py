"""What the demo measured."""

from __future__ import annotations

from dataclasses import dataclass

from neusemslice.maintain import Cost


@dataclass(frozen=True)
class Outcome:
    """What the demo measured; accuracies are shares of held-out images.

    Attributes:
        data: name of the data.
        trained: accuracy of the model before maintenance.
        restructured: accuracy after restructuring and fine-tuning.
        cost_before, cost_after: of restructuring.
        fine_tuning_epochs: after restructuring.
        shifted_before, shifted_after, shifted_full: accuracy on the shifted digits before
            re-adaptation, after it, and after full fine-tuning with the same steps.
        kept_after: accuracy of the re-adapted model on the digits it was trained on.
        tuned_neurons: share of the neurons that re-adaptation tuned.
        tuned_bytes, full_bytes: optimizer state of re-adaptation and of full fine-tuning.
        untuned_identical: whether every weight outside the tuned rows kept its bits.
        old_original, old_masked: accuracy on the old digits of the original model, and of the
            extended one under the old slice.
        new: accuracy of the extended model on the new digits.
        free_neurons: share of the neurons that extension could train.
        old_identical: whether all old held-out answers kept their bits.
    """

    data: str
    trained: float
    restructured: float
    cost_before: Cost
    cost_after: Cost
    fine_tuning_epochs: int
    shifted_before: float
    shifted_after: float
    shifted_full: float
    kept_after: float
    tuned_neurons: float
    tuned_bytes: int
    full_bytes: int
    untuned_identical: bool
    old_original: float
    old_masked: float
    new: float
    free_neurons: float
    old_identical: bool

    @property
    def regained(self) -> float:
        """Re-adaptation's gain on the shifted digits, as a share of full fine-tuning's."""
        return (self.shifted_after - self.shifted_before) / (
            self.shifted_full - self.shifted_before
        )
