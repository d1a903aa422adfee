"""report/: what a page shows, what it refuses to run, and that its script draws what Python computes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmneurons as mmn
from mmneurons.errors import SettingError
from mmneurons.finding.result import Finding, Grid, NeuronFinding, NounFinding, Parts
from mmneurons.maths import regions
from mmneurons.neurons import Neuron
from mmneurons.pocket.scenes import scene
from mmneurons.report import text, write_report
from mmneurons.report.page import render

SIDE = 8
MEANING = "how far it pushes log p of the word, to first order"
MINUS = "\N{MINUS SIGN}"
LIKE = {
    "dog": [" dog", " puppy", " fox", " wolf", "dog", " paws", " tail", " ears", " bark", " bear"],
    "cat": [" cat", " kitten", " tiger", " lion", "cat", " whiskers", " paws", " mouse", " ears", " fox"],
    "grass": [" grass", " green", " tree", " on", " field", " leaf", "grass", " snow", " beach", " frog"],
}
ELSEWHERE = [" road", " table", ".", "\n", " the", " night", " desert", " a", " room"]


def grid(values: np.ndarray) -> Grid:
    return tuple(tuple(float(np.float32(value)) for value in row) for row in values)


def make_finding(seed: int = 3, objects: tuple[str, ...] = ("dog", "cat"), **changes: object) -> Finding:
    """What a pocket model might find: each object of a scene and its background, maps strongest on the object."""
    shown = scene(seed, objects, background="on the grass")
    random = np.random.default_rng(seed)
    masks = dict(zip((*shown.objects, "grass"), [*shown.masks, ~np.logical_or.reduce(shown.masks)], strict=True))
    words = [*shown.objects, "grass"]
    nouns = tuple(make_noun(random, word, step, shown.caption, masks[word]) for step, word in enumerate(words))
    finding = Finding(
        images=("scenes/dog-and-cat.png",),
        prompt="Describe the image.",
        answer_prefix="An image of",
        caption=shown.caption,
        token_ids=tuple(range(12)),
        score="logprob",
        against=None,
        nouns=nouns,
        provenance={
            "model": {"id": "pocket", "revision": None, "weights": "sha256:0f3a…"},
            "device": "cpu",
            "dtype": "float32",
            "versions": {"mmneurons": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "settings": {"maps": True, "top": 10, "ks": [1, 10, 50, 100, 500, 1000]},
        },
        views=(shown.image,),
    )
    return dataclasses.replace(finding, **changes)  # pyright: ignore[reportArgumentType]


def make_pair(**changes: object) -> Finding:
    """Two pictures in one prompt; of the second, maps of another shape, a tenth as strong and of the other sign."""
    one, other = make_finding(), scene(4, ("cat",), background="on the grass")

    def second(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
        return (*grids, grid(np.asarray(grids[0])[::2] * -0.1))

    nouns = tuple(
        dataclasses.replace(
            noun,
            neurons=tuple(dataclasses.replace(neuron, maps=second(neuron.maps)) for neuron in noun.neurons),
            regions={k: second(grids) for k, grids in noun.regions.items()},
        )
        for noun in one.nouns
    )
    pair = dataclasses.replace(
        one, images=("a/dog.png", "b/cat.png"), views=(*one.views, other.image.resize((112, 56))), nouns=nouns
    )
    return dataclasses.replace(pair, **changes)  # pyright: ignore[reportArgumentType]


def make_noun(random: np.random.Generator, word: str, step: int, caption: str, mask: np.ndarray) -> NounFinding:
    patch = mask.shape[0] // SIDE
    covered = mask.reshape(SIDE, patch, SIDE, patch).mean(axis=(1, 3))
    scores = np.sort(random.gamma(1.2, 0.35, 10) + 0.08)[::-1]
    scores[0] += 0.9
    maps = [
        covered * score * 2.5 + random.normal(0, 0.12 + 0.1 * i**0.5, (SIDE, SIDE)) for i, score in enumerate(scores)
    ]
    like, other = LIKE.get(word, [f" {word}"] * 10), ELSEWHERE
    neurons = tuple(
        NeuronFinding(
            neuron=Neuron(int(random.integers(3, 8)), int(random.integers(1024))),
            score=float(score),
            activation=float(score * random.choice([-1, 1]) * random.uniform(0.8, 2.5)),
            tokens=tuple(random.permutation(like).tolist()),
            suppressed=tuple(random.choice(other, 3, replace=False).tolist()),
            maps=(grid(maps[i]),),
            lost_without_image=float(random.uniform(0.35, 1.02)),
        )
        for i, score in enumerate(scores)
    )
    regions = {
        k: (grid(covered * 1.2 * k**-0.25 + random.normal(0.05, 0.09 * k**-0.15, (SIDE, SIDE))),)
        for k in (1, 10, 50, 100, 500, 1000)
    }
    spread = np.array([0.2, 0.3, 0.6, 1, 2, 3.5, 5, 4])
    layers = {k: tuple(random.multinomial(k, spread / spread.sum()).tolist()) for k in (10, 100, 1000)}
    ffn, attention = float(scores.sum() + random.uniform(1, 3)), float(random.uniform(2, 5))
    parts = Parts(ffn=ffn, top=float(scores.sum()), attention=attention, other=0.0, embedding=-0.42, bias=0.07)
    return NounFinding(
        word=word,
        lemma=word,
        start=caption.index(word),
        token=f" {word}",
        token_id=100 + step,
        step=3 * step + 1,
        n_tokens=1,
        probability=float(random.uniform(0.7, 0.99)),
        logit=ffn + attention - 0.42 + 0.07,
        parts=parts,
        neurons=neurons,
        layers=layers,
        regions=regions,
    )


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and the text inside each of the elements open there."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in ("meta", "img", "input", "br"):
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.texts[i] += data

    def all(self, tag: str, css_class: str = "") -> list[tuple[dict[str, str], str]]:
        """Attributes and text of the elements with this tag and class."""
        found = zip(self.elements, self.texts, strict=True)
        return [
            (attrs, text)
            for (name, attrs), text in found
            if name == tag and (not css_class or css_class in attrs.get("class", "").split())
        ]

    def text(self, tag: str, css_class: str = "") -> list[str]:
        return [" ".join(text.split()) for _, text in self.all(tag, css_class)]

    def facts(self) -> dict[str, str]:
        """What stands beside each term; of a term that comes twice, the last."""
        return dict(zip(self.text("dt"), self.text("dd"), strict=True))


def page_of(*findings: Finding, title: str | None = None) -> Page:
    return Page(render(findings, title=title))


def with_nouns(finding: Finding, **changes: object) -> Finding:
    nouns = tuple(dataclasses.replace(noun, **changes) for noun in finding.nouns)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(finding, nouns=nouns)


def with_neurons(finding: Finding, **changes: object) -> Finding:
    nouns = tuple(
        dataclasses.replace(
            noun,
            neurons=tuple(dataclasses.replace(neuron, **changes) for neuron in noun.neurons),  # pyright: ignore[reportArgumentType]
        )
        for noun in finding.nouns
    )
    return dataclasses.replace(finding, nouns=nouns)


def unpacked(numbers: str) -> Grid:
    rows, columns, values = numbers.split(" ")
    patches = np.frombuffer(base64.b64decode(values), dtype="<f4").reshape(int(rows), int(columns))
    return grid(patches)


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


# What the page shows


def test_the_numbers_shown_are_those_of_the_finding():
    finding = make_finding()
    shown = [float(attrs["value"]) for attrs, _ in page_of(finding).all("data")]
    expected: list[float] = []
    for noun in finding.nouns:
        parts = noun.parts
        expected += [noun.step, noun.probability, noun.logit]
        expected += [parts.ffn, parts.top, parts.attention, parts.embedding, parts.bias, parts.total]
        for neuron in noun.neurons:
            assert neuron.lost_without_image is not None
            expected += [neuron.score, neuron.activation, neuron.lost_without_image]
    assert shown == [float(f"{value:.7g}") for value in expected]


def test_a_row_of_the_table():
    neuron = make_finding().nouns[0].neurons[0]
    neuron = dataclasses.replace(
        neuron,
        neuron=Neuron(23, 6012, expert=5),
        score=1.23456,
        activation=-0.5,
        lost_without_image=0.761,
        tokens=(" dog", "dogs", "\n"),
        suppressed=(" car ", ""),
    )
    finding = with_nouns(make_finding(), neurons=(neuron,))
    page = page_of(finding)
    row = next(text for text in page.text("tr") if text.startswith("1 "))
    assert row == f"1 L23.e5.u6012 +1.235 {MINUS}0.500 76.1 % ␣dog dogs ⏎ ▾ ␣car␣ (empty)"


def test_the_caption_is_whole_and_its_nouns_are_buttons():
    finding = make_finding()
    page = page_of(finding)
    assert page.text("p", "caption") == [f"An image of {finding.caption}"]
    assert page.text("button", "noun") == ["dog", "cat", "grass"]
    assert page.text("h3") == ["dog", "cat", "grass"]
    assert not page.text("p", "unplaced")


def test_nouns_that_are_not_where_they_say_stand_after_the_caption():
    dog, cat, grass = make_finding().nouns
    nouns = (
        dataclasses.replace(dog, start=400),
        dataclasses.replace(cat, start=-1),
        grass,
        dataclasses.replace(grass, word="grassy"),
        dataclasses.replace(grass, word="ass", start=grass.start + 2),
    )
    page = page_of(make_finding(nouns=nouns))
    assert page.text("p", "caption") == ["An image of a dog and a cat on the grass"]
    assert page.text("p", "unplaced") == ["Also scored: cat grassy ass dog"]
    assert len(page.all("section", "panel")) == 5


def test_a_word_of_several_tokens_and_its_lemma():
    noun = dataclasses.replace(make_finding().nouns[0], word="dogs", n_tokens=3, token=" do")
    page = page_of(make_finding(caption="two dogs", nouns=(dataclasses.replace(noun, start=4),)))
    assert page.text("h3") == ["dogs lemma dog"]
    assert page.facts()["token scored"] == "␣do first of 3"


def test_parts_are_drawn_from_a_common_zero():
    # From -2 to 6: 8 wide, zero a quarter of the way.
    noun = dataclasses.replace(
        make_finding().nouns[0], parts=Parts(6, top=3, attention=-2, other=0, embedding=0, bias=0)
    )
    page = page_of(make_finding(nouns=(noun,)))
    bars = [attrs for attrs, _ in page.all("rect") if attrs["class"] in ("plus", "minus") and "height" in attrs][:6]
    drawn = [(bar["class"], float(bar["x"]), float(bar["width"])) for bar in bars]
    assert drawn == [
        ("plus", 25, 75),
        ("plus", 25, 37.5),
        ("minus", 0, 25),
        ("plus", 25, 0),
        ("plus", 25, 0),
        ("plus", 25, 50),
    ]


def test_histograms_count_every_block():
    finding = with_nouns(make_finding(), layers={10: (0, 3, 7), 100: (0, 0, 0)})
    page = page_of(finding)
    labels = [attrs["aria-label"] for attrs, _ in page.all("svg") if attrs.get("role") == "img"]
    assert labels[:2] == [
        "Top 10 neurons of “dog” by block, from block 0: 0, 3, 7",
        "Top 100 neurons of “dog” by block, from block 0: 0, 0, 0",
    ]
    assert page.text("figcaption")[1:3] == ["top 10 7 in block 2", "top 100"]


def test_the_ready_made_heat_map_is_hottest_where_the_region_is():
    patches = np.zeros((8, 8))
    patches[2, 5] = 1
    finding = with_nouns(make_finding(), regions={10: (grid(patches),), 100: (grid(-patches),)})
    [uri, *_] = [
        attrs["src"] for attrs, _ in page_of(finding).all("img") if attrs["alt"].startswith("Heat map of the top 10")
    ]
    red, _, blue = np.asarray(decoded(uri).convert("RGB"), dtype=int).transpose(2, 0, 1)
    y, x = np.unravel_index((red - blue).argmax(), red.shape)
    assert 28 <= y < 42
    assert 70 <= x < 84


def test_a_run_of_many_images_has_a_list_of_them_and_one_description():
    page = page_of(*(make_finding(seed, images=(f"{seed}.png",)) for seed in range(5)))
    assert [attrs["href"] for attrs, _ in page.all("a")] == [f"#finding-{i}" for i in range(5)]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) == 5 * (1 + 3 * 2)
    assert page.text("h2") == [*(f"{seed}.png" for seed in range(5)), "How this was made"]


def test_choices_and_provenance():
    finding = make_finding(score="paper", against="cat", prompt="What is\nthis?")
    page = page_of(finding, title="Dogs")
    assert page.text("h1") == page.text("title")[:1] == ["Dogs"]
    assert page.facts()["score"] == "paper: as the released MM_Neurons code"
    assert (page.facts()["against"], page.facts()["prompt"]) == ("cat", "What is⏎this?")
    assert (page.facts()["answer prefix"], page.facts()["versions.torch"]) == ("An image of", "2.13.0")
    assert (page.facts()["model.revision"], page.facts()["settings.maps"]) == ("none", "yes")
    assert page.facts()["settings.ks"] == "1, 10, 50, 100, 500, 1000"
    assert page_of(make_finding()).facts()["against"] == "nothing"


def test_runs_made_differently_are_described_apart():
    one, other = make_finding(images=("a/one.png",)), make_finding(4, images=("b/two.png",), score="logit")
    page = page_of(one, other, dataclasses.replace(one, images=("three.png",)))
    assert page.text("h2")[3:] == ["How one.png, three.png were made", "How two.png was made"]


@pytest.mark.parametrize(
    ("value", "signed", "written"),
    [
        (0, False, "0.000"),
        (1.23456, True, "+1.235"),
        (-12.345678, True, f"{MINUS}12.35"),
        (0.0000123, False, f"1.2e{MINUS}05"),
        (123456.0, False, "1.2e+05"),
        (float("nan"), True, "not a number"),
        (float("-inf"), False, f"{MINUS}∞"),
    ],
)
def test_numbers(value: float, signed: bool, written: str):
    assert text.number(value, signed=signed) == written


# Several pictures in one prompt, and none


def test_two_pictures_of_one_prompt_are_side_by_side_each_with_its_own_maps():
    finding = make_pair()
    page = page_of(finding)
    assert page.text("h2")[0] == "1 a/dog.png 2 b/cat.png"
    assert page.text("p", "which") == ["1 dog.png", "2 cat.png"]
    assert page.text("header") == ["Multi-modal neurons 1 prompt with 2 images · score logprob: " + MEANING]
    stages = [attrs for attrs, _ in page.all("div", "stage")]
    assert [attrs["data-picture"] for attrs in stages] == ["0", "1"]
    alts = [attrs["alt"].partition(" neurons")[0] for attrs, _ in page.all("img") if "top 10" in attrs["alt"]]
    assert len(alts) == 2 * len(finding.nouns), "a ready-made heat map over each"
    row = next(attrs["data-map"] for attrs, _ in page.all("tr") if "data-map" in attrs)
    assert [unpacked(part) for part in row.split(";")] == list(finding.nouns[0].neurons[0].maps)
    choice = next(attrs["data-map"] for attrs, _ in page.all("input") if attrs["value"] == "100")
    assert [unpacked(part) for part in choice.split(";")] == list(finding.nouns[0].regions[100])


def test_pictures_of_one_prompt_share_a_scale_of_colours():
    patches = np.zeros((8, 8))
    patches[2, 5] = 1
    both = (grid(patches), grid(patches * 0.1))
    page = page_of(with_nouns(make_pair(), regions={10: both}))
    strong, weak = [decoded(a["src"]) for a, _ in page.all("img") if a["alt"].startswith("Heat map")][:2]
    colour = [np.ptp(np.asarray(image, dtype=int)[:, :, [0, 2]], axis=2).max() for image in (strong, weak)]
    assert colour[0] > 3 * colour[1]


def test_a_picture_or_a_map_of_two_may_be_missing():
    pair = make_pair()
    page = page_of(dataclasses.replace(pair, views=(None, pair.views[1])))
    assert page.text("div", "stage") == ["picture not at hand", ""]
    assert "over picture 2" in next(a["alt"] for a, _ in page.all("img") if a["alt"].startswith("Heat map"))
    one_map = with_nouns(pair, regions={k: grids[:1] for k, grids in pair.nouns[0].regions.items()})
    first, second = page_of(one_map), page_of(with_nouns(pair, regions={10: ((), pair.nouns[0].regions[10][1])}))
    assert "over picture 1" in next(a["alt"] for a, _ in first.all("img") if a["alt"].startswith("Heat map"))
    assert next(a["data-map"] for a, _ in second.all("input") if a["value"] == "10").startswith(";4 8 ")


def test_the_list_shows_pictures_of_every_prompt():
    page = page_of(make_pair(), make_finding(), make_wordless(), make_finding(notes=("Approximate: by 3 %.",)))
    assert len(page.all("span", "thumbs-2")) == 1
    assert len(page.all("span", "thumbs-1")) == 2
    assert len(page.all("span", "flag")) == 1
    assert page.text("header")[0].startswith("Multi-modal neurons 4 prompts with 4 images")


def make_wordless() -> Finding:
    """No picture: a prompt of words alone."""
    finding = make_finding(images=(), views=(), prompt="Name an animal.")
    return with_neurons(with_nouns(finding, regions={}), maps=(), lost_without_image=None)


def test_words_alone_have_no_place_for_a_picture():
    page = page_of(make_wordless())
    assert page.text("h2")[0] == "words alone: Name an animal."
    assert page.text("p", "asked") == ["Answer begun with: An image of"]
    assert not page.all("figure", "picture") + page.all("div", "stage") + page.all("input")
    assert page.text("header")[0].startswith("Multi-modal neurons 1 prompt, words alone")
    assert page.text("h3") == ["dog", "cat", "grass"]


def test_ready_made_inputs_keep_their_small_maps_but_have_no_picture():
    page = page_of(make_finding(images=(), views=(), prompt="", answer_prefix=""))
    assert page.text("h2")[0] == "ready-made inputs"
    assert not page.all("p", "asked") + page.all("div", "stage") + page.all("button", "pin")
    assert len([attrs for attrs, _ in page.all("img") if attrs["alt"].startswith("map of")]) == 30
    assert (page.facts()["prompt"], page.facts()["answer prefix"]) == ("none", "none")


# What was asked, and what was answered


def test_the_prompt_and_the_answer_prefix_are_shown():
    page = page_of(make_finding(prompt="Look.\nWhat is this?", answer_prefix="It is"))
    assert page.text("p", "asked") == ["Asked: Look.⏎What is this? Answer begun with: It is"]
    assert page.text("p", "caption")[0].startswith("It is a dog")


def test_a_long_answer_of_several_lines_is_set_smaller_and_broken_where_it_breaks():
    caption = "a dog\n\n" + "and more " * 30
    page = page_of(make_finding(caption=caption))
    assert page.all("p", "long")
    assert len(page.all("br")) == 2
    assert not page_of(make_finding()).all("p", "long")


def test_a_warning_stands_out_from_other_notes():
    page = page_of(make_finding(notes=("Read with care.", "Approximate: off by 3.2%.")))
    assert page.text("p", "note") == ["Read with care.", "⚠ Warning. Approximate: off by 3.2%."]
    assert page.text("p", "warning") == ["⚠ Warning. Approximate: off by 3.2%."]


def test_side_paths_are_a_part_only_where_a_model_has_them():
    assert "side paths" not in page_of(make_finding()).text("th")
    parts = dataclasses.replace(make_finding().nouns[0].parts, other=-0.25)
    page = page_of(with_nouns(make_finding(), parts=parts))
    assert page.text("th").count("side paths") == 3
    assert float(f"{parts.total:.7g}") in [float(attrs["value"]) for attrs, _ in page.all("data")]


def test_tokens_without_a_tokenizer_and_neurons_in_experts():
    noun = make_finding().nouns[0]
    neuron = dataclasses.replace(noun.neurons[0], neuron=Neuron(3, 17, expert=2), tokens=("<17>", "<5>"))
    noun = dataclasses.replace(noun, word="<5>", lemma="<5>", token="<5>", start=5, neurons=(neuron,))
    page = page_of(make_finding(caption="<17> <5> <5>", nouns=(noun, dataclasses.replace(noun, start=0))))
    assert page.text("p", "caption") == ["An image of <17> <5> <5>"]
    assert page.text("button", "noun") == ["<5>", "<5>"]
    assert page.text("button", "pin")[0] == "L3.e2.u17"
    assert page.text("span", "promoted")[0] == "<17> <5>"


# What may be missing


def test_a_file_stands_in_for_the_view_and_is_said_to(tmp_path: Path):
    file = tmp_path / "dog.png"
    Image.new("RGB", (1000, 500), (10, 200, 30)).save(file)
    page = page_of(make_finding(views=(), images=(str(file),)))
    picture = next(attrs for attrs, _ in page.all("img") if attrs["alt"].startswith("The picture"))
    assert (picture["width"], picture["height"]) == ("768", "384")
    assert decoded(picture["src"]).size == (768, 384)
    assert page.text("p", "aside") == ["The file as it is: where the model cuts its input, maps are shifted."]
    assert not page_of(make_finding()).text("p", "aside")


@pytest.mark.parametrize("name", ["<PIL image>", "no/such/file.png", "", "\0", "x" * 5000, "\ud800", "."])
def test_no_picture_at_hand(name: str):
    page = page_of(make_finding(views=(None,), images=(name,)))
    assert "picture not at hand" in page.text("p")
    assert not page.all("ul", "strip")


def test_a_file_that_is_no_picture(tmp_path: Path):
    file = tmp_path / "dog.png"
    file.write_text("not pixels")
    assert "picture not at hand" in page_of(make_finding(views=(), images=(str(file),))).text("p")


def test_no_map_was_asked_for():
    finding = with_neurons(with_nouns(make_finding(), regions={}), maps=())
    page = page_of(finding)
    assert page.text("p", "no-map") == ["No map was asked for."]
    assert not page.all("ul", "strip")
    assert not page.all("input")
    note = "No map is drawn: this model has no patch grid."
    page = page_of(dataclasses.replace(finding, notes=("Read with care.", note)))
    assert page.text("p", "no-map") == [note]
    assert page.text("p", "note") == ["Read with care.", note]


@pytest.mark.parametrize("bad", [(), ((),), ((1.0, 2.0), (3.0,)), ((float("nan"),),), ((float("inf"), 0.0),)])
def test_a_map_that_cannot_be_drawn_is_left_out(bad: Grid):
    finding = with_neurons(with_nouns(make_finding(), regions={10: (bad,)}), maps=(bad,))
    assert page_of(finding).text("p", "no-map") == ["No map was asked for."]


def test_one_noun_without_maps_beside_others_with():
    dog, cat, grass = make_finding().nouns
    page = page_of(make_finding(nouns=(dog, dataclasses.replace(cat, regions={}), grass)))
    assert page.text("ul", "strip") == ["dog top 10 grass top 10"]


def test_another_k_stands_in_where_the_top_10_is_missing():
    regions_of = {50: (grid(np.eye(3)),), 100: (grid(np.eye(3)),)}
    page = page_of(with_nouns(make_finding(), regions=regions_of))
    assert page.text("ul", "strip") == ["dog top 50 cat top 50 grass top 50"]


def test_no_image_was_blanked():
    page = page_of(with_neurons(make_finding(), lost_without_image=None))
    assert not page.all("td", "lost")
    assert page_of(make_finding()).all("td", "lost")


def test_nothing_to_show():
    assert page_of().text("p", "nothing") == ["This run has no findings."]
    page = page_of(make_finding(nouns=(), caption="", provenance={}))
    assert page.text("p", "nothing") == ["No word of this answer was scored."]
    assert page.text("p", "caption") == ["An image of (the model said nothing)"]
    assert not page.all("details")
    assert (
        page_of(with_nouns(make_finding(), neurons=(), layers={})).text("p", "nothing") == ["No neuron is listed."] * 3
    )


def test_numbers_that_are_none_are_shown_as_such():
    nan, infinite = float("nan"), float("inf")
    broken = Parts(ffn=nan, top=-infinite, attention=infinite, other=nan, embedding=0.0, bias=1.0)
    finding = with_neurons(with_nouns(make_finding(), parts=broken, logit=nan, probability=nan), score=nan)
    assert page_of(finding).facts()["logit"] == "not a number"


# What must not happen

HOSTILE = (
    """</script></style></title><script>alert(1)</script><img src=x onerror='alert(2)'>" onload="alert(3)' {{ 7 }}"""
)


