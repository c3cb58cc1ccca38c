"""Values as JSON and tensors: whatever goes in comes out equal in value and type, or is refused by
name.
"""

import collections
import dataclasses
import enum
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loop import History, storable
from loop.callbacks.recorder import Record
from loop.disk.encoding import DEPTH, DTYPES, decode, encode
from loop.history import Log
from tests.loop.saving import identical


@storable
@dataclasses.dataclass(frozen=True)
class Pair:
    """Two things."""

    left: Any
    right: Any = None


def there_and_back(value: Any) -> Any:
    node, tensors = encode(value, "memory")
    return decode(json.loads(json.dumps(node, allow_nan=False)), tensors)


def tensor_of(dtype: str, shape: list[int], data: bytes) -> Tensor:
    """A tensor with these bytes in it, again and again; booleans have only the two that are
    booleans.
    """
    size = math.prod(shape) * DTYPES[dtype].itemsize
    raw = torch.tensor([data[index % len(data)] for index in range(size)], dtype=torch.uint8)
    return (
        (raw % 2).bool().reshape(shape)
        if dtype == "bool"
        else raw.view(DTYPES[dtype]).reshape(shape)
    )


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
)
TENSORS = st.builds(
    tensor_of,
    st.sampled_from([name for name in DTYPES if name != "complex32"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.binary(min_size=1, max_size=24),
)
LEAVES = (
    SCALARS
    | TENSORS
    | st.sampled_from([torch.float32, torch.bfloat16, torch.int64])
    | st.just(Record())
)
KEYS = st.text(max_size=4) | st.integers(-(2**60), 2**60)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(inner, max_size=3)
    return (
        few
        | few.map(tuple)
        | few.map(Log)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.builds(Pair, inner, inner)
    )


@given(st.recursive(LEAVES, containers, max_leaves=12))
@settings(max_examples=300, derandomize=True, database=None, deadline=None)
def test_any_nesting_comes_back(value: Any) -> None:
    assert identical(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        *(math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 1e22, 1.0),
        *(2**53, 2**53 + 1, -(2**53) - 1, 2**64, 10**5000, -(10**400), True, 1),
        *("", "\x00", "\ud800", "\ud83d\ude00", "\U0001f600", "é\n\"'"),
        *({1: "a", "1": "b"}, {"b": 1, "a": 2}, {2**80: None}, {"\udcff": 0}),
        *({}, (), [], ((),), [[]]),
    ],
    ids=lambda value: (
        f"int of {value.bit_length()} bits" if isinstance(value, int) else repr(value)[:20]
    ),
)
def test_values_at_the_edges(value: Any) -> None:
    assert identical(there_and_back(value), value)


def test_one_is_not_true_and_not_a_float() -> None:
    assert [type(part) for part in there_and_back([1, True, 1.0])] == [int, bool, float]


def test_a_dict_keeps_its_order_and_the_kinds_of_its_keys() -> None:
    value = {"b": 1, 1: 2, "a": 3, "1": 4}
    assert list(there_and_back(value).items()) == list(value.items())


def test_a_string_that_looks_like_a_tag_is_a_string() -> None:
    value = {"tensor": "params", "tuple": ["int"], "float": "nan"}
    assert identical(there_and_back(value), value)


def test_tensors_are_named_by_where_they_are() -> None:
    value = {"a": [torch.tensor(1), (torch.tensor(2),)], 3: Record(average=torch.tensor(4.0))}
    _, tensors = encode(value, "memory")
    assert list(tensors) == ["memory['a'][0]", "memory['a'][1][0]", "memory[3].average"]


def test_a_tensor_is_detached_and_a_parameter_is_a_tensor() -> None:
    found = there_and_back(
        [torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2]
    )
    assert [type(part) for part in found] == [Tensor, Tensor]
    assert not any(part.requires_grad for part in found)


# Logs


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "bfloat16", "int64", "bool", "complex64", "float8_e5m2"]
)
def test_a_log_of_0d_tensors_is_one_tensor(dtype: str) -> None:
    log = Log([torch.tensor(float(value)).to(DTYPES[dtype]) for value in (0, 1, 0)])
    node, tensors = encode(log, "losses")
    assert node == {"log": [{"scalars": "losses[0:3]"}]}
    assert tensors["losses[0:3]"].shape == (3,)
    assert identical(decode(node, tensors), log)


def test_a_log_of_numbers_is_a_list() -> None:
    log = Log([0.1, 2, 0.3, None])
    assert encode(log, "lr") == ({"log": [{"items": [0.1, 2, 0.3, None]}]}, {})
    assert identical(there_and_back(log), log)


def test_a_log_of_everything() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0, requires_grad=True)
    log = Log(
        [
            one,
            two.detach(),
            1.0,
            math.nan,
            2**80,
            one,
            one.double(),
            torch.ones(1),
            {"a": one},
            None,
            one.half(),
        ]
    )
    node, tensors = encode(log, "log")
    assert list(tensors) == [
        "log[0:2]",
        "log[5:6]",
        "log[6:7]",
        "log[7]",
        "log[8]['a']",
        "log[10:11]",
    ]
    assert identical(decode(node, tensors), log)


def test_a_log_of_tracked_tensors_is_detached() -> None:
    assert not any(
        item.requires_grad for item in there_and_back(Log([torch.ones((), requires_grad=True)] * 2))
    )


def test_what_a_log_does_not_see_is_not_saved() -> None:
    short = Log().append(1)
    short.append(2)
    assert list(there_and_back(short)) == [1]


