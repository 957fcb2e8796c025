"""Parameters and multiply-accumulates of models.

Counting takes up to a second a model, so the counts of this package's models at their own input size are shipped in
`costs.json`. After models have changed: `python -c "import zoo.costs; zoo.costs.write()"`.
"""

import functools
import json
from pathlib import Path

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from zoo import registry

_FILE = Path(__file__).with_name("costs.json")


def of(name: str, input_size: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and multiply-accumulates for one image of (channels, height, width), of a model by name."""
    known = _shipped().get(name)
    return tuple(known["costs"]) if known and known["input_size"] == list(input_size) else measure(name, input_size)


@functools.cache
def _shipped() -> dict[str, dict]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def detector_input(name: str) -> tuple[int, int, int]:
    """Input of a registered model: of a detector in point clouds the columns of a point, and cells along y and x."""
    with torch.device("meta"):
        model = registry.entries()[name].build()
    return model.input_size if hasattr(model, "input_size") else (len(model.point_features), *model.grid_size[1:])


@functools.cache
def measure(name: str, input_size: tuple[int, ...]) -> tuple[int, int]:
    """The same, counted on fake tensors: nothing is allocated or downloaded.

    Of a detector in point clouds, what follows the map of its backbone is counted: the rest depends on the points.
    """
    if registry.find(name) is not None:
        return _measure_detector(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    # The forward pass runs on fake CPU tensors, because autocast regions inside models do not know the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        return count_params(model), count_macs(model.to_empty(device="cpu"), input_size)


def _measure_detector(name: str) -> tuple[int, int]:
    with torch.device("meta"):
        model = registry.entries()[name].build().eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.dense(torch.zeros(1, *model.map_shape))
    return count_params(model), counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Count the multiply-accumulates of one forward pass of one image.

    Matrix products, convolutions and attention are counted; normalisation and activations are not, as usual in papers.

    Args:
        model: Any module taking one image batch.
        input_size: (channels, height, width).
    """
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
    return counter.get_total_flops() // 2


def write() -> None:
    """Count every model of this package and write the file."""
    import zoo

    table = {}
    for name in zoo.list_models():
        detector = registry.find(name) is not None
        input_size = list(detector_input(name) if detector else timm.get_pretrained_cfg(name).input_size)
        table[name] = {"input_size": input_size, "costs": list(measure(name, tuple(input_size)))}
    rows = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    _FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