def hostile() -> Finding:
    finding = make_finding(
        images=(HOSTILE,),
        prompt=HOSTILE,
        answer_prefix=HOSTILE,
        caption=HOSTILE,
        against=HOSTILE,
        notes=(HOSTILE, "http://x"),
    )
    finding = dataclasses.replace(finding, provenance={HOSTILE: {HOSTILE: [HOSTILE, None]}})
    finding = with_nouns(finding, word="<script>", lemma=HOSTILE, token=HOSTILE, start=HOSTILE.index("<script>"))
    return with_neurons(finding, tokens=(HOSTILE, "javascript:alert(4)"), suppressed=(HOSTILE,))


def test_hostile_text_is_shown_as_text():
    page = page_of(hostile(), hostile(), title=HOSTILE)
    harmless = page_of(make_finding(), make_finding())
    tags = {tag for tag, _ in page.elements}
    assert tags == {tag for tag, _ in harmless.elements} - {"i"}  # no marks: all of it can be seen
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert page.text("title")[:1] == page.text("h1") == [HOSTILE]
    assert page.text("h2")[0] == HOSTILE
    assert page.text("p", "caption")[0] == f"{HOSTILE} {HOSTILE}"
    assert page.text("button", "noun")[0] == "<script>"
    assert page.text("bdi", "token")[1] == HOSTILE
    assert page.facts()[f"{HOSTILE}.{HOSTILE}"] == f"{HOSTILE}, none"


