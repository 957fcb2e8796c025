"""The small video DiT: builders, pipeline, sparse plans and the demonstration."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image

from zoo.backbones.video_dit import create_video_dit, label_embeds, video_dit_nano, video_dit_small
from zoo.cli import main
from zoo.cli.vdit import save_video
from zoo.cli.vdit_demo import fidelity, side_by_side
from zoo.heads import sparse_vdit
from zoo.heads.video_dit import VideoDiTPipeline, load_video_dit

TINY = dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, ffn_dim=32, freq_dim=16)
NAMES = ["bag", "boot", "coat"]
CALL = dict(num_inference_steps=4, output_type="pt")


def build_pipeline(channels: int = 1) -> VideoDiTPipeline:
    torch.manual_seed(0)
    model = video_dit_nano(3, channels, **TINY).eval()
    with torch.no_grad():
        # The fresh output layer is zero.
        model.proj_out.weight.normal_(std=0.3)
    pipe = VideoDiTPipeline(model, FlowMatchEulerDiscreteScheduler(shift=2.0), NAMES, sample_size=8, num_frames=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: VideoDiTPipeline, labels=(0, 2), **changes) -> torch.Tensor:
    return pipe(list(labels), generator=torch.Generator().manual_seed(1), **{**CALL, **changes}).frames


def test_sizes() -> None:
    with torch.device("meta"):
        nano, small = video_dit_nano(), video_dit_small()
    assert type(nano) is WanTransformer3DModel
    assert 3.5e6 < sum(p.numel() for p in nano.parameters()) < 4e6
    assert 25e6 < sum(p.numel() for p in small.parameters()) < 35e6
    with pytest.raises(ValueError, match="unknown video DiT 'video_dit_huge'; there are video_dit_nano"):
        create_video_dit("video_dit_huge")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        video_dit_nano(0)


def test_label_embeds() -> None:
    embeds = label_embeds(torch.tensor([1, 3]), 3)
    torch.testing.assert_close(embeds, torch.tensor([[[0.0, 1, 0, 0]], [[0.0, 0, 0, 1]]]))


def test_sampling_integrates_the_velocity() -> None:
    """Of the true velocity of one clip, `(x - clip) / sigma`, Euler's method arrives at that clip."""
    pipe = build_pipeline()
    clip = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 1, 4, 8, 8)

    def velocity(x, timestep, **kwargs):
        return ((x - clip) / (timestep.view(-1, 1, 1, 1, 1) / 1000),)

    pipe.transformer.forward = velocity
    for guidance in (1.0, 3.0):
        torch.testing.assert_close(sample(pipe, [1], guidance_scale=guidance, output_type="latent"), clip)


