"""Patches on the Hub: a stand-in of its HTTP API on this machine keeps repositories, commits and tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from kits.commands import call
from test_patch import a_patch, damaged

import mmneurons as mmn
from mmneurons.errors import FormatError, HubError
from mmneurons.patches.patch import Patch
from mmneurons.report.model_card import patch_card


class StandIn:
    """What the Hub keeps: by repository its commits, each with all files; the newest is `main`."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.writers = {"hf_ana": "ana"}
        self.sizes: dict[str, int] = {}
        self.written: list[str] = []

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        before = self.commits.setdefault(repository, {})
        everything = {**(list(before.values())[-1] if before else {}), **files}
        name = hashlib.sha1(repr((repository, len(before), sorted(everything.items()))).encode()).hexdigest()
        before[name] = everything
        return name

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits[repository]
        name = list(commits)[-1] if revision == "main" else revision
        return (name, commits[name]) if name in commits else None


class Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        sent = {"Content-Length": str(len(content)), **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self) -> str | None:
        return self.hub.writers.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def readable(self, repository: str) -> bool:
        """Like the Hub: 401 to a stranger, be the repository private or not there; 404 to a user."""
        owner = repository.split("/")[0]
        if repository in self.hub.commits and (repository not in self.hub.private or self.user == owner):
            return True
        if self.user is None:
            self.answer(
                401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password."
            )
        else:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return False

    def do_GET(self) -> None:
        if info := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)", self.path):
            if self.readable(info[1]):
                commit, files = self.hub.find(info[1], "main") or ("", {})
                facts = {"id": info[1], "sha": commit, "private": info[1] in self.hub.private}
                self.answer(200, {**facts, "siblings": [{"rfilename": name} for name in files]})
        elif at := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/([\w.-]+)", self.path):
            if self.readable(at[1]):
                self.file(self.hub.find(at[1], at[2]), at[1], at[3])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def file(self, found: tuple[str, dict[str, bytes]] | None, repository: str, name: str) -> None:
        if found is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif name not in found[1]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
        else:
            content = found[1][name]
            size = str(self.hub.sizes.get(repository, len(content)))
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=found[0], Content_Length=size)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.written.append(self.path)
        if self.user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != self.user:
                return self.answer(403, {"error": f"You don't have the rights to create a model under {repository}"})
            if repository in self.hub.commits:
                return self.answer(
                    409,
                    {
                        "error": "You already created this model repo",
                        "url": f"http://{self.headers['Host']}/{repository}",
                    },
                )
            self.hub.commits[repository] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repository)
            self.hub.commit(repository, {".gitattributes": b""})
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{repository}", "id": repository})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if at := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", self.path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if at := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                v["path"]: base64.b64decode(v["content"]) for v in (e["value"] for e in lines if e["key"] == "file")
            }
            name = self.hub.commit(at[1], files)
            url = f"http://{self.headers['Host']}/{at[1]}/commit/{name}"
            return self.answer(200, {"success": True, "commitOid": name, "commitUrl": url})
        return self.answer(404)


