"""Why a run has ended before its time, where reports find it."""

from loop.state import State

ENDED = "ended"
"""Where `state.memory` has who has ended the last run early, where and why; nothing if nobody
has said.
"""


def ended(state: State, who: str) -> State:
    """The state to end a run with: `who` says who does it, where and why.

    >>> ended(State({}, {}, {}, {}), "Mine at batch 3 of epoch 0: enough").memory
    {'ended': 'Mine at batch 3 of epoch 0: enough'}
    """
    return state.remember(ENDED, who)
