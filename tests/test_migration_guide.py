"""docs/migrate.md: its code runs as it is printed."""

import sys
import types

import keras
import numpy as np
import pytest
from keras import layers
from pages import blocks, run_python

import keras_bnrnn

pytest.importorskip("sklearn")

GUIDE = "docs/migrate.md"


def encoder(rng):
    """The state dict that the guide loads, as arrays. PyTorch draws from this range."""
    bound = 1 / np.sqrt(32)
    return {
        f"encoder.{name}_l{layer}{end}": rng.uniform(-bound, bound, shape)
        for layer, features in ((0, 8), (1, 64))
        for end in ("", "_reverse")
        for name, shape in (
            ("weight_ih", (128, features)),
            ("weight_hh", (128, 32)),
            ("bias_ih", 128),
            ("bias_hh", 128),
        )
    }


@pytest.mark.slow
def test_the_code_runs(rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state_dict = encoder(rng)
    torch = types.SimpleNamespace(load=lambda name, weights_only: state_dict)
    monkeypatch.setitem(sys.modules, "torch", torch)
    names, printed = {}, ""
    for language, block in blocks(GUIDE):
        if language == "python":
            printed += run_python(block, GUIDE, names)
    assert "lstm LSTM BNLSTM None" in printed
    assert type(names["model"].layers[0]) is keras_bnrnn.BNLSTM
    # Folded and float32: 1e-5.
    saved = keras.saving.load_model("digits.keras")
    assert [type(layer) for layer in saved.layers[:2]] == [layers.LSTM] * 2
    x = names["images"][:50]
    np.testing.assert_allclose(names["folded"](x), saved(x), atol=1e-5)
    expected, found = names["ported"](x), names["normalized"](x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    forward = names["ported"].layers[0].forward_layer.cell
    weight = state_dict["encoder.weight_ih_l0"]
    np.testing.assert_allclose(forward.kernel, weight.T, rtol=1e-6)
