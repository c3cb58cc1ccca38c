"""Whether values are of the types that a record's annotations say."""

import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_fields(record: type, values: Mapping[str, object], where: str = "") -> None:
    """Raise ValueError, naming the first, for values that are not of the types of the record's
    fields.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Row:
    ...     epoch: int
    >>> check_fields(Row, {"epoch": "one"})
    Traceback (most recent call last):
    ...
    ValueError: epoch is of type str, expected int.
    """
    # State imports Learner for type checkers only, so the name is unknown at run time.
    hints = get_type_hints(record, localns={"Learner": object})
    for name, value in values.items():
        _check(value, hints[name], f"{where}{name}")


def _check(value: object, hint: Any, where: str) -> None:
    if hint is Any:
        return
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if not any(_fits(value, option) for option in arguments):
            raise _other(value, hint, where)
    elif not _is(value, origin or hint):
        raise _other(value, hint, where)
    elif isinstance(value, Mapping) and arguments:
        for key, part in value.items():
            _check(key, arguments[0], f"a key of {where}")
            _check(part, arguments[1], f"{where}[{key!r}]")
    elif isinstance(value, (tuple, list)) and arguments:
        fixed = origin is tuple and Ellipsis not in arguments
        if fixed and len(value) != len(arguments):
            raise ValueError(f"{where} has {len(value)} entries, expected {hint}.")
        for index, part in enumerate(value):
            _check(part, arguments[index if fixed else 0], f"{where}[{index}]")
    elif is_dataclass(value) and not arguments:
        check_fields(type(value), vars(value), f"{where}.")


def _fits(value: object, hint: Any) -> bool:
    try:
        _check(value, hint, "")
    except ValueError:
        return False
    return True


def _is(value: object, kind: Any) -> bool:
    """isinstance, but True is no number, and a whole number will do for a float."""
    if kind in (int, float):
        return type(value) is int or (kind is float and type(value) is float)
    return isinstance(value, kind)


def _other(value: object, hint: Any, where: str) -> ValueError:
    expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
    return ValueError(f"{where} is of type {type(value).__name__}, expected {expected}.")
