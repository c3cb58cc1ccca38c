"""Shapes for a whole run, warm-up and all."""

from functional_sgd.schedules.joining import Join, Stretch
from functional_sgd.schedules.position import Between
from functional_sgd.schedules.shapes import Constant, Cosine, Linear

__all__ = [
    "flat_cosine",
    "linear_one_cycle",
    "one_cycle",
    "one_cycle_in_steps",
    "three_cosines",
    "warm_restarts",
    "warmup_cosine",
    "warmup_stable_decay",
]


def one_cycle(
    maximum: float, div: float = 25.0, div_final: float = 1e5, pct_start: float = 0.25
) -> Join:
    """Warm up along a cosine from maximum / div to maximum, then down to maximum / div_final.

    `pct_start` is the share of the warm-up. Source: Smith 2018, in fastai's form.

    >>> one_cycle(1e-3)(0.25)
    0.001
    """
    return three_cosines(pct_start, maximum / div, maximum, maximum / div_final)


def three_cosines(pct_start: float, start: float, middle: float, end: float) -> Join:
    """Along a cosine from start to middle over the first `pct_start`, and along another to the end.

    >>> three_cosines(0.25, 0.95, 0.85, 0.95)(0.25)
    0.85
    """
    return Join((pct_start, 1 - pct_start), (Cosine(start, middle), Cosine(middle, end)))


def flat_cosine(maximum: float, div_final: float = 1e5, pct_start: float = 0.75) -> Join:
    """Flat at the maximum for `pct_start` of the way, then along a cosine to maximum / div_final.

    >>> flat_cosine(0.1)(0.5)
    0.1
    """
    return three_cosines(pct_start, maximum, maximum, maximum / div_final)


def warm_restarts(maximum: float, cycles: int = 3, cycle_mult: float = 2.0) -> Join:
    """Cosines from the maximum to 0, one after the other, each `cycle_mult` times as long as the
    one before.

    Source: SGDR (Loshchilov and Hutter 2017).

    >>> warm_restarts(1.0, cycles=3)(1 / 7)
    1.0
    """
    lengths = [cycle_mult**i for i in range(cycles)]
    shares = tuple(length / sum(lengths) for length in lengths)
    return Join(shares, (Cosine(maximum, 0.0),) * cycles)


def linear_one_cycle(
    maximum: float,
    div: float = 25.0,
    div_final: float = 25e4,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
) -> Join:
    """Straight up from maximum / div to the maximum, straight down again, and on to maximum /
    div_final.

    It is at the top at `pct_start` of the way, and back at maximum / div at `pct_final`. Source:
    Smith 2018; optax.linear_onecycle_schedule, whose final_div_factor is div_final / div.

    >>> schedule = linear_one_cycle(1.0, div=4.0, div_final=8.0, pct_start=0.25, pct_final=0.5)
    >>> [schedule(k / 4) for k in range(5)]
    [0.25, 1.0, 0.25, 0.1875, 0.125]
    """
    low, last = maximum / div, maximum / div_final
    parts = (Linear(low, maximum), Linear(maximum, low), Linear(low, last))
    return Join((pct_start, pct_final - pct_start, 1 - pct_final), parts)


def one_cycle_in_steps(
    maximum: float,
    steps: int,
    div: float = 25.0,
    div_final: float = 25e4,
    pct_start: float = 0.3,
    shape: Between = Cosine,
    three_phase: bool = False,
) -> Stretch:
    """`one_cycle` as torch counts it: the last step is at the end, the top is one step early.

    top = pct_start * steps - 1;  end = steps - 1;  in three phases maximum / div again at 2 * top

    `shape` is Cosine or Linear. Over steps, for `scheduled(opt, lr=...)`. Source:
    torch.optim.lr_scheduler.OneCycleLR, whose final_div_factor is div_final / div. Its momentum is
    `Stretch(three_cosines(top / end, 0.95, 0.85, 0.95), end)`. Raises ValueError where the top, or
    the end of the second phase, is not one of the steps.

    >>> schedule = one_cycle_in_steps(1.0, steps=5, div=2.0, pct_start=0.6)
    >>> [round(schedule(step), 3) for step in range(5)]
    [0.5, 0.75, 1.0, 0.5, 0.0]
    """
    top, end = pct_start * steps - 1, steps - 1
    latest_top = end / 2 if three_phase else end
    if steps < 2 or not 0 <= top <= latest_top:
        raise ValueError(
            f"one_cycle_in_steps: expected phases within the steps, got steps={steps} and "
            f"pct_start={pct_start}, which put the top at step {top:g} of 0 to {end}. Give at "
            f"least 1 / pct_start steps, or another pct_start."
        )
    low, last = maximum / div, maximum / div_final
    if three_phase:
        shares: tuple[float, ...] = (top / end, top / end, 1 - 2 * top / end)
        rest = [shape(maximum, low), shape(low, last)]
    else:
        shares = (top / end, 1 - top / end)
        rest = [shape(maximum, last)]
    return Stretch(Join(shares, (shape(low, maximum), *rest)), end)


def warmup_cosine(peak: float, warmup: float = 0.1, start: float = 0.0, end: float = 0.0) -> Join:
    """From start straight up to the peak over the share `warmup`, then along a cosine to the end.

    A warm-up of 100 steps in a run of 1000 is `warmup_cosine(peak, 100 / 1000)` where the share of
    the run is what counts (ParamScheduler, `scheduled(opt, steps=1000)`), and
    `Stretch(warmup_cosine(peak, 100 / 1000), 1000)` where steps are. Source: Goyal et al. 2017;
    Loshchilov and Hutter 2017; optax.warmup_cosine_decay_schedule.

    >>> [warmup_cosine(1.0, warmup=0.5)(k / 4) for k in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return Join((warmup, 1 - warmup), (Linear(start, peak), Cosine(peak, end)))


def warmup_stable_decay(
    peak: float,
    warmup: float = 0.05,
    decay: float = 0.2,
    start: float = 0.0,
    end: float = 0.0,
    shape: Between = Linear,
) -> Join:
    """From start straight up over the share `warmup`, flat at the peak, down over the last `decay`.

    `shape(peak, end)` is the way down: Linear, Cosine, one_minus_sqrt. The flat part can go on for
    as long as one likes: in steps, `warm_up(100, Constant(peak))` is all of it but the decay.
    Source: WSD (Hu et al. 2024, MiniCPM); Zhai et al. 2022.

    >>> [warmup_stable_decay(1.0, warmup=0.25, decay=0.5)(k / 8) for k in (0, 1, 2, 4, 6, 8)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    stable = 1 - warmup - decay
    # Without a flat part it may be off by rounding: 1 - 0.8 - 0.2 is -6e-17.
    if -1e-9 < stable < 0:
        stable = 0.0
    parts = (Linear(start, peak), Constant(peak), shape(peak, end))
    return Join((warmup, stable, decay), parts)