@pytest.mark.parametrize("finding", [make_finding(), hostile()], ids=["plain", "hostile"])
def test_a_notebook_shows_the_page_in_a_frame_of_its_own(finding: Finding):
    [(tag, attrs)] = Page(finding._repr_html_()).elements
    assert (tag, attrs["srcdoc"], attrs["sandbox"]) == ("iframe", render([finding]), "allow-scripts")


@pytest.mark.parametrize("finding", [make_finding(), hostile()], ids=["plain", "hostile"])
def test_the_page_loads_and_runs_nothing_but_itself(finding: Finding):
    page = page_of(finding, finding, title=finding.prompt)
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "srcset", "action", "data")], (
            tag
        )
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,"))
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
    [(attrs, script)], [(_, style)] = page.all("script"), page.all("style")
    assert attrs == {}
    assert "url(" not in style
    assert "@import" not in style
    for part in (style, script):
        assert "http" not in part
    policy = next(attrs["content"] for attrs, _ in page.all("meta") if "http-equiv" in attrs)
    assert policy == (
        f"default-src 'none'; img-src data:; style-src {sha256(style)}; script-src {sha256(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def sha256(inline: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" dog", "␣dog"),
        ("hot dog", "hot dog"),
        ("  ", "␣␣"),
        ("\n\t\r", "⏎⇥␍"),
        ("\x00\x1b\x7f\x85", "␀␛␡[U+0085]"),
        ("\ud800\ufffd", "\ufffd\ufffd"),
        ("a\u2028b", "a[U+2028]b"),
        ("gpj\u202e", "gpj[U+202E]"),
        ("\u200b", "[U+200B]"),
        ("\u200d", "[U+200D]"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("", "(empty)"),
    ],
)
def test_what_cannot_be_seen_has_a_mark(token: str, shown: str):
    assert "".join(piece.text for piece in text.pieces(token)) == shown


