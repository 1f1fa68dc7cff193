"""The models that the tests of the client call, and a client of their server."""

import numpy as np
import pytest
import tensorflow as tf
from keras_bnrnn_client import ServingClient

F, U, K = 3, 4, 2


def weights(version):
    rng = np.random.default_rng(version)
    shapes = {"kernel": (F, U), "recurrent_kernel": (U, U), "out": (U, K)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def oracle(version, x, lengths, h=None):
    """`h_t = tanh(W x_t + U h_{t-1})`, `y_t = V h_t`, row by row in float64."""
    w = weights(version)
    logits = np.zeros([*x.shape[:2], K])
    last = np.zeros([len(x), U]) if h is None else np.array(h, "float64")
    for i in range(len(x)):
        for t in range(lengths[i]):
            last[i] = np.tanh(x[i, t] @ w["kernel"] + last[i] @ w["recurrent_kernel"])
            logits[i, t] = last[i] @ w["out"]
    return logits, last


def spec(shape, dtype, name):
    return tf.TensorSpec(shape, getattr(tf, dtype), name=name)


FRAMES, LENGTHS = (
    spec([None, None, F], "float32", "x"),
    spec([None], "int32", "lengths"),
)
STATES = [spec([None, U], "float32", "rnn_h"), spec([None], "int32", "t")]


class Recurrent(tf.Module):
    """The signatures of an exported causal model, written by hand."""

    def __init__(self, version):
        super().__init__()
        for name, value in weights(version).items():
            setattr(self, name, tf.Variable(value.astype("float32")))

    def run(self, x, lengths, h):
        mask = tf.sequence_mask(lengths, tf.shape(x)[1])
        outputs = tf.TensorArray(tf.float32, tf.shape(x)[1])
        for t in tf.range(tf.shape(x)[1]):
            m = mask[:, t, None]
            h = tf.where(m, self.cell(x[:, t], h), h)
            outputs = outputs.write(t, tf.where(m, h @ self.out, 0.0))
        return tf.ensure_shape(
            tf.transpose(outputs.stack(), [1, 0, 2]), [None, None, K]
        ), h

    def cell(self, x, h):
        return tf.tanh(x @ self.kernel + h @ self.recurrent_kernel)

    @tf.function(input_signature=[FRAMES, LENGTHS])
    def serve(self, x, lengths):
        logits, _ = self.run(x, lengths, tf.zeros([tf.shape(x)[0], U]))
        return {"logits": logits}

    @tf.function(input_signature=[spec([None, F], "float32", "x"), *STATES])
    def step(self, x, rnn_h, t):
        h = self.cell(x, rnn_h)
        return {"logits": h @ self.out, "rnn_h": h, "t": t + 1}

    @tf.function(input_signature=[FRAMES, LENGTHS, *STATES])
    def chunk(self, x, lengths, rnn_h, t):
        logits, h = self.run(x, lengths, rnn_h)
        return {"logits": logits, "rnn_h": h, "t": t + lengths, "lengths": lengths}

    @tf.function(input_signature=[spec(None, "float32", "x")])
    def initial_state(self, x):
        b = tf.shape(x)[0]
        return {"rnn_h": tf.zeros([b, U]), "t": tf.zeros([b], tf.int32)}


class Types(tf.Module):
    @tf.function(
        input_signature=[
            spec([None], "string", "text"),
            spec([None], "bool", "flag"),
            spec([None], "int64", "long"),
            spec([None], "uint8", "byte"),
            spec([None, 2], "float64", "double"),
        ]
    )
    def kinds(self, text, flag, long, byte, double):
        return {
            "text": text,
            "raw_bytes": tf.strings.join([text, b"\xff"]),
            "flag": ~flag,
            "long": long - 1,
            "byte": byte + tf.constant(1, tf.uint8),
            "double": double,
        }

    @tf.function(input_signature=[spec([None], "float32", "x")])
    def single(self, x):
        return {"y": tf.sqrt(x)[:, None] + tf.zeros([1, 2])}

    @tf.function(input_signature=[spec([None], "float16", "x")])
    def half(self, x):
        return {"y": tf.cast(x, tf.float32) * 2.0}


def save_recurrent(directory, version):
    module = Recurrent(version)
    names = ["step", "chunk", "initial_state"]
    signatures = {name: getattr(module, name) for name in names}
    signatures["serving_default"] = module.serve
    tf.saved_model.save(module, str(directory / str(version)), signatures)


def connect(server, protocol, model="rnn", **kwargs):
    where = {"rest_url": server.url}
    if protocol == "grpc":
        where = {"grpc_target": server.grpc_target}
    return ServingClient(model, **where, **kwargs)


protocols = pytest.mark.parametrize("protocol", ["rest", "grpc"])
