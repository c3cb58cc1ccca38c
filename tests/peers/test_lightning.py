"""Lightning: our optimizers in configure_optimizers, with checkpoints and schedulers."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import adamw, to_torch
from tests.comparing import assert_close, assert_same
from tests.peers.peers import peer

lightning = peer("lightning")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the library warns of (workers, loggers) is not ours to answer for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
    """A linear layer, trained with one optimizer."""

    def __init__(self, ours: bool = True, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.ours = nn.Linear(3, 2), ours
        self.automatic_optimization = not manual

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        if self.ours:
            optimizer: Any = to_torch(adamw(lr=0.1), self.named_parameters())
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def data() -> Any:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=4)


def trained(module: Any, folder: Path, epochs: int, resume: str | None = None) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        gradient_clip_val=0.05 if module.automatic_optimization else None,
    )
    trainer.fit(module, data(), ckpt_path=resume)
    return trainer


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


@pytest.mark.parametrize("manual", [False, True])
def test_trains_like_the_optimizer_of_torch(manual: bool, tmp_path: Path) -> None:
    """With Lightning's clipping and a scheduler of torch, and by hand."""
    ours, theirs = Module(True, manual), Module(False, manual)
    trainer = trained(ours, tmp_path, 2)
    trained(theirs, tmp_path, 2)
    assert_close(values(ours), values(theirs), rtol=1e-5, atol=1e-7)
    assert trainer.optimizers[0].opt_state["step"].tolist() == [4, 4]


def test_a_checkpoint_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole, first, second = Module(), Module(), Module()
    trained(whole, tmp_path, 3)
    path = str(tmp_path / "one.ckpt")
    trained(first, tmp_path, 1).save_checkpoint(path)
    trained(second, tmp_path, 3, resume=path)
    assert_same(values(second), values(whole))
