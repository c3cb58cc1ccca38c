"""Values as JSON and tensors, and back: what a state may hold if it is to be saved, and nothing
else.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from functional_sgd.sharded import distributed, local
from loop.columns import Items, Scalars
from loop.disk.runs import run_node, run_of
from loop.history import History, Log

Node: TypeAlias = Any
"""What JSON can say: null, true, numbers and strings stand for themselves, lists for lists, and
{"tag": body} for all else, such as {"tuple": [1, 2]} or {"tensor": "params['weight']"}.
"""

DEPTH = 100
"""How many containers may be in one another."""

_INTEGERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")
_COMPLEX = ("complex32", "complex64", "complex128")
_NAMES = (*_INTEGERS, *_FLOATS, *_COMPLEX)

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}
"""The dtypes of tensors that can be saved, by name."""

Class = TypeVar("Class", bound=type)

_STORABLE: dict[str, type] = {}


def storable(cls: Class) -> Class:
    """Let objects of this dataclass be saved: a decorator, above `@dataclass(frozen=True)`.

    A saved object is known by the name of its class, which must be imported before the object is
    loaded. Raises TypeError for what is no dataclass, or one whose fields are not what it is called
    with, and ValueError if another class of the same name is known already.

    >>> from dataclasses import dataclass
    >>> @storable
    ... @dataclass(frozen=True)
    ... class Counted:
    ...     total: int = 0
    >>> node, tensors = encode(Counted(3), "memory['counted']")
    >>> decode(node, tensors)
    Counted(total=3)
    """
    name = cls.__name__
    if not is_dataclass(cls) or not _takes_its_fields(cls):
        raise TypeError(
            f"storable: {name} must be a dataclass that is called with all of its fields, and only "
            f"them."
        )
    # A class that is defined again, as by a cell of a notebook, takes the place of the former.
    known = _STORABLE.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"storable: there is another {name} already, {known.__module__}.{known.__qualname__}. "
            f"Rename {cls.__module__}.{cls.__qualname__}: saved objects are known by the name of "
            f"their class."
        )
    _STORABLE[name] = cls
    return cls


def _takes_its_fields(cls: type) -> bool:
    """Whether a dataclass is called with all of its fields, and only them."""
    arguments = set(inspect.signature(cls).parameters)
    return arguments == {entry.name for entry in fields(cls)}


storable(History)


def encode(value: object, where: str) -> tuple[Node, dict[str, Tensor]]:
    """A value as JSON, and the tensors in it by where they are, which begins with `where`.

    Raises TypeError, saying where, for anything that `decode` could not give back equal in type and
    value.

    >>> node, tensors = encode({"sums": (torch.tensor(1.5), 2)}, "memory")
    >>> node
    {'dict': [['sums', {'tuple': [{'tensor': "memory['sums'][0]"}, 2]}]]}
    >>> tensors
    {"memory['sums'][0]": tensor(1.5000)}
    """
    tensors: dict[str, Tensor] = {}
    return _node(value, where, tensors, 0), tensors


def decode(node: Node, tensors: Mapping[str, Tensor]) -> Any:
    """The value that was encoded; each tensor is in one place of it. Raises ValueError for a class
    that is not known, or a node that makes no sense.
    """
    return _value(node, dict(tensors))


def _value(node: Node, tensors: dict[str, Tensor]) -> Any:
    """The value of a node; the tensors in it are taken out of those that are left."""
    if isinstance(node, list):
        return [_value(part, tensors) for part in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1 or not node.keys() <= _DECODERS.keys():
        raise ValueError(
            f"expected one of the tags {', '.join(_DECODERS)}, got {', '.join(node) or 'none'}."
        )
    ((tag, body),) = node.items()
    try:
        return _DECODERS[tag](body, tensors)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"what follows the tag {tag} makes no sense: {error}.") from error


def _node(value: Any, where: str, tensors: dict[str, Tensor], depth: int) -> Node:
    if depth > DEPTH:
        raise TypeError(f"save: {where} is more than {DEPTH} containers deep. Is it in itself?")
    # By exact type, here and below: what is read back is never of a subclass.
    if _is_json(value):
        return value
    kind, inner = type(value), depth + 1
    if kind is int:
        # Not in decimal, of which Python reads and writes no more than 4,300 digits.
        return {"int": hex(value)}
    if kind is float:
        return {"float": repr(value)}
    if kind is str:
        return _text(value)
    if kind is list:
        return [_node(part, f"{where}[{at}]", tensors, inner) for at, part in enumerate(value)]
    if kind is tuple:
        return {"tuple": _node(list(value), where, tensors, depth)}
    # As pairs: the keys of a JSON object are text, in which 1 and "1" are the same.
    if kind is dict:
        return {"dict": [_pair(key, part, where, tensors, depth) for key, part in value.items()]}
    if _is_tensor(value):
        tensors[where] = value.detach()
        return {"tensor": where}
    if kind is torch.dtype:
        return {"dtype": text_of(value)}
    if kind is Log:
        return {"log": list(_runs(value, where, tensors, depth))}
    if _STORABLE.get(kind.__name__) is kind:
        nodes: dict[str, Node] = {}
        for entry in fields(kind):
            part, place = getattr(value, entry.name), f"{where}.{entry.name}"
            nodes[entry.name] = _node(part, place, tensors, inner)
        return {"object": [kind.__name__, kind.__module__, nodes]}
    raise TypeError(
        f"save: {where} is {_described(value)}, which cannot be saved. A state may hold None, "
        f"bool, int, float, str, "
        f"dense tensors, dtypes, tuples, lists, dicts, and dataclasses with the decorator "
        f"@storable. Convert it."
    )


def _is_json(value: Any) -> bool:
    """Whether every reader of JSON gets this value back: numbers are finite, integers are exact as
    floats.
    """
    kind = type(value)
    if kind is float:
        return math.isfinite(value)
    return value is None or kind is bool or (kind is int and abs(value) <= 2**53)


def _text(value: str) -> Node:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character, as in the name of a file that is not UTF-8
        return {"str": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _pair(key: object, value: object, where: str, tensors: dict[str, Tensor], depth: int) -> Node:
    if type(key) not in (str, int):
        raise TypeError(
            f"save: {where} has the key {key!r}, which is {_described(key)}. Keys must be str or "
            f"int."
        )
    return [
        _node(key, where, tensors, depth),
        _node(value, f"{where}[{key!r}]", tensors, depth + 1),
    ]


def _runs(log: Log, where: str, tensors: dict[str, Tensor], depth: int) -> Iterator[Node]:
    def node(part: object, place: str) -> Node:
        return _node(part, place, tensors, depth + 1)

    start = 0
    for run in log.runs():
        if isinstance(run, Scalars) and not _is_plain(run.values):
            run = Items(tuple(run))  # which is refused by name
        yield run_node(run, where, start, tensors, node)
        start += len(run)


def _is_tensor(value: Any) -> bool:
    """Whether this is a tensor that can be saved, whole or in pieces."""
    if distributed(value):
        partial = any(placement.is_partial() for placement in value.placements)
        return not partial and _is_plain(local(value))
    return type(value) in (Tensor, torch.nn.Parameter) and _is_plain(value)


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
    return dense and DTYPES.get(text_of(tensor.dtype)) is tensor.dtype


def text_of(dtype: torch.dtype) -> str:
    """Its name: float32."""
    return str(dtype).removeprefix("torch.")


def _described(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    if isinstance(value, Tensor):
        return f"a {name} ({value.dtype}, {value.layout}, on {value.device})"
    return f"of type {name}"


def _tensor(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name}, or it is used twice.")
    # Once, so that no file makes more of a tensor than is in it.
    return tensors.pop(name)


def _dtype(name: str, _: object) -> torch.dtype:
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name}.")
    return found


def _dict(body: list[Node], tensors: dict[str, Tensor]) -> dict[str | int, Any]:
    found = {}
    for key_node, part in body:
        key = _value(key_node, tensors)
        if type(key) not in (str, int):
            raise TypeError(f"a key must be str or int, got {_described(key)}.")
        found[key] = _value(part, tensors)
    return found


def _log(nodes: list[Node], tensors: dict[str, Tensor]) -> Log:
    def take(name: str) -> Tensor:
        return _tensor(name, tensors)

    def value(node: Node) -> Any:
        return _value(node, tensors)

    runs = []
    for node in nodes:
        run = run_of(node, take, value)
        if len(run):
            runs.append(run)
    return Log.of(runs)


def _object(body: list[Node], tensors: dict[str, Tensor]) -> Any:
    name, module, nodes = body
    cls = _STORABLE.get(name)
    if cls is None:
        raise ValueError(
            f"it holds an object of a class {name} that is not known here. Import {module}, where "
            f"it was defined when "
            f"the file was written, or decorate your class {name} with @storable, and load again."
        )
    expected = {entry.name for entry in fields(cls)}
    if nodes.keys() != expected:
        raise ValueError(
            f"it holds a {name} with the fields {', '.join(nodes)}, but {cls.__module__}.{name} "
            f"has "
            f"{', '.join(sorted(expected))}. Load it with the code that wrote it."
        )
    arguments = {key: _value(node, tensors) for key, node in nodes.items()}
    return cls(**arguments)


_DECODERS: Mapping[str, Callable[[Node, dict[str, Tensor]], Any]] = {
    "int": lambda body, _: int(body, 16),
    "float": lambda body, _: float(body),
    "str": lambda body, _: bytes.fromhex(body).decode("utf-8", "surrogatepass"),
    "tuple": lambda body, tensors: tuple(_value(body, tensors)),
    "dict": _dict,
    "tensor": _tensor,
    "dtype": _dtype,
    "log": _log,
    "object": _object,
}
