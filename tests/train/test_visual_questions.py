"""The small vision-language model through Lightning."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from zoo.heads.tiny_vlm import load_tiny_vlm
from zoo.train.visual_questions import VisualQuestions

VISION = dict(
    hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=8
)
TEXT = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
MODEL = dict(scenes=8, questions=6, lr=3e-3, warmup_steps=2, vision=VISION, text=TEXT)


def garments(batch_size: int) -> DataLoader:
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.uniform(0, 1, (60, 1, 28, 28)), dtype=torch.float32).repeat(1, 3, 1, 1)
    return DataLoader(TensorDataset(images, torch.arange(60) % 10), batch_size)


def test_fit_writes_the_model(tmp_path) -> None:
    torch.manual_seed(0)
    module = VisualQuestions(**MODEL, folder=str(tmp_path / "model"))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=8,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images = next(iter(garments(20)))
    before = float(module.measure(*images, -1, 0)["loss"])
    assert float(module.measure(*images, -1, 1)["loss"]) != before
    trainer.fit(module, garments(20), garments(60))
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1
    assert float(module.measure(*images, -1, 0)["loss"]) < 0.8 * before
    model, _ = load_tiny_vlm(tmp_path / "model")
    weight = module.model.lm_head.weight.half().float()
    torch.testing.assert_close(model.lm_head.weight, weight, rtol=0, atol=0)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="10 classes of Fashion-MNIST, got num_classes=3"):
        VisualQuestions(3)
