"""`photo:NAME`: photographs that scikit-image brings."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmneurons.cli import app
from mmneurons.data.dataset import read_items
from mmneurons.data.images import open_image
from mmneurons.errors import ImageError
from mmneurons.photo import samples


@pytest.fixture
def scikit_image(monkeypatch, tmp_path):
    """A package of that name with one picture."""
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").write_text("raise ImportError('not to be imported')")
    Image.new("RGB", (7, 5), (9, 8, 7)).save(tmp_path / "skimage" / "data" / "coffee.png")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_photograph_is_read_by_its_name_wherever_a_path_is(scikit_image):
    assert open_image("photo:coffee").image.getpixel((0, 0)) == (9, 8, 7)
    (item,) = read_items("photo:coffee")
    assert (item.name, item.image().size) == ("photo:coffee", (7, 5))


def test_a_name_that_is_none_and_a_package_that_is_not_there_are_told(monkeypatch):
    with pytest.raises(ImageError, match=r"no photograph photo:tea(.|\n)*photo:coffee"):
        open_image("photo:tea")
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match="pip install scikit-image"):
        open_image("photo:coffee")


def test_they_are_listed_with_their_licences():
    told = " ".join(CliRunner().invoke(app, ["samples"]).output.split())
    assert len(samples.PHOTOGRAPHS) >= 8
    for one in samples.PHOTOGRAPHS:
        assert f"photo:{one.name} {one.shows}; {one.licence}" in told
        assert one.licence.startswith(("CC0 ", "public domain "))
