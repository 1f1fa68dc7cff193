"""`export_litert` and `export_onnx`: a folded model as one file, for other runtimes."""

import contextlib
import importlib
import inspect
import os
import pathlib
import uuid
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.checks import ExportMismatchError, shortest_timesteps
from keras_bnrnn.export.served_model import ServedModel, structure_of
from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import clone_graph, copy_of, require_built_graph, sublayers


@contextlib.contextmanager
def _without_warnings_of_libraries():
    """Silences what Keras does that NumPy 2 warns of; a user can do nothing about it.

    Other warnings pass: they are about the model.
    """
    with warnings.catch_warnings():
        # Of variables that become arrays.
        message = "__array__ implementation doesn't accept a copy keyword"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        # Of Keras' patch of tf2onnx, which looks whether there is an `np.object`.
        message = r"In the future `np\.object` will be defined"
        warnings.filterwarnings("ignore", message, FutureWarning)
        yield


@_without_warnings_of_libraries()
def export_litert(
    model,
    path,
    *,
    batch_size=None,
    fused_lstm=True,
    quantize=None,
    tolerance=None,
    overwrite=False,
):
    """Folds a model and writes it as a `.tflite` file, for LiteRT (TensorFlow Lite).

    The file has one signature, with inputs and outputs named as those of
    `export_saved_model`. It holds LiteRT's built-in operations alone, so that it loads
    in an interpreter without the TensorFlow ("Flex") ones. T is free where it is in the
    model, the batch size is fixed: the converter takes no loop over a free one.

    There are no `lengths`: every frame counts. At batch 1 there is nothing to pad; in
    larger batches give sequences of one length, or let the model mask by value
    (`Masking`, `Embedding(mask_zero=True)`).

    With `fused_lstm`, an LSTM is one operation of the runtime,
    `UNIDIRECTIONAL_SEQUENCE_LSTM`, which delegates and microcontrollers know. Left to
    itself that operation starts a sequence from the state in which the last one ended,
    and clips cell states at 10. Here neither happens: a frame in front of each sequence
    clears the state, and clipping is off. A sequence with values that are not finite,
    or beyond 1e18, answers NaN in all its frames. LSTMs with a mask, an initial state,
    `return_state` or unusual activations, GRUs and SimpleRNNs run a loop.

    Before the file is put in its place, it is loaded in its runtime and compared with
    `model(x, training=False)` on random sequences of several T.

    Args:
        model: A built Sequential or Functional model that computes in float32, with an
            input of shape (B, T, ...). It is not changed.
        path: Path of the file, which ends in `.tflite`, in a directory that is there.
        batch_size: Positive int. `None` (default): the model's own, or 1.
        fused_lstm: Whether LSTMs become one operation each. With 128 units, 50
            timesteps and one thread of an x86 CPU that takes a fifth less time than the
            loop at batch 1, and half as much again at batch 32.
        quantize: `"float16"` stores weights in half the space; it still computes in
            float32. `None` (default): float32.
        tolerance: The largest difference to pass, relative to the largest output where
            that exceeds 1. `None` (default): 1e-4, or 1e-2 with `quantize`.
        overwrite: Whether to replace a file that is there.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: Without the `litert` extra.
        FileExistsError: If the file is there and `overwrite` is `False`.
        ExportMismatchError: If the file answers otherwise than the model; a
            `ValueError`. Nothing is written.
        ValueError: If `model` is not built, subclassed, stateful or not in float32, has
            no input with timesteps, or something in it that LiteRT has no operation
            for; for a bad `path`, `batch_size`, `quantize` or `tolerance`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((None, 8), name="x"), BNLSTM(4, name="state")]
    ... )
    >>> path = export_litert(model, f"{tmp}/digits.tflite")
    >>> from ai_edge_litert.interpreter import Interpreter
    >>> run = Interpreter(str(path)).get_signature_runner()
    >>> run(x=np.ones((1, 5, 8), "float32"))["state"].shape
    (1, 4)
    """
    _require("export_litert", "litert", ["ai_edge_litert.interpreter"])
    _require_model(model, "`export_litert`")
    path = _checked_path(path, ".tflite", overwrite)
    if quantize not in (None, "float16"):
        raise ValueError(
            f"`quantize` must be None or 'float16'. Received: quantize={quantize!r}"
        )
    tolerance = _checked_tolerance(tolerance, 1e-4 if quantize is None else 1e-2)

    folded = fold(model)
    served = ServedModel(folded)
    batch_size = _checked_batch_size(batch_size, served)
    exported = _Exported(folded, served, batch_size, fused_lstm)
    target = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    options = {"target_spec": target}
    if quantize == "float16":
        target["supported_types"] = [tf.float16]
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]

    def write(file):
        exported.write(file, format="litert", **options)
        _stop_clipping(file)

    def check(file):
        _compare(model, served, _litert_answers(file), tolerance, [batch_size] * 4)

    with _explaining("LiteRT"):
        return _publish(path, overwrite, write, check)


