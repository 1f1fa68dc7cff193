"""Properties of the layers for any shapes, masks and arguments, drawn by hypothesis.

`make test` runs a few fixed examples of each property. `make fuzz` draws new ones for
ten minutes, see `tests/tools/fuzz.py`.
"""

import dataclasses
import os
import tempfile
import warnings
from unittest import mock

import hypothesis
import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import KINDS, gap, oracle_weights, randomize, randomize_model
from hypothesis import strategies as st

from keras_bnrnn import SequenceBatchNorm, fold, recalibrate
from keras_bnrnn.recurrence import schedule

COMMON = {
    "deadline": None,  # TensorFlow traces and compiles in some examples
    "suppress_health_check": list(hypothesis.HealthCheck),
    "print_blob": True,
    # Not `explain`, which runs a failing example a hundred times more.
    "phases": [*hypothesis.Phase][:-1],
}
hypothesis.settings.register_profile("test", derandomize=True, database=None, **COMMON)
hypothesis.settings.register_profile("fuzz", **COMMON)
# Of `tests/tools/mutants.py`, which only asks whether a test fails.
hypothesis.settings.register_profile(
    "mutants",
    hypothesis.settings.get_profile("test"),
    phases=[hypothesis.Phase.generate],
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "test")
hypothesis.settings.load_profile(PROFILE)


def examples(count):
    """Sets the number of examples, which is twice as large in `make fuzz`."""
    factor = 2 if PROFILE == "fuzz" else 1
    return hypothesis.settings(max_examples=count * factor)


# Cases


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer and what it is called with.

    Attributes:
        kind: A key of `KINDS`.
        arguments: Dict, the arguments of the layer.
        shape: (B, T, D).
        mask: List of rows of booleans, or `None`.
        initial_state: Whether the first states are given; otherwise they are zeros.
        seed: Of the weights and the inputs.
    """

    kind: str
    arguments: dict
    shape: tuple
    mask: list | None
    initial_state: bool
    seed: int

    def layer(self, **changes):
        """Makes the layer, with random weights."""
        layer = KINDS[self.kind][0](**{**self.arguments, **changes})
        layer.build(self.shape)
        randomize(layer, np.random.default_rng(self.seed))
        return layer

    def inputs(self, dtype="float64"):
        """Makes sequences, NaN in masked frames, and the arguments of the call."""
        rng = np.random.default_rng(self.seed + 1)
        x = rng.normal(0.3, 1.0, self.shape).astype(dtype)
        call = {}
        if self.mask is not None:
            call["mask"] = np.array(self.mask)
            x[~call["mask"]] = np.nan
        if self.initial_state:
            shape = self.shape[0], self.arguments["units"]
            count = 2 if self.kind == "lstm" else 1
            call["initial_state"] = [
                rng.normal(0.0, 0.5, shape).astype(dtype) for _ in range(count)
            ]
        return x, call

    @property
    def frame_wise(self):
        return "frame" in self.arguments.values() or "joint" in self.arguments.values()


RATES = st.sampled_from([0.0, 0.25])
FLAGS = st.booleans()


@st.composite
def masks(draw, batch, timesteps):
    """Draws a mask of any pattern, or `None`."""
    if draw(FLAGS):
        return None
    row = st.lists(FLAGS, min_size=timesteps, max_size=timesteps)
    return draw(st.lists(row, min_size=batch, max_size=batch))


@st.composite
def cases(draw, kinds=None, usual=False, training=False, state=True, **fixed):
    """Draws a `Case`.

    Args:
        kinds: List of keys of `KINDS`. Default: all.
        usual: Whether the layer has the activations and outputs of the oracle.
        training: Whether the case must be able to train: frame-wise statistics need
            two rows.
        state: Whether there may be initial states.
        fixed: Arguments of the layer that are not drawn.
    """
    kind = draw(st.sampled_from(kinds or sorted(KINDS)))
    arguments = {
        "units": draw(st.integers(1, 3)),
        "normalize": draw(st.sampled_from(["input", "joint"])),
        "statistics": draw(st.sampled_from(["sequence", "frame"])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.99])),
        "epsilon": draw(st.sampled_from([1e-3, 1e-2, 1.0])),
        "use_bias": draw(FLAGS),
        "go_backwards": draw(FLAGS),
        "zero_output_for_mask": draw(FLAGS),
        "unroll": draw(FLAGS),
        "return_sequences": True,
        "return_state": True,
    }
    if kind == "lstm":
        arguments["peephole"] = draw(FLAGS)
        arguments["unit_forget_bias"] = draw(FLAGS)
    if kind == "gru":
        arguments["reset_after"] = draw(FLAGS)
    if not usual:
        arguments["activation"] = draw(st.sampled_from(["tanh", "softsign", "relu"]))
        if kind != "simple_rnn":
            gates = st.sampled_from(["sigmoid", "hard_sigmoid"])
            arguments["recurrent_activation"] = draw(gates)
    arguments |= fixed
    rows = 1
    if training and (arguments["normalize"], arguments["statistics"]) != (
        "input",
        "sequence",
    ):
        rows = 2
    shape = draw(st.tuples(st.integers(rows, 4), st.integers(1, 4), st.integers(1, 3)))
    return Case(
        kind,
        arguments,
        shape,
        draw(masks(*shape[:2])),
        draw(FLAGS) if state else False,
        draw(st.integers(0, 2**16)),
    )


def weights_of(layer):
    """`oracle_weights`, with zeros for a beta that there is not."""
    norm = layer.cell.input_norm
    if norm.beta is not None:
        return oracle_weights(layer)
    norm.beta = norm.gamma  # any array of the shape
    weights = oracle_weights(layer)
    norm.beta = None
    return {**weights, "beta": np.zeros_like(weights["gamma"])}


def options_of(case):
    names = ("normalize", "epsilon", "reset_after", "go_backwards")
    names += ("zero_output_for_mask",)
    return {n: case.arguments[n] for n in names if n in case.arguments}


def call(layer, x, training=False, **arguments):
    """Calls a layer without its warnings; returns the list of arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = layer(x, training=training, **arguments)
    return [
        np.asarray(keras.ops.cast(r, "float64")) for r in keras.tree.flatten(results)
    ]