def test_a_log_that_came_back_can_grow() -> None:
    assert list(there_and_back(Log([1, 2])).append(3)) == [1, 2, 3]


def test_a_history_comes_back() -> None:
    history = History(
        Log([torch.tensor(1.0)]), {"lr": Log([0.1])}, ({"epoch": 0, "accuracy": None},)
    )
    assert identical(there_and_back(history), history)


# Refusals


class Loud(str):
    pass


class Colour(enum.IntEnum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass(frozen=True)
class Unknown:
    value: int = 0


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1, 2}, "of type set"),
        (b"bytes", "of type bytes"),
        (1j, "of type complex"),
        (np.float64(0.1), "of type numpy.float64"),
        (np.ones(2), "of type numpy.ndarray"),
        (Loud("a"), "Loud"),
        (Colour.RED, "Colour"),
        (Point(1, 2), "Point"),
        (collections.OrderedDict(a=1), "of type collections.OrderedDict"),
        (Unknown(), "Unknown"),
        (Pair, "of type type"),
        (torch.device("cpu"), "of type torch.device"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, device="meta"), "on meta"),
        (lambda: 0, "of type function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_by_name(value: Any, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        encode({"x": [value]}, "memory")
    assert str(caught.value).startswith("save: memory['x'][0] is ")
    assert kind in str(caught.value)


@pytest.mark.parametrize("key", [True, 1.0, None, (1, 2), Loud("a")])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(
        TypeError, match=r"save: memory\['x'\] has the key .* Keys must be str or int"
    ):
        encode({"x": {key: 1}}, "memory")


def test_what_is_in_a_log_or_an_object_is_refused_too() -> None:
    with pytest.raises(TypeError, match=r"save: losses\[2\] is of type set"):
        encode(Log([1, 2.0, {1}]), "losses")
    with pytest.raises(TypeError, match=r"save: memory\.right is of type set"):
        encode(Pair(1, {2}), "memory")


def test_a_list_that_is_in_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append((ring,))
    with pytest.raises(TypeError, match=f"more than {DEPTH} containers deep. Is it in itself?"):
        encode(ring, "memory")


def test_the_deepest_nesting() -> None:
    value: Any = 0
    for level in range(DEPTH):
        value = ((value,), {"a": value}, [value], Pair(value))[level % 4]
    assert identical(there_and_back(value), value)
    with pytest.raises(TypeError, match="containers deep"):
        encode([value], "memory")


# Classes


def test_a_class_that_is_not_known_is_an_error_that_says_what_to_import() -> None:
    node = {"object": ["Gone", "my.callbacks", {"total": 1}]}
    with pytest.raises(
        ValueError, match="class Gone that is not known here. Import my.callbacks, .*@storable"
    ):
        decode(node, {})


def test_a_class_whose_fields_have_changed() -> None:
    node = {"object": ["Pair", "somewhere", {"left": 1, "middle": 2}]}
    with pytest.raises(
        ValueError, match="a Pair with the fields left, middle, but .*Pair has left, right"
    ):
        decode(node, {})


def test_a_node_of_another_kind() -> None:
    for node in ({"pickle": "x"}, {}, {"tuple": [], "list": []}):
        with pytest.raises(ValueError, match="expected one of the tags int, float"):
            decode(node, {})


def test_a_tensor_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"there is no tensor memory\[0\]"):
        decode({"tensor": "memory[0]"}, {})


def test_a_second_class_of_a_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match="there is another Pair already, tests.loop.disk.test_encoding.Pair"
    ):
        storable(
            dataclasses.make_dataclass("Pair", ["left"], namespace={"__module__": "elsewhere"})
        )
    assert identical(there_and_back(Pair(1)), Pair(1))


def test_a_class_may_be_defined_again() -> None:
    """As a cell of a notebook does."""

    def define() -> type:
        @storable
        @dataclasses.dataclass(frozen=True)
        class Again:
            value: int

        return Again

    old, new = define(), define()
    assert type(there_and_back(new(1))) is new
    with pytest.raises(TypeError, match="cannot be saved"):
        encode(old(1), "memory")


@pytest.mark.parametrize(
    "kind", ["no dataclass", "field that is not passed", "argument that is no field"]
)
def test_what_cannot_be_rebuilt_is_no_storable(kind: str) -> None:
    bad = {
        "no dataclass": type("Plain", (), {}),
        "field that is not passed": dataclasses.make_dataclass(
            "A", [("a", int, dataclasses.field(init=False))]
        ),
        "argument that is no field": dataclasses.make_dataclass(
            "B", [("b", dataclasses.InitVar[int])]
        ),
    }
    with pytest.raises(
        TypeError, match="must be a dataclass that is called with all of its fields"
    ):
        storable(bad[kind])


NONSENSE = {
    "dtype": "load",
    "tuple": 3,
    "int": 5,
    "float": [],
    "str": 3,
    "dict": [[[1], 2]],
    "tensor": [],
    "log": 3,
}


@pytest.mark.parametrize(
    ("tag", "body"), [*NONSENSE.items(), ("dtype", 3), ("object", ["History", "loop", 3])]
)
def test_nodes_that_make_no_sense_are_value_errors(tag: str, body: Any) -> None:
    """torch.load is a function, no dtype."""
    with pytest.raises(ValueError, match=r"makes no sense|there is no dtype"):
        decode({tag: body}, {})
