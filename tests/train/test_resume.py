"""An interrupted run, resumed, ends bit for bit where an uninterrupted one ends."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from zoo.train.classification import ImageClassifier
from zoo.train.data import TorchvisionData

EPOCHS, BATCHES = 3, 4


class Interrupt(Callback):
    """Stops the process's training as a signal would, after a number of steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


def build(num_workers):
    seed_everything(7, verbose=False)
    model = ImageClassifier(
        "test_convnext",
        num_classes=4,
        model_kwargs={"drop_path_rate": 0.2, "drop_rate": 0.1},
        warmup_epochs=1,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
    )
    fake = {"image_size": [3, 24, 24], "num_classes": 4}
    data = TorchvisionData(
        "FakeData",
        num_classes=4,
        train_kwargs={"size": 8 * BATCHES + 3, **fake},
        val_kwargs={"size": 8, "random_offset": 1, **fake},
        image_size=32,
        batch_size=8,
        num_workers=num_workers,
        repeats=2,
        augment={"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"},
    )
    return model, data


def fit(folder, num_workers=0, stop_at=None, ckpt_path=None):
    model, data = build(num_workers)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    callbacks = [EMAWeightAveraging(decay=0.8), saver] + ([Interrupt(stop_at)] if stop_at is not None else [])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if stop_at is None:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer.fit(model, datamodule=data)
        # What the process has drawn since must not matter.
        torch.rand(5)
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_equal(a, b):
    for part in ("state_dict", "current_model_state"):
        assert a[part].keys() == b[part].keys()
        for key in a[part]:
            assert torch.equal(a[part][key], b[part][key]), f"{part} {key}"
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["optimizer_states"][0]["param_groups"] == b["optimizer_states"][0]["param_groups"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.filterwarnings("error:.*not resumable.*")
@pytest.mark.parametrize("step", [BATCHES, 2 * BATCHES, BATCHES + 1, 2 * BATCHES + 3], ids=lambda s: f"step{s}")
def test_resume_is_exact(uninterrupted, tmp_path, step):
    fit(tmp_path / "first", stop_at=step)
    resumed = fit(tmp_path / "second", ckpt_path=tmp_path / "first" / "last.ckpt")
    assert resumed["global_step"] == uninterrupted["global_step"] == EPOCHS * BATCHES
    assert_equal(uninterrupted, resumed)


def test_workers_do_not_matter(uninterrupted, tmp_path):
    """Resuming with worker processes gives what a run in one process gives."""
    fit(tmp_path / "first", stop_at=BATCHES + 2)
    resumed = fit(tmp_path / "second", num_workers=2, ckpt_path=tmp_path / "first" / "last.ckpt")
    assert_equal(uninterrupted, resumed)


def test_seed_matters():
    """Two epochs and two seeds have different orders and augmentation."""
    _, data = build(0)
    data.setup()
    loader = data.train_dataloader()
    first, again = next(iter(loader))[0], next(iter(loader))[0]
    assert torch.equal(first, again)
    loader.position = lambda: (1, 0)
    assert not torch.equal(first, next(iter(loader))[0])
    seed_everything(8, verbose=False)
    assert not torch.equal(first, next(iter(data.train_dataloader()))[0])
