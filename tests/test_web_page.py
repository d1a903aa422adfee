"""The app in a browser: real clicks on a real server, started as a user starts it.

Skipped without Gradio, Playwright or a browser, unless MMNEURONS_REQUIRE_APP says that they must be there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmneurons as mmn
from mmneurons import pocket

WAIT = 240_000
"""Milliseconds; no speed is asserted."""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = os.environ.get("MMNEURONS_AXE", "")
"""The file axe.min.js of the npm package axe-core, which looks for what keeps people from using a page."""
THERE = all(map(importlib.util.find_spec, ("gradio", "playwright"))) and BROWSER is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not THERE and not os.environ.get("MMNEURONS_REQUIRE_APP"), reason="no Gradio, no Playwright or no browser"
    ),
    # What Gradio's and Playwright's own code warns of is not ours.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def address(vlm, tmp_path_factory) -> Iterator[str]:
    """A server of the pocket model and of a run, in a process of its own."""
    run = mmn.sweep(vlm, pocket.samples()[0].path, tmp_path_factory.mktemp("swept") / "run", top=3).folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmneurons", "app", "--device", "cpu", "--port", str(port), "--run", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()[0].decode()
            try:
                urllib.request.urlopen(url).close()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, url: str, **options: Any) -> Any:
    """A page of a visitor of its own, which notes the hosts that it asks and what goes wrong in it."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(WAIT)
    page.hosts, page.faults = set(), []
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "//" in request.url else "data"))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(url)
    page.get_by_role("tab", name="Find").wait_for()  # another tab can be the one that is open
    return page


def give(page: Any, path: str | Path) -> Any:
    """Upload a picture; return the card."""
    page.locator("input[type=file]").first.set_input_files(str(path))
    card = page.frame_locator("#card iframe")
    card.locator(".caption").wait_for()
    return card


@pytest.fixture(scope="module")
def sample() -> Path:
    return pocket.samples()[0].path


def test_click_a_word_edit_it_and_undo_while_another_visitor_sees_nothing_of_it(browser, address, sample):
    page, other = opened(browser, address), opened(browser, address)
    card = give(page, sample)
    noun = card.locator(".caption button.noun").last
    word = noun.inner_text()
    noun.click()
    card.locator(".panel:not([hidden]) .pin").first.click()
    page.get_by_role("tab", name="Edit").click()
    assert page.get_by_label("Word that is to go").input_value() == word
    page.get_by_label("Word that is to come").fill("cat")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("Locality").wait_for()
    assert "cat" in page.locator("#outcome dd").nth(1).inner_text()
    # The patch is on for this visitor, and for no other.
    page.get_by_role("tab", name="Find").click()
    page.get_by_role("button", name="Find the neurons").click()
    card.locator(".caption", has_text="cat").wait_for()
    assert word in give(other, sample).locator(".caption").inner_text()
    # Undone, the caption is the first one.
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("button", name="Undo the last").click()
    page.get_by_role("checkbox", name="cat").wait_for(state="detached")
    page.get_by_role("tab", name="Find").click()
    page.get_by_role("button", name="Find the neurons").click()
    card.locator(".caption", has_text=word).wait_for()
    # The neuron that was kept on the card has a page, with an address, and a slider.
    page.get_by_role("tab", name="Neuron").click()
    page.get_by_role("button", name="Show the neuron").click()
    page.locator("#neuron-page h2").wait_for()
    assert "?neuron=L" in page.url
    assert (page.hosts | other.hosts) - {"data"} == {address.split("/")[2]}
    assert page.faults == other.faults == []


def test_the_slider_redraws_its_neuron_by_the_keyboard_too_and_another_neuron_when_it_is_shown(
    browser, address, sample
):
    page = opened(browser, address)
    give(page, sample)
    page.get_by_role("tab", name="Neuron").click()
    name, captions = page.get_by_label("Neuron", exact=True), page.locator("#neuron-captions dt")
    name.fill("L1.u17")
    page.get_by_role("button", name="Show the neuron").click()
    page.locator("#neuron-page h2", has_text="L1.u17").wait_for()
    assert captions.count() == 0
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    captions.filter(has_text="L1.u17").filter(has_text="0.750").wait_for()
    captions.filter(has_text="random and as loud").filter(has_text="0.750").wait_for()
    page.keyboard.press("Home")
    captions.filter(has_text="L1.u17").filter(has_text="0.000").wait_for()
    name.fill("L2.u5")
    page.get_by_role("button", name="Show the neuron").click()
    captions.filter(has_text="L2.u5").filter(has_text="0.000").wait_for()
    assert page.faults == []


