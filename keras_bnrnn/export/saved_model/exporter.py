"""`export_saved_model` writes a folded model as a version for TensorFlow Serving."""

import os
import pathlib

import tensorflow as tf

from keras_bnrnn.export.arguments import check_quantize, refuse_stateful
from keras_bnrnn.export.directory import publish_version, refuse_existing_version
from keras_bnrnn.export.manifest import write_manifest
from keras_bnrnn.export.operations import require_stock_operations
from keras_bnrnn.export.saved_model.arguments import (
    check_directory,
    check_lengths,
    check_provenance,
    check_streaming,
    check_version,
    check_xla_warmup,
)
from keras_bnrnn.export.saved_model.functions import (
    SERVE,
    XLA,
    all_functions,
    traced_functions,
)
from keras_bnrnn.export.saved_model.requests import example_requests
from keras_bnrnn.export.saved_model.served_model import ServedModel
from keras_bnrnn.export.saved_model.verification import compare
from keras_bnrnn.export.saved_model.weights import halve_weights
from keras_bnrnn.export.saved_model.xla import check_buckets
from keras_bnrnn.export.warmup import checked_requests, replay_warmup, write_warmup
from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import require_built_graph


def export_saved_model(
    model,
    directory,
    version=None,
    *,
    lengths=None,
    streaming="auto",
    text_front_end=None,
    signatures=None,
    warmup="auto",
    quantize=None,
    xla_buckets=None,
    xla_warmup=False,
    provenance=None,
):
    """Folds a model and writes it as `directory/<version>/`, a SavedModel.

    | signature | inputs | outputs |
    |---|---|---|
    | `serving_default`, `serve` | the model's inputs, maybe `lengths` | its outputs |
    | `step` | one frame (B, ...), states, `t` | outputs, states, `t` + 1 |
    | `chunk` | inputs, `lengths`, states, `t` | outputs, states, `t`, `lengths` |
    | `initial_state` | the first input, any (B, ...) | states of zeros, `t` = 0 |
    | `text` | `text`, strings (B,) | see `TextFrontEnd` |
    | `generate` | `prompt`, `max_tokens`, `temperature`, `seed` | `text` |
    | `serve_xla` | inputs, `lengths` | as `serve` |

    `lengths` is an int32 tensor (B,) with the number of valid frames of each row,
    clamped to 0..T. `serve` takes it or not, as the argument `lengths` says; `chunk`
    and `serve_xla` always do. Frames past a row's length have no effect, whatever they
    hold, NaN included. Floats leave as float32; an output with a frame for each input
    frame is zero past the lengths, in a model whose T is free. The batch size and T are
    as free as the model has them. But for `serve_xla` the graph holds no XLA, no
    cuDNN kernel, no Keras and no optimizer, so that it loads anywhere.

    `step`, `chunk` and `initial_state` are there if the model is causal: if its frames
    can come one by one. States are float32 tensors (B, U), named by layer: `lstm_h`
    and `lstm_c` for an LSTM named `lstm`, `_h` alone for the others. A client passes
    them on from answer to request, with `t`, an int32 tensor (B,), the number of frames
    that came so far.

    TensorFlow Serving does not compare a request with a signature's shapes, so the
    graph does: an input of another rank or size, or of another batch size than the
    first sequence, fails with `INVALID_ARGUMENT` and a text that names it.

    Before the version is published, it is loaded again: its operations must be those
    that TensorFlow Serving has, its warm-up requests are answered, and on random
    ragged sequences its answers must be those of `model`. The version is written beside
    its place and renamed once it is whole: a server that polls `directory` never sees
    half of it. `keras_bnrnn.json` in it records what it is; `keras-bnrnn inspect
    <directory>` prints that.

    Inputs have the names of the `keras.Input`s, outputs those of the layers that make
    them, numbered if a layer makes several; if the model takes or returns dicts, the
    names are the keys. A single input without a name is called `inputs`. The lengths
    are those of every input with timesteps (of those whose T is free, if there are
    such): a request with `lengths` in which these differ in T fails.

    A mask reaches a layer as it does in Keras; `Embedding` and `Masking` combine their
    masks with the mask of the lengths. Past a layer that destroys masks, such as
    `Conv1D`, padding counts as frames: the outputs of that layer for zeros. A layer
    with `go_backwards` and `return_sequences` outside `Bidirectional` returns
    sequences with the padding first, which Keras' masks do not describe. The outputs of
    such a model are not zeroed, and layers above depend on the amount of padding.

    Args:
        model: A built Sequential or Functional model with an input of shape
            (B, T, ...). It is not changed.
        directory: Path of the model, which holds its versions; made if need be.
        version: Non-negative int. `None` (default): one above the highest there,
            from 1.
        lengths: Whether `serving_default` and `serve` take `lengths`. Without, every
            frame counts, but for those that the model itself masks by their value; so
            a server must not pad requests to batch them. Sequences whose T is free
            then need not have the same T. `None` (default): `True` if T is free, or if
            a layer creates a mask: `Masking`, or one with `mask_zero=True`. `True` is
            an error for several sequences of unequal fixed T.
        streaming: Whether to write `step`, `chunk` and `initial_state`. `"auto"`
            (default): if the model is causal. `True`: an error if it is not.
        text_front_end: A `keras_bnrnn.export.TextFrontEnd`, or a tokenizer to make one
            of, for the signatures `text` and, for causal language models, `generate`.
        signatures: Dict of further signatures, from name to a function that takes
            `predict` and returns a `tf.Module` whose `__call__` is a `tf.function`
            with an `input_signature` and returns a dict of tensors. The module keeps
            its tables and assets. `predict(inputs, lengths)` takes a dict of tensors
            and returns one, as `serving_default` does; with `lengths=None` every frame
            counts.
        warmup: Requests that TensorFlow Serving runs before the version is available,
            at most 1000: a list of dicts of arrays for `serving_default`, or a dict
            of such lists by signature. `"auto"` (default): small random ones for each
            signature, except `serve_xla`. `None`: none.
        quantize: `"float16"`: weights are stored as float16, half the size, and
            computed with as before; a weight whose rounding alone moves outputs by
            more than 1e-3 of the largest stays as it is. `None` (default): none are.
        xla_buckets: List of `(B, T)`: adds `serve_xla`, which pads a request to the
            smallest of these sizes that holds it and runs a program that XLA compiled
            for that size; a larger request runs as in `serve`. TensorFlow Serving has
            XLA disabled unless it is started with `--xla_cpu_compilation_enabled`;
            without it, `serve_xla` fails and the other signatures answer. Default:
            `None`.
        xla_warmup: Whether to add a request for each of `xla_buckets` to those of
            `warmup`, so that the programs are compiled before the version is
            available. Default `False`: a server without XLA refuses a version with
            such requests, and if it is starting, opens no port.
        provenance: Dict that JSON can carry, recorded in `keras_bnrnn.json`: data,
            commit, whatever tells how the model came to be. Default: `None`.

    Returns:
        `pathlib.Path` of the version's directory.

    Raises:
        ValueError: If `model` is not built, subclassed or stateful, or has no
            input with timesteps; for a bad argument; if `directory` is not local; if
            the model is not causal and `streaming` is True; if an operation is none
            of TensorFlow Serving's.
        ExportMismatchError: If an answer differs from the model's by more than 1e-4
            of the largest output, or of 1 where that is less (with `quantize`, 1e-2).
        VersionExistsError: If the version is there already; it is left as it is. A
            `FileExistsError` and a `ValueError`.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((None, 8), name="x"), BNLSTM(4, name="state")]
    ... )
    >>> path = export_saved_model(model, f"{tmp}/digits")
    >>> path.name
    '1'
    >>> serve = tf.saved_model.load(path).signatures["serving_default"]
    >>> list(serve(x=tf.ones((2, 5, 8)), lengths=tf.constant([5, 3])))
    ['state']
    """
    require_built_graph(model, "`export_saved_model`")
    refuse_stateful(
        model,
        "The signatures `step` and `chunk` then take and return its states. ",
    )
    check_version(version)
    check_lengths(lengths)
    check_streaming(streaming)
    check_quantize(quantize)
    check_provenance(provenance)
    xla_buckets = check_buckets(xla_buckets)
    check_xla_warmup(xla_warmup, xla_buckets)
    check_directory(directory)
    directory = pathlib.Path(directory)
    if version is not None:
        refuse_existing_version(directory, version)

    folded, layers = fold(model, return_report=True)
    served = ServedModel(folded, lengths)
    functions, reason = traced_functions(served, streaming)
    halved = None
    if quantize == "float16":
        halved = halve_weights(served)
        functions = None  # they read the float32 weights
    root, functions = all_functions(
        served, functions, reason is None, text_front_end, signatures, xla_buckets
    )
    examples = example_requests(served, functions, xla_buckets)
    of_xla = [request for request in examples if request[0] == XLA]
    if warmup == "auto":
        requests = [request for request in examples if request[0] != XLA]
    else:
        requests = checked_requests(warmup or [], functions)
    if xla_warmup:
        requests += of_xla

    def write(path):
        tf.saved_model.save(
            root,
            os.fspath(path),
            signatures=functions,
            # A served model is not trained, so the graph needs no gradients.
            options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
        )
        require_stock_operations(path)
        if requests:
            write_warmup(path, requests)
        loaded = tf.saved_model.load(os.fspath(path))
        checks = compare(
            model, served, loaded.signatures[SERVE], 1e-4 if halved is None else 1e-2
        )
        checks["warmup_requests"] = replay_warmup(path, loaded.signatures)
        if not xla_warmup:
            for name, inputs in of_xla:
                loaded.signatures[name](
                    **{k: tf.constant(x) for k, x in inputs.items()}
                )
        write_manifest(
            path,
            model=model,
            tokenizer=getattr(text_front_end, "tokenizer", text_front_end),
            layers=layers,
            lengths=served.takes_lengths,
            streaming={"causal": reason is None, "because": reason},
            quantize=halved,
            xla_buckets=xla_buckets,
            checks=checks,
            provenance=provenance,
        )

    return publish_version(directory, version, write)
