"""galore against pytorch_optimizer's, which finds singular vectors in float32, and anew a step
earlier than the authors: here only once.
"""

import torch

import functional_sgd as fs
from tests.peers.peers import peer

SHAPES = ((6, 4), (3, 5), (4,))
STEPS = 12


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def test_same_params_as_pytorch_optimizer() -> None:
    theirs = [torch.nn.Parameter(start) for start in drawn(0)]
    low = dict(rank=2, update_proj_gap=1000, scale=0.25, projection_type="std")
    optimizer = peer("pytorch_optimizer").GaLore(
        [{"params": theirs, **low}], lr=0.1, eps=1e-6, weight_decay=0.3
    )
    opt = fs.galore(0.1, wd=0.3, rank=2, basis_every=1000)
    params, state = drawn(0), opt.init(drawn(0))
    for number in range(STEPS):
        grads = drawn(1 + number)
        for leaf, grad in zip(theirs, grads, strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
        params, state = opt(params, grads, state)
    for one, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-7)