@_without_warnings_of_libraries()
def export_onnx(model, path, *, opset_version=None, tolerance=1e-4, overwrite=False):
    """Folds a model and writes it as an `.onnx` file, for ONNX Runtime and others.

    Inputs and outputs are named as those of `export_saved_model`. The batch size and T
    are as free as the model has them. An LSTM becomes the `LSTM` operation of ONNX,
    if it has the usual activations and no mask; a GRU and a SimpleRNN become a `Loop`.

    There are no `lengths`: every frame counts. Give sequences of one length, or let the
    model mask by value (`Masking`, `Embedding(mask_zero=True)`).

    Before the file is put in its place, it is loaded in ONNX Runtime and compared with
    `model(x, training=False)` on random sequences of several B and T.

    Args:
        model: A built Sequential or Functional model that computes in float32, with an
            input of shape (B, T, ...). It is not changed.
        path: Path of the file, which ends in `.onnx`, in a directory that is there.
        opset_version: Int, the version of ONNX's operations. `None` (default): that of
            the converter, 15.
        tolerance: The largest difference to pass, relative to the largest output where
            that exceeds 1.
        overwrite: Whether to replace a file that is there.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: Without the `onnx` extra.
        FileExistsError: If the file is there and `overwrite` is `False`.
        ExportMismatchError: If the file answers otherwise than the model; a
            `ValueError`. Nothing is written.
        ValueError: If `model` is not built, subclassed, stateful or not in float32, has
            no input with timesteps, or something in it that ONNX has no operation for;
            for a bad `path`, `opset_version` or `tolerance`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((None, 8), name="x"), BNLSTM(4, name="state")]
    ... )
    >>> path = export_onnx(model, f"{tmp}/digits.onnx")
    >>> import onnxruntime
    >>> session = onnxruntime.InferenceSession(path)
    >>> (state,) = session.run(["state"], {"x": np.ones((2, 5, 8), "float32")})
    >>> state.shape
    (2, 4)
    """
    _require("export_onnx", "onnx", ["tf2onnx", "onnx", "onnxruntime"])
    _require_model(model, "`export_onnx`")
    path = _checked_path(path, ".onnx", overwrite)
    if opset_version is not None and (
        isinstance(opset_version, bool) or not isinstance(opset_version, int)
    ):
        raise ValueError(
            "`opset_version` must be an integer or None. "
            f"Received: opset_version={opset_version!r}"
        )
    tolerance = _checked_tolerance(tolerance, 1e-4)

    folded = fold(model)
    served = ServedModel(folded)
    exported = _Exported(folded, served, served.batch_size, fused_lstm=False)

    def write(file):
        exported.write(file, format="onnx", opset_version=opset_version)
        _name_free_sizes(file, served)

    def check(file):
        fixed = served.batch_size
        batches = [1, 3, 2, 1] if fixed is None else [fixed] * 4
        _compare(model, served, _onnx_answers(file), tolerance, batches)

    with _explaining("ONNX"):
        return _publish(path, overwrite, write, check)


