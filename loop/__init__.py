"""The training loop as an immutable state machine: callbacks return the next state, or raise a
signal.
"""

from functional_sgd import __version__ as __version__
from loop.callback import Callback as Callback
from loop.callback import Order as Order
from loop.callbacks import ActivationStats as ActivationStats
from loop.callbacks import AnnealOnGradRatio as AnnealOnGradRatio
from loop.callbacks import AverageParams as AverageParams
from loop.callbacks import BnFreeze as BnFreeze
from loop.callbacks import Checkpoint as Checkpoint
from loop.callbacks import CollectData as CollectData
from loop.callbacks import CSVLogger as CSVLogger
from loop.callbacks import CutMix as CutMix
from loop.callbacks import EarlyStopping as EarlyStopping
from loop.callbacks import Freeze as Freeze
from loop.callbacks import GradientAccumulation as GradientAccumulation
from loop.callbacks import GradientClip as GradientClip
from loop.callbacks import JSONLLogger as JSONLLogger
from loop.callbacks import LabelSmoothing as LabelSmoothing
from loop.callbacks import MixedPrecision as MixedPrecision
from loop.callbacks import MixUp as MixUp
from loop.callbacks import ModelResetter as ModelResetter
from loop.callbacks import ParamScheduler as ParamScheduler
from loop.callbacks import PrintShapes as PrintShapes
from loop.callbacks import Profiler as Profiler
from loop.callbacks import Progress as Progress
from loop.callbacks import Recorder as Recorder
from loop.callbacks import RecordValues as RecordValues
from loop.callbacks import ReduceLROnPlateau as ReduceLROnPlateau
from loop.callbacks import RNNRegularizer as RNNRegularizer
from loop.callbacks import SaveModel as SaveModel
from loop.callbacks import ShortEpoch as ShortEpoch
from loop.callbacks import ShowGraph as ShowGraph
from loop.callbacks import SingleBatch as SingleBatch
from loop.callbacks import TensorBoardLogger as TensorBoardLogger
from loop.callbacks import TerminateOnNaN as TerminateOnNaN
from loop.callbacks import Timer as Timer
from loop.callbacks import TorchScheduler as TorchScheduler
from loop.callbacks import TrackerLogger as TrackerLogger
from loop.callbacks import activation_stats as activation_stats
from loop.callbacks import at_average as at_average
from loop.callbacks import at_best as at_best
from loop.callbacks import count_targets as count_targets
from loop.callbacks import load_params as load_params
from loop.callbacks import sqr_avg_size as sqr_avg_size
from loop.data.batches import Batches as Batches
from loop.data.batches import DataLoaders as DataLoaders
from loop.data.batches import class_count as class_count
from loop.data.batches import one_batch as one_batch
from loop.data.collate import padding_collate as padding_collate
from loop.data.loader import dataloaders as dataloaders
from loop.data.loader import make_loader as make_loader
from loop.data.prefetch import Prefetch as Prefetch
from loop.disk.differences import differences as differences
from loop.disk.encoding import storable as storable
from loop.disk.store import StateFileError as StateFileError
from loop.disk.store import load as load
from loop.disk.store import load_latest as load_latest
from loop.disk.store import save as save
from loop.disk.store import save_in as save_in
from loop.history import History as History
from loop.layer_groups import layer_groups as layer_groups
from loop.layer_groups import spread as spread
from loop.learner import Learner as Learner
from loop.metrics import accuracy as accuracy
from loop.metrics import error_rate as error_rate
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
from loop.ranks.batch_norm import global_batch_norm as global_batch_norm
from loop.ranks.exporting import export_dcp as export_dcp
from loop.ranks.gathering import gathering as gathering
from loop.ranks.parallel import parallel as parallel
from loop.ranks.sharding import shard as shard
from loop.ranks.sharding import unshard as unshard
from loop.run.events import events as events
from loop.run.signals import Cancel as Cancel
from loop.run.signals import CancelBackward as CancelBackward
from loop.run.signals import CancelBatch as CancelBatch
from loop.run.signals import CancelEpoch as CancelEpoch
from loop.run.signals import CancelFit as CancelFit
from loop.run.signals import CancelStep as CancelStep
from loop.run.signals import CancelTrain as CancelTrain
from loop.run.signals import CancelValidate as CancelValidate
from loop.run.signals import SignalError as SignalError
from loop.state import State as State
from loop.tools.ablate import ablate as ablate
from loop.tools.interpret import sample_losses as sample_losses
from loop.tools.lr_find import LRFind as LRFind
from loop.tools.lr_find import lr_find as lr_find
from loop.tools.refresh import refresh_buffers as refresh_buffers
from loop.tools.show import show_loop as show_loop
from loop.tools.summary import summary as summary
from loop.training.batch import first_batch as first_batch
from loop.training.fine_tune import fine_tune as fine_tune
from loop.training.fit import fit as fit
from loop.training.fit import fit_one_cycle as fit_one_cycle
from loop.training.fit import predict as predict
from loop.training.fit import trace as trace
from loop.training.fit import validate as validate
from loop.training.recipes import fit_flat_cos as fit_flat_cos
from loop.training.recipes import fit_sgdr as fit_sgdr
from loop.training.recipes import overfit_one_batch as overfit_one_batch

__all__ = [
    "ActivationStats",
    "AnnealOnGradRatio",
    "AverageParams",
    "Batches",
    "BnFreeze",
    "CSVLogger",
    "Callback",
    "Cancel",
    "CancelBackward",
    "CancelBatch",
    "CancelEpoch",
    "CancelFit",
    "CancelStep",
    "CancelTrain",
    "CancelValidate",
    "Checkpoint",
    "CollectData",
    "CutMix",
    "DataLoaders",
    "EarlyStopping",
    "Freeze",
    "GradientAccumulation",
    "GradientClip",
    "History",
    "JSONLLogger",
    "LRFind",
    "LabelSmoothing",
    "Learner",
    "MixUp",
    "MixedPrecision",
    "ModelResetter",
    "Order",
    "ParamScheduler",
    "Prefetch",
    "PrintShapes",
    "Profiler",
    "Progress",
    "RNNRegularizer",
    "RecordValues",
    "Recorder",
    "ReduceLROnPlateau",
    "SaveModel",
    "ShortEpoch",
    "ShowGraph",
    "SignalError",
    "SingleBatch",
    "State",
    "StateFileError",
    "TensorBoardLogger",
    "TerminateOnNaN",
    "Timer",
    "TorchScheduler",
    "TrackerLogger",
    "__version__",
    "ablate",
    "accuracy",
    "activation_stats",
    "at_average",
    "at_best",
    "class_count",
    "count_targets",
    "dataloaders",
    "differences",
    "error_rate",
    "events",
    "export_dcp",
    "fine_tune",
    "first_batch",
    "fit",
    "fit_flat_cos",
    "fit_one_cycle",
    "fit_sgdr",
    "gathering",
    "global_batch_norm",
    "layer_groups",
    "load",
    "load_latest",
    "load_params",
    "lr_find",
    "make_loader",
    "one_batch",
    "overfit_one_batch",
    "padding_collate",
    "parallel",
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
    "predict",
    "refresh_buffers",
    "sample_losses",
    "save",
    "save_in",
    "shard",
    "show_loop",
    "spread",
    "sqr_avg_size",
    "storable",
    "summary",
    "trace",
    "unshard",
    "validate",
]