def test_marks_are_told_from_the_characters_they_look_like():
    assert text.pieces(" ␣") == [text.Piece("␣", True), text.Piece("␣", False)]


def test_lone_surrogates_and_control_characters_reach_no_file(tmp_path: Path):
    nasty = "\ud83d\x00\x1b[31m\u202e\u2028"
    finding = make_finding(images=(nasty,), prompt=nasty, caption=nasty, notes=(nasty,), provenance={nasty: nasty})
    finding = with_neurons(with_nouns(finding, word=nasty, lemma=nasty, token=nasty, start=0), tokens=(nasty,))
    write_report([finding], tmp_path / "page.html", title=nasty)
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not set(nasty) & set(written) - set("[31m")


def test_the_same_findings_give_the_same_bytes(tmp_path: Path):
    for name in ("one.html", "two.html"):
        write_report([make_finding(), make_finding(4)], tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.html", "two.html"))
    assert one == two
    assert b"\r" not in one


def test_a_pocket_page_stays_small():
    assert len(render([make_finding()]).encode()) < 250_000


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "page.html"
    path.write_text("the old page")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("mmneurons.report.page.os.replace", fail)
        with pytest.raises(SettingError, match="disk full"):
            write_report([make_finding()], path)
    with monkeypatch.context() as patched:
        patched.setattr("mmneurons.report.pictures.heat_over", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report([make_finding()], path)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "the old page"
    write_report([make_finding()], str(path))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_the_finding_is_left_as_it_was():
    finding = make_finding()
    [view] = finding.views
    assert view is not None
    before = view.tobytes()
    render([finding])
    assert finding == make_finding()
    assert view.tobytes() == before


# In a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ACTIONS = """
setTimeout(() => {
  const article = document.querySelector("article"), stage = article.querySelector(".stage");
  const texts = (selector) => [...article.querySelectorAll(selector)].map((element) => element.textContent);
  const drawn = () => {
    const canvas = stage.querySelector("canvas");
    const rgba = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return {
      nouns: texts(".panel:not([hidden]) h3"),
      pressed: texts(".noun[aria-pressed=true]"),
      hidden: canvas.hidden,
      size: [canvas.width, canvas.height],
      painted: rgba.filter((value, i) => i % 4 === 3 && value > 0).length,
      shows: stage.dataset.shows,
      mode: stage.dataset.mode,
      says: article.querySelector(".shown").textContent,
      focus: document.activeElement.textContent,
    };
  };
  const button = (word) => [...article.querySelectorAll(".noun")].find((noun) => noun.textContent === word);
  const input = (value) =>
    [...article.querySelectorAll(`input[value="${value}"]`)].find((one) => !one.closest("[hidden]"));
  const right = new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true, cancelable: true });
  const seen = [drawn()];
  const act = (action) => { action(); seen.push(drawn()); };
  act(() => button("cat").click());
  act(() => input("100").click());
  act(() => button("cat").dispatchEvent(right));
  act(() => input("mask").click());
  act(() => article.querySelector(".panel:not([hidden]) .pin").focus());
  act(() => document.activeElement.click());
  act(() => { document.activeElement.blur(); input("heat").click(); });
  act(() => input("plain").click());
  const maps = CASES.map(({ rows, columns, values, width, height }) => {
    const heat = upsample({ rows, columns, values: Float32Array.from(values) }, width, height);
    const { low, high, passes } = inside(heat);
    const pixels = new Uint32Array(heat.length);
    paintHeat(pixels, heat, Math.max(Math.abs(low), Math.abs(high)));
    const mask = Uint8Array.from(heat, (value) => Number(passes(value)));
    return [heat, mask, pixels].map((array) =>
      btoa(Array.from(new Uint8Array(array.buffer), (code) => String.fromCharCode(code)).join("")));
  });
  document.documentElement.dataset.result = JSON.stringify({ seen, maps });
}, 500);
"""


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("MMNEURONS_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def opened(page: Path, profile: Path) -> Page:
    """The page as it stands in headless Chromium three seconds after it was opened."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    command = [browser(), *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    return Page(done.stdout)


