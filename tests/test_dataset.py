import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.bounds import bounded
from PIL import Image

from mmneurons import pocket
from mmneurons.data.coco import Outline, RunLengths
from mmneurons.data.dataset import read_items
from mmneurons.data.masks import read_mask
from mmneurons.errors import ImageError, MmneuronsError, SettingError


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
        '[{"image": "images/a.png", "object": ["dog"]}]',
        '[{"image": "images/a.png", "masks": "a.dog.png", "objects": ["dog"]}]',
        "[" * 100_000,
        '[{"image": ' + "9" * 5000 + "}]",
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


def test_a_manifest_of_an_editor_and_of_another_program(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    text = json.dumps([{"image": "~/images/a.png", "objects": None, "masks": None}])
    (folder / "list.json").write_text(text, encoding="utf-8-sig")
    assert read_items(folder / "list.json")[0].image().size == (20, 10)


def test_what_a_manifest_names_is_looked_at_before_anything_is_loaded(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "text.png").write_text("no image")
    for bad in ("absent.png", "pipe.png", "text.png", "images", "/dev/zero", "x" * 5000, "a\0b", ""):
        entries = [{"image": "images/a.png"}, {"image": "images/a.png", "objects": ["dog"], "masks": [bad]}]
        (folder / "list.json").write_text(json.dumps(entries))
        with pytest.raises(ImageError, match="entry 2 of 2"):
            read_items(folder / "list.json")
    with pytest.raises(MmneuronsError):
        read_items("x" * 5000)


# Folders


def test_a_folder_says_what_it_leaves_out(folder):
    images = folder / "images"
    for name in ("notes.txt", "._a.jpg", ".DS_Store", "c.JFIF", "d.jp2", "broken.png"):
        (images / name).write_bytes(b"no image")
    Image.new("RGB", (4, 4)).save(images / "c.JFIF", "JPEG")
    Image.new("RGB", (4, 4)).save(images / "d.jp2")
    (images / "more").mkdir()
    told = []
    items = read_items(images, tell=told.append)
    assert [Path(item.name).name for item in items] == ["a.png", "b.png", "c.JFIF", "d.jp2"]
    assert "broken.png" in told[0]
    assert told[1] == f"{images}: left out 2 hidden, 1 folder, 1 .txt, 1 damaged"


def test_masks_beside_their_images_are_no_images(folder):
    images = folder / "images"
    grey = np.zeros((10, 20), np.uint8)
    grey[:, 3] = 255
    Image.fromarray(grey).save(images / "a.dog.png")
    ramp = np.tile(np.linspace(60, 200, 20).astype(np.uint8), (10, 1))
    Image.fromarray(ramp).save(images / "a.edited.png")  # a photograph of a similar name
    told = []
    assert [Path(item.name).name for item in read_items(images, tell=told.append)] == [
        "a.edited.png",
        "a.png",
        "b.png",
    ]
    assert told == [f"{images}: left out 1 mask"]
    (images / "a.edited.png").unlink()
    a, b = read_items(images, images)
    assert (a.objects, b.objects) == (("dog",), None)


def test_masks_go_with_the_image_of_the_longest_name(folder):
    images, masks = folder / "images", folder / "masks"
    for name in ("a.2", "photo[1]"):
        Image.new("RGB", (20, 10)).save(images / f"{name}.png")
    mask = Image.open(masks / "a.dog.png")
    for name in ("a.2.cat.png", "photo[1].dog.PNG", "b.dog.1.png", "b.dog.2.png", "absent.dog.png", "b.1.png"):
        mask.save(masks / name, "PNG")
    told = []
    items = {Path(item.name).name: item for item in read_items(images, masks, tell=told.append)}
    assert items["a.png"].objects == ("cat", "dog")
    assert items["a.2.png"].objects == ("cat",)
    assert items["photo[1].png"].objects == ("dog",)
    assert items["b.png"].objects == ("dog", "dog")
    assert list(items["b.png"].masks()) == ["dog"]
    assert told == [f"{masks}: 2 masks without an image: absent.dog.png, b.1.png"]
    Image.new("RGB", (20, 10)).save(images / "a.jpg")
    with pytest.raises(SettingError, match="Which image"):
        read_items(images, masks)


# What a mask may be: on the left half of 4 x 2 pixels is the object

LEFT = np.array([[1, 1, 0, 0]] * 2, dtype=bool)


def grey(true: int, false: int = 0, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(LEFT, true, false).astype(dtype))


def palette(*colours: int) -> Image.Image:
    image = grey(1).convert("P")
    image.putdata(LEFT.ravel().astype(int).tolist())
    image.putpalette(colours)
    return image


def rgba(inside: tuple[int, ...], outside: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(LEFT[..., None], inside, outside).astype(np.uint8))


@pytest.mark.parametrize(
    "image",
    [
        grey(255),
        grey(1),
        grey(38),
        grey(250, 3),
        grey(255).convert("1"),
        grey(1, dtype=np.uint16),
        grey(65535, dtype=np.uint16),
        grey(1, dtype=np.float32),
        grey(255).convert("RGB"),
        palette(0, 0, 0, 128, 0, 0),
        palette(0, 0, 0, 1, 1, 1),
        rgba((255, 0, 0, 255), (0, 0, 0, 255)),
        rgba((0, 0, 0, 255), (0, 0, 0, 0)),
        rgba((255, 255, 255, 255), (255, 255, 255, 0)),
        rgba((90, 200, 30, 255), (7, 8, 9, 0)),
        rgba((90, 200, 30, 1), (7, 8, 9, 0)),
        grey(255).convert("LA"),
        Image.fromarray(np.array([[255, 200, 0, 0], [255, 255, 0, 0]], np.uint8)),
    ],
    ids=lambda image: image.mode,
)
def test_masks_that_can_be_told(tmp_path, image):
    image.save(tmp_path / "mask.tif")
    assert np.array_equal(read_mask(tmp_path / "mask.tif"), LEFT)


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.fromarray(np.array([[0, 1, 2, 15]], np.uint8)), "4 greys from 0 to 15"),
        (Image.fromarray(np.array([[0, 12, 12, 255]], np.uint8)), "3 greys"),
        (grey(2, 1), "2 greys from 1 to 2"),
        (grey(200, 180), "2 greys"),
        (palette(0, 0, 255, 128, 0, 0), "none of them is black"),
        (Image.fromarray(np.array([[[0, 0, 0], [128, 0, 0], [0, 128, 0]]], np.uint8)), "3 colours"),
        (rgba((255, 255, 255, 0), (0, 0, 0, 0)), "transparent"),
        (
            Image.fromarray(np.array([[[255] * 4, [0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8)),
            "one mask in black and white",
        ),
        (Image.fromarray(np.array([[np.nan, 1]], np.float32)), "greys"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(tmp_path, image, seen):
    image.save(tmp_path / "park.dog.tif")
    with pytest.raises(ImageError, match=r"park\.dog\.tif") as caught:
        read_mask(tmp_path / "park.dog.tif")
    assert seen in caught.value.seen


# COCO


def coco(folder, annotations, **more):
    images = [{"id": 7, "file_name": "a.png", "width": 20, "height": 10, "license": 1}]
    images.append({"id": 8, "file_name": "absent.png", "width": 20, "height": 10})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "hot dog"}]}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_images.json").write_text(json.dumps(content | more))
    return folder / "annotations" / "instances_images.json"


def test_coco_instances_bring_their_masks(folder):
    square = {"image_id": 7, "category_id": 1, "segmentation": [[2, 2, 5, 2, 5, 5, 2, 5]], "iscrowd": 0}
    runs = {"image_id": 7, "category_id": 1, "segmentation": {"size": [10, 20], "counts": [190, 10]}, "iscrowd": 1}
    told = []
    (item,) = read_items(coco(folder, [square, runs]), tell=told.append)
    assert item.objects == ("hot dog",)
    expected = np.zeros((10, 20), bool)
    expected[2:5, 2:5] = True
    expected[:, 19] = True
    assert np.array_equal(item.masks()["hot dog"], expected)
    assert "1 of its 2 images are not there" in told[0]
    (item,) = read_items(coco(folder, [square, {"image_id": 7, "category_id": 1}]))
    assert (item.objects, item.masks()) == (("hot dog",), {})  # one of them may be anywhere


def test_run_lengths_as_text():
    """By hand: 6, 1, then 40 = 8 + 32 * 1 in two letters, 8 with the bit for "more" 40 + 48 = 'X'; then 3 as 1 + 2."""
    mask = Outline((RunLengths((5, 10), "61X12"),), 10, 5).mask()
    flat = mask.T.ravel()
    assert np.flatnonzero(flat).tolist() == [6, 47, 48, 49]  # runs 6, 1, 40, 1 + 2


def test_a_polygon_holds_the_pixels_whose_centre_it_holds():
    triangle = Outline(([[0.0, 0.0, 4.0, 0.0, 0.0, 4.0]],), 5, 4).mask()
    assert triangle.astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    beyond = Outline(([[-1.0, -1.0, 6.0, -1.0, 6.0, 5.0, -1.0, 5.0]],), 5, 4).mask()
    assert beyond.all()


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 2]],
        [[1, 1, 2, 2, 1e300, 1]],
        {"size": [10, 20], "counts": [190]},
        {"size": [20, 10], "counts": [200]},
        {"size": [10, 20], "counts": [-5, 205]},
        {"size": [10, 20], "counts": "\u0001"},
        {"size": [10, 20], "counts": "o" * 99},
    ],
)
def test_a_broken_segmentation_is_refused(folder, segmentation):
    path = coco(folder, [{"image_id": 7, "category_id": 1, "segmentation": segmentation}])
    with pytest.raises(ImageError):
        read_items(path)[0].masks()


