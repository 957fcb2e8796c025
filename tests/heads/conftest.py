"""What tests of several plug-ins share."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from .agent_sd_unets import make_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()
