"""What a metric of another library is made of: the metrics in it, and what they keep that is no
state.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

Marks: TypeAlias = dict[str, tuple[object, int]]
"""Name -> (a tensor, its version) or (a container, its length): whether one of them was changed."""

_PLAIN = (bool, int, float, complex, str, type(None))


def parts(metric: Any) -> dict[str, Any]:
    """The metric, and those that it is made of, by their path in it."""
    found = {"": metric}
    if isinstance(metric, nn.Module):
        for path, module in metric.named_modules():
            # A collection within shows the states of its members as its own.
            if hasattr(module, "metric_state") and not hasattr(module, "items"):
                found[path] = module
    return found


def check_parts(metric: Any) -> None:
    """Raise TypeError for metrics that are no submodules of the one that they are in: nothing says
    where they are.
    """
    for part in parts(metric).values():
        for name, value in _attributes(part).items():
            inside: Iterable[object] = [value]
            if isinstance(value, (list, tuple)):
                inside = value
            elif isinstance(value, dict) and name != "_modules":
                inside = value.values()
            if any(hasattr(one, "metric_state") for one in inside):
                raise TypeError(
                    f"TorchMetric: {type(part).__name__} expected the metrics in it to be "
                    f"submodules, got {name} of type {type(value).__name__}. Keep them in a "
                    f"torch.nn.ModuleList or ModuleDict."
                )


def plain_changes(part: Any, fresh: Any) -> dict[str, object]:
    """The numbers, names and None of a metric that are no states, where they are not as when it
    was made.
    """
    new, states = _attributes(fresh), part.metric_state
    changes: dict[str, object] = {}
    for name, value in _attributes(part).items():
        if name in states or name == "_update_count":
            continue
        if isinstance(value, _PLAIN) and (name not in new or new[name] != value):
            changes[name] = value
    return changes


def outside_of_states(metric: Any) -> dict[str, Marks]:
    """Marks by which one sees whether a tensor or a container of a metric that is no state was
    changed, for every part.
    """
    found: dict[str, Marks] = {}
    for path, part in parts(metric).items():
        states = part.metric_state
        marks: Marks = {}
        for name, value in {**_attributes(part), **getattr(part, "_buffers", {})}.items():
            if name in states:
                continue
            if isinstance(value, Tensor) and not value.is_inference():
                marks[name] = (value, value._version)
            elif isinstance(value, (list, dict, set)):
                marks[name] = (value, len(value))
        found[path] = marks
    return found


def _attributes(part: object) -> dict[str, Any]:
    """The attributes that an object has of its own; none where its class has slots."""
    return getattr(part, "__dict__", {})
