"""Fewer visual tokens for vision-language models of transformers, without training.

    handle = zoo.hired.apply(model, budget=0.2)
    ids = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    handle.remove()

    with zoo.hired.apply(model, budget=0.2, allocation="paper", exact=True):
        ids = model.generate(**inputs)

HiRED (arXiv:2408.10945) is the default method; `method_names()` lists the others behind the same call.
"""

from zoo.heads.token_dropping.base import (
    CLS,
    MERGED,
    METHODS,
    NEWLINE,
    AttentionEdit,
    Kept,
    Probes,
    Prompt,
    TokenDropper,
    TokenSelector,
    Vision,
    create_method,
    method_names,
)
from zoo.heads.token_dropping.hired import Hired
from zoo.heads.token_dropping.plugin import TokenDroppingHandle, apply, remove

__all__ = [
    "CLS",
    "MERGED",
    "METHODS",
    "NEWLINE",
    "AttentionEdit",
    "Hired",
    "Kept",
    "Probes",
    "Prompt",
    "TokenDropper",
    "TokenDroppingHandle",
    "TokenSelector",
    "Vision",
    "apply",
    "create_method",
    "method_names",
    "remove",
]
