"""The callbacks, one theme a file. A new callback goes into the file of its theme and into the list here."""

from loop.callbacks.control import ModelResetter as ModelResetter
from loop.callbacks.control import SingleBatch as SingleBatch
from loop.callbacks.control import TerminateOnNaN as TerminateOnNaN
from loop.callbacks.gradient import GradientClip as GradientClip
from loop.callbacks.progress import Progress as Progress
from loop.callbacks.recorder import Recorder as Recorder
from loop.callbacks.schedule import ParamScheduler as ParamScheduler
