"""Masked frames of layers that nothing follows: their outputs are the answers."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap, randomize_model

import keras_bnrnn
from keras_bnrnn import export_saved_model
from keras_bnrnn.export.examples import example_inputs
from keras_bnrnn.export.interface import interface_of

layers = keras.layers

# Both sides are float32 with the same weights; only the order of sums differs.
TOLERANCE = 1e-5

KINDS = {
    "folded": keras_bnrnn.BNSimpleRNN,
    "kept": lambda units, **options: keras_bnrnn.BNLSTM(
        units, peephole=True, **options
    ),
    # `served_loop` has no softmax: the loop of Keras runs.
    "stock": lambda units, **options: layers.SimpleRNN(
        units, activation="softmax", **options
    ),
    "stacked": lambda units, **options: layers.RNN(
        [keras_bnrnn.BNLSTMCell(2), keras_bnrnn.BNSimpleRNNCell(units)], **options
    ),
}

# The mask of each row: on its left, its right, inside, in two places, full, none.
IDS = np.array(
    [
        [0, 0, 4, 5],
        [3, 7, 0, 0],
        [3, 0, 0, 6],
        [0, 4, 0, 0],
        [0, 0, 0, 0],
        [3, 5, 8, 2],
    ],
    "int32",
)
ROWS, TIMESTEPS = IDS.shape


def model_of(direction, kinds, rng):
    """Each kind of layer above an `Embedding`, with each of its two arguments.

    Returns:
        A model, and the set of the names of its outputs with timesteps.
    """
    ids = keras.Input((None,), dtype="int32", name="ids")
    embedded = layers.Embedding(9, 3, mask_zero=True)(ids)
    outputs, per_step = {}, set()
    for kind, sequences, zeros in itertools.product(
        kinds, (False, True), (False, True)
    ):
        if direction == "backwards" and sequences:
            continue  # the padding would come first
        name = f"{kind}_{'all' if sequences else 'last'}_{'zeros' * zeros}"
        layer = KINDS[kind](
            2,
            return_sequences=sequences,
            zero_output_for_mask=zeros,
            go_backwards=direction == "backwards",
        )
        if direction == "both":
            layer = layers.Bidirectional(layer)
        outputs[name] = layer(embedded)
        if sequences:
            per_step.add(name)
    model = keras.Model(ids, outputs)
    randomize_model(model, rng)
    return model, per_step


@pytest.mark.filterwarnings("ignore:Not folded")
@pytest.mark.slow(but=["forward-few"])
@pytest.mark.parametrize(
    ("direction", "kinds"),
    [
        ("forward", ["folded", "stock"]),
        ("forward", ["kept", "stacked"]),
        ("backwards", KINDS),
        ("both", ["folded", "kept", "stock"]),
    ],
    ids=["forward-few", "forward-others", "backwards", "both"],
)
def test_masked_frames_of_last_layers(direction, kinds, rng, tmp_path):
    """As in Keras; a row whose `lengths` cut it off, as the cut row alone."""
    model, per_step = model_of(direction, kinds, rng)
    path = export_saved_model(model, tmp_path / "m", warmup=None)
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serve"]
    whole = model(IDS)
    answer = serve(ids=tf.constant(IDS), lengths=tf.fill([ROWS], TIMESTEPS))
    for name, expected in whole.items():
        assert gap(answer[name], expected) <= TOLERANCE, name

    prefixes = [model(IDS[:, : t + 1]) for t in range(TIMESTEPS)]
    lengths = np.array([3, 2, 2, 4, 1, 3], "int32")

    def assert_ends_with(answer, new, seen):
        """The answers are those to the first `seen` frames, the `new` ones last."""
        for row in np.flatnonzero(new):
            n, until = new[row], seen[row]
            for name, expected in prefixes[until - 1].items():
                found, expected = answer[name][row], expected[row]
                if name in per_step:
                    assert not np.any(found[n:]), name
                    found, expected = found[:n], expected[until - n :]
                assert gap(found, expected) <= TOLERANCE, (name, row)

    answer = serve(ids=tf.constant(IDS), lengths=tf.constant(lengths))
    assert_ends_with(answer, lengths, lengths)
    if direction != "forward":
        assert "step" not in loaded.signatures
        return

    states = start = loaded.signatures["initial_state"](ids=tf.constant(IDS))
    for t in range(TIMESTEPS):
        answer = loaded.signatures["step"](ids=tf.constant(IDS[:, t]), **states)
        states = {name: answer[name] for name in states}
        for name, expected in prefixes[t].items():
            if name in per_step:
                expected = expected[:, t]
            assert gap(answer[name], expected) <= TOLERANCE, (name, t)

    states, seen = start, np.zeros(ROWS, "int32")
    for new in (lengths - 1, np.array([1, 3, 2, 0, 3, 1], "int32")):
        columns = np.minimum(seen[:, None] + np.arange(TIMESTEPS), TIMESTEPS - 1)
        answer = loaded.signatures["chunk"](
            ids=tf.constant(np.take_along_axis(IDS, columns, 1)),
            lengths=tf.constant(new),
            **states,
        )
        states = {name: answer[name] for name in states}
        seen += new
        assert_ends_with(answer, new, seen)


@pytest.mark.slow
def test_a_layer_with_states_of_a_higher_rank(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 5, 2), name="x"),
            layers.ConvLSTM1D(3, 2, padding="same", name="y"),
        ]
    )
    randomize_model(model, rng)
    path = export_saved_model(model, tmp_path / "m", streaming=True, warmup=None)
    loaded = tf.saved_model.load(path)
    x = rng.normal(size=(5, 6, 5, 2)).astype("float32")
    lengths = np.array([6, 3, 1, 5, 2], "int32")
    answer = loaded.signatures["serve"](x=tf.constant(x), lengths=tf.constant(lengths))
    for row, n in enumerate(lengths):
        assert gap(answer["y"][row], model(x[row : row + 1, :n])[0]) <= TOLERANCE


@pytest.mark.slow(but=["4"])
@pytest.mark.parametrize("timesteps", [4, None])
def test_masks_inside_time_distributed(timesteps, rng, tmp_path):
    """Sentences of words: a mask (B, T, 5), of which each frame has a row."""
    ids = keras.Input((timesteps, 5), dtype="int32", name="ids")
    embedded = layers.Embedding(9, 3, mask_zero=True)(ids)
    last = layers.TimeDistributed(keras_bnrnn.BNSimpleRNN(3))(embedded)
    model = keras.Model(ids, layers.Dense(2, name="y")(last))
    randomize_model(model, rng)
    path = export_saved_model(model, tmp_path / "m", lengths=True, warmup=None)
    loaded = tf.saved_model.load(path)
    x = rng.integers(0, 3, (3, 4, 5)).astype("int32")
    lengths = tf.constant([4, 1, 2])
    found = loaded.signatures["serve"](ids=tf.constant(x), lengths=lengths)["y"]
    expected = model(x)
    for row, n in enumerate(lengths):
        assert gap(found[row, :n], expected[row, :n]) <= TOLERANCE


@pytest.mark.slow(but=["True-None"])
@pytest.mark.parametrize("quantize", [None, "float16"])
@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.skipif(
    not hasattr(layers, "ReversibleEmbedding"), reason="this Keras does not have it"
)
def test_an_embedding_with_its_own_call(mask_zero, quantize, rng, tmp_path):
    embedding = layers.ReversibleEmbedding(9, 3, mask_zero=mask_zero)
    ids = keras.Input((None,), dtype="int32", name="ids")
    y = keras_bnrnn.BNSimpleRNN(3, return_sequences=True)(embedding(ids))
    model = keras.Model(ids, {"y": embedding(y, reverse=True)})
    randomize_model(model, rng)
    path = export_saved_model(
        model, tmp_path / "m", quantize=quantize, streaming=False, warmup=None
    )
    loaded = tf.saved_model.load(path)
    lengths = np.array([3, 2, 2, 4, 1, 3], "int32")
    found = loaded.signatures["serve"](ids=tf.constant(IDS), lengths=lengths)["y"]
    for row, n in enumerate(lengths):
        alone = model(IDS[row : row + 1, :n])["y"][0]
        assert gap(found[row, :n], alone) <= (1e-2 if quantize else TOLERANCE)
        assert not np.any(found[row, n:])


def test_examples_have_masked_frames(rng):
    ids = keras.Input((None,), dtype="int32", name="ids")
    frames = keras.Input((None, 3), name="frames")
    speaker = keras.Input((2,), dtype="int32", name="speaker")
    steps = layers.Concatenate()(
        [
            layers.Embedding(50, 3, mask_zero=True)(ids),
            layers.Masking(mask_value=2.0)(frames),
        ]
    )
    last = layers.SimpleRNN(2)(steps)
    outputs = layers.Concatenate()([last, layers.Dense(2)(speaker)])
    model = keras.Model([ids, frames, speaker], outputs)
    drawn = example_inputs(model, interface_of(model), 50, 40, rng)
    for masked in (drawn["ids"] == 0, tf.reduce_all(drawn["frames"] == 2.0, -1)):
        assert not np.any(masked[:, 0])
        assert 0.2 < np.mean(masked[:, 1:]) < 0.3
    assert drawn["speaker"].shape == (50, 2)
