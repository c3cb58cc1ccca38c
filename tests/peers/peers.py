"""Import what we compare ourselves with."""

import importlib
import warnings
from types import ModuleType

import pytest


def fastai_module(name: str) -> ModuleType:
    """A module of fastai; whoever asks for it at the top of a file is skipped where there
    is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what fastai imports
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip("fastai is not installed", allow_module_level=True)


def peer(name: str) -> ModuleType:
    """A library, or a module of one; the file or the test that asks is skipped where there is
    none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
