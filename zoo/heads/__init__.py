"""Plug-ins and task heads on top of the backbones and ops."""
