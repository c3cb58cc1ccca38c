"""A chain made schedule-free: steps and their average at once, instead of a rate that falls."""

from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import step_from_fast, train_between, weigh_steps


def schedule_free(opt: Chain, mom: float = 0.9, wd: float = 0.0, lr_power: float = 2.0) -> Chain:
    """The optimizer on fast weights, with gradients taken between them and their average.

    fast = opt(fast - lr * wd * param, grad);  average = average + c * (fast - average)

    param = mom * average + (1 - mom) * fast;  c = w / (sum of all w), w = (largest lr)**lr_power

    Train with params as ever, and a rate that stays (after a warm-up, if there is one: `scheduled`,
    outside); evaluate with `average_of(state)`, as `fit` does by itself. `mom` in [0, 1) takes the
    place of the optimizer's own momentum, which should have none; `wd` decays the fast weights by
    the params, where the gradient is taken. Half-precision parameters have float32 weights. AdamW
    and SGD in this form are `schedule_free_adamw` and `schedule_free_sgd`.

    Raises ValueError if the optimizer has no `lr`, or a hyper of the same name as one of these.
    Source: Defazio et al. 2024, "The Road Less Scheduled".

    >>> import torch
    >>> from functional_sgd import average_of, sgd
    >>> opt, params = schedule_free(sgd(lr=1.0), mom=0.5), torch.tensor([4.0])
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     params, state = opt(params, torch.tensor([1.0]), state)  # fast: 3, 2; average: 3, 2.5
    >>> params, average_of(state)
    (tensor([2.2500]), tensor([2.5000]))
    """
    if not isinstance(opt, Chain):
        raise TypeError(
            f"schedule_free: expected a chain of rules that ends with sgd_step, got {opt!r}. "
            f"Put a partition or a schedule outside: scheduled(schedule_free(opt), lr=...)."
        )
    names = {*opt.hyper, *opt.required}
    if "lr" not in names:
        raise ValueError(
            f"schedule_free: {opt!r} has no lr, by which steps are weighed. End it with sgd_step."
        )
    for name in ("mom", "wd", "lr_power"):
        if name in names:
            raise ValueError(
                f"schedule_free: has a hyper {name!r}, and so has {opt!r}. One must go."
            )
    given = {**opt.given, "mom": mom, "wd": wd, "lr_power": lr_power}
    return chain(weigh_steps, step_from_fast, *opt.rules, train_between, **given)
