"""The shipped counts of parameters and multiply-accumulates are those of the models."""

import pytest
import timm

import zoo
from zoo import costs


def input_size(name: str) -> tuple[int, ...]:
    cfg = timm.get_pretrained_cfg(name)
    return tuple(cfg.input_size) if cfg else costs.detector_input(name)


def shipped(name: str) -> tuple[int, int]:
    entry = costs._shipped()[name]
    assert entry["input_size"] == list(input_size(name))
    return tuple(entry["costs"])


def test_every_model_has_shipped_counts() -> None:
    assert sorted(costs._shipped()) == sorted(zoo.list_models())


@pytest.mark.parametrize("name", zoo.list_models("*nano"))
def test_counts_of_the_smallest_models(name: str) -> None:
    size = input_size(name)
    assert costs.of(name, size) == shipped(name) == costs.measure(name, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.list_models())
def test_counts(name: str) -> None:
    assert shipped(name) == costs.measure(name, input_size(name))


def test_another_size_is_counted() -> None:
    assert costs.of("biformer_nano", (3, 64, 64))[1] < shipped("biformer_nano")[1]


def test_counting_keeps_the_training_mode() -> None:
    model = zoo.create_model("test_convnext")
    assert costs.count_macs(model, (3, 32, 32)) > 0
    assert model.training