def assert_close(found, expected, allowed):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.shape(a) == np.shape(b)
        assert gap(a, b) <= allowed


# The oracle

# Of outputs below 1 after 4 steps. Half precision rounds weights that are scaled by up
# to 3, and gates that these make.
TOLERANCES = {
    "float32": 2e-5,
    "float64": 1e-12,
    "mixed_float16": 3e-2,
    "mixed_bfloat16": 2e-1,
}


@examples(24)
@hypothesis.given(cases(usual=True), st.sampled_from(sorted(TOLERANCES)))
def test_inference_equals_the_oracle(case, dtype):
    layer = case.layer(dtype=dtype)
    before = layer.get_weights()
    x, arguments = case.inputs("float64" if dtype == "float64" else "float32")
    found = call(layer, x, **arguments)
    outputs, states = oracle.rnn_inference(
        case.kind,
        x,
        arguments.get("mask"),
        weights_of(layer),
        initial_state=arguments.get("initial_state"),
        **options_of(case),
    )
    assert_close(found, [outputs, *states], TOLERANCES[dtype])
    for a, b in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@examples(8)
@hypothesis.given(cases(usual=True, training=True))
def test_training_equals_the_oracle(case):
    """Outputs, gradients and the statistics of two steps, in float64."""
    layer = case.layer(dtype="float64")
    norm = layer.input_norm
    norm.update_count.assign(0.0)
    before = norm.get_weights()
    x, arguments = case.inputs()
    x, mask = tf.constant(x), arguments.get("mask")
    upstream = np.random.default_rng(case.seed + 2)
    with tf.GradientTape() as tape, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tape.watch(x)
        results = layer(x, training=True, **arguments)
        upstream = [upstream.normal(size=r.shape) for r in results]
        loss = weighed_sum(results, upstream)
    sources = {"x": x} | {v.name: v.value for v in layer.trainable_variables}
    gradients = tape.gradient(loss, sources, unconnected_gradients="zero")

    weights = {k: tf.constant(w) for k, w in weights_of(layer).items()}
    clean = tf.where(tf.math.is_nan(x), tf.zeros_like(x), x)
    with tf.GradientTape() as tape:
        tape.watch([clean, weights])
        outputs, states, info = oracle.rnn_training(
            case.kind,
            clean,
            mask,
            weights,
            case.arguments["statistics"],
            initial_state=arguments.get("initial_state"),
            **options_of(case),
        )
        loss = weighed_sum([outputs, *states], upstream)
    of_x, of_weights = tape.gradient(
        loss, [clean, weights], unconnected_gradients="zero"
    )

    # float64 over 4 steps, divided by standard deviations of 0.03 and more
    assert_close(list(map(np.asarray, results)), [outputs, *states], 1e-10)
    of_weights["peephole_kernel"] = of_weights.pop("peephole", None)
    for name, gradient in gradients.items():
        expected = of_x if name == "x" else of_weights[name]
        scale = max(1.0, np.abs(expected).max(initial=0.0))
        assert gap(gradient, expected) <= 1e-8 * scale, name

    if not teaches(case):
        for a, b in zip(norm.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        return
    batches = [(info["mean"], info["variance"])]
    assert_close([norm.moving_mean, norm.moving_variance], batches[0], 1e-10)
    call(layer, 2.0 * x + 1.0, training=True, **arguments)
    _, _, info = oracle.rnn_training(
        case.kind,
        2.0 * clean + 1.0,
        mask,
        weights,
        case.arguments["statistics"],
        initial_state=arguments.get("initial_state"),
        **options_of(case),
    )
    batches.append((info["mean"], info["variance"]))
    expected = oracle.moving_average(batches, case.arguments["momentum"])
    assert_close([norm.moving_mean, norm.moving_variance], expected, 1e-10)


def weighed_sum(results, upstream):
    return sum(
        tf.reduce_sum(tf.cast(r, "float64") * u)
        for r, u in zip(results, upstream, strict=True)
    )


def teaches(case):
    """Whether a batch has statistics: a valid frame, frame-wise two at the same t."""
    lengths = [case.shape[1]] * case.shape[0]
    if case.mask is not None:
        lengths = [sum(row) for row in case.mask]
    return len([n for n in lengths if n]) > case.frame_wise


@examples(12)
@hypothesis.given(
    st.tuples(*[st.integers(1, 4)] * 4), FLAGS, FLAGS, FLAGS, FLAGS, FLAGS, st.data()
)
def test_normalisation_equals_numpy(shape, rank4, frame, center, scale, float64, data):
    batch, timesteps, inner, features = shape
    batch = max(batch, 2) if frame else batch
    shape = (batch, timesteps, *([inner] if rank4 else []), features)
    mask = data.draw(masks(batch, timesteps))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    dtype = "float64" if float64 else "float32"
    x = rng.normal(2.0, 1.5, shape).astype(dtype)
    valid = np.ones(shape[:2], bool) if mask is None else np.array(mask)
    x[~valid] = np.nan
    norm = SequenceBatchNorm(
        statistics="frame" if frame else "sequence",
        center=center,
        scale=scale,
        dtype=dtype,
    )
    norm.build(shape)
    randomize(norm, rng)
    norm.update_count.assign(0.0)
    arguments = {} if mask is None else {"mask": valid}
    (y,) = call(norm, x, training=True, **arguments)
    gamma = 1.0 if norm.gamma is None else np.asarray(norm.gamma, "float64")
    beta = 0.0 if norm.beta is None else np.asarray(norm.beta, "float64")
    t = np.cumsum(valid, axis=1) * valid
    groups = [valid] if not frame else [t == k for k in range(1, timesteps + 1)]
    allowed = 1e-10 if float64 else 1e-4  # divided by deviations of 0.03 and more
    for group in groups:
        values = x[group].astype("float64")
        axes = tuple(range(values.ndim - 1))
        mean, variance = values.mean(axes), values.var(axes)
        if len(values):
            expected = (values - mean) / np.sqrt(variance + norm.epsilon)
            assert gap(y[group], expected * gamma + beta) <= allowed
    assert np.all(np.isfinite(y))
    biggest = max(group.sum() for group in groups) * (inner if rank4 else 1)
    if biggest > 1 and (not frame or biggest >= 2):
        values = x[valid].reshape(-1, features).astype("float64")
        expected = [values.mean(0), values.var(0)]
        assert_close([norm.moving_mean, norm.moving_variance], expected, allowed)


# Padding and partition


@examples(10)
@hypothesis.given(cases(training=True), FLAGS, st.data())
def test_padding_changes_nothing(case, training, data):
    """Masked frames, put anywhere, and rows of them."""
    batch, timesteps, _ = case.shape
    x, arguments = case.inputs()
    mask = arguments.pop("mask", np.ones((batch, timesteps), bool))
    more = data.draw(st.integers(0, 2))
    rows = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(0, timesteps))
    padded = np.insert(x, [place] * more, np.nan, axis=1)
    padded = np.concatenate([padded, np.full((rows, *padded.shape[1:]), np.nan)])
    wide = np.insert(mask, [place] * more, False, axis=1)
    wide = np.concatenate([wide, np.zeros((rows, wide.shape[1]), bool)])
    states = arguments.get("initial_state")
    more_states = {}
    if states is not None:
        more_states["initial_state"] = [
            np.concatenate([s, np.ones((rows, s.shape[1]))]) for s in states
        ]
    one, other = case.layer(dtype="float64"), case.layer(dtype="float64")
    found, *states = call(one, x, training, mask=mask, **arguments)
    wider, *other_states = call(other, padded, training, mask=wide, **more_states)
    order = -1 if case.arguments["go_backwards"] else 1
    kept = np.delete(np.arange(timesteps + more), range(place, place + more))
    back = wider[:batch, ::order][:, kept][:, ::order]  # in the order of processing
    valid = mask[:, ::order]
    # Sums of more terms, in another order; deviations of 0.03 and more.
    assert_close(
        [found[valid], *states],
        [back[valid], *[s[:batch] for s in other_states]],
        1e-10,
    )
    assert_close(other.input_norm.get_weights(), one.input_norm.get_weights(), 1e-10)


