"""eight_bit: the same rules, whose slots are kept in 8 bits."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from functional_sgd.blocks import block_scale, count_of, decode, encode
from functional_sgd.chaining import Chain, Part, chain, part
from functional_sgd.errors import did_you_mean
from functional_sgd.randomness import DRAWS, LeafKey
from functional_sgd.rule import Rule, renamed
from functional_sgd.sharded import distributed, full
from functional_sgd.signature import KEY
from functional_sgd.trial import writes_of

CODES, SCALES = "_codes", "_scales"
"""What the two slots are called that a slot becomes, after its name."""

DRAW = DRAWS // 2
"""The first of the draws that round slots, above those that rules make themselves."""


@overload
def eight_bit(rules: Rule, *slots: str) -> Rule: ...
@overload
def eight_bit(rules: Part, *slots: str) -> Part: ...
@overload
def eight_bit(rules: Chain, *slots: str) -> Chain: ...
def eight_bit(rules: Rule | Part | Chain, *slots: str) -> Rule | Part | Chain:
    """The same rules, which keep slots in 8 bits: a quarter of the memory, and of what is moved.

    A slot `x` becomes two: `x_codes`, a byte for each element, and `x_scales`, a power of two for
    each block of 256. A code is a small float relative to its scale, with 4 bits of exponent, 3 of
    mantissa and a sign; where a rule declares that its slot is never negative (`positive=`), with 5
    bits of exponent and none, and then what is not 0 never becomes 0. Values are rounded up or down
    by chance, so that the mean of what is kept is the value, and means that move by a thousandth of
    themselves in a step still move. Rules see what they have written before it is rounded, as for
    slots of any dtype. What is not finite makes its whole block so.

    `slots` are names of slots of elementwise rules; without any, all are meant that begin at zero,
    which means of gradients do and copies of params do not, but for those that are needed as they
    are: to be evaluated, read by an earlier rule, or reduced to a number. The results of a rule, a
    part or a chain are of the same kind. Raises ValueError for a name that no rule keeps, or that
    is needed as it is.

    A derivative does not go through what has been kept. Slots of leaves that are DTensors are
    decoded as a whole on every process.

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", with their blocks;
    the format is that of "OCP Microscaling" (2023): small floats, and a power of two for a block.

    >>> from functional_sgd import adamw
    >>> opt = eight_bit(adamw(lr=0.1))
    >>> state = opt.init(torch.ones(1000))
    >>> {name: (slot.dtype, tuple(slot.shape)) for name, slot in state.items() if "sqr" in name}
    {'sqr_avg_codes': (torch.uint8, (1000,)), 'sqr_avg_scales': (torch.float32, (4,))}
    """
    flat = [rules] if isinstance(rules, Rule) else rules.rules
    known: list[str] = []
    for rule in flat:
        if rule.scope == "elementwise":
            known += rule.slots
    for name in slots:
        if name not in known:
            raise ValueError(
                f"eight_bit: no elementwise rule keeps a slot {name!r}. {did_you_mean(name, known)}"
            )
    before: set[str] = set()
    for rule in flat:
        before.update(map(rule.outer, rule.declared.before))
    made = [_converted(rule, slots, before) for rule in flat]
    if isinstance(rules, Rule):
        return made[0]
    if isinstance(rules, Chain):
        return chain(*made, **rules.given)
    return part(*made, **rules.given)


def codes_of(param: Tensor) -> Tensor:
    """Codes of zeros."""
    return torch.zeros_like(param, dtype=torch.uint8)


def scales_of(param: Tensor) -> Tensor:
    """Scales of zeros."""
    return param.new_zeros(count_of(param.numel()), dtype=torch.float32)


def _converted(rule: Rule, slots: tuple[str, ...], before: set[str]) -> Rule:
    """The rule with these slots, by the chain's names, in 8 bits; if there are none, all that begin
    at zero and can be. `before` are slots that are read before their owner has run.
    """
    if rule.scope != "elementwise":
        return rule
    chosen = []
    for slot, start in rule.starts.items():
        named = rule.outer(slot) in slots
        meant = named or (not slots and start is torch.zeros_like)
        if not meant or not callable(start):  # a number of the tree begins as a number
            continue
        reason = _needed(rule, slot, before)
        if reason and named:
            raise ValueError(
                f"eight_bit: rule {rule!r} {reason}, so {rule.outer(slot)!r} must stay as it is. "
                f"Name other slots, or none."
            )
        if not reason:
            chosen.append(slot)
    return _with_codes(rule, tuple(chosen)) if chosen else rule


def _needed(rule: Rule, slot: str, before: set[str]) -> str:
    """Why a slot must stay as it is."""
    reductions = rule.signature.reductions.values()
    if any(slot in reduction.columns for reduction in reductions):
        return "makes a number of it"
    if slot == rule.declared.evaluate:
        return "has it evaluated"
    return "keeps what is read before it has run" if rule.outer(slot) in before else ""


def _with_codes(rule: Rule, chosen: tuple[str, ...]) -> Rule:
    """The rule with some slots, by the function's own names, in 8 bits."""
    # _EightBit calls the function by its own parameter names; the new rule does the renaming.
    plain = renamed(rule, {})
    kept = {slot: start for slot, start in rule.starts.items() if slot not in chosen}
    names = dict(rule.renames)
    writes = [*writes_of(plain, frozenset(plain.columns))]
    for slot in chosen:
        kept[slot + CODES], kept[slot + SCALES] = codes_of, scales_of
        writes += [slot + CODES, slot + SCALES]
        if rule.outer(slot) != slot:
            names[slot + CODES] = rule.outer(slot) + CODES
            names[slot + SCALES] = rule.outer(slot) + SCALES
    positive = [slot for slot in rule.declared.positive if slot not in chosen]
    blocks = [(slot + CODES, slot + SCALES) for slot in chosen]
    declared = replace(
        rule.declared, writes=tuple(writes), positive=tuple(positive), blocks=tuple(blocks)
    )
    return Rule(_EightBit(plain, chosen), "blockwise", kept, declared, names)


