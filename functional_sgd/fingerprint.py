"""What a function reads besides its arguments, and whether that is as it was: what has been traced
has such numbers in it as constants.
"""

import argparse
import dis
import functools
import sys
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakMethod, ref

from torch import Tensor, nn

PLAIN = (int, float, bool, str, bytes, complex, type(None))
"""What is compared by its value."""

_DEPTH = 4  # of functions, containers and objects within each other
_MANY = 256  # entries of a container, beyond which it is compared by identity and length alone
_DATA = (*PLAIN, Tensor, Mapping, list, tuple, set, SimpleNamespace, argparse.Namespace)


class Identity:
    """An object in a fingerprint: equal to itself alone, and not kept alive by it.

    A hook may be a method of the model, which has the graphs: held, it would keep both for ever.
    """

    def __init__(self, value: Any) -> None:
        self.ref: Callable[[], Any]
        try:
            self.ref = WeakMethod(value) if isinstance(value, MethodType) else ref(value)
        except TypeError:  # such as a dtype, which refers to nothing
            self.ref = lambda: value
        self.hash = hash(value) if isinstance(value, MethodType) else id(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        one = self.ref()
        if not isinstance(other, Identity) or one is None:
            return False
        # Python makes a method anew whenever one is asked for.
        return one == other.ref() if isinstance(one, MethodType) else one is other.ref()


def fingerprint(value: Any, depth: int = _DEPTH) -> Any:
    """What tells whether an object is the same, and what it is made of: the values in a container,
    the attributes of an object, what a function reads besides its arguments.
    """
    if isinstance(value, PLAIN):
        return type(value), repr(value)
    if isinstance(value, Tensor):
        # A tensor of inference mode has no version.
        version = -1 if value.is_inference() else value._version
        return Identity(value), version
    if depth and isinstance(value, (Mapping, list, tuple)) and len(value) > _MANY:
        return Identity(value), len(value)
    if depth and isinstance(value, Mapping):
        return tuple([(repr(key), fingerprint(part, depth - 1)) for key, part in value.items()])
    if depth and isinstance(value, (list, tuple)):
        return type(value), tuple([fingerprint(part, depth - 1) for part in value])
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted(map(repr, value)))
    parts = [fingerprint(part, depth - 1) for part in _parts(value, depth)]
    if depth and isinstance(value, FunctionType) and not _is_of_library(value):
        for part in _globals(value):
            # Loggers and the like are made of what changes by itself, and matters to nobody.
            if _is_of_library(type(part)) and not isinstance(part, (*_DATA, FunctionType)):
                parts.append(Identity(part))
            else:
                parts.append(fingerprint(part, depth - 1))
    return Identity(value), tuple(parts)


def reads_outside(value: Any, depth: int = _DEPTH) -> bool:
    """Whether a function may give something else for the same arguments later on: it, or one that
    it calls, reads a number, a tensor or an object that is none of its arguments.
    """
    if isinstance(value, (type, ModuleType)) or not depth:
        return False
    if isinstance(value, FunctionType):
        return any(reads_outside(one, depth - 1) for one in _may_change(value))
    if _is_of_library(type(value)) and not isinstance(value, (*_DATA, MethodType)):
        # A reduction, say, or a rule: what it calls may be of the user.
        attributes = getattr(value, "__dict__", {}).values()
        return any(callable(one) and reads_outside(one, depth - 1) for one in attributes)
    return True


def _may_change(function: FunctionType) -> list[Any]:
    """What a function reads besides its arguments, without what stays as it is: numbers that are
    defaults, or that a library has made a function with.
    """
    found = [one for one in _defaults(function) if not isinstance(one, (*PLAIN, Tensor))]
    cells = _cells(function)
    if _is_of_library(function):
        return [*found, *(one for one in cells if not isinstance(one, PLAIN))]
    return [*found, *cells, *_globals(function)]


def _parts(value: Any, depth: int) -> list[Any]:
    """What an object may look up while something is made of it, but for what layers have."""
    if not depth or isinstance(value, (nn.Module, type, ModuleType)):
        return []
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        return [*_cells(value), *_defaults(value)]
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return [*attributes, *attributes.values()]


def _defaults(function: FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _cells(function: FunctionType) -> list[Any]:
    """What a function closes over."""
    return [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]


def _globals(function: FunctionType) -> list[Any]:
    """What a function looks up in its module, in order; without modules, classes and functions of
    libraries, which stay what they are.
    """
    found = []
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        settled = isinstance(value, (type, ModuleType)) or value is None
        if not settled and not (callable(value) and _is_of_library(value)):
            found.append(value)
    return found


@functools.lru_cache(maxsize=1024)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The names that code, and the functions within it, look up as globals."""
    # Not `co_names`, which has the names of attributes too.
    names = dict.fromkeys(
        one.argval for one in dis.get_instructions(code) if one.opname in _LOOK_UP
    )
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    return tuple(names)


_LOOK_UP = ("LOAD_GLOBAL", "LOAD_NAME")


def _is_of_library(value: Any) -> bool:
    """Whether a function or a class is one of Python, torch, or of a package that is installed."""
    return _is_library(str(getattr(value, "__module__", None) or "builtins"))


@functools.lru_cache(maxsize=1024)
def _is_library(module: str) -> bool:
    root = module.partition(".")[0]
    if root in ("torch", "functional_sgd", "loop") or root in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018, whose being there is the question
    except ValueError:  # of a function that is made later
        return False
    return True
