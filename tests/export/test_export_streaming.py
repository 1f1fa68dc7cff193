"""The signatures for streams, and the loops of the exported graph, against Keras."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap, randomize, randomize_model

import keras_bnrnn
from keras_bnrnn import export_saved_model, fold
from keras_bnrnn.export.saved_model.loops import (
    has_served_loop,
    joins_kernels,
    masked_outputs,
    served_loop,
)

layers = keras.layers

# Both sides are float32 with the same weights; only the order of sums differs.
TOLERANCE = 1e-5


LAYERS = {
    "simple_rnn": (layers.SimpleRNN, {}),
    "lstm": (layers.LSTM, {}),
    "gru": (layers.GRU, {}),
    "gru_reset_first": (layers.GRU, {"reset_after": False}),
    "lstm_other": (
        layers.LSTM,
        {"activation": "softsign", "recurrent_activation": "hard_sigmoid"},
    ),
    "lstm_without_bias": (layers.LSTM, {"use_bias": False}),
    "gru_without_bias": (layers.GRU, {"use_bias": False}),
    "simple_rnn_relu": (layers.SimpleRNN, {"activation": "relu"}),
}


def served(layer, masked, one_frame, wants_states=True):
    """`served_loop` as the export runs it, with nothing known of B and T."""
    joined = None
    if joins_kernels(layer):
        joined = tf.concat([layer.cell.kernel, layer.cell.recurrent_kernel], 0)
    timesteps = 1 if one_frame else None
    specs = [tf.TensorSpec([None, timesteps, 3])]
    if masked == "lengths":
        specs.append(tf.TensorSpec([None], tf.int32))
    elif masked == "any":
        specs.append(tf.TensorSpec([None, None], tf.bool))
    count = 2 if isinstance(layer, layers.LSTM) else 1
    specs += [tf.TensorSpec([None, layer.units])] * count

    @tf.function(autograph=False, input_signature=specs)
    def run(x, *rest):
        rest = list(rest)
        mask = lengths = None
        if masked == "lengths":
            lengths = rest.pop(0)
            mask = tf.sequence_mask(lengths, tf.shape(x)[1])
        elif masked == "any":
            mask = rest.pop(0)
        results = served_loop(
            layer, x, rest, mask, lengths, joined=joined, wants_states=wants_states
        )
        if mask is None:
            return results
        of_lengths = lengths is not None
        zeros = layer.zero_output_for_mask
        return masked_outputs(layer, results, mask, lengths, of_lengths, zeros, None)

    return run


@pytest.mark.slow(
    but=[
        "no-False-simple_rnn",
        "no-False-gru_without_bias",
        "no-False-simple_rnn_relu",
        "no-True-gru_reset_first",
        "lengths-False-lstm_other",
        "lengths-True-lstm",
        "any-False-gru",
        "any-True-lstm_without_bias",
    ]
)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("masked", ["no", "lengths", "any"])
def test_loops_are_those_of_keras(kind, go_backwards, masked, rng):
    cls, options = LAYERS[kind]
    zero_output = kind == "gru"
    layer = cls(
        5,
        go_backwards=go_backwards,
        return_sequences=True,
        zero_output_for_mask=zero_output,
        **options,
    )
    layer.build((None, None, 3))
    randomize(layer, rng)
    assert has_served_loop(layer)
    count = 2 if cls is layers.LSTM else 1
    one_frame, many, stateless = (
        served(layer, masked, True),
        served(layer, masked, False),
        served(layer, masked, False, wants_states=False),
    )
    for rows, timesteps in ((1, 1), (3, 1), (1, 7), (2, 4), (5, 9), (35, 6)):
        x = tf.constant(rng.normal(size=(rows, timesteps, 3)), tf.float32)
        states = [
            tf.constant(rng.normal(size=(rows, 5)), tf.float32) for _ in range(count)
        ]
        mask, given = None, []
        if masked == "lengths":
            given = [tf.constant(rng.integers(0, timesteps + 1, rows), tf.int32)]
            mask = tf.sequence_mask(given[0], timesteps)
        elif masked == "any":
            mask = tf.constant(rng.integers(0, 2, (rows, timesteps)) == 1)
            given = [mask]
        run = one_frame if timesteps == 1 else many
        found = run(x, *given, *states)
        last, outputs, after = layer.inner_loop(x, states, mask)
        if masked == "lengths" and zero_output:
            some = tf.cast(given[0] > 0, tf.float32)[:, None]
            last = tf.nest.flatten(after)[0] * some
        assert gap(found[0], last) <= TOLERANCE
        assert gap(found[1], outputs) <= TOLERANCE
        for a, b in zip(found[2], tf.nest.flatten(after), strict=True):
            assert gap(a, b) <= TOLERANCE
        if run is many:
            fewer = stateless(x, *given, *states)
            assert gap(fewer[0], last) <= TOLERANCE
            assert gap(fewer[1], outputs) <= TOLERANCE


def test_loops_of_nothing():
    for cls, count in ((layers.LSTM, 2), (layers.GRU, 1)):
        layer = cls(4, return_sequences=True)
        layer.build((None, None, 3))
        run = served(layer, "no", False)
        for rows, timesteps in ((0, 5), (2, 0)):
            states = [tf.ones((rows, 4)) for _ in range(count)]
            _, outputs, after = run(tf.zeros((rows, timesteps, 3)), *states)
            assert outputs.shape == (rows, timesteps, 4)
            for a, b in zip(after, states, strict=True):
                np.testing.assert_array_equal(a, b)


def causal_model(rng):
    """All kinds of recurrent layers, one of them called twice, in nested models."""
    x = keras.Input((None, 3), name="x")
    speaker = keras.Input((2,), name="speaker")
    inner_x = keras.Input((None, 4))
    shared = keras_bnrnn.BNSimpleRNN(4, return_sequences=True, name="shared")
    inner = keras.Model(inner_x, shared(shared(inner_x)), name="inner")
    y = keras_bnrnn.BNLSTM(4, return_sequences=True, name="lower")(x)
    y = layers.LayerNormalization()(inner(layers.TimeDistributed(layers.Dense(4))(y)))
    y = layers.Dropout(0.3)(layers.Add()([y, layers.Dense(4)(x)]))
    frames = layers.Dense(2, name="frames")(y)
    last = keras_bnrnn.BNGRU(3, name="top")(y)
    both = layers.Concatenate()([last, speaker])
    model = keras.Model([x, speaker], [frames, layers.Dense(2, name="label")(both)])
    randomize_model(model, rng)
    return model


STATES = ["lower_h", "lower_c", "shared_h", "shared_h_1", "top_h"]


def signatures_of(path):
    loaded = tf.saved_model.load(path)
    return loaded, loaded.signatures


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A causal model, its weights before its export, and the signatures of that."""
    model = causal_model(np.random.default_rng(20151005))
    before = model.get_weights()
    # No warm-up, which calls the signatures as the tests do themselves.
    path = export_saved_model(model, tmp_path_factory.mktemp("causal"), warmup=None)
    loaded, signatures = signatures_of(path)
    yield model, before, signatures
    del loaded  # until here: signatures do not keep variables alive


