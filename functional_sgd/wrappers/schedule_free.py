"""Schedule-free learning: steps and their average at once, instead of a rate that falls."""

import torch
from torch import Tensor

from functional_sgd.chaining import Chain, chain
from functional_sgd.ranges import Decay, NonNegative
from functional_sgd.reduction import root
from functional_sgd.rule import elementwise
from functional_sgd.rules.averaging import average_sqr_grad
from functional_sgd.rules.scaling import rectification
from functional_sgd.rules.stepping import sgd_step
from functional_sgd.trial import rename


@elementwise(lr_max=0.0, weight_sum=0.0, share=0.0)
def weigh_steps(
    *,
    lr: NonNegative,
    lr_max: Tensor,
    weight_sum: Tensor,
    share: Tensor,
    lr_power: NonNegative = 2.0,
) -> dict[str, Tensor]:
    """The share that this step has in an average of steps, weighed by the largest lr so far.

    lr_max = max(lr_max, lr);  weight = lr_max**lr_power
    weight_sum = weight_sum + weight;  share = weight / weight_sum

    All three are numbers of the whole tree, so lr must be one number.

    >>> zero = torch.tensor(0.0)
    >>> weigh_steps(lr=0.5, lr_max=zero, weight_sum=torch.tensor(0.75), share=zero)
    {'lr_max': tensor(0.5000), 'weight_sum': tensor(1.), 'share': tensor(0.2500)}
    """
    lr_max = torch.where(lr_max > lr, lr_max, lr)
    weight = lr_max**lr_power
    weight_sum = weight_sum + weight
    share = weight / torch.where(weight_sum == 0, 1.0, weight_sum)
    return dict(lr_max=lr_max, weight_sum=weight_sum, share=share)


@elementwise(before=("fast",))
def step_from_fast(
    param: Tensor, fast: Tensor, *, lr: NonNegative, wd: NonNegative = 0.0
) -> dict[str, Tensor]:
    """Let the rules after this one move the fast weights, decayed by the params.

    param = fast - lr * wd * param

    Reads fast as train_between left it in the step before, param (where the gradient was taken),
    lr and wd >= 0.

    >>> step_from_fast(torch.tensor([2.0]), torch.tensor([1.0]), lr=0.5, wd=0.5)
    {'param': tensor([0.5000])}
    """
    return dict(param=fast - lr * wd * param)


@elementwise(evaluate="average", fast=torch.clone, average=torch.clone)
def train_between(
    param: Tensor, fast: Tensor, average: Tensor, *, share: Tensor, mom: Decay = 0.9
) -> dict[str, Tensor]:
    """Average the fast weights, and go on from a point between them and their average.

    fast = param;  average = (1 - share) * average + share * fast
    param = mom * average + (1 - mom) * fast

    Reads param, share (of weigh_steps) and mom in [0, 1); keeps fast and average, which start as
    the parameter. The average is what is to be evaluated.

    >>> one, two, four = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
    >>> train_between(two, one, four, share=torch.tensor(0.5), mom=0.5)
    {'fast': tensor([2.]), 'average': tensor([3.]), 'param': tensor([2.5000])}
    """
    average = (1 - share) * average + share * param
    return dict(fast=param, average=average, param=mom * average + (1 - mom) * param)


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


def schedule_free_adamw(
    lr: float = 2.5e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Chain:
    """Adam with schedule-free averaging in the place of momentum, and decoupled weight decay.

    Source: Defazio et al. 2024; numbers of schedulefree.AdamWScheduleFree without warm-up.

    >>> schedule_free_adamw(lr=0.01).hyper
    {'lr': 0.01, 'lr_power': 2.0, 'wd': 0.0, 'sqr_mom': 0.999, 'eps': 1e-08, 'mom': 0.9}
    """
    inner = chain(
        average_sqr_grad, scale_by_debiased_rms, sgd_step, lr=lr, sqr_mom=sqr_mom, eps=eps
    )
    return schedule_free(inner, mom=mom, wd=wd)


def schedule_free_sgd(lr: float = 1.0, mom: float = 0.9, wd: float = 0.0) -> Chain:
    """SGD with schedule-free averaging in the place of momentum.

    `wd` is an L2 penalty where the gradient is taken.

    Source: Defazio et al. 2024; numbers of schedulefree.SGDScheduleFree without warm-up.

    >>> schedule_free_sgd(lr=0.5).hyper
    {'lr': 0.5, 'lr_power': 2.0, 'wd': 0.0, 'mom': 0.9}
    """
    return schedule_free(chain(sgd_step, lr=lr), mom=mom, wd=wd)


def schedule_free_radam(
    lr: float = 2.5e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Chain:
    """schedule_free_adamw whose lr rises by itself as its mean square can be trusted: it needs no
    warm-up.

    rate = nu * lr, with nu of RAdam;  0 in the first steps (four for sqr_mom = 0.999), which only
    fill the mean square

    Source: Defazio et al. 2024; Liu et al. 2020; numbers of schedulefree.RAdamScheduleFree with
    silent_sgd_phase=True, its default.

    >>> print(*schedule_free_radam().rules[:2])
    rectify_lr rename(weigh_steps, lr='rate')
    >>> print(*schedule_free_radam().rules[3:5])
    average_sqr_grad scale_by_debiased_rms
    """
    front = (rectify_lr, rename(weigh_steps, lr="rate"), rename(step_from_fast, lr="rate"))
    inner = (average_sqr_grad, scale_by_debiased_rms, rename(sgd_step, lr="rate"))
    hypers = dict(mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return chain(*front, *inner, train_between, lr=lr, **hypers)


@elementwise(rate=0.0)
def rectify_lr(
    *, lr: NonNegative, rate: Tensor, step: Tensor, sqr_mom: Decay = 0.99
) -> dict[str, Tensor]:
    """The lr that RAdam moves with: 0 as long as it does not trust its mean square.

    rate = nu * lr where r > 4, else 0;  r and nu as in `rectification`

    A number of the whole tree, so lr must be one number.

    >>> early = torch.tensor(4.0, dtype=torch.float64)
    >>> rectify_lr(lr=0.5, rate=torch.tensor(0.0), step=early, sqr_mom=0.999)
    {'rate': tensor(0., dtype=torch.float64)}
    """
    trusted, nu = rectification(step, sqr_mom, threshold=4.0)
    return dict(rate=torch.where(trusted, nu * lr, 0.0))


@elementwise
def scale_by_debiased_rms(
    update: Tensor,
    sqr_avg: Tensor,
    *,
    step: Tensor,
    sqr_mom: Decay = 0.99,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """scale_by_rms with debias for the squares alone, so that the chain has no `mom`.

    update = update / (sqrt(sqr_avg / (1 - sqr_mom**step)) + eps)

    >>> four, eight = torch.tensor([4.0]), torch.tensor([8.0])
    >>> scale_by_debiased_rms(four, eight, step=torch.tensor(1), sqr_mom=0.5, eps=0.0)
    {'update': tensor([1.])}
    """
    return dict(update=update / (root(sqr_avg / (1 - sqr_mom**step)) + eps))
