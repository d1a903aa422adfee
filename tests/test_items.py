import json

import numpy as np
import pytest
from PIL import Image

from mmneurons import pocket
from mmneurons.errors import ImageError, MmneuronsError, SettingError
from mmneurons.inspection.items import read_items


@pytest.fixture
def folder(tmp_path):
    """Two pictures, masks of a dog and a cat in the first, in a folder of their own."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("b", "a"):
        Image.new("RGB", (20, 10), "white").save(tmp_path / "images" / f"{name}.png")
    for noun, column in (("dog", 3), ("cat", 15)):
        mask = np.zeros((10, 20), dtype=np.uint8)
        mask[:, column] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"a.{noun}.png")
    return tmp_path


def test_a_folder_with_masks_beside(folder):
    a, b = read_items(folder / "images", folder / "masks")
    assert (a.name, a.objects, b.objects) == (str(folder / "images" / "a.png"), ("cat", "dog"), None)
    assert {noun: np.nonzero(mask)[1][0] for noun, mask in a.masks().items()} == {"cat": 15, "dog": 3}
    assert a.image().size == (20, 10)
    assert b.masks() == {}
    assert [item.objects for item in read_items(folder / "images")] == [None, None]


def test_a_manifest_counts_paths_from_its_own_folder(folder, monkeypatch):
    entries = [
        {"image": "images/a.png", "objects": ["dog", "cat"], "masks": ["masks/a.dog.png", "masks/a.cat.png"]},
        {"image": "images/b.png", "objects": ["tree"]},
        {"image": "images/b.png"},
    ]
    (folder / "list.json").write_text(json.dumps(entries))
    monkeypatch.chdir("/")
    items = read_items(folder / "list.json")
    assert [item.objects for item in items] == [("dog", "cat"), ("tree",), None]
    assert items[0].masks()["dog"][:, 3].all()


def test_two_objects_of_one_noun_are_one_region(folder):
    entries = [{"image": "images/a.png", "objects": ["dog", "dog"], "masks": ["masks/a.dog.png", "masks/a.cat.png"]}]
    (folder / "list.json").write_text(json.dumps(entries))
    (mask,) = read_items(folder / "list.json")[0].masks().values()
    assert mask.sum() == 20


def test_a_pocket_set_brings_its_truth():
    items = read_items("pocket:find-500")
    scene = pocket.evaluation_set("find-500")[7]
    assert (items[7].name, items[7].objects) == ("find-500/7", scene.objects)
    assert np.array_equal(np.stack(list(items[7].masks().values())), scene.masks)


def test_a_mask_of_another_size_is_refused(folder):
    Image.new("L", (10, 10)).save(folder / "masks" / "a.dog.png")
    with pytest.raises(ImageError, match="another size"):
        read_items(folder / "images", folder / "masks")[0].masks()


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "{}",
        "[]",
        "[1]",
        '[{"objects": ["dog"]}]',
        '[{"image": "a.png", "objects": "dog"}]',
        '[{"image": "a.png", "objects": ["dog"], "masks": []}, {"image": "a.png", "masks": ["b.png"]}]',
        '[{"image": "a.png", "objects": ["dog", "cat"], "masks": ["b.png"]}]',
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(SettingError):
        read_items(tmp_path / "list.json")


def test_nothing_there_is_refused(folder):
    (folder / "empty").mkdir()
    for source, masks in (
        (folder / "empty", None),
        (folder / "absent", None),
        (folder / "images", folder / "absent"),
        (folder / "images", folder / "empty"),
        ("pocket:nothing", None),
        ("pocket:find-500", folder / "masks"),
    ):
        with pytest.raises(MmneuronsError):
            read_items(source, masks)
