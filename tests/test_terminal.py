"""report/terminal.py: what a finding looks like in a terminal, wide or narrow."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from mmneurons.finding.result import Finding, Grid, NeuronFinding, NounFinding, Parts
from mmneurons.neurons import Neuron
from mmneurons.report.terminal import show


def square(side: int, value: float) -> Grid:
    """A map that is `value` in one patch and half as much beside it."""
    return tuple(tuple({0: value, 1: value / 2}.get(x + y, 0.0) for x in range(side)) for y in range(side))


def make(*maps: Grid, **changes: object) -> Finding:
    neurons = tuple(
        NeuronFinding(Neuron(30 + i, 14335, expert=None), 0.5, -1.5, (" dog", " puppy", "<17>", " a very long word"))
        for i in range(2)
    )
    noun = NounFinding(
        word="dog",
        lemma="dog",
        start=2,
        token=" dog",
        token_id=5,
        step=1,
        n_tokens=1,
        probability=0.5,
        logit=3.0,
        parts=Parts(ffn=2, top=1, attention=1, other=0, embedding=0, bias=0),
        neurons=neurons,
        regions={10: maps} if maps else {},
    )
    finding = Finding(
        images=tuple(f"folder/{i}.png" for i in range(len(maps))),
        prompt="What is this?",
        answer_prefix="",
        caption="a dog",
        token_ids=(4, 5),
        score="logit",
        against=None,
        nouns=(noun,),
    )
    return dataclasses.replace(finding, **changes)  # pyright: ignore[reportArgumentType]


def printed(finding: Finding, width: int = 80, *, colour: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    show(finding, console)
    written = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return [line.rstrip() for line in written.splitlines()]


def test_the_heading_names_all_pictures():
    assert printed(make(square(4, 1)))[1:3] == ["folder/0.png", "a dog"]
    assert printed(make(square(4, 1), square(4, 1)))[1:4] == ["1  folder/0.png", "2  folder/1.png", "a dog"]


def test_words_alone_and_ready_made_inputs_are_named():
    assert printed(make())[1] == "words alone: What is this?"
    assert printed(make(prompt=""))[1] == "ready-made inputs"


def test_maps_stand_beside_the_table_where_there_is_room_and_below_it_where_not():
    finding = make(square(4, 1), square(4, 0.5))
    wide, narrow = printed(finding, 80), printed(finding, 45)
    assert any("neuron" in line and line.endswith("map of the top 10") for line in wide)
    assert narrow[-6:] == ["map of the top 10", "1         2", "██▒▒      ▒▒░░", "▒▒        ░░", "", ""], "one scale"


def test_maps_that_do_not_fit_in_one_row_go_on_in_the_next():
    lines = printed(make(*[square(8, 1)] * 5), 45)
    heads = [line.split() for line in lines if line and set(line) <= set("12345 ")]
    assert heads == [["1", "2"], ["3", "4"], ["5"]]
    assert lines.count("map of the top 10") == 1


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("maps", [(), (square(8, 1),), (square(60, 1), square(24, 1))], ids=["none", "one", "two"])
def test_no_line_is_wider_than_the_screen_and_no_number_is_lost(width: int, maps: tuple[Grid, ...]):
    neuron = dataclasses.replace(make().nouns[0].neurons[0], neuron=Neuron(61, 18943, expert=2))
    finding = make(*maps)
    finding = dataclasses.replace(finding, nouns=(dataclasses.replace(finding.nouns[0], neurons=(neuron,)),))
    lines = printed(finding, width)
    assert max(map(len, lines)) <= width
    assert any(line.split()[:3] == ["L61.e2.u18943", "+0.500", "-1.50"] for line in lines)


def test_a_large_map_is_reduced_by_means():
    lines = printed(make(square(60, 9)), 40)
    shown = lines[lines.index("map of the top 10") + 1 :]
    assert len(shown) == 20
    assert shown[0].startswith("██")


def test_a_warning_stands_out():
    lines = printed(make(notes=("Read with care.", "Approximate: off by 3 %.")), colour=True)
    plain, warning = (next(line for line in lines if words in line) for words in ("care", "Approximate"))
    assert "note:" in plain
    assert "warning:" in warning
    assert "\x1b[1;31m" in warning, "bold red"
    assert "\x1b[1;31m" not in plain


def test_side_paths_are_told_only_where_there_are_any():
    assert not any("side paths" in line for line in printed(make()))
    noun = make().nouns[0]
    noun = dataclasses.replace(noun, parts=dataclasses.replace(noun.parts, other=-0.5))
    assert any("side paths -0.50" in line for line in printed(make(nouns=(noun,)), 120))


def test_a_word_that_is_not_where_it_says_is_still_shown_once():
    noun = dataclasses.replace(make().nouns[0], word="<5>", start=0)
    lines = printed(make(caption="<17> <5>", nouns=(noun, noun)))
    assert lines[2] == "<17> <5>"
    assert lines.count("<5>") == 2, "the headings"


def test_an_answer_without_words():
    assert printed(make(caption="", nouns=()))[2] == "(the model said nothing)"


def test_what_would_steer_a_terminal_is_made_visible():
    lines = printed(make(images=("a\x1b[2J.png",), caption="a dog\x1b[31m\n", notes=("\x1b]0;x\x07",)))
    assert not any("\x1b" in line or "\x07" in line for line in lines)