def hard_grids() -> list[tuple[np.ndarray, tuple[int, int]]]:
    random = np.random.default_rng(5)
    shapes = [((8, 8), (112, 112)), ((3, 5), (31, 44)), ((24, 24), (50, 10)), ((1, 1), (4, 4)), ((2, 2), (8, 8))]
    grids = [(random.normal(size=shape).astype(np.float32), size) for shape, size in shapes]
    grids.append((np.array([[1, 0], [0, 0]], dtype=np.float32), (8, 8)))  # ties at the maximum
    grids.append((np.zeros((2, 3), dtype=np.float32), (5, 7)))
    return grids


@pytest.mark.slow
def test_in_a_browser_the_script_runs_and_draws_what_python_computes(tmp_path: Path):
    grids = hard_grids()
    cases = [
        {"rows": len(g), "columns": len(g[0]), "values": g.ravel().tolist(), "height": size[0], "width": size[1]}
        for g, size in grids
    ]
    actions = ACTIONS.replace("CASES", json.dumps(cases))
    # The page itself, its policy in force; only these actions are let in beside its own script.
    html = render([make_finding(), hostile()]).replace("script-src ", f"script-src {sha256(actions)} ", 1)
    (tmp_path / "page.html").write_text(html.replace("</body>", f"<script>{actions}</script></body>"), encoding="utf-8")
    page = opened(tmp_path / "page.html", tmp_path / "profile")
    [(root, _)] = page.all("html")
    assert "data-error" not in root, root["data-error"]
    assert root["data-ready"] == "true"
    result = json.loads(root["data-result"])
    check_what_was_drawn(result["seen"])
    for (patches, size), drawn in zip(grids, result["maps"], strict=True):
        heat = regions.upsample(patches, size)
        expected = [heat, regions.mask(heat), np.ascontiguousarray(regions.overlay(heat))]
        assert [base64.b64decode(array) for array in drawn] == [array.tobytes() for array in expected]


