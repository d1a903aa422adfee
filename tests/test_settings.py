"""Settings: one place for what a verb can be told, from which its arguments, options and provenance come."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest
import typer

import mmneurons as mmn
from mmneurons import settings
from mmneurons.cli import app
from mmneurons.cli.options import descriptions
from mmneurons.errors import SettingError
from mmneurons.settings import (
    DehallucinateSettings,
    EditSettings,
    FindSettings,
    InspectSettings,
    Question,
    SweepSettings,
    settled,
)

KINDS = (Question, FindSettings, SweepSettings, EditSettings, InspectSettings, DehallucinateSettings)
NO_SWEEP = ("token_ids", "tagger", "maps", "blank", "baseline", "grounded", "calibration")
COMMANDS = {
    "caption": (Question, {}),
    "find": (FindSettings, {"token_ids": None, "tagger": None, "blank": None, "baseline": None, "calibration": None}),
    "sweep": (SweepSettings, dict.fromkeys(NO_SWEEP)),
    "edit": (EditSettings, {}),
    "inspect": (InspectSettings, {}),
    "dehallucinate": (DehallucinateSettings, {"say": None, "n_asked": None}),
}
"""Of each command its class, and the fields that are no options of it, or other ones."""


@pytest.mark.parametrize("kind", KINDS)
def test_keyword_arguments_are_the_fields(kind):
    options = getattr(settings, f"{kind.__name__.removesuffix('Settings')}Options")
    names = {"Tagger": object}
    assert get_type_hints(options, localns=names) == get_type_hints(kind, localns=names)


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_is_described_by_sentences(kind):
    told = descriptions(kind)
    assert set(told) == {one.name for one in fields(kind)}
    assert all(text[0].isupper() and text.endswith(".") and "\n" not in text for text in told.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_of_a_command_are_the_fields_and_say_what_they_say(name):
    kind, without = COMMANDS[name]
    command = typer.main.get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    options = {one.name: one for one in command.params}
    for one in fields(kind):
        if one.name in without:
            continue
        option = options[one.name]
        assert option.help == descriptions(kind)[one.name]
        asked = (name, one.name)
        shown = asked in (("find", "maps"), ("find", "grounded"))  # a report is looked at; a Finding need not be
        default = True if shown else one.default
        assert option.default == default or (option.multiple and not option.default and not default)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Question, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (Question, {"batch_size": "8"}, "batch_size='8'"),
        (FindSettings, {"batch_size": "auto"}, "1 or more.\nbatch_size='auto'"),
        (SweepSettings, {"batch_size": "best"}, "1 or more, or 'auto'.\nbatch_size='best'"),
        (Question, {"prompt": ["What?"]}, "one text each"),
        (FindSettings, {"top": 0}, "top=0"),
        (FindSettings, {"top": float("nan")}, "top=nan"),
        (FindSettings, {"top": 2.5}, "whole number"),
        (EditSettings, {"top": True}, "top=True"),
        (InspectSettings, {"seed": -1}, "seed=-1"),
        (FindSettings, {"score": "loudness"}, "(?s)no score 'loudness'.*logit, logprob, paper"),
        (FindSettings, {"words": ["dog"], "token_ids": [3]}, "not both"),
        (EditSettings, {"blocks": 0}, "blocks=0"),
        (EditSettings, {"blocks": "last"}, "blocks='last'"),
        (DehallucinateSettings, {"payoff": 1}, "payoff=1"),
        (DehallucinateSettings, {"payoff": float("inf")}, "payoff=inf"),
        (EditSettings, {"ridge": float("inf")}, "ridge=inf"),
    ],
)
def test_what_has_no_meaning_is_refused(kind, given, message):
    with pytest.raises(SettingError, match=message):
        kind(**given)


def test_a_verb_refuses_what_it_cannot_be_told(vlm):
    with pytest.raises(TypeError, match=r"no option 'tpo'\. Did you mean 'top'\?"):
        mmn.find(vlm, None, tpo=3)  # pyright: ignore[reportCallIssue]


def test_arguments_go_over_settings():
    chosen = settled(FindSettings, FindSettings(top=3, score="logprob"), {"top": 5})
    assert chosen == FindSettings(top=5, score="logprob")
    assert settled(FindSettings, None, {"words": "dog"}).words == ("dog",)
    assert [one.prompt for one in EditSettings(wordings="What?").questions][1:] == ["What?"]  # pyright: ignore[reportArgumentType]


def test_what_is_asked_is_a_question_of_its_own():
    chosen = EditSettings(prompt="What?", max_new_tokens=5, wordings=("Which?",))
    assert chosen.question == Question("What?", max_new_tokens=5)
    assert [one.prompt for one in chosen.questions] == ["What?", "Which?"]