def at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A Hub that Ana is logged in to, and an empty cache."""
    kept = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Kept", (Handler,), {"hub": kept}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_ana")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield kept
    server.shutdown()
    server.server_close()


@pytest.fixture
def patch(random_vlm: mmn.VLM) -> Patch:
    model = {"id": "org/model", "revision": "c" * 40, "dtype": "float32", "weights_hash": "ab" * 32}
    made_by = {"source": "dog", "target": "cat", "model": model, "search": {"strength": 2.0, "turned": 1.0}}
    return replace(a_patch(random_vlm, {0: [1, 5], 2: [7]}), provenance=made_by)


def card_of(hub: StandIn, repository: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of the newest card."""
    found = hub.find(repository, "main")
    assert found is not None
    _, header, text = found[1]["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), text


def test_what_is_pushed_is_read_back_and_its_commit_recorded(hub, patch):
    first = patch.push_to_hub("ana/dog-to-cat", metrics={"efficacy": "0.98 of 50"})
    commit = first.removeprefix("hub:ana/dog-to-cat@")
    again = Patch.load("hub:ana/dog-to-cat")
    assert (again.hash, again.provenance["hub"]) == (patch.hash, {"id": "ana/dog-to-cat", "revision": commit})
    assert {name for name in again.provenance if name != "hub"} == set(patch.provenance)
    header, text = card_of(hub, "ana/dog-to-cat")
    assert (header["library_name"], header["base_model"]) == ("mmneurons", "org/model")
    assert "mmneurons" in header["tags"]
    for said in (patch.hash, "ab" * 32, "| efficacy | 0.98 of 50 |", "3, in blocks 0, 2", "# dog → cat"):
        assert said in text
    # A second push is a new commit of the same repository; what is pinned stays what it was.
    second = (2 * patch).push_to_hub("ana/dog-to-cat")
    assert Patch.load(first).hash == patch.hash
    assert Patch.load("hub:ana/dog-to-cat").hash == Patch.load(second).hash == (2 * patch).hash


def test_what_was_read_once_is_there_without_a_network(hub, patch, monkeypatch):
    place = patch.push_to_hub("ana/p")
    Patch.load("hub:ana/p")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Patch.load(place).hash == Patch.load("hub:ana/p").hash == patch.hash
    assert f"hub:ana/p@{Patch.load('hub:ana/p').provenance['hub']['revision']}" == place
    with pytest.raises(HubError, match=r"(?s)stay offline.*unset HF_HUB_OFFLINE"):
        Patch.load("hub:ana/other")
    with pytest.raises(HubError, match="stay offline"):
        patch.push_to_hub("ana/p")


def test_a_patch_of_the_hub_is_read_as_any_file_is(hub, patch, tmp_path):
    patch.save(tmp_path / "p.safetensors")
    for i, (_, content, message) in enumerate(list(damaged((tmp_path / "p.safetensors").read_bytes()))[:8]):
        hub.commit(f"eve/p{i}", {"patch.safetensors": content})
        with pytest.raises(FormatError) as told:
            Patch.load(f"hub:eve/p{i}")
        assert message in str(told.value)
    hub.commit("eve/huge", {"patch.safetensors": b"0"})
    hub.sizes["eve/huge"] = 2**40
    with pytest.raises(HubError, match=r"too large for a patch\.\nIt has 1,099,511,627,776 bytes"):
        Patch.load("hub:eve/huge")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hub:ana", "Its form is user/name"),
        ("hub:ana/../eve", "Its form is user/name"),
        ("hub:ana/none", r"(?s)no repository ana/none.*hf auth login"),
        ("hub:eve/model", r"(?s)holds no patch.*mmneurons patch push FILE eve/model"),
        ("hub:eve/model@v9", "no revision v9"),
    ],
)
def test_what_cannot_be_read_is_told_with_what_helps(hub, place, message):
    hub.commit("eve/model", {"model.safetensors": b"0"})
    with pytest.raises(HubError, match=message):
        Patch.load(place)


def test_what_cannot_be_pushed_is_told_and_leaves_nothing(hub, patch, monkeypatch):
    hub.commit("ana/model", {"model.safetensors": b"0", "README.md": b"mine"})
    hub.commit("ana/public", {"patch.safetensors": b"0"})
    before = json.dumps({name: list(commits) for name, commits in hub.commits.items()})
    for repository, more, message in (
        ("ana/model", {}, r"(?s)holds something else.*model\.safetensors"),
        ("ana/public", {"private": True}, "is public"),
        ("eve/p", {}, r"(?s)may not write to eve/p.*don't have the rights"),
        ("p", {}, "Its form is user/name"),
    ):
        with pytest.raises(HubError, match=message):
            patch.push_to_hub(repository, **more)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(HubError, match=r"(?s)does not know who you are.*hf auth login"):
        patch.push_to_hub("ana/new")
    assert json.dumps({name: list(commits) for name, commits in hub.commits.items()}) == before


