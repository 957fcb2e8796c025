"""Choosing visual tokens: the CLS row of an attention map, budgets of sub-images, and a top-k that keeps the order."""

from zoo.kernels.token_select.op import cls_attention, token_select
from zoo.kernels.token_select.reference import SelectionPlan

__all__ = ["SelectionPlan", "cls_attention", "token_select"]
