"""Training of DyVTE's routers on a tiny vision-language model."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zoo
from tests.heads.vlm_models import IMAGE, TEXT, build, inputs_of
from zoo.heads.token_dropping.dyvte import DyVTE
from zoo.train.dyvte import DyVTETraining, answer_prompt, stays_the_same

ANSWER = 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llava", text_config={**TEXT, "model_type": "llama", "num_hidden_layers": 3})


def batches(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """Prompts that end with an answer of three tokens."""
    out = []
    for seed in range(count):
        batch = inputs_of(model, [[(16, 16)], [(16, 16)]], seed=seed, text=6)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -ANSWER:] = batch["input_ids"][:, -ANSWER:]
        out.append({**batch, "labels": labels})
    return out


def test_features_end_where_the_answer_begins(model: nn.Module) -> None:
    training, batch = DyVTETraining(model, width=8), batches(model, 1)[0]
    prompt = answer_prompt(batch["input_ids"], batch["attention_mask"], batch["labels"], IMAGE)
    assert torch.equal(prompt.attention_mask.sum(1), batch["attention_mask"].sum(1) - ANSWER)
    features, leave = training.examples(batch, 1)
    changed = {name: x.clone() for name, x in batch.items()}
    changed["input_ids"][:, -ANSWER:] = changed["labels"][:, -ANSWER:] = 9
    torch.testing.assert_close(training.examples(changed, 1)[0], features)
    assert features.shape == (2, 64) and leave.shape == (2,)
    # What the routers see is what they will see without an answer.
    question = {name: x[:, :-ANSWER] if x.dim() == 2 else x for name, x in batch.items() if name != "labels"}
    seen = []
    with zoo.hired.apply(model, method=DyVTE(routers=training.routers)) as handle, torch.no_grad():
        handle.method.routers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**question)
    torch.testing.assert_close(seen[0], features)


def test_labels() -> None:
    labels = torch.tensor([[-100, -100, 1, 2]])
    full = torch.full((1, 4, 4), -2.0)
    full[0, 1, 1] = full[0, 2, 2] = 2
    worse, other = full.clone(), full.clone()
    worse[0, 1, 1] = 1
    other[0, 1, 3] = 3
    elsewhere = full.clone()
    elsewhere[0, [0, 3], 3] = 9
    results = [bool(stays_the_same(full, x, labels, 0.99, 1.03)) for x in (full, elsewhere, worse, other)]
    assert results == [True, True, False, False]
    assert bool(stays_the_same(full, worse, labels, 0.99, 10.0)) and bool(
        stays_the_same(full, other, labels, 0.5, 99.0)
    )


def test_routers_learn_and_are_saved(model: nn.Module, tmp_path: Any) -> None:
    seed_everything(0, verbose=False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    path = tmp_path / "routers.safetensors"
    # Every exit passes: the label is always "leave".
    training = DyVTETraining(model, width=8, lr=0.1, agreement=0.0, loss_ratio=1e9, save_to=str(path))
    data = DataLoader(batches(model, 12), batch_size=None)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(training, data, data)
    assert trainer.callback_metrics["val/leave"] == 1 and trainer.callback_metrics["val/acc"] == 1
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert set(state) == {f"routers.{name}" for name in training.routers.state_dict()}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    inputs = {name: x for name, x in batches(model, 1)[0].items() if name != "labels"}
    with torch.no_grad(), zoo.hired.apply(model, method="dyvte", routers=path):
        cache = model(**inputs, use_cache=True).past_key_values
    lengths = [cache.get_seq_length(i) for i in range(3)]
    assert lengths[0] - int((inputs["input_ids"][0] == IMAGE).sum()) == lengths[1] == lengths[2]
