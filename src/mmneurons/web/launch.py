"""Start the app: loopback only unless asked, nothing from other hosts, nothing told to anybody."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mmneurons.data.dataset import Item
from mmneurons.errors import SettingError
from mmneurons.pocket.scenes import nouns, scene
from mmneurons.pocket.sets import make_edit_scenes
from mmneurons.vlm.vlm import VLM
from mmneurons.web.atlas import Runs
from mmneurons.web.limits import Limits
from mmneurons.web.pool import STRIP, Pool
from mmneurons.web.visit import Server
from mmneurons.words import singular

if TYPE_CHECKING:
    import gradio as gr  # pyright: ignore[reportMissingImports] - an extra

APP_EXTRA = 'pip install "mmneurons[app]"'
"""The command that installs what the app needs."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The hosts that only this machine reaches."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""The policy of the page: a browser asks no other host, whatever Gradio's own page would load."""
FIRST_SEED, POOL = 690_000_000, 120
"""The first seed of the scenes of the pocket model's pool, and how many they are."""

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class OwnHost:
    """A layer around the server that sends the policy with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """Answer one request."""

        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def app(
    vlm: VLM | Mapping[str, VLM],
    *,
    images: Sequence[Any] = (),
    run: str | Path | Sequence[str | Path] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    limits: Limits | None = None,
    block: bool | None = None,
) -> gr.Blocks:
    """Open the web app on a model: click a word, see its neurons, edit, undo.

    In a script the call lasts until the server is stopped; in a notebook it returns, with the page below the cell.

    Args:
        vlm: The model, or several by the names that visitors choose from.
        images: Pictures of the server, such as `read_items(...)` gives, that edits are made and judged with beside the
            visitor's own. Default: scenes, for the pocket model; none, for another.
        run: The folder of a run of the same model, or several: their atlas is a tab, and on the pages of neurons.
        host: Where the server listens. Any other host than this machine lets others use the models.
        port: Its port; None: the first that is free from 7860 on.
        auth: The name and password that visitors are asked for; None: none.
        limits: What a visitor may ask of the server; None: the defaults.
        block: Whether the call lasts until the server is stopped; None: in a script, not in a notebook.

    Returns:
        The running app; its `close()` stops the server.

    Raises:
        FormatError: a folder holds no run, or a damaged one.
        SettingError: Gradio is not installed, no model was given, a run is of another, or the port is taken.
    """
    check_gradio()
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    from mmneurons.web.page import make_page, theme
    from mmneurons.web.views import style

    server = serving(vlm, images, limits or Limits(), [run] if isinstance(run, str | Path) else run)
    page = make_page(server)
    page.queue(max_size=32, default_concurrency_limit=2)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=auth,
            share=False,
            quiet=True,
            prevent_thread_lock=block is False,
            max_file_size=server.limits.n_bytes,
            show_error=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            footer_links=[],
            state_session_capacity=200,
            app_kwargs={"middleware": [Middleware(OwnHost)]},
            css=style(),
            theme=theme(),
        )
    except OSError as error:
        raise SettingError(
            f"The server cannot listen on {host}:{port}.", seen=str(error), fix="Choose another port."
        ) from error
    return page


def check_gradio() -> None:
    """Refuse to go on without Gradio.

    Raises:
        SettingError: it is not installed, or cannot be imported.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SettingError("The app needs Gradio.", seen=str(error), fix=APP_EXTRA) from error
    del gradio


def serving(
    vlm: VLM | Mapping[str, VLM], images: Sequence[Any], limits: Limits, folders: Sequence[str | Path] = ()
) -> Server:
    """Make the server of some models, pictures and folders of runs.

    Raises:
        FormatError: a folder holds no run, or a damaged one.
        SettingError: no model was given, or a run is of none of them.
    """
    models = {vlm.model_id: vlm} if isinstance(vlm, VLM) else dict(vlm)
    if not models:
        raise SettingError("The app needs a model.", fix="mmneurons.app(mmneurons.load())")
    pools = {
        name: Pool(one, scenes(), scenes_of) if one.is_pocket and not images else Pool(one, images)
        for name, one in models.items()
    }
    runs = Runs(folders) if folders else None
    if runs is not None and not any(runs.are_of(one) for one in models.values()):
        raise SettingError(
            "This run is of another model.", seen=f"The app has {', '.join(models)}.", fix="--model, as in the sweep"
        )
    return Server(models, pools, limits, runs)


@dataclass(frozen=True)
class Drawing:
    """A drawing is a scene of the pocket world that is drawn when it is looked at."""

    seed: int

    def image(self) -> Image.Image:
        """Draw it."""
        return scene(self.seed).image


def scenes() -> list[Drawing]:
    """Return the scenes of the pocket model's pool; they are none of training, and none of an evaluation set."""
    return [Drawing(seed) for seed in range(FIRST_SEED, FIRST_SEED + POOL)]


def scenes_of(word: str) -> list[Item]:
    """Draw scenes of the pocket world that show a word; none where it has no drawing of it."""
    noun = singular(word)
    if noun not in nouns():
        return []
    drawn = make_edit_scenes(noun)[: 2 * STRIP]
    return [Item(f"{noun} {i}", one.image, one.objects) for i, one in enumerate(drawn)]
