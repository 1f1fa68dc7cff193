"""Models that version 0.1.0 saved load, and answer as they did then."""

import keras
import numpy as np
import pytest
import saved_answers
from helpers import KERAS

pytestmark = pytest.mark.skipif(
    KERAS < (3, 15),
    reason="Keras 3.15 saved the files, and older versions do not read them",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    return directory, saved_answers.read(directory)


@pytest.mark.slow(
    but=[
        "simple_rnn_input",
        "simple_rnn_backwards",
        "simple_rnn_cell",
        "lstm_frame",
        "lstm_zero_output",
        "lstm_stateful",
        "lstm_both",
        "gru_joint",
        "gru_relu",
        "gru_unroll",
        "lstm_peephole",
        "lstm_no_forget",
        "gru_before",
        "gru_hard",
        "norm_sequence",
        "norm_frame",
        "norm_bare",
        "stacked",
    ]
)
@pytest.mark.parametrize("name", list(saved_answers.layers()))
def test_saved_answers(name, saved):
    """1e-6, of float64 layers but for those that are float32.

    Sums in float32 are rounded by 6e-8 of their largest term, differently on each
    processor. Gradients of 10 differ by 4e-6 in entries of 0.3. In float32 the 1e-6 are
    therefore relative to the largest entry of an array, if it exceeds 1.
    """
    directory, arrays = saved
    masks = {
        key.removeprefix("mask/"): value
        for key, value in arrays.items()
        if key.startswith("mask/")
    }
    model = keras.saving.load_model(directory / f"{name}.keras", compile=False)
    (layer,) = model.layers
    found = saved_answers.answers(name, layer, arrays["x"], {"none": None, **masks})
    expected = {
        key.removeprefix(f"{name}/"): value
        for key, value in arrays.items()
        if key.startswith(f"{name}/")
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        largest = np.max(np.abs(value), initial=1) if value.dtype == np.float32 else 1
        np.testing.assert_allclose(
            found[key], value, rtol=1e-6, atol=1e-6 * largest, err_msg=key
        )
