"""Write a new optimizer: a rule of your own among the library's, tried as a function, checked, and
raced.
"""

import torch
import tyro
from torch import Tensor, nn

from functional_sgd import (
    adamw,
    average_grad,
    chain,
    elementwise,
    rename,
    sgd_step,
    value_and_grad,
    weight_decay,
)


@elementwise
def cautious(update: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Stand still where update and gradient of this step disagree (Liang et al. 2024)."""
    return dict(update=torch.where(update * grad > 0, update, 0.0))


@elementwise
def move_by_sign(param: Tensor, update: Tensor, *, lr: float) -> dict[str, Tensor]:
    """Go one step of size lr, uphill or downhill."""
    return dict(param=param - lr * update.sign())


two_speeds = chain(
    average_grad,  # a fast average, which becomes the update
    cautious,
    # and a slow one of that
    rename(average_grad, grad="update", grad_avg="slow_avg", mom="slow_mom"),
    sgd_step,
    lr=0.3,
    slow_mom=0.5,
)


def main(steps: int = 200, seed: int = 0, device: str = "cpu") -> None:
    """Fit a small network to a sine with three optimizers.

    Args:
        steps: Updates for each of them.
        seed: Decides the first weights.
        device: Where to train.
    """
    update, grad = torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0])
    print("a rule is a function:", cautious(update, grad), "\n")
    two_speeds.describe()

    torch.manual_seed(seed)
    x = torch.linspace(-3, 3, 64, device=device)[:, None]
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
    start = {name: value.detach() for name, value in model.named_parameters()}

    def loss_fn(params: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), x.sin())

    optimizers = {
        "two speeds": two_speeds,
        "sign": chain(weight_decay, average_grad, move_by_sign, lr=3e-3, wd=0.01),
        "adamw": adamw(lr=1e-2),
    }
    print()
    for name, opt in optimizers.items():
        params, state = start, opt.init(start)
        for _ in range(steps):
            _, grads = value_and_grad(loss_fn)(params)
            params, state = opt(params, grads, state)
        print(f"{name:>10}: loss {loss_fn(params).item():.5f} after {steps} steps")


if __name__ == "__main__":
    tyro.cli(main)
