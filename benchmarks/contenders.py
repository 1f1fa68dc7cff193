"""What is measured: layers, models, and one training or inference step of each."""

import json
import os
import subprocess
import sys
import time
import typing

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_bnrnn

# `benchmarks/against.py` runs this with versions that have no registry, too.
registry = getattr(keras_bnrnn.layers, "KINDS", None) or {
    "lstm": keras_bnrnn.BNLSTM,
    "gru": keras_bnrnn.BNGRU,
    "simple_rnn": keras_bnrnn.BNSimpleRNN,
}

SHAPES = [  # B, T, D, U
    (20, 35, 650, 650),
    (32, 100, 250, 250),
    (32, 100, 128, 128),
    (1, 100, 128, 128),
]
MODES = ("graph", "xla")
KINDS = {
    kind: (layer, getattr(keras.layers, layer.__name__.removeprefix("BN")))
    for kind, layer in registry.items()
}


def model(name, shape, kind="lstm", mode="graph"):
    """A model of sequences of a shape (B, T, D, U).

    Args:
        name: `"bn"` (sequence-wise), `"bn frame"`, `"bn off"` (the same layer with
            its normalisation frozen: the same loop with other weights, no batch
            statistics), `"keras"`, `"keras bn"` (`BatchNormalization` in front).
        shape: (B, T, D, U).
        kind: The kind of layer.
        mode: With `"xla"`, no cuDNN kernel, which XLA does not have.
    """
    batch, timesteps, width, _ = shape
    inputs = keras.Input(
        (timesteps, width),
        # Frame-wise statistics of one row are refused where they can be foreseen.
        batch_size=None if name == "bn frame" else batch,
    )
    outputs = inputs
    if name == "keras bn":
        outputs = keras.layers.BatchNormalization()(inputs)
    recurrent = layer(name, shape, kind, mode)
    outputs = recurrent(outputs)
    if name == "bn off":
        recurrent.input_norm.trainable = False
    return keras.Model(inputs, outputs)


def layer(name, shape, kind="lstm", mode="graph"):
    """The recurrent layer of a `model`, with the same arguments."""
    own, stock = KINDS[kind]
    options = {"return_sequences": True}
    if mode == "xla" and kind != "simple_rnn":
        options["use_cudnn"] = False
    if name.startswith("keras"):
        return stock(shape[-1], **options)
    statistics = "frame" if name == "bn frame" else "sequence"
    return own(shape[-1], statistics=statistics, **options)


GRID = [(b, 100, u, u) for u in (64, 128, 256) for b in (16, 64, 128, 256)]
FIT_MODELS = ("lstm", "gru", "masked lstm")
FIT_SIZES = [(b, 100, 64, 64) for b in (1, 16, 32, 64, 128, 256)]
FIT_STEPS = 16  # batches in an epoch
PREDICT_ROWS = 2048  # of all batches of a `predict`
FIT_MODES = {"default": "auto", "jit_compile=True": True}


def fitted(name, shape, kind, jit_compile):
    """A whole model, compiled as a user does, and its `fit`.

    Args:
        name: `"bn"` or `"keras"`.
        shape: (B, T, D, U).
        kind: `"lstm"`, `"gru"`: one recurrent layer and a `Dense` one. `"masked lstm"`:
            two recurrent layers over sequences of 50 to 100 % of T.
        jit_compile: As for `keras.Model.compile`; Keras resolves `"auto"` to `False`
            where there is no GPU.

    Returns:
        A function that trains one epoch and returns the seconds of a step in it: from
        the end of the first step to the end of the last, callbacks and data included.
        What `fit` does once, before and after, is not.
    """
    batch, timesteps, width, units = shape
    layer = KINDS[kind.split()[-1]][0 if name == "bn" else 1]
    x = frames((batch * FIT_STEPS, timesteps, width))
    y = np.random.default_rng(1).integers(0, 10, len(x))
    layers = [keras.Input((timesteps, width))]
    if kind.startswith("masked"):
        pad(x)
        layers += [keras.layers.Masking(), layer(units, return_sequences=True)]
    layers += [layer(units), keras.layers.Dense(10)]
    return epoch_of(keras.Sequential(layers), x, y, batch, jit_compile)


