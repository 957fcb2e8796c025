"""Every data module on small generated data."""

import gzip
import io
import tarfile

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from zoo.train.classification import ImageClassifier
from zoo.train.data import (
    DigitsData,
    FashionMnistData,
    ImageFolderData,
    TarFolderData,
    TorchvisionData,
    WebDatasetData,
)
from zoo.train.seeding import SeededSampler, local_seed

CLASSES = ("bag", "hat", "shoe")
SMALL = {"image_size": 32, "batch_size": 4, "num_workers": 0}


def picture(label, seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 60, (24, 20 + label, 3), dtype=np.uint8) + 60 * label
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def encoded(label, seed, mode="RGB"):
    buffer = io.BytesIO()
    picture(label, seed, mode).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path, per_class=4, classes=CLASSES):
    with tarfile.open(path, "w") as tar:
        for label, name in enumerate(classes):
            for i in range(per_class):
                add(tar, f"{name}/{i}.png", encoded(label, i, "L" if i == 0 else "RGB"))


def write_shards(folder, name, shards, per_shard=6):
    for s in range(shards):
        with tarfile.open(folder / f"{name}-{s:04}.tar", "w") as tar:
            for i in range(per_shard):
                add(tar, f"{s}_{i}.png", encoded(i % 3, i))
                add(tar, f"{s}_{i}.cls", str(i % 3).encode())


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def check_batches(data, num_classes, class_names=None):
    """Batches have the promised shape, are normalised, and repeat themselves for one seed."""
    seed_everything(3, verbose=False)
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        first, again = list(loader), list(loader)
        assert first
        for (x, y), (x2, y2) in zip(first, again, strict=True):
            assert x.shape[1:] == (3, 32, 32) and x.dtype == torch.float32
            assert y.dtype == torch.int64 and y.min() >= 0 and y.max() < num_classes
            assert torch.equal(x, x2) and torch.equal(y, y2)
    if class_names:
        assert data.class_names == list(class_names)
    assert data.data_config["input_size"] == [3, 32, 32]
    assert data.data_config["label_names"] == (data.class_names or None)


@pytest.fixture
def image_folder(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                picture(label, i).save(folder / f"{i}.png")
    return tmp_path


def test_image_folder(image_folder):
    check_batches(ImageFolderData(str(image_folder), num_classes=3, **SMALL), 3, CLASSES)


def test_image_folder_errors(image_folder):
    with pytest.raises(ValueError, match="num_classes is 5, but the data has 3 classes: bag, hat, shoe"):
        ImageFolderData(str(image_folder), num_classes=5, **SMALL).setup()
    (image_folder / "val" / "hat").rename(image_folder / "val" / "hats")
    with pytest.raises(ValueError, match="val and train have different class folders: hat, hats"):
        ImageFolderData(str(image_folder), num_classes=3, **SMALL).setup()
    with pytest.raises(FileNotFoundError, match="expected .*/validation/CLASS/IMAGE"):
        ImageFolderData(str(image_folder), num_classes=3, val_split="validation", **SMALL).setup()


@pytest.mark.parametrize("cache", [False, True])
def test_tar_folder(tmp_path, cache):
    for split in ("train", "validation", "test"):
        write_tar(tmp_path / f"{split}.tar")
    data = TarFolderData(str(tmp_path), num_classes=3, cache=cache, augment={"color_jitter": 0.4}, **SMALL)
    check_batches(data, 3, CLASSES)


def test_tar_folder_uses_the_training_classes(tmp_path):
    write_tar(tmp_path / "train.tar")
    write_tar(tmp_path / "validation.tar", classes=CLASSES[1:])
    data = TarFolderData(str(tmp_path), num_classes=3, **SMALL)
    data.setup()
    labels = {data.splits["val"][i][1] for i in range(len(data.splits["val"]))}
    assert labels == {1, 2}
    with pytest.raises(FileNotFoundError, match="nowhere.tar"):
        TarFolderData(str(tmp_path), num_classes=3, train_split="nowhere", **SMALL).setup()


def test_torchvision():
    fake = {"size": 12, "image_size": [3, 24, 24], "num_classes": 3}
    kwargs = {"train_kwargs": fake, "val_kwargs": fake | {"random_offset": 1}}
    check_batches(TorchvisionData("FakeData", num_classes=3, repeats=3, **kwargs, **SMALL), 3)
    with pytest.raises(ValueError, match="has no 'Fakedata'"):
        TorchvisionData("Fakedata", num_classes=3)


def test_fashion_mnist(tmp_path):
    rng = np.random.default_rng(0)
    for names, count in ((FashionMnistData.FILES["train"], 20), (FashionMnistData.FILES["test"], 8)):
        write_idx(tmp_path / names[0], rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / names[1], np.arange(count, dtype=np.uint8) % 10)
    data = FashionMnistData(str(tmp_path), val_size=5, **SMALL)
    check_batches(data, 10, FashionMnistData.CLASSES)
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [15, 5, 8]
    assert data.class_names[-1] == "Ankle boot"


def test_fashion_mnist_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz.*dataset-fashion-mnist") as error:
        FashionMnistData(str(tmp_path), **SMALL).setup()
    assert str(tmp_path) in str(error.value)
    for names in FashionMnistData.FILES.values():
        for name in names:
            (tmp_path / name).write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(ValueError, match="not an idx file"):
        FashionMnistData(str(tmp_path), **SMALL).setup()


def test_digits():
    data = DigitsData(**{**SMALL, "batch_size": 600})
    check_batches(data, 10, [str(i) for i in range(10)])
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [1198, 599, 599]


def test_webdataset(tmp_path):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, "train", 2)
    write_shards(tmp_path, "val", 1)
    patterns = (str(tmp_path / "train-{0000..0001}.tar"), str(tmp_path / "val-*.tar"))
    data = WebDatasetData(*patterns, train_samples=14, num_classes=3, class_names=list(CLASSES), **SMALL)
    check_batches(data, 3, CLASSES)
    loader = data.train_dataloader()
    assert len(loader) == len(list(loader)) == 3
    assert sum(len(x) for x, _ in data.val_dataloader()) == 6
    loader.position = lambda: (1, 0)
    assert not torch.equal(next(iter(loader))[0], next(iter(data.train_dataloader()))[0])
    with pytest.raises(FileNotFoundError, match="no shard"):
        WebDatasetData(str(tmp_path / "test-*.tar"), patterns[1], 14, num_classes=3, **SMALL).setup()


