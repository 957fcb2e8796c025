"""A web page to try the models: what they attend to, which visual tokens they drop, what a sparse plan does.

`zoo app` starts it; it needs the extra ``app`` (Gradio). What stands behind its tabs is in `zoo.app.views` and needs
no Gradio.
"""

from __future__ import annotations

from zoo.app.page import build

__all__ = ["build"]
