"""A cast keeps what the type can hold and refuses the rest by name."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.cast import largest, narrowed
from jlora.errors import AdapterError, ModelError

TYPES = {
    "float16": (np.float16, 65504.0, 65520.0),
    "bfloat16": (ml_dtypes.bfloat16, 3.3895313892515355e38, 3.3961775292304601e38),
    "float32": (np.float32, 3.4028234663852886e38, 1e39),
}
"""The largest value of each type, and the smallest that rounds to infinity; IEEE 754, not our code."""


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_of_a_type_passes_and_the_next_is_refused(name: str, sign: int) -> None:
    kind, most, over = TYPES[name]
    dtype = np.dtype(kind)
    cast = narrowed(np.array([0.5, sign * most]), dtype, "w", ModelError)
    assert cast.dtype == dtype
    assert cast.tolist() == [0.5, sign * most]
    with pytest.raises(
        ModelError, match=f"^w: values up to {over:.3g}".replace("+", "[+]")
    ) as caught:
        narrowed(np.array([0.5, sign * over]), dtype, "w", ModelError)
    advice = "; use --dtype bfloat16 or float32" if name == "float16" else ""
    assert str(caught.value).endswith(f" do not fit {name}{advice}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fits_no_type(bad: float) -> None:
    with pytest.raises(AdapterError, match="do not fit float32"):
        narrowed(np.array([bad], np.float32), np.dtype(np.float32), "w", AdapterError)


@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1))
def test_what_fits_is_rounded_as_numpy_rounds(values: list[float]) -> None:
    array = np.array(values, np.float32)
    half = narrowed(array, np.dtype(np.float16), "w", ModelError)
    np.testing.assert_array_equal(half, array.astype(np.float16))
    assert narrowed(array, array.dtype, "w", ModelError) is array


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_the_largest_magnitude_is_numpys_and_shows_what_is_not_finite(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = np.random.default_rng(0).standard_normal((7, 33)).astype(dtype)
    for view in (values, values.T, values[::2, 3:], np.zeros((2, 0), dtype)):
        expected = float(np.abs(view.astype(np.float64)).max(initial=0))
        assert largest(view) == expected
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        values[3, 5] = bad
        assert not np.isfinite(largest(values))
        assert np.isnan(largest(values)) == np.isnan(bad)