@examples(8)
@hypothesis.given(cases(), st.data())
def test_a_batch_may_be_split_at_inference(case, data):
    x, arguments = case.inputs()
    layer = case.layer(dtype="float64")
    whole = call(layer, x, **arguments)
    cut = data.draw(st.integers(0, case.shape[0]))
    parts = []
    for rows in (slice(0, cut), slice(cut, None)):
        if len(x[rows]):
            given = {"mask": arguments["mask"][rows]} if "mask" in arguments else {}
            if case.initial_state:
                given["initial_state"] = [s[rows] for s in arguments["initial_state"]]
            parts.append(call(layer, x[rows], **given))
    joined = [np.concatenate(values) for values in zip(*parts, strict=True)]
    assert_close(joined, whole, 1e-12)  # float64


@examples(6)
@hypothesis.given(cases(state=False, stateful=True, go_backwards=False), st.data())
def test_a_stateful_layer_continues(case, data):
    x, arguments = case.inputs()
    mask = arguments.get("mask", np.ones(case.shape[:2], bool))
    whole, *states = call(case.layer(dtype="float64", stateful=False), x, mask=mask)
    layer = case.layer(dtype="float64")
    layer.reset_state()
    cut = data.draw(st.integers(0, case.shape[1]))
    outputs = []
    for part in (slice(0, cut), slice(cut, None)):
        if x[:, part].shape[1]:
            found, *last = call(layer, x[:, part], mask=mask[:, part])
            outputs.append(found)
    outputs = np.concatenate(outputs, axis=1)
    assert_close([outputs[mask], *last], [whole[mask], *states], 1e-12)  # float64


