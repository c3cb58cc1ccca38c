"""Pictures: each function returns a matplotlib Figure, which notebooks show and `savefig` saves."""

from loop.plots.batch import plot_batch as plot_batch
from loop.plots.layers import plot_activation_histograms as plot_activation_histograms
from loop.plots.layers import plot_activations as plot_activations
from loop.plots.layers import plot_near_zero as plot_near_zero
from loop.plots.predictions import plot_confusion_matrix as plot_confusion_matrix
from loop.plots.predictions import plot_top_losses as plot_top_losses
from loop.plots.runs import plot_losses as plot_losses
from loop.plots.runs import plot_lr_find as plot_lr_find
from loop.plots.runs import plot_predictions as plot_predictions
from loop.plots.runs import plot_records as plot_records
from loop.plots.runs import plot_schedule as plot_schedule
from loop.plots.runs import plot_schedules as plot_schedules

__all__ = [
    "plot_activation_histograms",
    "plot_activations",
    "plot_batch",
    "plot_confusion_matrix",
    "plot_losses",
    "plot_lr_find",
    "plot_near_zero",
    "plot_predictions",
    "plot_records",
    "plot_schedule",
    "plot_schedules",
    "plot_top_losses",
]
