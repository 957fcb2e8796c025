"""Task heads on the backbones, and plug-ins for the pipelines of other libraries."""
