"""Where a module has its tensors, and under which names."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

# A plain tuple, since each call makes one for each tensor of the module: a NamedTuple takes ten
# times as long to make (264 ns to 26).
Place: TypeAlias = tuple[dict[str, Any], str, str, bool]
"""(the dict of a layer, the key in it, the name of the tensor for it, whether it is a buffer)"""


class Inside(NamedTuple):
    """What a module has."""

    places: list[Place]
    found: list[Tensor]  # what is in them
    training: bool  # whether any layer is


def inside(module: nn.Module, given: Mapping[str, Tensor]) -> Inside:
    """All places of a module, with the names of the tensors that are given for them."""
    places: list[Place] = []
    found: list[Tensor] = []
    first_name: dict[int, str] = {}  # of tied tensors, which are one
    training = False
    for prefix, layer in module.named_modules():
        # Any layer: a frozen BatchNorm in eval mode writes nothing, its neighbour in training does.
        training = training or layer.training
        buffers = layer._buffers
        # The dicts themselves, because setattr refuses a plain tensor in the place of a Parameter.
        for store in (layer._parameters, buffers):
            for key, value in store.items():
                if value is not None:
                    path = f"{prefix}.{key}" if prefix else key
                    name = first_name.setdefault(id(value), path)
                    places.append((store, key, name, store is buffers))
                    found.append(value)
    # The usual names need no second walk through the module.
    if given.keys() != set(first_name.values()):
        names = _other_names(module, given, first_name)
        for number, value in enumerate(found):
            store, key, _, is_buffer = places[number]
            places[number] = (store, key, names[id(value)], is_buffer)
    return Inside(places, found, training)


def _other_names(
    module: nn.Module, given: Mapping[str, Tensor], first_name: Mapping[int, str]
) -> dict[int, str]:
    """The names under which tensors are given; tied ones may go by any of theirs."""
    known: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    unknown = [name for name in given if name not in known]
    names: dict[int, str] = {}
    for name in given.keys() & known.keys():
        other = names.setdefault(id(known[name]), name)
        if given[other] is not given[name]:
            raise RuntimeError(
                f"{type(module).__name__}: {other!r} and {name!r} are one tensor there, but two "
                f"were given. Leave one of them out."
            )
    missing = [name for number, name in first_name.items() if number not in names]
    if missing or unknown:
        raise RuntimeError(
            f"{type(module).__name__}: expected a tensor for each of its own, but {missing} are "
            f"missing and {unknown} are unknown. Pass those that split(module) gives."
        )
    return names
