import re
from pathlib import Path
from typing import get_type_hints

import pytest
from test_specificity import FOUND, LAYER_OF

from mmneurons.inspection.causal import NounCausal, Outcome
from mmneurons.inspection.faithfulness import Agreement, Deletion, NounTruth
from mmneurons.inspection.rows import CausalRow, FinderRow, SensitivityRow, SpecificityRow, by_image, rows_of
from mmneurons.inspection.run import Inspection, InspectSettings
from mmneurons.inspection.sensitivity import MatchedRegion, NounSensitivity
from mmneurons.inspection.specificity import specificity
from mmneurons.inspection.tables import causal_table, finder_tables, sensitivity_tables
from mmneurons.maths.statistics import Estimate
from mmneurons.metrics.regions import RegionMatch
from mmneurons.metrics.similarity import Meaning

FORMAT = Path(__file__).parents[1] / "docs" / "reference" / "format.md"
KINDS = {"string": str, "int64": int, "double": float, "boolean": bool}
SCHEMAS = {
    "sensitivity": SensitivityRow,
    "specificity": SpecificityRow,
    "causal": CausalRow,
    "finders": FinderRow,
}
MATCH, WEAK = RegionMatch(0.25, 0.5, 1.0, None, 0.125), RegionMatch(0.1, 0.1, 0.5, 0.5, 0.125)
ELSEWHERE = RegionMatch(0.0, 0.0, 0.25, 0.25, 0.5)
NOUN = NounSensitivity(
    "dogs",
    "dog",
    True,
    (0.9, 0.1),
    (),
    (True, False),
    {10: 0.5},
    {1: MATCH, 10: MATCH},
    {1: MatchedRegion(WEAK, 0.5, 1)},
    {1: ELSEWHERE},
)
OUTCOMES = (
    Outcome("times 0", 10, "top", ("a cat",), 1.0, 1.0, 1.0, 10.0, 1.0, 0.0),
    Outcome("times 0", 10, "matched random", ("a dog", "a cat"), 0.5, 1.0, 0.75, 25.0, 0.375, 0.0),
    Outcome("times 0", 10, "matched random, equal change", ("a dog", "a cat"), 0.5, 0.0, 0.75, 25.0, 1.0, -1.5),
)
TRUTH = NounTruth(
    word="dog",
    caption="a dog",
    probability=0.5,
    agreements=(
        Agreement("logit", "all blocks", "logprob", None),
        Agreement("logprob", "all blocks", "logprob", 0.5),
        Agreement("random", "all blocks", "logprob", 0.25),
    ),
    deletions=(Deletion("logit", 10, 0.5, 0.125, 0.75, 25.0, 0.0),),
    n_silenced=5,
    token=" dog",
    says={"logit": ((" dog", " a"), (" cat", " a"))},
)


@pytest.fixture(scope="module")
def found():
    return Inspection(
        InspectSettings(),
        {},
        {},
        {},
        {},
        sensitivity={"a": [NOUN, NOUN]},
        specificity=specificity(FOUND, LAYER_OF),
        causal={"a": [NounCausal("dogs", "dog", "dogs", OUTCOMES)]},
        finders={"a": [TRUTH]},
    )


