import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmneurons.errors import SettingError
from mmneurons.neurons import Neuron

names = st.builds(Neuron, st.integers(0, 200), st.integers(0, 10**6), st.none() | st.integers(0, 500))


@given(names)
def test_a_name_reads_back(neuron):
    assert Neuron.parse(str(neuron)) == neuron


def test_names_are_written_as_the_field_writes_them():
    assert str(Neuron(23, 6012)) == "L23.u6012"
    assert str(Neuron(23, 6012, expert=5)) == "L23.e5.u6012"


@given(st.lists(names))
def test_order_is_layer_then_index(neurons):
    keys = [(n.layer, n.index) for n in sorted(neurons)]
    assert keys == sorted(keys)


@pytest.mark.parametrize(
    "name", ["", "23.6012", "L23u6012", "L-1.u3", "L1.u2.e3", "L1.u2 and more", "L\uff11.u2", "L1.u" + 5000 * "9"]
)
def test_anything_else_is_refused_with_the_form(name):
    with pytest.raises(SettingError, match=r"L23\.u6012"):
        Neuron.parse(name)
