"""The page in Gradio Blocks: which fields there are, and which function of `visit` answers which click."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, cast

import gradio as gr  # pyright: ignore[reportMissingImports] - an extra
from PIL import Image

from mmneurons import pocket
from mmneurons.errors import MmneuronsError, SettingError
from mmneurons.settings import PROMPT, SCORES
from mmneurons.web import views, visit
from mmneurons.web.session import Session
from mmneurons.web.visit import Asked, Server

HOUR = 3600
PROGRESS = gr.Progress()
"""Asks Gradio for its progress bar, as a default value."""
DROP = "Drop an image file here to upload"
"""What stands on the field for a picture: the name that a screen reader is told for it, no other."""
FRAME = """
const heard = (event) => {
  if (!element.isConnected) { removeEventListener('message', heard); return; }
  const frame = element.querySelector('iframe'), told = event.data && event.data.mmneurons;
  if (!frame || event.source !== frame.contentWindow || !told) return;
  if (Number.isFinite(told.height)) frame.style.height = Math.min(Math.max(told.height, 160), 20000) + 'px';
  if (typeof told.word === 'string') trigger('select', { word: told.word, neuron: String(told.neuron || '') });
};
addEventListener('message', heard);
"""
"""The script beside the card: the frame tells its height and what is chosen in it; nothing else is heard."""
ADDRESS = "() => [new URLSearchParams(location.search).get('neuron') ?? '']"
"""Reads the neuron of the page's address."""
KEEP_ADDRESS = """(neuron) => {
  const address = new URL(location); address.searchParams.set('neuron', neuron.trim());
  history.replaceState(null, '', address); return [neuron];
}"""
"""Writes the neuron that is shown into the page's address."""


def files_only(component: Any) -> Any:
    """Make a component take files that were uploaded, never an address, which Gradio would have the server fetch."""
    # Set on the component itself: a class of one's own would have Gradio write a .pyi file into this package.
    usual = component.async_move_resource_to_block_cache

    async def take(url_or_file_path: Any) -> Any:
        if "://" in str(url_or_file_path):
            raise gr.Error("Give a file, not an address.", print_exception=False)
        return await usual(url_or_file_path)

    component.async_move_resource_to_block_cache = take
    return component


def _path_of(payload: Any) -> str | None:
    """Give the path of an uploaded picture: it is opened under the limits of the server, not by Gradio."""
    return None if payload is None else payload.path


