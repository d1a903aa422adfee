"""The command `app`."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmneurons.cli.options import Load, app, err, loads_model, out
from mmneurons.cli.sources import SOURCES, fitting_items, readable_items
from mmneurons.data.run import Run
from mmneurons.errors import SettingError

if TYPE_CHECKING:
    from mmneurons.vlm.vlm import VLM

PASSWORD = "MMNEURONS_PASSWORD"
"""The environment variable that holds the password of `--auth NAME`, so that no list of processes shows it."""


@app.command("app")
@functools.partial(loads_model, without={"model"})
def web_app(
    load: Load,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model: a hub id, a folder, or photo; repeatable. Default: the pocket model."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help=f"Pictures that edits are made and judged with beside a visitor's own. {SOURCES}"),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="A folder that sweep made with the same model: its atlas; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; any but this machine needs --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Ask visitors for this name and the password in ${PASSWORD}."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long the model may work on one request.")] = 120,
    export_space: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the files of a Hugging Face Space into a folder, and end.")
    ] = None,
) -> None:
    """Open the web app: click a word, see its neurons, edit, undo.

    A page for this machine alone, unless --host says otherwise. Visitors' patches are apart, and no file is changed.
    """
    from mmneurons.web.space import write_space

    if export_space is not None:
        write_space(export_space, model or [])
        out.print(f"wrote {export_space}", soft_wrap=True)
        return
    from mmneurons.web.launch import LOOPBACK, check_gradio
    from mmneurons.web.launch import app as open_app
    from mmneurons.web.limits import Limits

    # 1. Who may come in, before anything is loaded.
    check_gradio()
    if host not in LOOPBACK and auth is None:
        raise SettingError(
            "Anybody who reaches this host could use the model.",
            seen=f"--host {host}, without --auth",
            fix=f"{PASSWORD}=... mmneurons app --host {host} --auth NAME",
        )
    secret = _secret(auth)
    for folder in run or ():
        Run(folder)
    pictures = readable_items(images) or []
    # 2. The models, once and for all: none is loaded for a visitor.
    models: dict[str, VLM] = {name or "pocket": load.of(name) for name in model or [None]}
    for vlm in models.values():
        pictures = fitting_items(vlm, pictures or None) or []
    # 3. The page.
    if host not in LOOPBACK:
        err.print(f"warning: this listens on {host}: others can use your models, over a line that is not encrypted")
    out.print(f"open http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port} (Ctrl-C stops)", soft_wrap=True)
    open_app(
        models,
        images=pictures,
        run=run or (),
        host=host,
        port=port,
        auth=secret,
        limits=Limits(seconds=seconds),
        block=True,
    )


def _secret(name: str | None) -> tuple[str, str] | None:
    """Return the name and the password that visitors are asked for."""
    if name is None:
        return None
    password = os.environ.get(PASSWORD)
    if not password:
        raise SettingError("--auth needs a password.", seen=f"${PASSWORD} is not set.", fix=f"export {PASSWORD}=...")
    return name, password
