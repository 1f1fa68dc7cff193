"""Every public argument passed wrong: the error names it and says what to do.

The cases are generated from the signatures of the public classes and functions, and of
the `call` of each layer. An argument without an entry in `WRONG` fails
`test_every_argument_has_wrong_values`.
"""

import functools
import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bnrnn
import keras_bnrnn.export
from keras_bnrnn import BNGRU, BNLSTM, BNLSTMCell, SequenceBatchNorm
from keras_bnrnn.layers.arguments import DEFAULTS

B, T, D, U = 3, 4, 2, 5
X = np.ones((B, T, D), "float32")
STATE = np.zeros((B, U), "float32")


def public():
    """Dict from the names of public classes and functions to these, no exceptions."""
    found = {}
    for module in (keras_bnrnn, keras_bnrnn.export):
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) and issubclass(value, Exception)):
                found[name] = value
    return found


PUBLIC = public()
LAYERS = {
    name: value
    for name, value in PUBLIC.items()
    if inspect.isclass(value) and issubclass(value, keras.layers.Layer)
}
CELLS = [name for name in LAYERS if name.endswith("Cell")]
RNNS = [name for name, cls in LAYERS.items() if issubclass(cls, keras.layers.RNN)]

# Arguments that a signature hides in `**kwargs`. `unknown` is one that there is not.
OF_KERAS = ["name", "dtype", "trainable", "unknown"]


def arguments_of(function, hidden=()):
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            names += hidden
        else:
            names.append(parameter.name)
    return names


def hidden_arguments(name):
    if name == "normalize_model":
        return [*DEFAULTS, "unknown"]
    return [*OF_KERAS, "zero_output_for_mask"] if name in RNNS else OF_KERAS


class Made:
    """A value that a test makes when it needs it.

    Args:
        make: Function without arguments.
        received: The text by which a message describes the value.
    """

    def __init__(self, make, received):
        self.make, self.received = make, received


def value_and_text(wrong):
    if isinstance(wrong, Made):
        return wrong.make(), [wrong.received]
    return wrong, [repr(wrong), str(wrong)]


# Models


@functools.cache
def model():
    return keras.Sequential([keras.Input((None, D), name="x"), BNLSTM(U, name="rnn")])


def stock_model():
    layers = [keras.Input((None, D), name="x"), keras.layers.LSTM(U, name="rnn")]
    return keras.Sequential(layers)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="sub")


def state_dict(**changes):
    arrays = {
        "weight_ih_l0": np.ones((4 * U, D)),
        "weight_hh_l0": np.ones((4 * U, U)),
        "bias_ih_l0": np.ones(4 * U),
        "bias_hh_l0": np.ones(4 * U),
    }
    return {**arrays, **changes}


def tokenizer():
    return keras.layers.TextVectorization(vocabulary=["<eos>", "the"], ragged=True)


# What makes each call right, to which one wrong argument is added. `directory` is that
# of the test.
RIGHT = {
    **{name: lambda directory: {"units": U} for name in LAYERS},
    "SequenceBatchNorm": lambda directory: {},
    "fold": lambda directory: {"model": model()},
    "recalibrate": lambda directory: {"model": model(), "data": X, "verbose": 0},
    "normalize_model": lambda directory: {
        "model": stock_model(),
        "data": X,
        "verbose": 0,
    },
    "Recalibrate": lambda directory: {"data": X},
    "NormalizationMonitor": lambda directory: {"batch": X},
    "from_torch": lambda directory: {
        "state_dict": state_dict(),
        "layers": stock_model(),
    },
    "export_saved_model": lambda directory: {
        "model": model(),
        "directory": directory / "model",
    },
    "export_litert": lambda directory: {
        "model": model(),
        "path": directory / "model.tflite",
    },
    "export_onnx": lambda directory: {
        "model": model(),
        "path": directory / "model.onnx",
    },
    "TextFrontEnd": lambda directory: {"tokenizer": tokenizer()},
}

# Wrong values