def test_frames_one_by_one_are_the_sequence(rng, causal):
    model, _, signatures = causal
    assert {"serving_default", "serve", "step", "chunk", "initial_state"} == set(
        signatures
    )
    x = rng.normal(size=(3, 6, 3)).astype("float32")
    speaker = tf.constant(rng.normal(size=(3, 2)), tf.float32)
    folded = fold(model)
    frames, _ = folded([tf.constant(x), speaker])

    states = signatures["initial_state"](x=tf.constant(x))
    assert set(states) == {*STATES, "t"}
    for t in range(6):
        answer = signatures["step"](x=tf.constant(x[:, t]), speaker=speaker, **states)
        states = {name: answer.pop(name) for name in states}
        assert set(answer) == {"frames", "label"}
        assert gap(answer["frames"], frames[:, t]) <= TOLERANCE
        assert (
            gap(answer["label"], folded([tf.constant(x[:, : t + 1]), speaker])[1])
            <= TOLERANCE
        )
        np.testing.assert_array_equal(states["t"], [t + 1] * 3)


def test_chunks_of_any_size_are_the_sequence(rng, causal):
    model, _, signatures = causal
    x = rng.normal(size=(4, 9, 3)).astype("float32")
    speaker = tf.constant(rng.normal(size=(4, 2)), tf.float32)
    folded = fold(model)
    frames, _ = folded([tf.constant(x), speaker])
    states = signatures["initial_state"](x=tf.constant(x[:, 0]))
    # How many frames of each row come in each chunk; none, for some.
    plan = np.array([[3, 0, 1, 2], [2, 4, 0, 1], [4, 5, 5, 0]])
    seen = np.zeros(4, int)
    for sizes in plan:
        chunk = np.full((4, sizes.max() + 1, 3), np.nan, "float32")  # padded by one
        for row, n in enumerate(sizes):
            chunk[row, :n] = x[row, seen[row] : seen[row] + n]
        answer = signatures["chunk"](
            x=tf.constant(chunk),
            speaker=speaker,
            lengths=tf.constant(sizes, tf.int32),
            **states,
        )
        states = {name: answer.pop(name) for name in states}
        np.testing.assert_array_equal(answer["lengths"], sizes)
        for row, n in enumerate(sizes):
            if n:
                expected = frames[row, seen[row] : seen[row] + n]
                assert gap(answer["frames"][row, :n], expected) <= TOLERANCE
            assert not np.any(answer["frames"][row, n:])
            seen[row] += n
            if seen[row]:
                label = folded(
                    [tf.constant(x[row : row + 1, : seen[row]]), speaker[row : row + 1]]
                )[1]
                assert gap(answer["label"][row], label[0]) <= TOLERANCE
        np.testing.assert_array_equal(states["t"], seen)
    # The lengths are clamped, and so is what t counts.
    answer = signatures["chunk"](
        x=tf.zeros((4, 2, 3)),
        speaker=speaker,
        lengths=tf.constant([9, -1, 2, 0]),
        **states,
    )
    np.testing.assert_array_equal(answer["lengths"], [2, 0, 2, 0])
    np.testing.assert_array_equal(answer["t"], seen + [2, 0, 2, 0])