def _require(function, extra, modules):
    """Imports what an extra brings."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"`{function}` needs `{module.partition('.')[0]}`, and its import "
                f"failed: {error}. Install it with "
                f"`pip install 'keras-bnrnn[{extra}]'`."
            ) from error


def _require_model(model, purpose):
    require_built_graph(model, purpose)
    for layer in sublayers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                "A stateful layer would carry one call's state into the next: rebuild "
                "the model with `stateful=False` and set its weights. "
                f"Received: layer {layer.name!r} with stateful=True"
            )
        dtype = getattr(layer, "compute_dtype", None)
        if dtype not in (None, "float32"):
            raise ValueError(
                f"`model` must compute in float32 for {purpose}. Received: layer "
                f"{layer.name!r} with compute_dtype={dtype!r}"
            )


def _checked_path(path, suffix, overwrite):
    path = pathlib.Path(path)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(
            f"`path` must be that of a file and end in {suffix!r}. "
            f"Received: path={os.fspath(path)!r}"
        )
    if not path.parent.is_dir():
        raise ValueError(
            "`path` must be in a directory that is there. "
            f"Received: path={os.fspath(path)!r}"
        )
    _refuse_existing(path, overwrite)
    return path


def _refuse_existing(path, overwrite):
    if path.exists() and not overwrite:
        raise FileExistsError(
            "`path` is there already: `overwrite=True` replaces it. "
            f"Received: path={os.fspath(path)!r}"
        )


def _checked_tolerance(tolerance, default):
    if tolerance is None:
        return default
    if isinstance(tolerance, bool) or not (
        isinstance(tolerance, (int, float)) and tolerance > 0
    ):
        raise ValueError(
            f"`tolerance` must be a positive number. Received: tolerance={tolerance!r}"
        )
    return tolerance


def _checked_batch_size(batch_size, served):
    fixed = served.batch_size
    if batch_size is None:
        return 1 if fixed is None else fixed
    if isinstance(batch_size, bool) or not (
        isinstance(batch_size, int) and batch_size > 0
    ):
        raise ValueError(
            "`batch_size` must be a positive integer or None. "
            f"Received: batch_size={batch_size!r}"
        )
    if fixed not in (None, batch_size):
        raise ValueError(
            f"`batch_size` must be {fixed}, which the model's inputs have. "
            f"Received: batch_size={batch_size}"
        )
    return batch_size


class _Exported:
    """A folded model as Keras' exporters get it: dicts in and out, by name."""

    def __init__(self, folded, served, batch_size, fused_lstm):
        def prepared(layer):
            return _prepared(layer, fused_lstm)

        model = clone_graph(folded, clone_function=prepared)
        model.set_weights(folded.get_weights())
        self.specs = {
            name: tf.TensorSpec([batch_size, *x.shape[1:]], x.dtype, name=name)
            for name, x in served.inputs.items()
        }
        inputs = {
            name: keras.Input(batch_shape=tuple(spec.shape), dtype=x.dtype, name=name)
            for (name, x), spec in zip(
                served.inputs.items(), self.specs.values(), strict=True
            )
        }
        outputs = keras.tree.flatten(model(served.packed(inputs)))
        self.model = keras.Model(
            inputs, dict(zip(served.outputs, outputs, strict=True))
        )

    def write(self, file, **options):
        self.model.export(file, verbose=False, input_signature=[self.specs], **options)


def _prepared(layer, fused_lstm):
    """A copy of a layer that the converters understand."""
    clone = copy_of(layer)
    if not isinstance(clone, keras.layers.Layer):
        return clone
    for part in sublayers(clone):
        if hasattr(part, "use_cudnn"):
            # Traced where a GPU is visible, it would be an operation of cuDNN.
            part.use_cudnn = False
        if type(part) is keras.layers.TimeDistributed:
            _run_on_all_frames(part)
        if fused_lstm and type(part) is keras.layers.LSTM:
            _run_fused(part)
    return clone