# Not a closure: rules made with it can be compared and pickled.
@dataclass(frozen=True)
class _EightBit:
    """The function of a rule whose slots are decoded before it, and encoded after it."""

    rule: Rule
    slots: tuple[str, ...]

    def __post_init__(self) -> None:
        # Rule reads these attributes from its function, and an instance has none of its own.
        name = f"eight_bit({self.rule.name})"
        for attribute in ("__name__", "__qualname__"):
            object.__setattr__(self, attribute, name)

    @property
    def __signature__(self) -> inspect.Signature:
        found = inspect.signature(self.rule.function)
        parameters: list[inspect.Parameter] = []
        for name, parameter in found.parameters.items():
            if name not in self.slots:
                parameters.append(parameter)
                continue
            for ending in (CODES, SCALES):
                parameters.append(parameter.replace(name=name + ending))
        # Encoding rounds at random, so a key is needed even if the rule does not draw.
        if KEY not in found.parameters:
            parameters.append(inspect.Parameter(KEY, inspect.Parameter.KEYWORD_ONLY))
        return found.replace(parameters=parameters)

    def __call__(self, *args: Any, **named: Any) -> Mapping[str, Any]:
        given = {**dict(zip(self.__signature__.parameters, args, strict=False)), **named}
        key = given[KEY] if self.rule.signature.random else given.pop(KEY)
        if any(map(distributed, given.values())):
            # Blocks are those of the whole leaf.
            given = {name: full(value) for name, value in given.items()}
            # So random numbers are drawn for all elements, not for the local piece.
            key = replace(key, leaf=None) if isinstance(key, LeafKey) else key
        columns = [given[name] for name in self.rule.columns if name in given]
        for slot in self.slots:
            codes, scales = given.pop(slot + CODES), given.pop(slot + SCALES)
            value = decode(codes, scales, self._signed(slot))
            # Codes are of float32; rules see them in the precision of the leaf.
            wide = columns and isinstance(value, Tensor)
            given[slot] = value.to(columns[0].dtype) if wide else value
        written = dict(self.rule.function(**given))
        for number, slot in enumerate(self.slots):
            scales = block_scale(written[slot])
            written[slot + SCALES] = scales
            written[slot + CODES] = encode(
                written[slot], scales, key, DRAW + number, self._signed(slot)
            )
        return written

    def _signed(self, slot: str) -> bool:
        return slot not in self.rule.declared.positive
