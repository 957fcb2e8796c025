"""The page of `zoo app`: Gradio around the functions of `zoo.app.views`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zoo.app import views
from zoo.hub import HubError

if TYPE_CHECKING:
    import gradio


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError("zoo app needs Gradio: pip install 'attention-zoo[app]'") from error
    return gradio


def build() -> gradio.Blocks:
    """Build the page with its tabs; nothing is computed, downloaded or served by that.

    Raises:
        ImportError: Gradio is missing.
    """
    gr = _gradio()
    # Usage statistics and a check for updates would go over the network.
    with gr.Blocks(title="attention zoo", analytics_enabled=False) as page:
        gr.Markdown("# Attention zoo")
        for title, tab in (
            ("Classify", _classify_tab),
            ("Drop visual tokens", _tokens_tab),
            ("Sparse plans", _plan_tab),
            ("Point clouds", _points_tab),
        ):
            with gr.Tab(title):
                tab(gr)
    return page


def _told(gr: Any, function: Callable) -> Callable:
    """A view whose errors that a user can mend are shown as such."""

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, FileNotFoundError, ImportError, HubError) as error:
            raise gr.Error(" ".join(str(error).split())) from error

    return call


def _classify_tab(gr: Any) -> None:
    models, samples = views.image_models(), views.sample_images()
    with gr.Row():
        with gr.Column():
            image = gr.Image(samples[0] if samples else None, type="pil", label="Image", height=280)
            model = gr.Dropdown(models, value=views.CLASSIFIER, label="Model", allow_custom_value=True)
            x = gr.Slider(0, 1, 0.5, label="Place from the left")
            y = gr.Slider(0, 1, 0.5, label="Place from the top")
            run = gr.Button("Classify", variant="primary")
            gr.Examples(samples, image, label="Photographs", cache_examples=False)
        with gr.Column():
            label = gr.Label(label="Classes", num_top_classes=5)
            picture = gr.Image(label="What the place attends to", height=320)
            text = gr.Textbox(show_label=False, container=False)
    run.click(_told(gr, views.classify), [image, model, x, y], [label, picture, text])


def _tokens_tab(gr: Any) -> None:
    from zoo.heads.token_dropping import METHODS

    with gr.Row():
        with gr.Column():
            folder = gr.Textbox(label="Model folder", placeholder="empty: the weights of this package")
            scene = gr.Number(0, label="Sample scene", precision=0)
            question = gr.Textbox(label="Question", placeholder="empty: the first question about the scene")
            method = gr.Dropdown(sorted(METHODS), value="hired", label="Method")
            budget = gr.Slider(0.05, 1, 0.2, step=0.05, label="Share of the visual tokens")
            run = gr.Button("Ask", variant="primary")
        with gr.Column():
            picture = gr.Image(label="Kept patches", height=320)
            text = gr.Textbox(label="Answer", lines=3)
    run.click(_told(gr, views.drop_tokens), [folder, scene, question, method, budget], [picture, text])


def _plan_tab(gr: Any) -> None:
    source = gr.Textbox(label="Plan: file, folder or hub repository", placeholder="empty: that of the embedded model")
    run = gr.Button("Show", variant="primary")
    picture = gr.Image(show_label=False, format="png")
    # Columns of the report need a font of equal widths.
    text = gr.Code(label="A row a layer, a column a head", language=None)
    run.click(_told(gr, views.show_plan), source, [picture, text])


def _points_tab(gr: Any) -> None:
    models = views.point_models()
    with gr.Row():
        with gr.Column(scale=1):
            file = gr.File(label="Point cloud (.bin, .npz, .npy, .pcd); none: a simulated scene", type="filepath")
            scene = gr.Number(1, label="Simulated scene", precision=0)
            model = gr.Dropdown(models, value=views.DETECTOR, label="Detector", allow_custom_value=True)
            score = gr.Slider(0, 1, 0.3, label="Least score")
            run = gr.Button("Detect", variant="primary")
        with gr.Column(scale=2):
            picture = gr.Image(label="From above", height=520)
            text = gr.Textbox(show_label=False, container=False, lines=2)
    run.click(_told(gr, views.detect), [file, scene, model, score], [picture, text])