def theme() -> gr.themes.Base:
    """Return the theme: the colours and fonts of the report, none of them from elsewhere."""
    sans = ["-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "Arial", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    base = gr.themes.Base(primary_hue="orange", neutral_hue="stone", font=sans, font_mono=mono, radius_size="md")
    # The colours are those of the report's style sheet, which changes them in the dark.
    surfaces = dict.fromkeys(("block_background_fill", "background_fill_primary", "input_background_fill"), "surface")
    colours = surfaces | {
        "body_background_fill": "ground", "background_fill_secondary": "ground", "body_text_color": "ink",
        "body_text_color_subdued": "soft", "block_label_text_color": "soft", "block_title_text_color": "ink",
        "block_info_text_color": "soft", "border_color_primary": "line", "block_border_color": "line",
        "input_border_color": "line", "button_secondary_background_fill": "tint", "button_secondary_text_color": "ink",
        "button_primary_background_fill": "button", "button_primary_background_fill_hover": "button",
        "color_accent": "accent", "slider_color": "accent", "block_label_background_fill": "surface",
    }  # fmt: skip
    both = {name: f"var(--{colour})" for name, colour in colours.items()}
    both |= {f"{name}_dark": colour for name, colour in both.items() if hasattr(base, f"{name}_dark")}
    return base.set(**both, button_primary_text_color="white", button_primary_text_color_dark="white")


def told(function: Callable[..., Any], n_outputs: int) -> Callable[..., Any]:
    """Make a function whose last output is a notice: empty, or what went wrong, with all other outputs as they were."""

    @wraps(function)
    def answered(*given: Any, **more: Any) -> list[Any]:
        try:
            found = function(*given, **more)
        except MmneuronsError as error:
            return _failed(error, n_outputs)
        return [*(found if isinstance(found, tuple) else (found,)), ""]

    return answered


def told_each(function: Callable[..., Iterator[str]]) -> Callable[..., Any]:
    """Make the same, with one output, of a function that gives it again and again as more is known."""

    @wraps(function)
    def answered(*given: Any) -> Iterator[list[Any]]:
        try:
            for found in function(*given):
                yield [found, ""]
        except MmneuronsError as error:
            yield _failed(error, 1)

    return answered


def _failed(error: MmneuronsError, n_outputs: int) -> list[Any]:
    return [gr.skip()] * n_outputs + [views.notice(error)]


def make_page(server: Server) -> gr.Blocks:
    """Build the page of a server."""
    with gr.Blocks(title="mmneurons", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        names = list(server.models)
        about = ", ".join(repr(vlm).split("(", 1)[1].rstrip(")") for vlm in server.models.values())
        gr.HTML(views.head(about), elem_classes="mm-head")
        session = gr.State(Session(), time_to_live=HOUR, delete_callback=lambda one: one.stop.set())
        model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        with gr.Tabs() as tabs:
            with gr.Tab("Find", id="find"):
                card, word, neuron_chosen = _find_tab(server, session, model)
            with gr.Tab("Neuron", id="neuron"):
                _neuron_tab(server, session, model, neuron_chosen, page, tabs)
            with gr.Tab("Edit", id="edit"):
                _edit_tab(server, session, model, word)
            if server.runs is not None:
                with gr.Tab("Atlas", id="atlas"):
                    _atlas_tab(server)
        card.select(_chosen, None, [word, neuron_chosen], queue=False, api_visibility="private", show_progress="hidden")
    return page


def _chosen(event: gr.EventData) -> tuple[Any, Any]:
    """Take over what was chosen on the card."""
    data = cast(dict[str, Any], event._data or {})
    word, neuron = str(data.get("word", ""))[:200], str(data.get("neuron", ""))[:40]
    return word or gr.skip(), neuron or gr.skip()


def _find_tab(server: Server, session: gr.State, model: gr.Dropdown) -> tuple[gr.HTML, gr.Textbox, gr.Textbox]:
    """Build the tab Find; return the card, and the fields of other tabs that a click on it fills."""
    # Made here, shown in their own tabs.
    word = gr.Textbox(label="Word that is to go", render=False)
    neuron = gr.Textbox(label="Neuron", placeholder="L3.u17", render=False, scale=3)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            picture = files_only(
                gr.Image(
                    type="filepath", label="Picture", sources=["upload", "webcam", "clipboard"], height=260,
                    placeholder=DROP,
                )
            )  # fmt: skip
            picture.preprocess = _path_of
            samples = pocket.samples()[:12] if any(vlm.is_pocket for vlm in server.models.values()) else ()
            shown = [(Image.open(sample.path).convert("RGB"), sample.caption) for sample in samples]
            gallery = gr.Gallery(
                cast(Any, shown), label="Samples", columns=4, height="auto", allow_preview=False, visible=bool(shown),
                interactive=False, object_fit="cover", buttons=[], elem_classes="mm-samples",
            )  # fmt: skip
            with gr.Accordion("More to ask", open=False):
                prompt = gr.Textbox(PROMPT, label="Prompt")
                caption = gr.Textbox(label="Caption to be scored instead of the model's own")
                against = gr.Textbox(label="Why not this word instead")
                score = gr.Dropdown(list(SCORES), value=SCORES[0], label="Score")
            go = gr.Button("Find the neurons", variant="primary")
        with gr.Column(scale=3, min_width=320):
            notice = gr.HTML(elem_id="find-notice")
            card = gr.HTML(views.empty(), elem_classes="mm-frame", elem_id="card", js_on_load=FRAME)

    def find(one: Session, name: str, *asked: Any) -> str:
        return views.card(server.find(one, name, Asked(*asked)))

    inputs = [session, model, picture, prompt, caption, against, score]
    options: Any = {"inputs": inputs, "outputs": [card, notice], "concurrency_id": "model"}
    go.click(told(find, 1), api_name="find", **options)
    picture.upload(told(find, 1), api_visibility="private", **options)
    prompt.submit(told(find, 1), api_visibility="private", **options)

    def take(event: gr.SelectData) -> str:
        # The number of a sample, never a path that a visitor sends.
        return str(samples[int(cast(int, event.index))].path)

    gallery.select(take, None, picture, api_visibility="private").then(
        told(find, 1), api_visibility="private", **options
    )
    return card, word, neuron


def _neuron_tab(
    server: Server, session: gr.State, model: gr.Dropdown, neuron: gr.Textbox, page: gr.Blocks, tabs: gr.Tabs
) -> None:
    """Build the tab Neuron, which `?neuron=L23.u6012` opens."""
    with gr.Row(equal_height=True):
        neuron.render()
        show = gr.Button("Show the neuron", variant="primary", scale=1)
    notice = gr.HTML(elem_id="neuron-notice")
    told_page = gr.HTML(elem_id="neuron-page")
    gr.HTML(views.slider_help())
    scale = gr.Slider(0, 3, value=1, step=0.25, label="Activation times")
    captions = gr.HTML(elem_id="neuron-captions")

    def page_of(one: Session, name: str, of: str) -> str:
        return server.neuron(one, name, of)

    slid = told_each(server.scale)

    def again(one: Session, name: str, of: str, times: float) -> Iterator[list[Any]]:
        # What stands below is of the neuron before: it is made anew, or goes where nothing is scaled.
        if times != 1 and any(picture.model == name for picture in one.shown):
            yield from slid(one, name, of, times)
        else:
            yield ["", gr.skip()]

    options: Any = {"inputs": [session, model, neuron], "outputs": [told_page, notice], "concurrency_id": "model"}
    slide: Any = {"inputs": [session, model, neuron, scale], "outputs": [captions, notice], "concurrency_id": "model"}
    slide["show_progress"] = "hidden"
    for event, name in ((show.click, "neuron"), (neuron.submit, None)):
        shown = event(told(page_of, 1), api_name=name, api_visibility="public" if name else "private", **options)
        kept = shown.then(None, neuron, neuron, js=KEEP_ADDRESS, api_visibility="private")
        kept.then(again, api_visibility="private", **slide)
    # By the pointer, the keyboard, the field of its number, or its reset; of the moves during one, the last counts.
    scale.change(slid, trigger_mode="always_last", api_name="scale", **slide)

    def opened(of: str) -> tuple[Any, Any]:
        return of or gr.skip(), gr.Tabs(selected="neuron") if of else gr.skip()

    page.load(opened, neuron, [neuron, tabs], js=ADDRESS, api_visibility="private", queue=False).then(
        told(lambda one, name, of: server.neuron(one, name, of) if of else "", 1), api_visibility="private", **options
    )


def _atlas_tab(server: Server) -> None:
    """Build the tab Atlas: a word, and the neurons that say it in the server's runs."""
    with gr.Row(equal_height=True):
        word = gr.Textbox(label="Word", placeholder="dog; none: all that were said", scale=3)
        show = gr.Button("Show its neurons", variant="primary", scale=1)
    notice = gr.HTML(elem_id="atlas-notice")
    found = gr.HTML(server.word(""), elem_id="atlas-page")
    for event, name in ((show.click, "word"), (word.submit, None)):
        event(
            told(server.word, 1), word, [found, notice], api_name=name, api_visibility="public" if name else "private"
        )


def _edit_tab(server: Server, session: gr.State, model: gr.Dropdown, word: gr.Textbox) -> None:
    """Build the tab Edit: words, progress, what the edit did, and the stack of patches."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            word.render()
            target = gr.Textbox(label="Word that is to come")
            remove = gr.Checkbox(label="Remove the word instead")
            with gr.Row():
                go = gr.Button("Edit", variant="primary", min_width=90)
                stop = gr.Button("Stop", min_width=90)
            stack = gr.CheckboxGroup(
                [], label="Patches, switched on or off", info="Yours alone: nobody else's answers change."
            )
            with gr.Row():
                undo = gr.Button("Undo the last", size="sm", min_width=80)
                save = gr.Button("Download", size="sm", min_width=80)
                give = files_only(gr.UploadButton("Upload", file_types=[".safetensors"], size="sm", min_width=80))
            files = gr.File(label="Patches that are on", file_count="multiple", interactive=False, visible=False)
        with gr.Column(scale=3, min_width=320):
            notice = gr.HTML(elem_id="edit-notice")
            outcome = gr.HTML(views.no_edit(), elem_id="outcome")

    def stacked(one: Session) -> Any:
        choices, on = visit.stack_of(one)
        return gr.CheckboxGroup(choices=choices, value=cast(Any, on))

    def edit(
        one: Session, name: str, source: str, to: str, without: bool, progress: gr.Progress = PROGRESS
    ) -> Iterator[list[Any]]:
        def tell(stage: str, done: float, total: int) -> None:
            progress((int(done), total) if total else 0.0, desc=stage)

        try:
            for made in server.edit(one, name, source, to, without, tell):
                yield [views.outcome(made), stacked(one), ""]
        except MmneuronsError as error:
            yield [gr.skip(), stacked(one), views.notice(error)]

    go.click(
        edit, [session, model, word, target, remove], [outcome, stack, notice], api_name="edit", concurrency_id="model"
    )
    stop.click(lambda one: one.stop.set(), session, None, queue=False, api_visibility="private")
    quick: Any = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    stack.input(visit.switch, [session, stack], None, **quick)

    def undone(one: Session) -> Any:
        one.undo()
        return stacked(one)

    def upload(one: Session, name: str, path: str | None) -> Any:
        if path is None:
            raise SettingError("There is no file.")
        server.upload(one, name, str(path))
        return stacked(one)

    undo.click(told(undone, 1), session, [stack, notice], **quick)
    save.click(told(lambda one: gr.File(visit.saved_patches(one), visible=True), 1), session, [files, notice], **quick)
    give.upload(
        told(upload, 1), [session, model, give], [stack, notice], api_visibility="private", concurrency_id="model"
    )