MANIFEST = b'[{"image": "images/a.png", "objects": ["dog", "dog"], "masks": ["masks/a.dog.png", "masks/a.cat.png"]}]'
INSTANCES = (
    b'{"images": [{"id": 1, "file_name": "images/a.png", "width": 20, "height": 10}], "categories": [{"id": 1, '
    b'"name": "dog"}], "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[2, 2, 5, 2, 5, 5]]}, '
    b'{"image_id": 1, "category_id": 1, "segmentation": {"size": [10, 20], "counts": "n5:"}}]}'
)


@st.composite
def mutants(draw, seeds) -> bytes:
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data) - 1))
        data[place : place + draw(st.integers(0, 6))] = draw(
            st.sampled_from([b"null", b"-1", b"1e400", b"[", b'"', b"\xff", b"9" * 400, b"{}", b"\\u0000"])
        )
    return bytes(data)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutants([MANIFEST, INSTANCES]) | st.binary(max_size=50))
def test_any_manifest_gives_items_or_our_error(folder, data):
    (folder / "list.json").write_bytes(data)
    with contextlib.suppress(MmneuronsError), bounded():
        for item in read_items(folder / "list.json"):
            assert all(mask.dtype == bool for mask in item.masks().values())


def test_the_seeds_of_the_mutants_are_sound(folder):
    for seed in (MANIFEST, INSTANCES):
        (folder / "list.json").write_bytes(seed)
        assert read_items(folder / "list.json")[0].masks()["dog"].any()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_a_mask_or_our_error(folder, data):
    seed = bytearray((folder / "masks" / "a.dog.png").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        seed[data.draw(st.integers(0, len(seed) - 1))] = data.draw(st.integers(0, 255))
    (folder / "mask").write_bytes(seed)
    with contextlib.suppress(MmneuronsError), bounded():
        assert read_mask(folder / "mask").dtype == bool