def test_webdataset_trains_in_persistent_workers(tmp_path):
    """Workers that live through the run see a new order in every epoch."""
    pytest.importorskip("webdataset")
    write_shards(tmp_path, "train", 2)
    data = WebDatasetData(
        str(tmp_path / "train-{0000..0001}.tar"),
        str(tmp_path / "train-0000.tar"),
        train_samples=16,
        num_classes=3,
        **SMALL | {"num_workers": 2},
    )
    model = ImageClassifier("test_convnext", num_classes=3)
    seen = []
    model.on_train_batch_end = lambda outputs, batch, index: seen.append(batch[0].sum().item())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    assert len(seen) == 8 == trainer.global_step
    assert len(set(seen)) == 8


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"image_size": 0}, {"crop_pct": 2.0}, {"num_workers": -1}])
def test_numbers_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        DigitsData(**wrong)


def test_augment_keys_are_checked():
    with pytest.raises(ValueError, match="unknown key 'auto_augmnt'.*auto_augment"):
        DigitsData(augment={"auto_augmnt": "rand-m9"})


@pytest.mark.parametrize("policy", ["rand-m10-mstd0-inc1", "original-mstd0.5", "augmix-m5-w4-d2"])
def test_every_augmentation_runs(policy):
    """The strongest level keeps 0 bits of posterized images, which Pillow 13 refuses by itself."""
    data = TorchvisionData("FakeData", num_classes=3, augment={"auto_augment": policy}, **SMALL)
    transform = data.transform(training=True)
    for seed in range(60):
        with local_seed(seed):
            assert transform(picture(0, seed)).isfinite().all()


def test_batch_larger_than_data():
    fake = {"size": 3, "image_size": [3, 24, 24], "num_classes": 3}
    data = TorchvisionData("FakeData", num_classes=3, train_kwargs=fake, val_kwargs=fake, **SMALL)
    data.setup()
    with pytest.raises(ValueError, match="batch_size is 4, but a training epoch has 3 images"):
        data.train_dataloader()


@pytest.mark.parametrize("repeats", [1, 3])
def test_sampler_divides_an_epoch_among_processes(repeats):
    images = list(range(300))
    parts = [list(SeededSampler(images, 5, repeats, num_replicas=3, rank=rank)) for rank in range(3)]
    indices = [[index for index, _ in part] for part in parts]
    seeds = [seed for part in parts for _, seed in part]
    assert len(set(seeds)) == len(seeds)
    if repeats == 1:
        assert sorted(sum(indices, [])) == images
    else:
        # The three draws of an image go to the three processes.
        assert indices[0] == indices[1] == indices[2]
    assert [i for i, _ in SeededSampler(images, 6, repeats, 3, 0)] != indices[0]


def test_sampler_skips_once():
    sampler = SeededSampler(list(range(10)), 0)
    whole = list(sampler)
    sampler.skip = 4
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


def test_local_seed_leaves_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with local_seed(2):
        torch.rand(7)
        np.random.rand(7)
    assert torch.equal(torch.rand(3), expected)


def test_validation_may_ignore_the_aspect_ratio():
    squash = DigitsData(**SMALL, crop_pct=1.0, crop_mode="squash", interpolation="bilinear")
    assert squash.data_config["crop_mode"] == "squash"
    image = Image.new("RGB", (256, 64))
    image.paste((255, 255, 255), (0, 0, 32, 64))
    centre = DigitsData(**SMALL, crop_pct=1.0, interpolation="bilinear")
    # The bright border at the left is cut away by the centre crop only.
    squashed, cropped = (data.transform(training=False)(image) for data in (squash, centre))
    assert squashed[:, :, 0].min() > cropped.max()