def test_labels_guidance_and_output_types() -> None:
    pipe = build_pipeline(channels=3)
    frames = sample(pipe)
    assert frames.shape == (2, 4, 3, 8, 8) and frames.min() >= 0 and frames.max() <= 1
    for labels in (["bag", "coat"], ["0", "2"]):
        torch.testing.assert_close(sample(pipe, labels), frames, rtol=0, atol=0)
    assert not torch.equal(sample(pipe, [1, 2])[0], frames[0])
    assert not torch.equal(sample(pipe, guidance_scale=1.0), frames)
    assert sample(pipe, num_frames=2).shape[1] == 2
    arrays = sample(pipe, output_type="np")
    torch.testing.assert_close(torch.from_numpy(arrays).movedim(-1, 2), frames)
    images = sample(pipe, output_type="pil")
    assert len(images) == 2 and images[0][0].size == (8, 8) and images[0][0].mode == "RGB"
    assert sample(build_pipeline(), output_type="pil")[0][0].mode == "L"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=3), "no class 3; there are 3: bag, boot, coat"),
        (dict(prompt="hat"), "no class 'hat'"),
        (dict(prompt=[]), "at least one class"),
        (dict(prompt=0, output_type="gif"), "output_type must be one of"),
        (dict(prompt=0, num_inference_steps=0), "at least one frame and step, got 4 and 0"),
    ],
)
def test_bad_calls(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_pipeline()(**arguments)


def test_round_trip(tmp_path) -> None:
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path)
    again = load_video_dit(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.class_names == NAMES
    torch.testing.assert_close(sample(again, ["bag", "coat"]), sample(pipe), rtol=0, atol=0)


def test_full_plan_is_dense_and_searched_plan_runs() -> None:
    pipe = build_pipeline()
    dense = sample(pipe)
    full = sparse_vdit.uniform_plan(sparse_vdit.describe_model(pipe), "none")
    with sparse_vdit.use(pipe, full):
        torch.testing.assert_close(sample(pipe), dense, rtol=0, atol=0)
    plan = sparse_vdit.search(
        pipe,
        ["bag", {"prompt": [0, 1]}],
        density=0.5,
        bins=2,
        tile=(8, 8),
        generator=torch.Generator().manual_seed(0),
        call_kwargs=dict(num_inference_steps=4),
        progress=False,
    )
    assert plan.calibrated["grid"] == [4, 4, 4]
    with sparse_vdit.use(pipe, plan):
        sparse = sample(pipe)
    assert sparse.isfinite().all() and not torch.equal(sparse, dense)
    torch.testing.assert_close(sample(pipe), dense, rtol=0, atol=0)


def test_fidelity_and_gif(tmp_path) -> None:
    clips = torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    other = clips.clone()
    other[1] = (other[1] - 0.1).abs()
    psnr, ssim = fidelity(other, clips)
    assert psnr[0] == float("inf") and ssim[0] == pytest.approx(1)
    assert 15 < psnr[1] < 30 and ssim[1] < 0.99
    side_by_side(clips, other, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3 and image.size == (2 * 64 + 4, 14 + 2 * 64 + 4)


def test_demo(tmp_path, capsys) -> None:
    build_pipeline().save_pretrained(tmp_path / "model")
    arguments = ["vdit", "demo", "--model", str(tmp_path / "model"), "--device", "cpu", "--steps", "5"]
    arguments += ["--labels", "0", "boot", "--frames", "4"]
    assert main([*arguments, "--out", str(tmp_path / "first")]) == 0
    printed = capsys.readouterr().out
    for word in ("mean density", "time on cpu: dense", "class 0: PSNR", "class boot: PSNR", "SSIM"):
        assert word in printed
    assert {p.name for p in (tmp_path / "first").iterdir()} == {"plan.json", "dense_and_sparse.gif"}
    # A plan that lies beside the model is used.
    (tmp_path / "first" / "plan.json").rename(tmp_path / "model" / "plan.json")
    assert main([*arguments, "--out", str(tmp_path / "second")]) == 0
    assert {p.name for p in (tmp_path / "second").iterdir()} == {"dense_and_sparse.gif"}


def test_demo_without_model(tmp_path, capsys) -> None:
    assert main(["vdit", "demo", "--model", str(tmp_path)]) == 1
    message = "holds no video DiT pipeline. Train one on a GPU with `zoo fit --config video/video_dit_nano`"
    assert message in capsys.readouterr().err


def test_search_and_apply_commands(tmp_path) -> None:
    """The general commands take the small model too; diffusers alone does not know its pipeline."""
    build_pipeline().save_pretrained(tmp_path / "model")
    common = ["--steps", "4", "--device", "cpu", "--dtype", "float32"]
    model, plan = str(tmp_path / "model"), str(tmp_path / "plan.json")
    assert main(["vdit", "search", model, "--prompt", "bag", "--bins", "2", "--out", plan, *common]) == 0
    out = str(tmp_path / "a.gif")
    assert main(["vdit", "apply", model, plan, "--prompt", "coat", "--out", out, "--compare", *common]) == 0
    for name in ("a.gif", "a_dense.gif"):
        with Image.open(tmp_path / name) as clip:
            assert (clip.size, clip.n_frames) == ((8, 8), 4)


def test_grey_clips_become_videos(tmp_path, monkeypatch) -> None:
    written = {}
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: written.update({path: frames}))
    save_video(torch.rand(3, 8, 8, 1).numpy(), tmp_path / "a.mp4", 8)
    (frames,) = written.values()
    assert [frame.shape for frame in frames] == [(8, 8, 3)] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_agrees_with_reference_on_gpu() -> None:
    torch.manual_seed(0)
    model = video_dit_nano(3).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.05)
    pipe = VideoDiTPipeline(model, FlowMatchEulerDiscreteScheduler(), NAMES).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    described = sparse_vdit.describe_model(pipe)
    dense = sample(pipe)
    with sparse_vdit.use(pipe, sparse_vdit.uniform_plan(described, "none")):
        torch.testing.assert_close(sample(pipe), dense, rtol=0, atol=0)
    plan = sparse_vdit.uniform_plan(described, "none", {"pattern": "multi_diagonal", "window": 0.5})
    clips = {}
    for backend in ("triton", "reference"):
        with sparse_vdit.use(pipe, plan, backend=backend):
            clips[backend] = sample(pipe)
    # float32 products may run in TF32, over four steps.
    torch.testing.assert_close(clips["triton"], clips["reference"], rtol=0, atol=2e-2)
