"""A cast keeps what the type can hold and refuses the rest by name."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.cast import narrowed
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