def test_states_of_another_batch_size_fail(causal):
    _, _, signatures = causal
    states = signatures["initial_state"](x=tf.zeros((1, 3)))
    frame = {"x": tf.zeros((2, 3)), "speaker": tf.zeros((2, 2))}
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`lower_h`.*`x`"):
        signatures["step"](**frame, **states)
    chunk = {"x": tf.zeros((2, 4, 3)), "speaker": tf.zeros((2, 2))}
    lengths = tf.constant([4, 4])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`lower_h`.*`x`"):
        signatures["chunk"](**chunk, lengths=lengths, **states)
    states = signatures["initial_state"](x=tf.zeros((2, 3)))
    for wrong in ("t", "top_h"):
        broken = {**states, wrong: states[wrong][:1]}
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"`{wrong}`"):
            signatures["step"](**frame, **broken)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`speaker`"):
        signatures["step"](**{**frame, "speaker": tf.zeros((1, 2))}, **states)


@pytest.mark.slow
def test_masks_by_value_in_a_stream(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            layers.Embedding(9, 4, mask_zero=True),
            keras_bnrnn.BNLSTM(3, return_sequences=True, name="a", peephole=True),
            keras_bnrnn.BNSimpleRNN(3, return_sequences=True, name="b"),
        ]
    )
    randomize_model(model, rng)
    with pytest.warns(UserWarning, match="peephole"):
        path = export_saved_model(model, tmp_path / "m", warmup=None)
    _loaded, signatures = signatures_of(path)
    ids = np.array([[0, 3, 0, 0, 5, 8], [7, 0, 2, 1, 0, 0]], "int32")
    expected = model(ids)
    states = signatures["initial_state"](ids=tf.constant(ids))
    assert set(states) == {"a_h", "a_c", "b_h", "t"}
    for t in range(6):
        answer = signatures["step"](ids=tf.constant(ids[:, t]), **states)
        states = {name: answer[name] for name in states}
        assert gap(answer["b"], expected[:, t]) <= TOLERANCE