def pad(x):
    """Pads sequences on the right: 50 to 100 % of their timesteps remain."""
    timesteps = x.shape[1]
    lengths = np.random.default_rng(2).integers(timesteps // 2, timesteps, len(x))
    x[np.arange(timesteps) >= lengths[:, None]] = 0


def epoch_of(model, x, y, batch, jit_compile):
    """Compiles a model, and returns what `fitted` returns."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=jit_compile)

    def epoch():
        clock = Clock()
        model.fit(x, y, batch_size=batch, verbose=0, callbacks=[clock])
        return clock.seconds()

    return epoch


class Clock(keras.callbacks.Callback):
    """Notes when each batch of one `fit` or `predict` ends."""

    def __init__(self):
        super().__init__()
        self.times = []

    def on_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())

    on_predict_batch_end = on_batch_end

    def seconds(self):
        """From the end of the first batch to the end of the last, for each batch."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class Whole(typing.NamedTuple):
    """A whole model: recurrent layers and a `Dense` one.

    Attributes:
        kind: `"lstm"` or `"gru"`.
        batch, timesteps, width, units: B, T, D, U.
        depth: The number of recurrent layers.
        bidirectional: Whether they are wrapped in `Bidirectional`.
        masked: Whether sequences are padded, and a `Masking` layer masks them.
        each: Whether each frame has a label; otherwise each sequence has one.
        words: The size of the vocabulary of a language model with D-dimensional
            embeddings. Its statistics are frame-wise. 0: the input consists of frames.
    """

    kind: str
    batch: int
    timesteps: int
    width: int
    units: int
    depth: int = 1
    bidirectional: bool = False
    masked: bool = False
    each: bool = False
    words: int = 0


WHOLE = {
    "LSTM 64, batch 256": Whole("lstm", 256, 100, 64, 64),
    "Bidirectional LSTM 64, masked, batch 64": Whole(
        "lstm", 64, 100, 64, 64, bidirectional=True, masked=True
    ),
    "2 x LSTM 128, masked, batch 64": Whole(
        "lstm", 64, 100, 64, 128, depth=2, masked=True
    ),
    "2 x LSTM 128, labels of frames, batch 128": Whole(
        "lstm", 128, 100, 64, 128, depth=2, each=True
    ),
    "GRU 256, batch 32": Whole("gru", 32, 100, 64, 256),
    "2 x GRU 128, batch 128": Whole("gru", 128, 100, 64, 128, depth=2),
    "Bidirectional GRU 64, masked, batch 128": Whole(
        "gru", 128, 100, 64, 64, bidirectional=True, masked=True
    ),
    "Language model, 2 x LSTM 128, 5,000 words, batch 32": Whole(
        "lstm", 32, 35, 128, 128, depth=2, each=True, words=5000
    ),
}


def fitted_whole(name, which, jit_compile):
    """What `fitted` returns, of a model of `WHOLE`."""
    whole = WHOLE[which]
    own = name == "bn"
    layer = KINDS[whole.kind][0 if own else 1]
    options = {"statistics": "frame"} if own and whole.words else {}
    rng = np.random.default_rng(1)
    sequences = whole.batch * FIT_STEPS
    if whole.words:
        x = rng.integers(0, whole.words, (sequences, whole.timesteps))
        layers = [
            keras.Input((whole.timesteps,)),
            keras.layers.Embedding(whole.words, whole.width),
        ]
    else:
        x = frames((sequences, whole.timesteps, whole.width))
        layers = [keras.Input((whole.timesteps, whole.width))]
    if whole.masked:
        pad(x)
        layers.append(keras.layers.Masking())
    for i in range(whole.depth):
        each = whole.each or i < whole.depth - 1
        recurrent = layer(whole.units, return_sequences=each, **options)
        if whole.bidirectional:
            recurrent = keras.layers.Bidirectional(recurrent)
        layers.append(recurrent)
    classes = whole.words or 10
    y = rng.integers(0, classes, x.shape[:2] if whole.each else len(x))
    layers.append(keras.layers.Dense(classes))
    return epoch_of(keras.Sequential(layers), x, y, whole.batch, jit_compile)


VARYING_LENGTHS = [52 + 6 * i for i in range(16)]  # as many frames as 16 times 97


def varying(name, kind, changes):
    """An epoch of `fit` over batches of 64 rows, of one length or of 16 lengths.

    Args:
        name: `"bn"` or `"keras"`.
        kind: `"lstm"` or `"gru"`.
        changes: Whether the length changes with every batch. The number of frames of an
            epoch is the same.

    Returns:
        A function that trains one epoch and returns its seconds.
    """
    import tensorflow as tf

    lengths = VARYING_LENGTHS
    if not changes:
        lengths = [sum(lengths) // len(lengths)] * len(lengths)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(lengths))
    batches = [
        (frames((64, lengths[i], 64), seed=i), rng.integers(0, 10, 64)) for i in order
    ]
    spec = (tf.TensorSpec((64, None, 64)), tf.TensorSpec((64,), tf.int64))
    data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)
    model = keras.Sequential(
        [
            keras.Input((None, 64)),
            KINDS[kind][0 if name == "bn" else 1](64),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)

    def epoch():
        start = time.perf_counter()
        model.fit(data, verbose=0)
        return time.perf_counter() - start

    return epoch


def predicted(name, shape, kind):
    """`predict` by a model that does not know the batch size.

    Returns:
        A function that predicts all rows and returns the seconds of a batch, counted as
        in `fitted`.
    """
    batch, timesteps, width, _ = shape
    x = frames((PREDICT_ROWS, timesteps, width))
    model = keras.Sequential(
        [keras.Input((timesteps, width)), layer(name, shape, kind)]
    )

    def predict():
        clock = Clock()
        model.predict(x, batch_size=batch, verbose=0, callbacks=[clock])
        return clock.seconds()

    return predict


def stack(name, shape=(24, 300, 123, 250), depth=5):
    """A deep bidirectional LSTM, as the paper's for speech."""
    batch, timesteps, width, units = shape
    layer = keras_bnrnn.BNLSTM if name == "bn" else keras.layers.LSTM
    layers = [
        keras.layers.Bidirectional(layer(units, return_sequences=True))
        for _ in range(depth)
    ]
    return keras.Sequential(
        [keras.Input((timesteps, width), batch_size=batch), *layers]
    )


def frames(shape, seed=0):
    """Random input of a shape (B, T, D, U)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape[:3]).astype("float32")


def training_step(model, x, mode):
    """A function that takes one step of gradient descent and waits for it."""
    import tensorflow as tf

    x = tf.constant(x)

    def step(x):
        weights = [w.value for w in model.trainable_variables]
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = tf.reduce_mean(tf.square(outputs))
        for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
            weight.assign_sub(0.01 * gradient)
        return loss

    step = tf.function(
        step,
        input_signature=[tf.TensorSpec((model.input_shape), x.dtype)],
        jit_compile=mode == "xla",
        autograph=False,
    )

    def run():
        step(x).numpy()

    return run


def inference_step(model, x, mode):
    """A function that infers and waits for it."""
    import tensorflow as tf

    x = tf.constant(x)
    infer = tf.function(
        lambda x: model(x, training=False),
        jit_compile=mode == "xla",
        autograph=False,
    )

    def run():
        infer(x).numpy()

    return run


class TorchLSTM:
    """A training step of `torch.nn.LSTM`, in a process of its own.

    There its threads do not meet those of TensorFlow: it works when called, and
    waits otherwise.

    Args:
        shape: (B, T, D, U).
        python: The interpreter, one that has torch. Default: the one in use.
    """

    def __init__(self, shape, python=sys.executable):
        self.process = subprocess.Popen(
            [python, os.path.join(os.path.dirname(__file__), "torch_lstm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask(list(shape))

    def _ask(self, message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("The torch process ended; its error is above.")
        return json.loads(answer)

    def __call__(self):
        """Seconds that a step took."""
        took = self._ask("step")
        # The threads of OpenMP spin for some milliseconds before they sleep, and would
        # take the cores from whoever is timed next.
        time.sleep(0.05)
        return took

    def close(self):
        self.process.stdin.close()
        self.process.wait()
