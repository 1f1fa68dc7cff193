"""`export_litert` writes a folded model as a file for LiteRT."""

import os

import keras
import tensorflow as tf

from keras_bnrnn.export.arguments import check_quantize
from keras_bnrnn.export.directory import publish_file
from keras_bnrnn.export.formats.arguments import (
    checked_path,
    checked_tolerance,
    require_extra,
    require_float32_graph,
)
from keras_bnrnn.export.formats.conversion import (
    NamedModel,
    explaining,
    prepared_copy,
    without_warnings_of_libraries,
)
from keras_bnrnn.export.formats.fused_lstm import run_fused
from keras_bnrnn.export.formats.verification import compare
from keras_bnrnn.export.interface import interface_of
from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import sublayers


@without_warnings_of_libraries()
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
    require_extra("export_litert", "litert", ["ai_edge_litert.interpreter"])
    require_float32_graph(model, "`export_litert`")
    path = checked_path(path, ".tflite", overwrite)
    check_quantize(quantize)
    tolerance = checked_tolerance(tolerance, 1e-4 if quantize is None else 1e-2)

    folded = fold(model)
    interface = interface_of(folded)
    batch_size = _checked_batch_size(batch_size, interface)
    copy = _with_fused_lstm if fused_lstm else prepared_copy
    exported = NamedModel(folded, interface, batch_size, copy)
    target = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    options = {"target_spec": target}
    if quantize == "float16":
        target["supported_types"] = [tf.float16]
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]

    def write(file):
        exported.export(file, format="litert", **options)
        _stop_clipping(file)
        answers = _answers(file)
        compare(model, interface, answers, tolerance, [batch_size] * 4)

    with explaining("LiteRT"):
        return publish_file(path, overwrite, write)


def _checked_batch_size(batch_size, interface):
    fixed = interface.batch_size
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


def _with_fused_lstm(layer):
    """Copies a layer for the converter, with LSTMs as one operation each."""
    clone = prepared_copy(layer)
    if isinstance(clone, keras.layers.Layer):
        for part in sublayers(clone):
            if type(part) is keras.layers.LSTM:
                run_fused(part)
    return clone


def _stop_clipping(file):
    """Removes the clipping of cell states at 10, which the converter adds."""
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


def _answers(file):
    """The function from named inputs to named outputs that a file holds."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(os.fspath(file)).get_signature_runner()
    return lambda inputs: run(**inputs)