TWO_PICTURES = """
setTimeout(() => {
  const article = document.querySelector("article"), stages = [...article.querySelectorAll(".stage")];
  const seen = [];
  const look = () => seen.push({
    says: article.querySelector(".shown").textContent,
    high: article.querySelector("[data-legend=high]").textContent,
    stages: stages.map((stage) => {
      const canvas = stage.querySelector("canvas");
      const rgba = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      const strongest = rgba.filter((value, i) => i % 4 === 3).reduce((most, value) => Math.max(most, value), 0);
      return [stage.dataset.shows, stage.dataset.mode, canvas.hidden, canvas.width, canvas.height, strongest];
    }),
  });
  look();
  [...article.querySelectorAll(".noun")].find((noun) => noun.textContent === "cat").click();
  look();
  article.querySelector(".panel:not([hidden]) .pin").click();
  look();
  article.querySelector("input[value=mask]").click();
  look();
  document.documentElement.dataset.result = JSON.stringify(seen);
}, 500);
"""


@pytest.mark.slow
def test_in_a_browser_one_choice_drives_the_maps_of_all_pictures(tmp_path: Path):
    finding = make_pair()
    html = render([finding, make_wordless()]).replace("script-src ", f"script-src {sha256(TWO_PICTURES)} ", 1)
    html = html.replace("</body>", f"<script>{TWO_PICTURES}</script></body>")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    [(root, _)] = opened(tmp_path / "page.html", tmp_path / "profile").all("html")
    assert "data-error" not in root, root["data-error"]
    dog, cat, pinned, masked = json.loads(root["data-result"])
    name = str(finding.nouns[1].neurons[0].neuron)
    assert [stage[:5] for stage in dog["stages"]] == [["10", "heat", False, 448, 448], ["10", "heat", False, 448, 224]]
    assert [stage[:3] for stage in pinned["stages"]] == [[name, "heat", False]] * 2
    assert [stage[:3] for stage in masked["stages"]] == [[name, "mask", False]] * 2
    for step, word in [(dog, "dog"), (cat, "cat")]:
        strong, weak = [stage[5] for stage in step["stages"]]
        assert strong > 5 * weak > 0, "one scale of colours"
        assert step["says"] == f"“{word}”, mean of the top 10"
        sizes = [(112, 112), (56, 112)]
        grids = finding.noun(word).regions[10]
        heats = [regions.upsample(np.asarray(g, np.float32), size) for g, size in zip(grids, sizes, strict=True)]
        assert float(step["high"]) == pytest.approx(max(np.abs(heat).max() for heat in heats), rel=5e-3)
    maps = finding.nouns[1].neurons[0].maps
    counts = [
        regions.mask(regions.upsample(np.asarray(m, np.float32), size)).sum()
        for m, size in zip(maps, [(112, 112), (56, 112)], strict=True)
    ]
    assert masked["says"] == f"“cat”, neuron {name}: its strongest {counts[0]} + {counts[1]} pixels"