NOT_FLAGS = ["yes", 1, None]
NOT_COUNTS = [0, -1, 1.5, "a", True]
NOT_RATES = [1.5, 1.0, -0.1, "a", None, True]
NOT_IDENTIFIERS = ["no_such", 5, {"class_name": "no_such"}]
NOT_MODELS = [
    None,
    "model",
    5,
    Made(lambda: keras.Sequential([BNLSTM(U)], name="seq"), "seq"),
]
NO_GRAPH = Made(Subclassed, "model='sub'")
NOT_TOKENS = [-1, 99, 1.5, "no_such", True]
NOT_TRAINING = ["yes", 2.5, 2, [True], Made(lambda: np.ones(2, bool), "training=")]


def array(*shape, dtype="float32", received=None):
    """A wrong array, which messages describe by its shape."""
    value = "a" if dtype is str else 1
    return Made(lambda: np.full(shape, value, dtype), received or str(shape))


def states(count, *shape):
    shapes = str([shape] * count)
    return Made(lambda: [np.zeros(shape, "float32")] * count, shapes)


WRONG = {
    # layers and cells
    "units": [0, -1, 1.5, "a", None, True],
    "activation": ["no_such", 5, ["tanh"]],
    "recurrent_activation": ["no_such", 5, ["tanh"]],
    **{
        f"{weight}_{kind}": NOT_IDENTIFIERS
        for weight in ("kernel", "recurrent", "bias", "gamma", "beta", "activity")
        for kind in ("initializer", "regularizer", "constraint")
    },
    **dict.fromkeys(["dropout", "recurrent_dropout"], NOT_RATES),
    **dict.fromkeys(
        [
            "use_bias",
            "unit_forget_bias",
            "return_sequences",
            "return_state",
            "go_backwards",
            "stateful",
            "unroll",
            "zero_output_for_mask",
            "reset_after",
            "peephole",
            "synchronized",
            "center",
            "scale",
        ],
        NOT_FLAGS,
    ),
    "seed": ["a", 1.5, [1], True],
    "use_cudnn": ["yes", 1, None],
    "normalize": ["output", "recurrent", None, ["input"]],
    "statistics": ["batch", None, ["frame"]],
    "population": ["frame", "timestep", None],
    "max_timesteps": [5, "a"],
    "momentum": [1.0, 2, -0.1, "a", None, True, float("nan")],
    "epsilon": [0, -1, "a", None, True, float("nan"), float("inf")],
    "name": [5, "a/b", ["a"]],
    "dtype": ["no_such", 5, "int32", "string", "complex64", "int8_from_float32"],
    "trainable": ["yes", 5, None],
    "unknown": [1],
    # functions of models
    "model": NOT_MODELS,
    "return_report": NOT_FLAGS,
    "data": [
        None,
        5,
        "text",
        Made(lambda: [], "an empty one"),
        array(0, T, D, received="an empty one"),
        array(B, T),
        array(B, T, D + 1),
        array(B, T, D, 1, 1),
        array(B, T, D, dtype=str),
        Made(lambda: np.full((B, T, D), np.nan), "batch 1 of `data`"),
        Made(lambda: (X, X), "a tuple of 2 arrays"),
    ],
    "steps": [*NOT_COUNTS, 5],
    "batch_size": NOT_COUNTS,
    "verbose": ["yes", None, 3, -1, 1.5],
    "every": [*NOT_COUNTS, None],
    "state_dict": [
        None,
        5,
        "text",
        [1],
        Made(dict, "prefix=''"),
        Made(lambda: {5: 1}, "5"),
        Made(lambda: {"kernel": 1}, "'kernel'"),
        Made(lambda: {"weight_ih_l0": np.ones((4, 2))}, "no 'weight_hh_l0'"),
        Made(lambda: state_dict(weight_ih_l0="text"), "'text'"),
        Made(lambda: state_dict(weight_ih_l0=np.ones(5)), "(5,)"),
        Made(lambda: state_dict(weight_ih_l0=np.ones((7, D))), "(7, 2)"),
        Made(lambda: state_dict(weight_hh_l0=np.ones((7, U))), "(7, 5)"),
        Made(lambda: state_dict(bias_hh_l0=np.ones(5)), "(5,)"),
        Made(lambda: state_dict(weight_hr_l0=np.ones((2, U))), "'weight_hr_l0'"),
    ],
    "layers": [
        None,
        5,
        "text",
        Made(lambda: [5], "5"),
        Made(lambda: keras.layers.LSTM, "LSTM"),
        Made(lambda: [], "layers=[]"),
        Made(lambda: keras.layers.Dense(2), "layers=[]"),
        Made(lambda: keras.layers.LSTM(U + 2), f"{U + 2} units"),
        Made(lambda: keras.layers.GRU(U), "GRUCell"),
        Made(model, "BNLSTMCell"),
    ],
    "prefix": [None, 5, "encoder."],
    # exports
    "directory": [None, 5, b"model", "gs://bucket/model", __file__],
    "version": [-1, 1.5, "a", True, 2**63],
    "lengths": ["yes", 1],
    "streaming": ["yes", 1, 0, None],
    "text_front_end": ["text", 5],
    "signatures": [
        "text",
        5,
        [1],
        Made(lambda: {"a b": print}, "'a b'"),
        Made(lambda: {5: print}, "5"),
        Made(lambda: {"serve": print}, "'serve'"),
        Made(lambda: {"own": 5}, "signatures['own']=5"),
    ],
    "warmup": ["text", 5, True],
    "quantize": ["int8", 5, True],
    "xla_buckets": ["text", 5, [5], [(0, 1)], [(1, 2, 3)], [(1.5, 2)]],
    "xla_warmup": [*NOT_FLAGS, True],
    "provenance": ["text", 5, [1], Made(lambda: {"a": {1}}, "{'a': {1}}")],
    "path": [None, 5, b"model", "model.txt", "no/such/folder/model"],
    "fused_lstm": NOT_FLAGS,
    "overwrite": NOT_FLAGS,
    "tolerance": [0, -1, "a", True, float("nan"), float("inf")],
    "opset_version": [0, -1, 1.5, "a", True, 6, 1000],
    "tokenizer": [
        None,
        5,
        "text",
        Made(
            lambda: keras.layers.TextVectorization(output_mode="multi_hot"), "multi_hot"
        ),
    ],
    **dict.fromkeys(["start_token", "end_token", "unknown_token"], NOT_TOKENS),
    "vocabulary_size": NOT_COUNTS,
    "detokenize": [5, "text"],
    "max_tokens": [*NOT_COUNTS, None],
    "logits": NOT_FLAGS,
    # of one class or function alone
    "fold.model": [*NOT_MODELS, NO_GRAPH],
    "normalize_model.model": [*NOT_MODELS, NO_GRAPH],
    "export_saved_model.model": [*NOT_MODELS, NO_GRAPH],
    "export_litert.model": [*NOT_MODELS, NO_GRAPH],
    "export_onnx.model": [*NOT_MODELS, NO_GRAPH],
    "NormalizationMonitor.batch": [None, 5, "text"],
    "NormalizationMonitor.log_dir": [5, True, b"runs"],
    "NormalizationMonitor.every": NOT_COUNTS,
    "NormalizationMonitor.margin": [0.0, 0.5, -1, "a", None, True],
    "Recalibrate.data": [None, 5, "text"],
    "Recalibrate.steps": NOT_COUNTS,
    "export_litert.path": [None, 5, b"a", "model.txt", "no/such/folder/model.tflite"],
    "export_onnx.path": [None, 5, b"a", "model.txt", "no/such/folder/model.onnx"],
    # calls
    "sequences": [
        None,
        "text",
        array(T, D),
        array(B, T, D, 1),
        array(B, T, D + 1),
        array(B, T, 0),
        array(B, 0, D, received="(batch, 0, features)"),
        array(B, T, D, dtype=str, received="'string'"),
    ],
    "initial_state": [
        5,
        "text",
        Made(list, "[]"),
        Made(lambda: [None, None], "[None, None]"),
        states(3, B, U),
        states(1, B, U - 1),
        states(1, B - 1, U),
        states(1, U),
        states(2, B, U, 1),
    ],
    "mask": [
        5,
        "text",
        Made(lambda: [[True] * T] * B, "[[True, "),
        array(B, T - 1, dtype=bool),
        array(B - 1, T, dtype=bool),
        array(B, dtype=bool),
        array(B, T, D, dtype=bool),
        array(B, T, dtype=str, received="'string'"),
    ],
    "training": NOT_TRAINING,
    "inputs": [
        None,
        "text",
        array(D),
        array(B, T, D),
        array(B, D + 1),
        array(B, D, dtype=str, received="'string'"),
    ],
    "states": [
        None,
        5,
        "text",
        Made(list, "[]"),
        states(3, B, U),
        states(1, B, U - 1),
        states(1, B - 1, U),
        states(1, U),
    ],
    "SequenceBatchNorm.inputs": [
        None,
        "text",
        array(B, D),
        array(B, T, D + 1),
        array(B, T, D, dtype=str, received="'string'"),
    ],
}
# What Keras calls the first argument of a call.
CALLED = {name: ["Input", "input tensors"] for name in ("sequences", "inputs")}