def not_causal(kind):
    x = keras.Input((5 if kind == "fixed" else None, 4), name="x")
    y = keras_bnrnn.BNSimpleRNN(4, return_sequences=True, name="rnn")
    if kind == "bidirectional":
        y = layers.Bidirectional(y, name="both")(x)
    elif kind == "backwards":
        y = keras_bnrnn.BNGRU(4, go_backwards=True, name="turned")(x)
    elif kind == "convolution":
        y = layers.Conv1D(4, 3, padding="causal")(y(x))
    elif kind == "behind relu":  # which is 0 for the first random weights
        y = layers.SimpleRNN(2, return_sequences=True)(x)
        y = layers.Conv1D(2, 2, padding="causal")(y)
        for _ in range(2):
            y = layers.Dense(1, activation="relu")(y)
    elif kind == "ahead":
        y = layers.Conv1D(4, 3, padding="same")(y(x))
    elif kind == "pooling":
        y = layers.GlobalAveragePooling1D()(y(x))
    elif kind == "attention":
        y = y(x)
        y = layers.Attention()([y, y])
    elif kind == "decoder":
        last = keras_bnrnn.BNLSTM(4, name="last")(x)
        y = y(layers.RepeatVector(3)(last))
    elif kind == "encoder":
        _, *states = layers.SimpleRNN(4, return_state=True)(x)
        y = y(x, initial_state=states)
    else:
        y = y(x)
    return keras.Model(x, y)


@pytest.mark.slow(
    but=[
        "bidirectional-'both' reads sequences from both ends",
        "convolution-several timesteps",
        "fixed-timesteps is fixed",
    ]
)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bidirectional", "'both' reads sequences from both ends"),
        ("backwards", "'turned' reads sequences from their end"),
        ("convolution", "several timesteps"),
        ("behind relu", "several timesteps"),
        ("ahead", "several timesteps"),
        ("pooling", "several timesteps"),
        ("attention", "several timesteps"),
        ("decoder", "several timesteps"),
        ("encoder", "several timesteps"),
        ("fixed", "timesteps is fixed"),
    ],
)
def test_models_that_need_the_whole_sequence(kind, reason, tmp_path):
    model = not_causal(kind)
    with pytest.raises(ValueError, match=f"`streaming=True`.*{reason}"):
        export_saved_model(model, tmp_path / "m", streaming=True)
    assert not (tmp_path / "m").exists() or not list((tmp_path / "m").iterdir())
    path = export_saved_model(model, tmp_path / "m", warmup=None)
    _loaded, signatures = signatures_of(path)
    assert set(signatures) == {"serving_default", "serve"}


def test_streaming_can_be_left_out(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), keras_bnrnn.BNLSTM(4)])
    path = export_saved_model(model, tmp_path / "m", streaming=False, warmup=None)
    assert set(signatures_of(path)[1]) == {"serving_default", "serve"}
    with pytest.raises(ValueError, match=r"`streaming` must be.*streaming='yes'"):
        export_saved_model(model, tmp_path / "m", streaming="yes")


def test_weights_are_back_after_the_trial_of_causality(rng, causal):
    model, before, signatures = causal
    for a, b in itertools.zip_longest(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    x = tf.constant(rng.normal(size=(2, 5, 3)), tf.float32)
    speaker = tf.zeros((2, 2))
    answer = signatures["serve"](x=x, speaker=speaker, lengths=tf.constant([5, 5]))
    assert gap(answer["frames"], fold(model)([x, speaker])[0]) <= TOLERANCE


@pytest.mark.slow(but=["3"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_size_that_is_fixed(rows, rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), batch_size=rows, name="x"),
            keras_bnrnn.BNSimpleRNN(4, return_sequences=True, name="y"),
        ]
    )
    randomize_model(model, rng)
    path = export_saved_model(model, tmp_path / "m", warmup=None)
    _loaded, signatures = signatures_of(path)
    x = tf.constant(rng.normal(size=(rows, 6, 3)), tf.float32)
    answer = signatures["serve"](x=x, lengths=tf.fill([rows], 6))
    assert gap(answer["y"], fold(model)(x)) <= TOLERANCE