def _run_on_all_frames(layer):
    """Has a `TimeDistributed` see its frames as rows of a batch.

    Its own loop over a free T comes out of both converters with wrong numbers.
    """
    own_call = layer.call
    takes_mask = "mask" in inspect.signature(layer.layer.call).parameters

    def call(inputs, training=None, mask=None):
        sizes = inputs.shape[2:]
        if None in sizes or (takes_mask and mask is not None):
            return own_call(inputs, training=training, mask=mask)
        y = layer.layer(keras.ops.reshape(inputs, (-1, *sizes)))
        shape = (*keras.ops.shape(inputs)[:2], *keras.ops.shape(y)[1:])
        return keras.ops.reshape(y, shape)

    layer.call = call


def _run_fused(layer):
    """Has an LSTM layer become the runtime's operation, where that can be."""
    own_loop = layer.inner_loop

    def inner_loop(sequences, initial_state, mask, training=False):
        if mask is not None or not _can_fuse(layer, sequences, initial_state):
            return own_loop(sequences, initial_state, mask, training)
        outputs = _fused_lstm(layer, sequences)
        return outputs[:, -1], outputs, initial_state

    layer.inner_loop = inner_loop


def _can_fuse(layer, sequences, initial_state):
    """Whether the operation does what a layer does, and gives what it gives."""
    starts = [tf.get_static_value(state) for state in initial_state]
    return (
        layer.activation is keras.activations.tanh
        and layer.recurrent_activation is keras.activations.sigmoid
        and not layer.return_state
        and sequences.shape[0] is not None
        and all(start is not None and not np.any(start) for start in starts)
    )


# What a frame may hold: more could overflow to NaN in a product, and a NaN in the
# state outlasts what clears it.
LARGEST = 1e18

# Closes a gate: sigmoid(-1e4) is 0, and -1e4 still a float16.
CLOSED = -1e4


def _fused_lstm(layer, sequences):
    """Outputs (B, T, U), by a function that the converter knows by its attributes.

    The operation keeps its state from call to call. So a frame comes first that closes
    the gates i, f and o: the state is 0 after it. It is the only one in which a feature
    of its own is not 0.
    """
    cell, units = layer.cell, layer.units
    batch_size, _, features = sequences.shape
    frames = tf.reverse(sequences, [1]) if layer.go_backwards else sequences
    sound = tf.abs(frames) < LARGEST  # not NaN either
    frames = tf.where(sound, frames, 0.0)

    clearing = np.zeros((batch_size, 1, features + 1), "float32")
    clearing[..., -1] = 1.0
    frames = tf.pad(frames, [[0, 0], [0, 0], [0, 1]])
    frames = tf.concat([clearing, frames], axis=1)  # (B, 1 + T, D + 1)
    closing = np.full((1, 4 * units), CLOSED, "float32")  # i, f, c, o
    closing[:, 2 * units : 3 * units] = 0.0
    kernel = tf.concat([tf.convert_to_tensor(cell.kernel), closing], axis=0)

    zeros = tf.zeros([batch_size, units])
    bias = cell.bias if cell.use_bias else tf.zeros([4 * units])
    # As tensors: the converter takes the process down over variables.
    _, outputs, *_ = _lstm_function()(
        frames,
        zeros,
        zeros,
        kernel,
        tf.convert_to_tensor(cell.recurrent_kernel),
        tf.convert_to_tensor(bias),
    )
    sound = tf.reduce_all(sound, axis=[1, 2], keepdims=True)
    return tf.where(sound, outputs[:, 1:], np.nan)


def _lstm_function():
    """An LSTM with the arguments and results that the converter replaces.

    They are those of the LSTM of Keras 2, which it recognises by `api_implements`.
    """
    attributes = {
        "api_implements": f"lstm_{uuid.uuid4().hex}",
        "time_major": False,
        "go_backwards": False,
    }

    @tf.function(experimental_attributes=attributes, autograph=False)
    def lstm(frames, h, c, kernel, recurrent_kernel, bias):
        def step(states, frame):
            h, c = states
            a = frame @ kernel + h @ recurrent_kernel + bias
            i, f, candidate, o = tf.split(a, 4, axis=-1)  # (B, U) each
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(candidate)
            return tf.sigmoid(o) * tf.tanh(c), c

        hs, cs = tf.scan(step, tf.transpose(frames, [1, 0, 2]), (h, c))
        return hs[-1], tf.transpose(hs, [1, 0, 2]), hs[-1], cs[-1], tf.zeros([])

    return lstm


