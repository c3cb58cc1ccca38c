"""Hugging Face: its models in fit, eager and compiled; our optimizers in its Trainer."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import adamw, sgd, to_torch
from loop import DataLoaders, Learner, fit, predict, validate
from tests.comparing import assert_close
from tests.peers.peers import peer

hf = peer("transformers")

SIZES: dict[str, Any] = dict(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=8,
)
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the library warns of is not ours to answer for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|torch|accelerate|huggingface_hub")
        yield


def bert(dropout: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options = {} if dropout else NO_DROPOUT
    model: nn.Module = hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES, **options, num_labels=2)
    )
    return model


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = hf.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, **off)
    model: nn.Module = hf.GPT2LMHeadModel(config)
    return model


def sentences(padded: bool = True) -> list[dict[str, Tensor]]:
    """Two batches as collators make them; the class is whether the first word is a late one."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 20, (16, 6), generator=generator)
    mask = torch.ones(16, 6, dtype=torch.long)
    if padded:
        mask[::2, 4:] = 0
    labels = (words[:, 0] > 9).long()
    every = dict(input_ids=words, attention_mask=mask, labels=labels)
    return [{name: value[i : i + 8] for name, value in every.items()} for i in (0, 8)]


def texts() -> list[dict[str, Tensor]]:
    """Two batches for a language model, in which the labels are the words."""
    return [{**batch, "labels": batch["input_ids"]} for batch in sentences(padded=False)]


def of_logits(output: Any, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits, labels)


def own_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def by_hand(model: nn.Module, batches: Any, epochs: int, optimizer: Any) -> dict[str, Tensor]:
    """The same training in plain PyTorch."""
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def learner_of(model: nn.Module, batches: Any, own: bool = False, **options: Any) -> Learner:
    data = DataLoaders(batches, batches)
    loss, targets = (own_loss, ()) if own else (of_logits, "labels")
    return Learner(model, data, loss, adamw(lr=0.01), targets=targets, **options)


@pytest.mark.parametrize("own", [False, True], ids=["our loss", "its own loss"])
def test_bert_with_an_attention_mask(own: bool) -> None:
    """The weights are those of a plain loop; the loss is ours, or the model's."""
    learner = learner_of(bert(), sentences(), own)
    start = learner.init()
    end = fit(learner, start, epochs=2)
    theirs = copy.deepcopy(learner.model)
    expected = by_hand(theirs, sentences(), 2, to_torch(adamw(lr=0.01), theirs.parameters()))
    assert_close(end.params, expected, rtol=1e-4, atol=1e-5)
    assert validate(learner, end)["valid_loss"] < validate(learner, start)["valid_loss"]
    assert predict(learner, end).logits.shape == (16, 2)


def test_bert_with_an_attention_mask_compiles() -> None:
    """One graph is right for batches with and without padding: the model looks at the values of
    the mask, except where it knows that it is traced.
    """
    batches = [sentences(padded=False)[0], sentences(padded=True)[1]]
    learner = learner_of(bert(), batches)
    end, compiled = (fit(learner, learner.init(), 2, compile=c) for c in (False, True))
    assert_close(compiled.params, end.params, rtol=1e-4, atol=1e-5)


def test_gpt2_with_tied_embeddings() -> None:
    """The tied weight is one parameter, and stays tied in the model that is loaded."""
    learner = learner_of(gpt2(), texts(), own=True)
    start = learner.init()
    assert "lm_head.weight" not in start.params
    end = fit(learner, start, epochs=2)
    theirs = copy.deepcopy(learner.model)
    expected = by_hand(theirs, texts(), 2, to_torch(adamw(lr=0.01), theirs.parameters()))
    assert_close(end.params, expected, rtol=1e-4, atol=1e-5)
    trained: Any = learner.load(end)
    assert trained.lm_head.weight is trained.transformer.wte.weight


def test_gradient_checkpointing() -> None:
    """The layers run once more in the backward pass, and the gradients are the same."""
    plain, model = learner_of(gpt2(), texts(), own=True), gpt2()
    switch: Any = model
    switch.gradient_checkpointing_enable({"use_reentrant": False})
    learner = learner_of(model, texts(), own=True)
    end = fit(learner, learner.init(), epochs=1)
    assert_close(end.params, fit(plain, plain.init(), epochs=1).params, rtol=1e-4, atol=1e-5)


def test_reentrant_gradient_checkpointing_is_an_error_of_torch_that_names_the_cure() -> None:
    model: Any = gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    learner = learner_of(model, texts(), own=True)
    with pytest.raises(RuntimeError, match="set use_reentrant=False"):
        fit(learner, learner.init(), epochs=1)


def test_the_trainer_steps_with_our_optimizer(tmp_path: Path) -> None:
    """It is prepared, saved and resumed by the Trainer, whose own scheduler sets its lr."""
    peer("accelerate")
    rows = [{name: value[i] for name, value in b.items()} for b in sentences() for i in range(8)]
    options = dict(report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1)

    def trained(steps: int, resume: bool) -> tuple[dict[str, Tensor], Any]:
        model = bert()
        arguments = hf.TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            save_steps=2,
            lr_scheduler_type="constant",
            **options,
        )
        optimizer = to_torch(adamw(lr=0.01), model.named_parameters())
        trainer = hf.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return {n: p.detach().clone() for n, p in model.named_parameters()}, optimizer

    values, optimizer = trained(4, resume=False)
    assert optimizer.opt_state["step"].tolist() == [4] * len(values)
    resumed, optimizer = trained(4, resume=True)
    assert optimizer.opt_state["step"].tolist() == [4] * len(values)
    assert_close(resumed, values, rtol=1e-5, atol=1e-7)


def test_accelerate_prepares_our_optimizer(tmp_path: Path) -> None:
    """Steps, gradient accumulation, and what it saves and loads."""
    accelerator = peer("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = bert()
    raw = to_torch(sgd(lr=0.1, mom=0.9), model.named_parameters())
    ready, optimizer = accelerator.prepare(model, raw)
    for batch in sentences():
        with accelerator.accumulate(ready):
            accelerator.backward(ready(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert raw.opt_state["step"].unique().tolist() == [1]
    accelerator.save_state(str(tmp_path))
    saved = copy.deepcopy(raw.opt_state)
    raw.state[next(model.parameters())]["velocity"].zero_()
    accelerator.load_state(str(tmp_path))
    assert_close(raw.opt_state, saved)