def wrong_values(owner, argument):
    return WRONG.get(f"{owner}.{argument}", WRONG.get(argument))


CONSTRUCTIONS = [
    (name, argument)
    for name, value in PUBLIC.items()
    for argument in arguments_of(value, hidden_arguments(name))
]
CALLS = [
    (name, argument)
    for name, cls in LAYERS.items()
    for argument in arguments_of(functools.partial(cls.call, None))
]


def test_every_argument_has_wrong_values():
    missing = [
        f"{owner}.{argument}"
        for owner, argument in CONSTRUCTIONS + CALLS
        if not wrong_values(owner, argument)
    ]
    assert not missing, f"`WRONG` needs values that these arguments refuse: {missing}"


def check_error(call, argument, texts):
    """Checks that a call fails, here and not in the backend, and says why."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    names = [f"`{argument}", f"{argument}=", f"'{argument}'", *CALLED.get(argument, [])]
    assert any(name in message for name in names), f"no {argument}: {message}"
    assert any(text in message for text in texts), f"no {texts}: {message}"
    assert re.search(ADVICE, message), f"does not say what to do: {message}"
    innermost = pathlib.Path(str(caught.traceback[-1].path))
    assert "tensorflow" not in innermost.parts, innermost


ADVICE = r"must|needs? |[Ee]xpect|should be|[Aa]ccepted|unexpected|Unrecognized"


def each(cases):
    return pytest.mark.parametrize("owner, argument", cases, ids=map(".".join, cases))


@each(CONSTRUCTIONS)
def test_wrong_arguments(owner, argument, tmp_path):
    right = RIGHT[owner](tmp_path)
    for wrong in wrong_values(owner, argument):
        value, texts = value_and_text(wrong)
        if argument == "unknown":
            texts = ["unknown"]
        given = {**right, argument: value}
        check_error(functools.partial(PUBLIC[owner], **given), argument, texts)
    assert not list(tmp_path.iterdir())


# Calls


@functools.cache
def built(owner):
    """A layer, called once, and the arguments of a right call."""
    cls = LAYERS[owner]
    if owner == "SequenceBatchNorm":
        layer, right = cls(name="layer"), {"inputs": X}
    elif owner in CELLS:
        layer = cls(U, name="layer")
        count = len(keras.tree.flatten(layer.state_size))
        right = {"inputs": X[:, 0], "states": [STATE] * count}
    else:
        layer, right = cls(U, name="layer"), {"sequences": X}
    layer(**right)
    return layer, right


@each(CALLS)
def test_wrong_arguments_of_a_call(owner, argument):
    layer, right = built(owner)
    for wrong in wrong_values(owner, argument):
        value, texts = value_and_text(wrong)
        given = {**right, argument: value}
        first = next(iter(right))
        call = functools.partial(layer, given.pop(first), **given)
        check_error(call, argument, texts)


# Combinations: pairs of arguments, or of an argument and what it is called with

GPU = bool(tf.config.list_physical_devices("GPU"))
free_time = tf.TensorSpec([B, None, D])


def endless():
    return tf.data.Dataset.from_tensors(X).repeat()


COMBINATIONS = {
    **{
        f"{name}-synchronized-joint": (
            functools.partial(cls, U, synchronized=True, normalize="joint"),
            ["synchronized=True", "normalize='joint'"],
        )
        for name, cls in LAYERS.items()
        if name != "SequenceBatchNorm"
    },
    "normalize_model-synchronized-joint": (
        lambda: keras_bnrnn.normalize_model(
            stock_model(), X, normalize="joint", synchronized=True
        ),
        ["synchronized=True", "normalize='joint'"],
    ),
    **{
        f"{name}-joint-batch-of-1": (
            lambda cls=cls: cls(U, normalize="joint")(X[:1], training=True),
            ["normalize='joint'", f"(1, {T}, "],
        )
        for name, cls in LAYERS.items()
        if name in RNNS
    },
    "frame-batch-of-1": (
        lambda: BNGRU(U, statistics="frame")(X[:1], training=True),
        ["statistics='frame'", f"(1, {T}, "],
    ),
    "SequenceBatchNorm-frame-batch-of-1": (
        lambda: SequenceBatchNorm(statistics="frame")(X[:1], training=True),
        ["statistics='frame'", f"(1, {T}, {D})"],
    ),
    "cell-batch-of-1": (
        lambda: BNLSTMCell(U)(X[:1, 0], [STATE[:1]] * 2, training=True),
        ["a cell", f"(1, {D})"],
    ),
    "stateful-free-batch": (
        lambda: BNLSTM(U, stateful=True)(keras.Input((T, D))),
        ["`stateful=True`", "batch size must be static", f"(None, {T}, {D})"],
    ),
    "stateful-other-batch": (
        lambda: [layer(x) for layer in [BNLSTM(U, stateful=True)] for x in (X, X[1:])],
        ["stateful", "Expected batch size: 3", "Received batch size: 2"],
    ),
    "unroll-free-time": (
        lambda: tf.function(
            BNLSTM(U, unroll=True), input_signature=[free_time]
        ).get_concrete_function(),
        ["unroll", "time dimension is undefined"],
    ),
    "cudnn-peephole": (
        lambda: BNLSTM(U, use_cudnn=True, peephole=True)(X),
        ["`use_cudnn=True`", "without peepholes"],
    ),
    "cudnn-unroll": (
        lambda: BNGRU(U, use_cudnn=True, unroll=True)(X),
        ["`use_cudnn=True`", "`unroll` is True"],
    ),
    "cudnn-recurrent_dropout": (
        lambda: BNGRU(U, use_cudnn=True, recurrent_dropout=0.5)(X, training=True),
        ["`use_cudnn=True`", "there is recurrent dropout"],
    ),
    "cudnn-joint": (
        lambda: BNGRU(U, use_cudnn=True, normalize="joint")(X, training=True),
        ["`use_cudnn=True`", "`normalize='joint'`"],
    ),
    "cudnn-frame": (
        lambda: BNGRU(U, use_cudnn=True, statistics="frame")(X, training=True),
        ["`use_cudnn=True`", "frame-wise"],
    ),
    "recalibrate-endless-steps": (
        lambda: keras_bnrnn.recalibrate(model(), endless(), verbose=0),
        ["`steps`", "steps=None", "endless"],
    ),
    "normalize_model-endless-steps": (
        lambda: keras_bnrnn.normalize_model(stock_model(), endless(), verbose=0),
        ["`steps`", "steps=None", "endless"],
    ),
    "Recalibrate-endless-steps": (
        lambda: keras_bnrnn.Recalibrate(endless()),
        ["`steps`", "steps=None", "endless"],
    ),
    "Recalibrate-iterator-steps": (
        lambda: keras_bnrnn.Recalibrate(iter([X])),
        ["`steps`", "steps=None", "iterator"],
    ),
    "recalibrate-no-target": (
        lambda: keras_bnrnn.recalibrate(stock_model(), X),
        ["`model`", "no batch-normalised layer", "model='sequential"],
    ),
    "normalize_model-no-target": (
        lambda: keras_bnrnn.normalize_model(
            keras.Sequential([keras.Input((D,)), keras.layers.Dense(1)]), X[0]
        ),
        ["`model` must have a recurrent layer", "model='sequential"],
    ),
    "tokens-size": (
        lambda: keras_bnrnn.export.TextFrontEnd(
            tokenizer(), end_token=1, vocabulary_size=1
        ),
        ["`end_token`", "below 1", "end_token=1"],
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_wrong_combinations(name):
    call, texts = COMBINATIONS[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    for text in texts:
        assert text in message


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_cudnn_without_a_gpu():
    for cls in (BNLSTM, BNGRU):
        with pytest.raises(ValueError, match=r"`use_cudnn=True`.*there is no GPU"):
            cls(U, use_cudnn=True)(X)