@pytest.mark.skipif(not AXE, reason="$MMNEURONS_AXE names no axe.min.js of the npm package axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_on_any_tab(browser, address, sample, scheme):
    page = opened(browser, address, color_scheme=scheme)
    axe = Path(AXE).read_text(encoding="utf-8")

    def check(where: str) -> None:
        for frame in page.frames:  # the card's too, whose sandbox axe does not reach into by itself
            frame.evaluate(axe)
            found = frame.evaluate("() => axe.run(document, {iframes: false})")
            assert found["passes"]
            bad = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
            assert not bad, (where, [(one["id"], [node["html"] for node in one["nodes"]]) for one in bad])

    check("empty")
    card = give(page, sample)
    card.locator(".caption button.noun").last.click()
    card.locator(".panel:not([hidden]) .pin").first.click()
    page.get_by_role("button", name="More to ask").click()
    page.get_by_label("Prompt").wait_for()
    check("find")
    page.get_by_role("tab", name="Neuron").click()
    page.get_by_role("button", name="Show the neuron").click()
    page.locator("#neuron-page h2").wait_for()
    page.locator("input[type=range]").fill("0")
    page.locator("#neuron-captions dt", has_text="random and as loud").wait_for()
    check("neuron")
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("Word that is to come").fill("cat")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_text("Locality").wait_for()
    check("edit")
    page.get_by_role("tab", name="Atlas").click()
    page.locator("#atlas-page td").first.wait_for()
    check("atlas")
    page.get_by_label("Word", exact=True).fill("nothing")
    page.get_by_role("button", name="Show its neurons").click()
    page.locator("#atlas-notice .mm-notice").wait_for()
    check("notice")


def test_an_address_opens_a_neuron_and_no_page_is_wider_than_a_phone(browser, address):
    page = opened(browser, f"{address}?neuron=L1.u17", viewport={"width": 390, "height": 800}, color_scheme="dark")
    assert page.locator("#neuron-page h2").inner_text() == "L1.u17"
    for tab in ("Find", "Neuron", "Edit", "Atlas"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_function("document.documentElement.scrollWidth <= 390")  # once what is loading is there


def test_a_word_of_the_atlas_leads_to_its_neurons(browser, address):
    page = opened(browser, address)
    page.get_by_role("tab", name="Atlas").click()
    noun = page.locator("#atlas-page td").first.inner_text()
    page.get_by_label("Word", exact=True).fill(noun)
    page.get_by_role("button", name="Show its neurons").click()
    page.locator("#atlas-page h3", has_text=f"Neurons of “{noun}”").wait_for()
    first = page.locator("#atlas-page a").first
    name = first.inner_text()
    first.click()
    page.locator("#neuron-page h2", has_text=name).wait_for()
    page.locator("#neuron-page h3", has_text="In the data set it gives most to").wait_for()


def test_the_quick_benchmark_of_the_app_fills_every_row(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.cost.app", "--quick", "--out", str(page)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = dict(line.strip("| ").split(" | ") for line in lines[2:])
    assert [name.startswith("resident memory") for name in rows] == [False] * 8 + [True] * 3
    assert all(float(cell.split(" (")[0]) > 0 for cell in rows.values())


def test_by_the_keyboard_alone(browser, address, sample):
    page = opened(browser, address)
    give(page, sample)

    def tab_to(name: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            said = page.evaluate(
                "() => { let a = document.activeElement; return a.tagName === 'IFRAME' ? 'IFRAME' : a.textContent }"
            )
            if said.strip() == name:
                return
        raise AssertionError(f"{name} is not reached by Tab")

    tab_to("IFRAME")
    card = page.frame_locator("#card iframe")
    nouns = card.locator(".caption button.noun").all_inner_texts()
    begun = card.locator(".caption button.noun:focus").inner_text()  # the frame can have been reached a Tab ago
    page.keyboard.press("ArrowRight")
    after = nouns[(nouns.index(begun) + 1) % len(nouns)]
    card.locator(".caption button[aria-pressed=true]:focus", has_text=after).wait_for()
    assert card.locator(".caption button[aria-pressed=true]").count() == 1


def test_hostile_files_and_texts_are_messages_and_run_nothing(browser, address, tmp_path, sample):
    page = opened(browser, address)
    bad = tmp_path / "<img src=x onerror=document.title=1>.png"
    Image.new("1", (20_000, 20_000)).save(bad)
    page.locator("input[type=file]").first.set_input_files(str(bad))
    page.locator("#find-notice .mm-notice", has_text="too large").wait_for()
    give(page, sample)
    page.get_by_role("tab", name="Neuron").click()
    page.get_by_label("Neuron", exact=True).fill("<img src=x onerror=document.title=1>")
    page.get_by_role("button", name="Show the neuron").click()
    notice = page.locator("#neuron-notice .mm-notice")
    notice.wait_for()
    assert "onerror" in notice.inner_text()
    assert "Traceback" not in page.content()
    assert page.title() == "mmneurons"
