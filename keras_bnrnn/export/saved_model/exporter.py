"""Exports a folded model as a SavedModel version for TensorFlow Serving."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import keras
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
    check_text_front_end,
    check_version,
    check_warmup,
    check_xla_warmup,
)
from keras_bnrnn.export.saved_model.functions import (
    SERVE,
    XLA,
    all_functions,
    check_signatures,
    traced_functions,
)
from keras_bnrnn.export.saved_model.requests import example_requests
from keras_bnrnn.export.saved_model.served_model import ServedModel
from keras_bnrnn.export.saved_model.verification import compare
from keras_bnrnn.export.saved_model.weights import halve_weights
from keras_bnrnn.export.saved_model.xla import check_buckets
from keras_bnrnn.export.text import TextFrontEnd
from keras_bnrnn.export.warmup import checked_requests, replay_warmup, write_warmup
from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import require_built_graph

# Requests for one signature.
Requests: TypeAlias = list[dict[str, Any]]


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike[str],
    version: int | None = None,
    *,
    lengths: bool | None = None,
    streaming: bool | Literal["auto"] = "auto",
    text_front_end: TextFrontEnd | Callable[..., Any] | None = None,
    signatures: dict[str, Callable[..., tf.Module]] | None = None,
    warmup: Requests | dict[str, Requests] | Literal["auto"] | None = "auto",
    quantize: Literal["float16"] | None = None,
    xla_buckets: list[tuple[int, int]] | None = None,
    xla_warmup: bool = False,
    provenance: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Folds a model and writes it as `directory/<version>/`, a SavedModel.

    | signature | inputs | outputs |
    |---|---|---|
    | `serving_default`, `serve` | model inputs, optionally `lengths` | model outputs |
    | `step` | one frame (B, ...), states, `t` | outputs, states, `t` + 1 |
    | `chunk` | inputs, `lengths`, states, `t` | outputs, states, `t`, `lengths` |
    | `initial_state` | the first sequence input, any (B, ...) | zero states, `t` = 0 |
    | `text` | `text`, strings (B,) | see `TextFrontEnd` |
    | `generate` | `prompt`, `max_tokens`, `temperature`, `seed` | `text` |
    | `serve_xla` | inputs, `lengths` | as `serve` |

    **Lengths.** `lengths` is an int32 tensor (B,) with the number of valid frames of
    each row, clamped to 0..T. The argument `lengths` decides whether `serve` takes this
    tensor; `chunk` and `serve_xla` always take it. Frames past a row's length have no
    effect, even if they are NaN: the answer is the model's answer to the row alone. A
    layer with `zero_output_for_mask=True` and `return_sequences=False` thus returns
    zeros if the model masks the last frame of a row by its value, but not because
    padding follows this frame. If T is free, an output with one frame per input frame
    is zero past the lengths. `lengths` applies to every input with timesteps (if T is
    free in some inputs, to those). A request fails if it has `lengths` and the T of
    these inputs differ.

    **Streaming.** The signatures `step`, `chunk` and `initial_state` exist if the model
    is causal, which means that it can process frames one at a time. States are float32
    tensors (B, U), named after their layer: `lstm_h` and `lstm_c` for an LSTM named
    `lstm`, only `_h` for a layer with one state. `t` is an int32 tensor (B,), the
    number of frames processed so far. A client sends the states and `t` of each
    response with its next request.

    **Names.** Inputs have the names of the `keras.Input`s. Outputs have the names of
    the layers that return them, numbered if a layer returns several. If the model takes
    or returns dicts, the names are the keys. A single input without a name is called
    `inputs`.

    **Graph.** The batch size and T are free if they are free in the model.
    Floating-point outputs are float32. The graph contains no Keras objects, no
    optimizer and no cuDNN kernel, and only `serve_xla` uses XLA, so that CPU servers
    without these can load it. TensorFlow Serving does not compare the shapes of a
    request with the signature, so the graph does. If an input has the wrong rank or
    size, or not the batch size of the first sequence, the request fails with
    `INVALID_ARGUMENT` and a message that names the input.

    **Masks.** Layers receive masks as in Keras. `Embedding` and `Masking` combine their
    masks with the mask of `lengths`. After a layer that drops masks, such as `Conv1D`,
    padding counts as frames: this layer computes outputs for zeros in the padding. A
    layer with `go_backwards` and `return_sequences` outside `Bidirectional` returns
    sequences with the padding first, which Keras' masks cannot describe. The outputs of
    a model with such a layer are not zeroed, and the layers above it depend on the
    amount of padding.

    **Checks.** Before the version is published, it is loaded again. TensorFlow Serving
    must have all its operations, its warm-up requests must run, and its outputs on
    random ragged sequences must equal those of `model`. The version is written under a
    temporary name and renamed when it is complete, so a server that polls `directory`
    never sees an incomplete version. The file `keras_bnrnn.json` in the version
    describes the version. `keras-bnrnn inspect <directory>` prints a summary.

    Args:
        model: A built Sequential or Functional model with an input of shape
            (B, T, ...). The model is not changed.
        directory: Path of the model, which holds its versions; created if it does not
            exist.
        version: Non-negative int. `None` (default): one above the highest version in
            `directory`, or 1 if there is none.
        lengths: Whether `serving_default` and `serve` take `lengths`. If not, every
            frame is valid except those that the model masks by value, so a server must
            not pad requests to batch them; sequences whose T is free may then differ in
            T. `None` (default): `True` if T is free, or if a layer creates a mask
            (`Masking`, or a layer with `mask_zero=True`). `True` is an error if several
            sequences have unequal fixed T.
        streaming: Whether to write `step`, `chunk` and `initial_state`. `"auto"`
            (default): if the model is causal. `True` is an error if the model is not
            causal.
        text_front_end: A `keras_bnrnn.export.TextFrontEnd`, or a tokenizer for a
            default `TextFrontEnd`. Adds the signature `text` and, for causal language
            models, `generate`. Default: `None`.
        signatures: Dict of further signatures, from name to a function that takes
            `predict` and returns a `tf.Module`. The `__call__` of this module must be a
            `tf.function` with an `input_signature` that returns a dict of tensors. The
            module holds the tables and assets of the function. `predict(inputs,
            lengths)` maps a dict of tensors to a dict of tensors, as `serving_default`
            does; with `lengths=None` every frame is valid. Default: `None`.
        warmup: Requests that TensorFlow Serving runs before the version becomes
            available, at most 1000: a list of dicts of arrays for `serving_default`, or
            a dict from signature name to such a list. `"auto"` (default): one small
            random request for each signature of this function except `serve_xla`.
            `None`: no requests.
        quantize: `"float16"`: store weights as float16, at half the size; the
            computation dtype does not change. A weight stays float32 if rounding it
            alone changes outputs by more than 1e-3 of the largest output. `None`
            (default): store all weights unchanged.
        xla_buckets: List of `(B, T)`. Adds `serve_xla`, which pads a request to the
            smallest of these sizes that holds it and runs a program that XLA compiled
            for this size. A request larger than all sizes runs as in `serve`.
            TensorFlow Serving disables XLA unless it is started with
            `--xla_cpu_compilation_enabled`; without XLA, `serve_xla` fails and the
            other signatures work. Default: `None`.
        xla_warmup: Whether to add a warm-up request for each of `xla_buckets`, so that
            the programs are compiled before the version becomes available. Default:
            `False`, because a server without XLA cannot load a version with such
            requests, and does not open its ports if this happens while it starts.
        provenance: Dict that JSON can represent, recorded in `keras_bnrnn.json`. It may
            describe the origin of the model, such as its data and commit. Default:
            `None`.

    Returns:
        `pathlib.Path` of the version's directory.

    Raises:
        ValueError: If `model` is not built, subclassed or stateful, or has no input
            with timesteps; if an argument is invalid; if `directory` is not local; if
            the model is not causal and `streaming` is True; if TensorFlow Serving lacks
            an operation.
        ExportMismatchError: If an output differs from the model's by more than 1e-4
            (with `quantize`, 1e-2), relative to the largest output if that output
            exceeds 1.
        VersionExistsError: If the version already exists. A version is never
            overwritten. This error is a `FileExistsError` and a `ValueError`.

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
        "The signatures `step` and `chunk` then take and return the states. ",
    )
    check_version(version)
    check_lengths(lengths)
    check_streaming(streaming)
    check_quantize(quantize)
    check_provenance(provenance)
    xla_buckets = check_buckets(xla_buckets)
    check_xla_warmup(xla_warmup, xla_buckets)
    check_text_front_end(text_front_end)
    check_signatures(signatures, text_front_end)
    check_warmup(warmup)
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
        functions = None  # the traced functions read the float32 weights
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
            # The graph needs no gradients, since a served model is not trained.
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