def test_a_private_repository_is_private(hub, patch, monkeypatch):
    patch.push_to_hub("ana/secret", private=True)
    assert hub.private == {"ana/secret"}
    patch.push_to_hub("ana/secret", private=True)
    hub.writers["hf_eve"] = "eve"
    monkeypatch.setenv("HF_TOKEN", "hf_eve")
    with pytest.raises(HubError, match="or it is private"):
        Patch.load("hub:ana/secret")


def test_no_network_is_told(hub, patch, monkeypatch):
    at(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    for act in (lambda: Patch.load("hub:ana/p"), lambda: patch.push_to_hub("ana/p")):
        with pytest.raises(HubError, match=r"(?s)cannot be reached.*127\.0\.0\.1:9.*HF_ENDPOINT"):
            act()


def test_the_command_shows_and_asks_before_it_uploads(hub, patch, tmp_path, monkeypatch, capsys):
    import typer

    monkeypatch.chdir(tmp_path)
    patch.save("p.safetensors")
    asked: list[str] = []
    monkeypatch.setattr(typer, "confirm", lambda text: asked.append(text) or False)
    code, out, err = call(capsys, monkeypatch, "patch", "push", "p.safetensors", "ana/p")
    assert (code, len(asked), hub.written) == (1, 1, [])
    assert "nothing was uploaded" in err
    size = Path("p.safetensors").stat().st_size
    assert f"patch.safetensors  {size:,} bytes" in out
    assert patch.hash in out
    code, out, err = call(capsys, monkeypatch, "patch", "push", "p.safetensors", "ana/p", "--private", "--yes")
    assert (code, len(asked), hub.private) == (0, 1, {"ana/p"}), err
    place = out.split()[-1]
    assert Patch.load(place).hash == patch.hash
    found = hub.find("ana/p", "main")
    assert found is not None
    assert found[1]["README.md"].decode() in out
    code, out, err = call(capsys, monkeypatch, "patch", "show", place, "--no-words")
    assert (code, place in out) == (0, True), err
    code, out, err = call(capsys, monkeypatch, "caption", "--patch", "hub:ana/none")
    assert (code, "no repository ana/none" in err) == (2, True)


def test_the_three_lines_of_a_card_put_the_patch_on(hub, vlm, monkeypatch):
    patch = replace(a_patch(vlm, {0: [1]}), provenance={"model": dict(vlm.facts)})
    patch.push_to_hub("ana/p")
    header, text = card_of(hub, "ana/p")
    assert "base_model" not in header
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'mmn.load("pocket")' in code
    monkeypatch.setattr(mmn, "load", lambda name: vlm, raising=False)
    names: dict[str, Any] = {}
    exec(code, names)
    try:
        assert vlm.facts["patches"] == [patch.hash]
    finally:
        names["patch"].revert(vlm)


def test_a_card_shows_anybodys_words_as_they_are():
    evil = "<script>x</script> | [a](http://b) ```\n# big\n---\n`c`"
    model = {"id": 'a/b")\nimport os', "revision": "main\n```", "dtype": '"'}
    card = patch_card(
        Patch(4, (), provenance={"source": evil, "target": evil, "model": model}), "hub:a/b", {evil: evil}
    )
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header).get("base_model") is None
    before, _, block = text.partition("```json\n")
    lines = before.splitlines()
    assert [line for line in lines if line.startswith("#")] == [lines[1]]
    assert "<script>" not in before
    assert not re.search(r"(?<!\\)\[a\]", before)
    assert [line for line in card.splitlines() if line.startswith("```")] == ["```python", "```", "```json", "```"]
    assert json.loads(block.removesuffix("```\n"))["source"] == evil
    wide = patch_card(Patch(4, (), provenance={"model": {"id": "/home/ana/model", "revision": None}}), "hub:a/b", {})
    assert "base_model" not in wide