def _stop_clipping(file):
    """The converter has each fused LSTM clip its cell states at 10."""
    from ai_edge_litert.tools import flatbuffer_utils

    content = flatbuffer_utils.read_model(os.fspath(file))
    fused = [
        operator.builtinOptions
        for graph in content.subgraphs
        for operator in graph.operators
        if getattr(operator.builtinOptions, "cellClip", 0.0)
    ]
    for options in fused:
        options.cellClip = 0.0
    if fused:
        flatbuffer_utils.write_model(content, os.fspath(file))


def _name_free_sizes(file, served):
    """Calls the free sizes of an ONNX file `batch` and `timesteps`."""
    import onnx

    content = onnx.load(file)
    # Sequences of one model may differ in T.
    timesteps = len(served.sequences) == 1
    names = dict.fromkeys(served.sequences, timesteps)
    names |= {
        name: timesteps and per_step
        for name, per_step in zip(served.outputs, served.per_step, strict=True)
    }
    for value in [*content.graph.input, *content.graph.output]:
        sizes = value.type.tensor_type.shape.dim
        for size, name in zip(sizes, ("batch", "timesteps"), strict=False):
            named = name == "batch" or names.get(value.name, False)
            if named and size.HasField("dim_param"):
                size.dim_param = name
    onnx.save(content, file)


def _litert_answers(file):
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(os.fspath(file)).get_signature_runner()
    return lambda inputs: run(**inputs)


def _onnx_answers(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _compare(model, served, answers, tolerance, batches):
    """Refuses a file whose answers on random sequences are not the model's."""
    rng = np.random.default_rng(1)
    fewest = shortest_timesteps(served)
    timesteps = [fewest + extra for extra in (8, 0, 3, 8)]
    for batch_size, count in zip(batches, timesteps, strict=True):
        inputs = served.example_inputs(batch_size, count, rng)
        packed = keras.tree.pack_sequence_as(
            structure_of(model, "input"), list(inputs.values())
        )
        expected = keras.tree.flatten(model(packed, training=False))
        found = answers({name: x.numpy() for name, x in inputs.items()})
        for name, y in zip(served.outputs, expected, strict=True):
            gap = _gap(keras.ops.convert_to_numpy(y), found[name])
            if not gap <= tolerance:
                raise ExportMismatchError(
                    "The exported file must answer as the model does, to "
                    f"{tolerance:g}. Received: output {name!r}, which differs by "
                    f"{gap:.2g} on random sequences. Nothing was published."
                )


def _gap(expected, found):
    """The largest difference, relative to the largest output where that exceeds 1."""
    if expected.shape != found.shape:
        return np.inf
    if expected.dtype.kind in "iub":
        return float(np.any(expected != found))
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    return float(np.abs(expected - found).max(initial=0.0) / scale)


@contextlib.contextmanager
def _explaining(format_name):
    """Says what failed; converters and runtimes raise errors of many types."""
    try:
        yield
    except (ExportMismatchError, OSError):
        raise
    except Exception as error:
        cause = str(error).strip().split("\n")[0]
        if "loc(" in cause:  # LiteRT's converter first says where, at length
            cause = cause.rpartition("): ")[2]
        raise ValueError(
            f"`model` has something that {format_name} has no operation for, or on "
            "which its converter fails. Nothing was published. Received: "
            f"{type(error).__name__}: {cause[:300]}"
        ) from error


def _publish(path, overwrite, write, check):
    """Has a file written beside its place and checked, then renames it."""
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}{path.suffix}")
    try:
        write(unfinished)
        _sync(unfinished)
        check(unfinished)
        _refuse_existing(path, overwrite)
        os.replace(unfinished, path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
