"""Two networks, two losses, two optimizers and one loop: a GAN that makes points of a ring.

Both networks are parts of one module. Where a loss must not train the other one, its output or its
weights are detached, so the sum of the losses has the gradient of each; `partition` hands each
network to its own optimizer. Sources: Goodfellow et al. 2014; Mescheder et al. 2018 (the penalty).
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from functional_sgd import adam, partition
from functional_sgd.schedules import Cosine
from loop import Batches, DataLoaders, Learner, ParamScheduler, RecordValues, fit, plot_records

SPREAD, PENALTY = 0.05, 0.1
PLACES = torch.view_as_real(torch.polar(torch.ones(8), torch.arange(8) * (torch.pi / 4)))
Scores = dict[str, Tensor]


def ring(count: int) -> Tensor:
    """Points around eight places of the unit circle, (count, 2)."""
    return PLACES[torch.randint(8, (count,))] + SPREAD * torch.randn(count, 2)


def network(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of 64 units."""
    hidden = nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


class GAN(nn.Module):
    """A generator, from 2 random numbers to a point, and a critic, from a point to a score."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = network(2, 2), network(2, 1)

    def forward(self, real: Tensor) -> Scores:
        """What the critic says of both kinds of points, and how steep it is at the real ones."""
        fake = self.generator(torch.randn_like(real))
        real = real.detach().requires_grad_()
        of_real = self.critic(real)
        (slope,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
        fixed = {name: value.detach() for name, value in self.critic.named_parameters()}
        return {
            "real": of_real,
            "slope": slope,
            "fake": self.critic(fake.detach()),  # trains the critic alone
            "fooled": functional_call(self.critic, fixed, (fake,)),  # trains the generator alone
        }


def critic_loss(scores: Scores) -> Tensor:
    """High scores for real points, low ones for others, and a gentle slope."""
    right = softplus(-scores["real"]).mean() + softplus(scores["fake"]).mean()
    return right + PENALTY / 2 * scores["slope"].square().sum(1).mean()


def generator_loss(scores: Scores) -> Tensor:
    """High scores for the points that it makes."""
    return softplus(-scores["fooled"]).mean()


def main(
    epochs: int = 40,
    lr: float = 4e-3,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
) -> None:
    """Train both, print how good the points are, and save a picture.

    Args:
        epochs: Passes over 8192 points.
        lr: That of both optimizers, before it falls.
        seed: Decides the points, first weights and the noise.
        device: Where to train.
        pictures: The folder for the picture.
    """
    torch.set_num_threads(1)  # faster for so small networks
    torch.manual_seed(seed)
    data = DataLoaders(Batches((ring(8192),), 256, shuffle=True))
    adams = {name: adam(mom=0.0, sqr_mom=0.99) for name in ("generator", "critic")}
    opt = partition(adams, {"generator.*": "generator", "critic.*": "critic"})
    schedules = ParamScheduler({"generator.lr": Cosine(lr, 0.0), "critic.lr": Cosine(lr, 0.0)})
    both = RecordValues(
        critic=lambda state: critic_loss(state.pred),
        generator=lambda state: generator_loss(state.pred),
    )

    def loss(scores: Scores) -> Tensor:
        return critic_loss(scores) + generator_loss(scores)  # each network gets its own part

    learner = Learner(GAN(), data, loss, opt, callbacks=[schedules, both])
    end = fit(learner, learner.init(seed, device), epochs)

    fake = learner.load(end).get_submodule("generator")(torch.randn(2000, 2)).detach()
    far, nearest = torch.cdist(fake, PLACES).min(1)
    good = far < 4 * SPREAD
    print(f"{good.float().mean():.0%} are good, at {len(set(nearest[good].tolist()))} of 8 places")

    axes = (figure := Figure(figsize=(5, 5), layout="constrained")).subplots()
    for name, points in {"real": ring(2000), "made": fake}.items():
        axes.plot(*points.T, ".", markersize=2, label=name)
    axes.legend(frameon=False)
    pictures.mkdir(parents=True, exist_ok=True)
    figure.savefig(pictures / "gan.png", dpi=120)
    plot_records(end).savefig(pictures / "gan_losses.png", dpi=120)
    print(f"saved {pictures}/gan.png\nsaved {pictures}/gan_losses.png")


if __name__ == "__main__":
    tyro.cli(main)
