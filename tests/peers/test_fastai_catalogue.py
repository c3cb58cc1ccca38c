"""FR4: the callbacks that fastai ships, and what does the same here."""

import importlib
import inspect
import pkgutil
import warnings

import pytest

import loop
from tests.peers.fastai_runs import callbacks

SAME = {
    "ActivationStats": "ActivationStats",
    "BnFreeze": "BnFreeze",
    "CSVLogger": "CSVLogger",
    "CollectDataCallback": "CollectData",
    "CutMix": "CutMix",
    "EarlyStoppingCallback": "EarlyStopping",
    "FetchPredsCallback": "predict",
    "GatherPredsCallback": "sample_losses",
    "GradientAccumulation": "GradientAccumulation",
    "GradientClip": "GradientClip",
    "LRFinder": "lr_find",
    "MixUp": "MixUp",
    "MixedPrecision": "MixedPrecision",
    "ModelResetter": "ModelResetter",
    "NonNativeMixedPrecision": "MixedPrecision",
    "ParamScheduler": "ParamScheduler",
    "ProgressCallback": "Progress",
    "RNNCallback": "RNNRegularizer",
    "RNNRegularizer": "RNNRegularizer",
    "Recorder": "Recorder",
    "ReduceLROnPlateau": "ReduceLROnPlateau",
    "SaveModelCallback": "SaveModel",
    "ShortEpochCallback": "ShortEpoch",
    "ShowGraphCallback": "ShowGraph",
    "SkipToEpoch": "fit",
    "TensorBoardCallback": "TensorBoardLogger",
    "TerminateOnNaNCallback": "TerminateOnNaN",
    "TrainEvalCallback": "fit",
}
"""fastai's callback -> the public name of what does it here; `resume` of fit skips, and the machine
sets the mode.
"""

OTHERWISE = {
    "Callback HookCallback MixHandler TensorBoardBaseCallback TrackerCallback": "a base class",
    "CastToTensor": "undoes tensor subclasses, which only fastai has",
    "ChannelsLast": "model.to(memory_format=torch.channels_last) before Learner",
    "ModelToHalf": "model.half() before Learner",
    "MCDropoutCallback": "a bracket around_predict that lets Dropout train, and a seed a sample",
    "TensorBoardProjectorCallback": "embeddings can be written by a callback of one's own",
}
"""fastai's callbacks -> why there is none of that name here."""

TRACKERS = ("azureml", "captum", "comet", "neptune", "wandb")  # see TrackerLogger


def shipped() -> dict[str, str]:
    """Callback -> module, of all of fastai.callback and fastai.learner."""
    found: dict[str, str] = {}
    package = importlib.import_module("fastai.callback")
    modules = [
        f"fastai.callback.{module.name}" for module in pkgutil.iter_modules(package.__path__)
    ]
    for name in ["fastai.learner", *modules]:
        if name.rpartition(".")[2] in TRACKERS:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            members = vars(importlib.import_module(name))
        for member, value in members.items():
            if (
                inspect.isclass(value)
                and issubclass(value, callbacks.Callback)
                and value.__module__ == name
            ):
                found[member] = name
    return found


def test_fr4_every_shipped_callback_is_listed() -> None:
    assert {*shipped()} == {*SAME, *(name for names in OTHERWISE for name in names.split())}


@pytest.mark.parametrize("name", sorted({*SAME.values(), "TrackerLogger"}))
def test_fr4_what_does_the_same_is_there(name: str) -> None:
    assert callable(getattr(loop, name))
