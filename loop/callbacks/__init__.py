"""The callbacks, one theme a file. A new callback goes into the file of its theme and into the list
here.
"""

from loop.callbacks.accumulation import GradientAccumulation as GradientAccumulation
from loop.callbacks.accumulation import count_targets as count_targets
from loop.callbacks.activations import ActivationStats as ActivationStats
from loop.callbacks.activations import activation_stats as activation_stats
from loop.callbacks.annealing import AnnealOnGradRatio as AnnealOnGradRatio
from loop.callbacks.annealing import sqr_avg_size as sqr_avg_size
from loop.callbacks.average import AverageParams as AverageParams
from loop.callbacks.average import at_average as at_average
from loop.callbacks.checkpoint import Checkpoint as Checkpoint
from loop.callbacks.collecting import CollectData as CollectData
from loop.callbacks.collecting import RecordValues as RecordValues
from loop.callbacks.control import ModelResetter as ModelResetter
from loop.callbacks.control import ShortEpoch as ShortEpoch
from loop.callbacks.control import SingleBatch as SingleBatch
from loop.callbacks.control import TerminateOnNaN as TerminateOnNaN
from loop.callbacks.freezing import BnFreeze as BnFreeze
from loop.callbacks.freezing import Freeze as Freeze
from loop.callbacks.gradient import GradientClip as GradientClip
from loop.callbacks.inspecting import PrintShapes as PrintShapes
from loop.callbacks.logging import CSVLogger as CSVLogger
from loop.callbacks.logging import JSONLLogger as JSONLLogger
from loop.callbacks.logging import TensorBoardLogger as TensorBoardLogger
from loop.callbacks.logging import TrackerLogger as TrackerLogger
from loop.callbacks.mixing import CutMix as CutMix
from loop.callbacks.mixing import LabelSmoothing as LabelSmoothing
from loop.callbacks.mixing import MixUp as MixUp
from loop.callbacks.precision import MixedPrecision as MixedPrecision
from loop.callbacks.progress import Progress as Progress
from loop.callbacks.recorder import Recorder as Recorder
from loop.callbacks.regularize import RNNRegularizer as RNNRegularizer
from loop.callbacks.saving import SaveModel as SaveModel
from loop.callbacks.saving import at_best as at_best
from loop.callbacks.saving import load_params as load_params
from loop.callbacks.schedule import ParamScheduler as ParamScheduler
from loop.callbacks.showing import ShowGraph as ShowGraph
from loop.callbacks.timing import Profiler as Profiler
from loop.callbacks.timing import Timer as Timer
from loop.callbacks.torch_schedule import TorchScheduler as TorchScheduler
from loop.callbacks.tracking import EarlyStopping as EarlyStopping
from loop.callbacks.tracking import ReduceLROnPlateau as ReduceLROnPlateau

__all__ = [
    "ActivationStats",
    "AnnealOnGradRatio",
    "AverageParams",
    "BnFreeze",
    "CSVLogger",
    "Checkpoint",
    "CollectData",
    "CutMix",
    "EarlyStopping",
    "Freeze",
    "GradientAccumulation",
    "GradientClip",
    "JSONLLogger",
    "LabelSmoothing",
    "MixUp",
    "MixedPrecision",
    "ModelResetter",
    "ParamScheduler",
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
    "SingleBatch",
    "TensorBoardLogger",
    "TerminateOnNaN",
    "Timer",
    "TorchScheduler",
    "TrackerLogger",
    "activation_stats",
    "at_average",
    "at_best",
    "count_targets",
    "load_params",
    "sqr_avg_size",
]