MASKED = -7.0


def model_of(case):
    """A model of the layer that masks frames of one value."""
    _, timesteps, features = case.shape
    arguments = {**case.arguments, "return_state": False}
    layers = [
        keras.Input((timesteps, features)),
        keras.layers.Masking(MASKED),
        KINDS[case.kind][0](**arguments, name="rnn"),
        SequenceBatchNorm(name="norm"),
    ]
    model = keras.Sequential(layers)
    randomize_model(model, np.random.default_rng(case.seed))
    return model


def data_of(case, rows=None, scale=1.0):
    """Inputs of the model, with the mask of the case."""
    x, arguments = case.inputs("float32")
    if rows is not None:
        x = np.random.default_rng(case.seed + 3).normal(size=(rows, *case.shape[1:]))
        x = x.astype("float32") * scale
    if "mask" in arguments:
        mask = arguments["mask"]
        mask = np.resize(mask, x.shape[:2])
        x[~mask] = MASKED
    return x


@pytest.mark.slow
@examples(2)
@hypothesis.given(cases(state=False, unroll=False), st.tuples(*[st.integers(1, 9)] * 2))
def test_recalibration_does_not_depend_on_the_partition(case, batch_sizes):
    hypothesis.assume(case.mask is None or np.any(case.mask))
    x = data_of(case, rows=7)
    valid = np.any(x != MASKED, axis=-1)
    hypothesis.assume(valid.any())
    found = []
    for batch_size in batch_sizes:
        model = model_of(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recalibrate(model, x, batch_size=batch_size, verbose=0)
        norms = [model.get_layer("rnn").input_norm, model.get_layer("norm")]
        found.append([w for n in norms for w in n.get_weights()])
    for a, b in zip(*found, strict=True):
        assert gap(a, b) <= 1e-6 * max(1.0, np.abs(b).max())
    if case.arguments["normalize"] == "input":
        kernel = np.asarray(model.get_layer("rnn").cell.kernel, "float64")
        mean, variance = oracle.pooled_moments(x @ kernel, valid)
        norm = norms[0]
        assert gap(norm.moving_mean, mean) <= 1e-5  # float32
        assert gap(norm.moving_variance, variance) <= 1e-5 * max(1, variance.max())


# Fold, save, clone, compile


@examples(6)
@hypothesis.given(cases(state=False), RATES, RATES)
def test_fold_equals_inference(case, dropout, recurrent_dropout):
    rates = {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
    case = dataclasses.replace(case, arguments={**case.arguments, **rates})
    model, x = model_of(case), data_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer with peepholes is kept
        folded = fold(model)
    found, expected = call(folded, x)[0], call(model, x)[0]
    scale = max(1.0, np.abs(expected).max())  # relu is not bounded
    assert gap(found, expected) <= 1e-5 * scale


@examples(4)
@hypothesis.given(cases(state=False), RATES, RATES)
def test_saved_and_cloned_models_are_equal(case, dropout, recurrent_dropout):
    rates = {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
    case = dataclasses.replace(case, arguments={**case.arguments, **rates})
    model, x = model_of(case), data_of(case)
    clone = type(model).from_config(model.get_config())
    clone.set_weights(model.get_weights())
    with tempfile.TemporaryDirectory() as directory:
        model.save(f"{directory}/model.keras")
        loaded = keras.saving.load_model(f"{directory}/model.keras")
    for other in (clone, loaded):
        layer = other.get_layer("rnn")
        for name, value in case.arguments.items():
            if name.endswith("activation"):
                value = keras.activations.get(value)
            if name != "return_state":
                assert getattr(layer, name) == value, name
        np.testing.assert_array_equal(call(other, x)[0], call(model, x)[0])


@examples(2)
@hypothesis.given(cases(training=True), FLAGS)
def test_eager_graph_and_xla_are_equal(case, training):
    x, arguments = case.inputs()

    def run(layer):
        results = layer(x, training=training, **arguments)
        return results, layer.input_norm.statistics_variables[:3]

    found = []
    for wrap in (
        lambda f: f,
        tf.function,
        lambda f: tf.function(f, jit_compile=True),
    ):
        layer = case.layer(dtype="float64")

        def step(layer=layer):
            with tf.GradientTape() as tape:
                loss = sum(tf.reduce_sum(r * r) for r in run(layer)[0])
            values = [v.value for v in layer.trainable_variables]
            gradients = tape.gradient(loss, values, unconnected_gradients="zero")
            return loss, gradients

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = keras.tree.flatten(wrap(step)())
        found.append([*map(np.asarray, results), *layer.input_norm.get_weights()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            # float64, divided by deviations of 0.03 and more
            assert gap(a, b) <= 1e-9 * max(1.0, np.abs(a).max())


@examples(4)
@hypothesis.given(
    cases(usual=True, training=True, unroll=False),
    FLAGS,
    FLAGS,
    st.sampled_from(["float32", "float64"]),
)
def test_slices_are_equal_to_one_loop(case, training, sliced, dtype):
    compare_graph_with_eager(case, training, sliced, dtype)


BLOCK = {"normalize": "input", "statistics": "sequence", "peephole": False}


@examples(3)
@hypothesis.given(
    cases(["lstm"], usual=True, training=True, unroll=False, **BLOCK), FLAGS
)
def test_slices_of_a_block_are_equal_to_one_loop(case, sliced):
    compare_graph_with_eager(case, True, sliced, "float32")


def compare_graph_with_eager(case, training, sliced, dtype):
    """A graph on CPUs, with the thresholds of the schedule lowered to small batches."""
    x, arguments = case.inputs(dtype)

    def step(layer):
        with tf.GradientTape() as tape:
            results = layer(x, training=training, **arguments)
            loss = sum(tf.reduce_sum(r * r) for r in results)
        values = [v.value for v in layer.trainable_variables]
        gradients = tape.gradient(loss, values, unconnected_gradients="zero")
        return [*results, *gradients]

    found = []
    lowered = {"BY_STEP_FROM": 1}
    if sliced:
        lowered |= {
            "LEAST_SLICED_ROWS": 2,
            "LEAST_SLICED_PRODUCT": 1,
            "LEAST_SLICED_PRODUCT_AT_INFERENCE": 1,
        }
    with mock.patch.multiple(schedule, **lowered), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for wrap in (lambda f: f, tf.function):
            layer = case.layer(dtype=dtype)
            results = wrap(lambda layer=layer: step(layer))()
            found.append([*map(np.asarray, results), *layer.input_norm.get_weights()])
    # Divided by deviations of 0.03 and more.
    allowed = 1e-3 if dtype == "float32" else 1e-9
    for a, b in zip(*found, strict=True):
        assert gap(a, b) <= allowed * max(1.0, np.abs(a).max())
