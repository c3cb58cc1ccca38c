"""What a rule that is run on symbols draws its random numbers from."""

from dataclasses import dataclass

from functional_sgd.fusion.arithmetic import Node
from functional_sgd.randomness import factor_of


@dataclass(frozen=True)
class SymbolKey:
    """The key of a leaf, as symbols."""

    words: tuple[Node, Node]
    for_short: tuple[Node, Node]
    position: int

    def bits(self, like: Node, draw: int) -> tuple[Node, Node]:
        """Two columns of random numbers, as `LeafKey.bits` makes them."""
        graph = self.words[0].graph
        # The arguments are scalars, but every element draws its own number.
        made = [graph.node(op, *self.words, draw, element=True) for op in ("uniform", "tail")]
        return made[0], made[1]

    def short(self, like: Node, draw: int) -> Node:
        """A column of short random numbers, as `LeafKey.short` makes them."""
        graph = self.words[0].graph
        drawn = graph.node("short", *self.for_short, element=True)
        return graph.node("multiple", drawn, factor_of(self.position, draw))