@pytest.mark.parametrize("pictures", [1, 2, 0])
def test_what_the_pocket_model_finds_can_be_shown(vlm: mmn.VLM, sample_paths: list[str], pictures: int):
    images = [sample_paths[:pictures]] if pictures else None
    found = mmn.find(vlm, images, maps=bool(pictures))  # pyright: ignore[reportArgumentType]
    finding = found[0] if isinstance(found, list) else found
    assert [len(neuron.maps) for neuron in finding.nouns[0].neurons] == [pictures] * 10
    page = page_of(finding)
    assert len(page.all("div", "stage")) == pictures
    assert len([a for a, _ in page.all("img") if a["alt"].startswith("Heat map")]) == pictures * len(finding.nouns)


def check_what_was_drawn(seen: list[dict[str, Any]]) -> None:
    grass = make_finding().nouns[2]
    first, other, hundred, arrow, masked, focused, pinned, left, plain = seen
    assert (
        [step["nouns"] for step in seen]
        == [step["pressed"] for step in seen]
        == [["dog"]] + [["cat"]] * 2 + [["grass"]] * 6
    )
    assert (first["shows"], first["says"]) == ("10", "“dog”, mean of the top 10")
    assert first["size"] == [448, 448], "four times the picture's size"
    assert first["painted"] > 448 * 448 / 2
    assert other["says"] == "“cat”, mean of the top 10"
    assert hundred["says"] == "“cat”, mean of the top 100"
    assert (arrow["focus"], arrow["shows"]) == ("grass", "100"), "another noun keeps k"
    share = regions.mask(regions.upsample(np.asarray(grass.regions[100][0], np.float32), (112, 112))).sum()
    assert masked["says"] == f"“grass”, mean of the top 100: its strongest {share} pixels"
    name = str(grass.neurons[0].neuron)
    assert focused["shows"] == pinned["shows"] == left["shows"] == name
    assert left["says"] == f"“grass”, neuron {name}"
    assert plain["hidden"]
    assert plain["mode"] == "plain"