@pytest.mark.parametrize("experiment", SCHEMAS)
def test_rows_have_the_columns_types_and_measures_of_the_page(found, experiment):
    section = FORMAT.read_text(encoding="utf-8").partition(f"## Rows of `{experiment}`")[2].partition("\n#")[0]
    columns = dict(re.findall(r"^\| `(\w+)` \| (\w+(?: or null)?) \|", section, re.MULTILINE))
    measures = set(
        re.findall(
            r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?`) \|", section.partition("| measure |")[2], re.MULTILINE))
        )
    )
    rows = found.rows(experiment)
    assert list(columns) == list(get_type_hints(SCHEMAS[experiment]))
    assert {row["measure"] for row in rows} == measures
    for row in rows:
        assert list(row) == list(columns)
        for name, value in row.items():
            kind, _, null = columns[name].partition(" or ")
            assert type(value) is KINDS[kind] or (null and value is None), f"{name}: {value!r}"


def test_an_experiment_that_was_not_run_has_no_rows():
    assert Inspection(InspectSettings(), {}, {}, {}, {}).rows("finders") == []


def test_rows_say_what_was_found_of_each_noun(found):
    values = {
        (row["noun"], row["measure"], row["neurons"], row["k"]): row["value"] for row in found.rows("sensitivity")
    }
    assert values[1, "lose half with a blank image", "top", 2] == 0.5
    assert values[1, "lose half with another image", "top", 2] is None
    assert values[0, "pointing game - the mask's share", "top", 10] == 0.875
    assert values[0, "patch AUROC", "top", 1] is None
    assert values[0, "IoU at equal area", "matched random", 1] == 0.1
    assert values[0, "IoU at equal area", "matched random", 10] is None, "none was drawn"
    assert (0, "the mask's share of the image", "matched random", 1) not in values
    assert values[0, "pointing game - the mask's share", "top, another object", 1] == -0.25, "of the other's share"
    assert values[0, "the mask's share of the image", "top, another object", 10] is None, "there is no other object"
    values = {(row["measure"], row["neurons"]): row["value"] for row in found.rows("causal")}
    assert values["no longer says the noun", "matched random"] == 0.5
    assert values["neurons", "matched random"] == 25
    assert values["change / the top's", "matched random"] == 0.375
    assert values["activations times", "matched random, equal change"] == -1.5
    values = {(row["measure"], row["neurons"]): row["value"] for row in found.rows("finders")}
    assert (values["fall of log p", "matched random"], values["decoded hit@10", "top"]) == (0.125, 0.5)
    values = {(row["measure"], row["concept"], row["other"]): row["value"] for row in found.rows("specificity")}
    assert values["shared top neurons", "cat", "dog"] == 0.5
    assert values["images that say it", "dog", None] == 2


def rows(*values, **labels):
    return [{"image": image, "value": value, **labels} for image, value in values]


def test_images_weigh_alike_however_many_nouns_they_say():
    found = by_image(rows(("b", 1.0), ("b", 0.0), ("b", None), ("a", 1.0), ("c", None), k=10), "k")
    assert found == {(10,): {"b": 0.5, "a": 1.0}}
    assert list(found[10,]) == ["b", "a"], "the order of the rows: intervals depend on it"


def test_combinations_of_labels_come_in_order_and_those_without_a_value_too():
    mixed = [
        *rows(("a", 1.0), which="z", k=2),
        *rows(("a", None), which="a", k=None),
        *rows(("b", 3.0), which="z", k=2),
    ]
    found = by_image(mixed, "which", "k")
    assert list(found.items()) == [(("z", 2), {"a": 1.0, "b": 3.0}), (("a", None), {})]
    assert by_image([], "k") == {}


def test_a_column_that_begins_with_thousands_of_nulls_and_names_that_are_no_utf_8():
    many = [*rows(*[("caf\udce9", None)] * 5000, k=None), *rows(("caf\udce8", 0.1), k=3)]
    assert by_image(many, "k") == {(None,): {}, (3,): {"caf\udce8": 0.1}}


def test_tables_are_means_over_nouns_then_over_images():
    shown, hidden = NOUN, NounSensitivity("sea", "sea", False, (0.0, 0.0), (), (True, True), {}, {}, {}, {})
    dependence, regions = sensitivity_tables({"a": [shown, hidden], "b": [hidden]})
    cell = dependence.value("top neurons that lose half with a blank image")
    assert isinstance(cell, Estimate)
    assert (cell.mean, cell.n) == (0.125, 2)
    cell = dependence.value("the same, of objects that the image truly shows")
    assert isinstance(cell, Estimate)
    assert (cell.mean, cell.n) == (0.5, 1)
    assert dependence.value("top neurons that lose half with another image") is None
    labels = [labels for labels, _ in regions.rows]
    assert labels[:7] == [
        ("pointing game", "top", "1"),
        ("pointing game", "top", "10"),
        ("pointing game", "matched random", "1"),
        ("pointing game", "matched random", "10"),
        ("pointing game", "top, another object", "1"),
        ("pointing game", "top, another object", "10"),
        ("the mask's share of the image", "top", "1"),
    ]
    assert regions.value("pointing game", "matched random", "10") is None


def test_tables_of_causes_and_finders_keep_their_order():
    meaning = Meaning(None, None, "none", None, {"BERTScore": "none here"})
    table = causal_table({"a": [NounCausal("dogs", "dog", "dogs", OUTCOMES)]}, meaning)
    assert [labels[2:] for labels, _ in table.rows] == [
        ("top", "no longer says the noun"),
        ("top", "the rest unchanged"),
        ("top", "BERTScore to the caption before"),
        ("matched random", "no longer says the noun"),
        ("matched random", "the rest unchanged"),
        ("matched random", "BERTScore to the caption before"),
        ("matched random", "loudness / the top's"),
        ("matched random", "neurons"),
        ("matched random", "change / the top's"),
        ("matched random, equal change", "no longer says the noun"),
        ("matched random, equal change", "the rest unchanged"),
        ("matched random, equal change", "BERTScore to the caption before"),
        ("matched random, equal change", "loudness / the top's"),
        ("matched random, equal change", "neurons"),
        ("matched random, equal change", "change / the top's"),
        ("matched random, equal change", "activations times"),
    ]
    agreement, differences, deletion = finder_tables({"a": [TRUTH], "b": [TRUTH]})
    assert agreement.value("logprob", "all blocks", "logit") is None
    cells = dict(differences.rows)
    assert cells["logprob", "all blocks", "logprob - logit"] is None
    assert str(cells["logprob", "all blocks", "logprob - random"]) == "0.250"
    assert str(deletion.value("logit", "10", "top - matched random")) == "0.375"
    assert deletion.value("logit", "10", "top / matched random") is None, "nothing tells that random ones do anything"


def test_rows_of_several_images_stand_one_after_the_other():
    places = dict.fromkeys((row["image"], row["noun"]) for row in rows_of({"b": [TRUTH, TRUTH], "c": [], "a": [TRUTH]}))
    assert list(places) == [("b", 0), ("b", 1), ("a", 0)]
