"""Which calls a fused kernel runs, and what it is given.

There is no GPU here: the tests say that there is one. The stock layer to which the
weights are handed then does without its kernel, by Keras' own rules, and computes what
the kernel would.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, random_mask, randomize

from keras_bnrnn import backend
from keras_bnrnn.backend import FusedKernel

B, T, D, U = 6, 5, 3, 4
BOOLEANS = [False, True]
EACH = pytest.mark.parametrize("kind", ["lstm", "gru"])


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(backend, "has_fused_kernels", lambda: True)


@pytest.fixture
def handed_over(monkeypatch):
    """The arguments of every call of a fused kernel."""
    calls = []
    call = FusedKernel.__call__

    def listen(self, *arguments):
        calls.append(arguments)
        return call(self, *arguments)

    monkeypatch.setattr(FusedKernel, "__call__", listen)
    return calls


def pair(kind, rng, use_cudnn="auto", **arguments):
    """A layer that may be fused, and one with the same weights that may not."""
    layers = [
        KINDS[kind][0](U, dtype="float64", use_cudnn=which, **arguments)
        for which in (use_cudnn, False)
    ]
    for layer in layers:
        layer.build((B, T, D))
    randomize(layers[0], rng)
    layers[1].set_weights(layers[0].get_weights())
    return layers


def outputs_and_gradients(layer, x, mask, states, training):
    weights = [w.value for w in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch([x, *states])
        outputs = layer(x, mask=mask, initial_state=states, training=training)
        outputs = keras.tree.flatten(outputs)
        loss = sum(tf.reduce_sum(tf.sin(o) * (i + 1.3)) for i, o in enumerate(outputs))
    gradients = tape.gradient(
        loss, [x, *states, *weights], unconnected_gradients="zero"
    )
    norm = layer.input_norm
    return [
        *outputs,
        *gradients,
        *[w.value for w in (norm.moving_mean, norm.moving_variance, norm.update_count)],
    ]


@pytest.mark.slow(
    but=[
        "False-False-False-False-False-lstm",
        "False-False-False-False-False-gru",
        "False-False-False-True-True-gru",
        "False-False-True-False-False-gru",
        "False-True-False-False-True-lstm",
        "True-False-False-True-False-lstm",
        "True-True-True-False-False-lstm",
        "True-True-True-True-True-gru",
    ]
)
@EACH
@pytest.mark.parametrize("masked", BOOLEANS)
@pytest.mark.parametrize("backwards", BOOLEANS)
@pytest.mark.parametrize("training", BOOLEANS)
@pytest.mark.parametrize("sequences", BOOLEANS)
@pytest.mark.parametrize("state", BOOLEANS)
def test_fused_and_loop_agree(
    kind, masked, backwards, training, sequences, state, rng, gpu, handed_over
):
    """1e-11 in float64: outputs, gradients and the statistics learnt.

    Masks have any pattern. One row is empty, and its last states are the initial ones.
    """
    fused, loop = pair(
        kind,
        rng,
        return_sequences=sequences,
        return_state=state,
        go_backwards=backwards,
    )
    x = tf.constant(rng.normal(size=(B, T, D)))
    count = 2 if kind == "lstm" else 1
    states = [tf.constant(rng.normal(size=(B, U))) for _ in range(count)]
    mask = tf.constant(random_mask(rng, B, T)) if masked else None

    @tf.function(autograph=False)
    def of_fused(x, mask, *states):
        return outputs_and_gradients(fused, x, mask, list(states), training)

    ours = of_fused(x, mask, *states)
    (given,) = handed_over
    # The kernel is told lengths only for the sake of the cell state.
    needs_lengths = masked and kind == "lstm" and (state or not training)
    assert (given[3] is not None) == needs_lengths
    theirs = outputs_and_gradients(loop, x, mask, states, training)
    assert len(handed_over) == 1
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, b) <= 1e-11


@EACH
def test_the_weights_handed_over(kind, rng, gpu, handed_over):
    """Folded by the batch's moments in training, by the population's otherwise."""
    layer, _ = pair(kind, rng)
    norm, cell = layer.input_norm, layer.cell
    x = rng.normal(size=(B, T, D))
    kernel = np.asarray(cell.kernel)
    gamma, beta = np.asarray(norm.gamma), np.asarray(norm.beta)
    mean, variance = np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)

    layer(x)
    sequences, _, weights, _ = handed_over.pop()
    scale = gamma / np.sqrt(variance + norm.epsilon)
    assert gap(sequences, x) == 0
    assert gap(weights[0], kernel * scale) <= 1e-12
    assert gap(input_bias(weights), beta - mean * scale) <= 1e-12

    layer(x, training=True)
    sequences, _, weights, _ = handed_over.pop()
    projected = x.reshape(-1, D) @ kernel
    scale = gamma / np.sqrt(projected.var(0) + norm.epsilon)
    # The frames are centred first: the bias is beta alone.
    assert gap(sequences, x - x.mean((0, 1))) <= 1e-12
    assert gap(weights[0], kernel * scale) <= 1e-12
    assert gap(input_bias(weights), beta) == 0
    assert gap(weights[1], cell.recurrent_kernel) == 0
    if kind == "gru":
        assert gap(weights[2][1], cell.recurrent_bias) == 0


def input_bias(weights):
    bias = np.asarray(weights[2])
    return bias if bias.ndim == 1 else bias[0]


@EACH
@pytest.mark.parametrize("backwards", BOOLEANS)
def test_the_kernel_is_handed_right_padding(kind, backwards, rng, gpu, handed_over):
    """Valid frames first, in the direction of the layer; then zeros, never NaN."""
    layer, _ = pair(kind, rng, go_backwards=backwards)
    x, mask = rng.normal(size=(B, T, D)), random_mask(rng, B, T)
    x[~mask] = np.nan
    layer(x, mask=mask)
    sequences, _, _, lengths = handed_over.pop()
    if kind == "lstm":  # at least 1: cuDNN refuses empty rows
        np.testing.assert_array_equal(lengths, np.maximum(mask.sum(1), 1))
    for row, valid, given in zip(x, mask, np.asarray(sequences), strict=True):
        expected = row[valid][::-1] if backwards else row[valid]
        np.testing.assert_array_equal(given[: len(expected)], expected)
        assert not given[len(expected) :].any()


@EACH
def test_joint_is_fused_at_inference_only(kind, rng, gpu, handed_over):
    fused, loop = pair(kind, rng, normalize="joint")
    x = rng.normal(size=(B, T, D))
    assert gap(fused(x), loop(x)) <= 1e-11
    assert len(handed_over) == 1
    fused(x, training=True)
    assert len(handed_over) == 1


REFUSALS = [
    ("lstm", {"peephole": True}, False, "peepholes"),
    ("lstm", {"activation": "relu"}, False, "activations"),
    ("gru", {"recurrent_activation": "hard_sigmoid"}, False, "activations"),
    ("gru", {"reset_after": False}, False, "activations"),
    ("lstm", {"unroll": True}, False, "unroll"),
    ("lstm", {"statistics": "frame"}, True, "frame-wise"),
    ("lstm", {"normalize": "joint"}, True, "joint"),
    ("gru", {"recurrent_dropout": 0.2}, True, "recurrent dropout"),
]


@pytest.mark.parametrize("kind, arguments, training, reason", REFUSALS, ids=str)
def test_what_is_not_fused(kind, arguments, training, reason, rng, gpu, handed_over):
    x = rng.normal(size=(B, T, D)).astype("float32")
    KINDS[kind][0](U, **arguments)(x, training=training)
    assert not handed_over
    layer = KINDS[kind][0](U, use_cudnn=True, name="mine", **arguments)
    with pytest.raises(ValueError, match=f"use_cudnn=True.*{reason}.*'mine'"):
        layer(x, training=training)


@EACH
def test_no_gpu(kind, rng, handed_over, monkeypatch):
    monkeypatch.setattr(backend, "has_fused_kernels", lambda: False)
    x = rng.normal(size=(B, T, D)).astype("float32")
    layer = KINDS[kind][0](U)
    assert layer.supports_jit
    layer(x)
    assert not handed_over
    with pytest.raises(ValueError, match=r"use_cudnn=True.*there is no GPU"):
        KINDS[kind][0](U, use_cudnn=True)(x)


@EACH
def test_the_stock_layer_leaves_no_trace(kind, rng, gpu, tmp_path):
    fused, loop = pair(kind, rng)
    assert not fused.supports_jit and loop.supports_jit
    assert [w.path.split("/")[-1] for w in fused.weights] == [
        w.path.split("/")[-1] for w in loop.weights
    ]
    model = keras.Sequential([keras.Input((None, D)), KINDS[kind][0](U)])
    x = rng.normal(size=(B, T, D)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((B, U)), verbose=0)
    plain = keras.Sequential(
        [keras.Input((None, D)), KINDS[kind][0](U, use_cudnn=False)]
    )
    assert model.count_params() == plain.count_params()
    path = tmp_path / "model.keras"
    model.save(path)
    assert gap(keras.saving.load_model(path)(x), model(x)) == 0
    assert gap(keras.models.clone_model(model)(x).shape, (B, U)) == 0


@EACH
def test_nothing_random_is_drawn_for_the_stock_layer(kind, rng, gpu):
    after = []
    for use_cudnn in ("auto", False):
        keras.utils.set_random_seed(3)
        KINDS[kind][0](U, use_cudnn=use_cudnn).build((None, None, D))
        after.append(keras.ops.convert_to_numpy(keras.random.normal((3,))))
    np.testing.assert_array_equal(*after)


@EACH
def test_xla_is_given_up_only_where_training_has_a_kernel(kind, gpu):
    cls = KINDS[kind][0]
    assert not cls(U).supports_jit
    for arguments in (
        {"statistics": "frame"},
        {"normalize": "joint"},
        {"recurrent_dropout": 0.5},
        {"use_cudnn": False},
    ):
        assert cls(U, **arguments).supports_jit


@EACH
@pytest.mark.parametrize("arguments", [{"statistics": "frame"}, {"normalize": "joint"}])
def test_no_kernel_where_xla_compiles(kind, arguments, rng, gpu, handed_over):
    """`supports_jit` is True for training in the loop: inference is compiled, too."""
    layer = KINDS[kind][0](U, **arguments)
    x = tf.constant(rng.normal(size=(B, T, D)), "float32")
    layer.build(x.shape)
    expected = layer(x)
    assert len(handed_over) == 1
    assert gap(tf.function(layer, jit_compile=True)(x), expected) <= 1e-6
    assert len(handed_over) == 1
