"""Training of the small video DiT on scikit-learn's digits in motion."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from zoo.cli import main
from zoo.heads.video_dit import load_video_dit
from zoo.train.data import DigitsData
from zoo.train.moving import moving_images
from zoo.train.video import VideoDiffusion, export_pipeline

TINY = dict(num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, freq_dim=32, patch_size=[1, 4, 4])
MODEL = dict(num_classes=10, model_kwargs=TINY, size=16, frames=4, warmup_steps=4)
DATA = dict(image_size=12, batch_size=64, num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3, augment={"no_aug": True})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_moving_images() -> None:
    images = torch.ones(6, 1, 10, 10)
    clips = moving_images(images, 8, 32, generator())
    assert clips.shape == (6, 1, 8, 32, 32)
    torch.testing.assert_close(moving_images(images, 8, 32, generator()), clips, rtol=0, atol=0)
    bright = (clips + 1) / 2
    # Images cover a third to two thirds of a frame, whole (corners may stick out when turned) and in motion.
    share = bright.mean((1, 3, 4))
    assert share.min() > 0.2 and share.max() < 0.8
    assert ((clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 3, 4)) > 1e-3).all()
    column = torch.linspace(-1, 1, 32)
    centres = (bright * column).sum((1, 3, 4)) / bright.sum((1, 3, 4))  # [B, F]
    assert centres.abs().max() < 0.45 and centres.std(1).max() > 0.02


def test_moving_images_draws_upright() -> None:
    """The upper half of an image stays above the lower one."""
    images = torch.full((8, 1, 16, 16), -1.0)
    images[:, :, :8] = 1
    bright = moving_images(images, 4, 32, generator()) + 1
    full = moving_images(torch.ones_like(images), 4, 32, generator()) + 1
    rows = torch.linspace(-1, 1, 32)[:, None]
    upper, whole = ((x * rows).sum((1, 3, 4)) / x.sum((1, 3, 4)) for x in (bright, full))
    assert (upper < whole - 0.1).all()
    with pytest.raises(ValueError, match="needs images"):
        moving_images(images[0], 4, 32)


def test_moving_images_in_mixed_precision() -> None:
    images = torch.rand(2, 1, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        clips = moving_images(images, 4, 32, generator())
    torch.testing.assert_close(clips, moving_images(images, 4, 32, generator()), rtol=0, atol=0)
    assert moving_images(images.bfloat16(), 4, 32, generator()).dtype == torch.bfloat16


def test_loss_of_the_true_velocity_is_zero() -> None:
    """The network is given exactly the noisy clip whose velocity it is to predict."""
    module = VideoDiffusion(**{**MODEL, "drop_label": 0.5})
    images, labels = torch.rand(64, 3, 12, 12) * 2 - 1, torch.arange(64) % 10
    clips = moving_images(images.mean(1, keepdim=True), 4, 16, generator())
    seen = {}

    def velocity(noisy, timestep, encoder_hidden_states, return_dict):
        seen.update(timestep=timestep, condition=encoder_hidden_states)
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return ((noisy - clips) / sigma,)

    module.net.forward = velocity
    assert module.loss(images, labels, generator()) < 1e-6
    assert seen["timestep"].min() > 0 and seen["timestep"].max() < 1000
    # Half of the labels are dropped, the others kept.
    chosen = seen["condition"][:, 0].argmax(-1)
    assert 20 < (chosen == 10).sum() < 44
    assert torch.equal(chosen[chosen < 10], labels[chosen < 10])


def test_overfits_a_few_clips() -> None:
    torch.manual_seed(0)
    module = VideoDiffusion(**MODEL)
    data = DigitsData(**DATA)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    optimizer = torch.optim.AdamW(module.net.parameters(), lr=3e-3)
    losses = []
    for step in range(120):
        # Four draws of motion and noise, again and again.
        loss = module.loss(images[:16], labels[:16], generator(step % 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # At first the prediction is zero, and the loss the mean square of the velocity.
    assert losses[0] > 1.2
    assert sum(losses[-4:]) / 4 < 0.4 * losses[0]


def test_fit_writes_a_pipeline(tmp_path) -> None:
    module = VideoDiffusion(**MODEL, pipeline=str(tmp_path / "pipeline"))
    trainer = Trainer(
        accelerator="cpu", max_steps=3, limit_val_batches=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[EMAWeightAveraging(decay=0.5)],
        val_check_interval=3,
    )  # fmt: skip
    trainer.fit(module, datamodule=DigitsData(**DATA))
    assert {"train/loss", "val/loss"} <= trainer.callback_metrics.keys()
    pipe = load_video_dit(tmp_path / "pipeline")
    assert pipe.config.class_names == [str(n) for n in range(10)] and pipe.config.num_frames == 4
    for name, weight in module.net.state_dict().items():
        torch.testing.assert_close(pipe.transformer.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["3"], num_inference_steps=2).frames.shape == (1, 4, 16, 16, 1)


def test_export(tmp_path, capsys) -> None:
    module = VideoDiffusion(**MODEL)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=DigitsData(**DATA))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert main(["vdit", "export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "pipeline")]) == 0
    weights = load_video_dit(tmp_path / "pipeline").transformer.state_dict()
    for name, weight in module.net.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of zoo.train.video.VideoDiffusion"):
        export_pipeline(tmp_path / "other.ckpt", tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(channels=2), "channels must be 1 or 3, got 2"),
        (dict(drop_label=1.0), "drop_label must lie in"),
        (dict(shift=0.0), "shift must be positive"),
    ],
)
def test_bad_settings(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDiffusion(**{**MODEL, **changes})
