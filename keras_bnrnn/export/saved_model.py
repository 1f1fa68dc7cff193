"""`export_saved_model`: a folded model as a version that TensorFlow Serving loads."""

import json
import os
import pathlib
import re
import shutil
import socket
import uuid

import tensorflow as tf

from keras_bnrnn.export.checks import compare, example_requests
from keras_bnrnn.export.manifest import write_manifest
from keras_bnrnn.export.operations import require_stock_operations
from keras_bnrnn.export.served_model import ServedModel
from keras_bnrnn.export.signatures import (
    chunk_function,
    initial_state_function,
    serve_function,
    step_function,
    why_not_causal,
)
from keras_bnrnn.export.warmup import checked_requests, replay_warmup, write_warmup
from keras_bnrnn.export.xla import check_buckets, xla_function
from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import require_built_graph, sublayers

DEFAULT_SIGNATURE = "serving_default"
SERVE, XLA, STEP, CHUNK, INITIAL_STATE, TEXT, GENERATE = OWN_SIGNATURES = (
    "serve",
    "serve_xla",
    "step",
    "chunk",
    "initial_state",
    "text",
    "generate",
)


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

    Inputs have the names of the `keras.Input`s, outputs those of the layers that they
    come from, numbered where a layer gives several; for a model of dicts, their keys.
    A single input that was given no name is called `inputs`. The lengths are those of
    every input with timesteps (whose T is free, if there are such): a request with
    `lengths` in which these differ in T fails.

    A mask reaches a layer as it does in Keras, only that `Embedding` and `Masking`
    join theirs to that of the lengths. Past a layer which destroys masks
    (`Conv1D`, for one), padding counts as frames of what that layer makes of zeros.
    A layer of `go_backwards` and `return_sequences` outside `Bidirectional` hands
    sequences on with the padding in front, which Keras' masks know nothing of: then
    outputs are not zeroed, and layers above depend on how much padding there is.

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
    _refuse_stateful(model)
    _check_version(version)
    _check_options(lengths, streaming, quantize, provenance)
    xla_buckets = check_buckets(xla_buckets)
    _check_xla_warmup(xla_warmup, xla_buckets)
    if "://" in os.fspath(directory):
        raise ValueError(
            "`directory` must be a path of this machine, where a folder can be renamed "
            f"at once: export, then copy. Received: directory={directory!r}"
        )
    directory = pathlib.Path(directory)
    if version is not None:
        _refuse_existing(directory, version)

    folded, layers = fold(model, return_report=True)
    served = ServedModel(folded, lengths)
    functions, reason = _traced(served, streaming)
    halved = None
    if quantize == "float16":
        halved = served.halve_weights()
        functions = None  # which were traced with whole weights
    root, functions = _functions(
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
            # Nobody trains what is served: without the loops of the gradients.
            options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
        )
        require_stock_operations(path)
        if requests:
            write_warmup(path, requests)
        loaded = tf.saved_model.load(os.fspath(path))
        checks = compare(
            model, served, loaded.signatures[SERVE], 1e-4 if halved is None else 1e-2
        )
        checks["warmup_requests"] = (
            replay_warmup(path, loaded.signatures) if requests else 0
        )
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

    return _write_version(directory, version, write)


def _traced(served, streaming):
    """`serve` and `step`, traced; and why the latter is of no use, or `None`."""
    serve = serve_function(served)
    serve.get_concrete_function()
    if streaming is False:
        return {SERVE: serve}, "`streaming` is False"
    step = step_function(served)
    reason = why_not_causal(served, serve, step)
    if reason is not None and streaming is True:
        raise ValueError(
            "`streaming=True` needs a causal model, whose frames can come one by one: "
            f"{reason}. Received: model={served.model.name!r}"
        )
    return {SERVE: serve, STEP: step}, reason


def _functions(served, traced, causal, text_front_end, signatures, xla_buckets):
    """What to save: an object that holds all of it, and the signatures."""
    if traced is None:
        traced = {SERVE: serve_function(served), STEP: step_function(served)}
    functions = {SERVE: traced[SERVE]}
    if causal:
        functions[STEP] = traced[STEP]
        functions[CHUNK] = chunk_function(served)
        functions[INITIAL_STATE] = initial_state_function(served)
    if xla_buckets:
        functions[XLA] = xla_function(served, xla_buckets)
    root = tf.Module()  # what it holds is saved
    root.parts = {}
    if text_front_end is not None:
        from keras_bnrnn.export.text import text_signatures  # needs the extra `text`

        root.parts.update(text_signatures(served, text_front_end, causal))
    for name, make in (signatures or {}).items():
        taken = {*OWN_SIGNATURES, DEFAULT_SIGNATURE}
        if text_front_end is None:
            taken -= {TEXT, GENERATE}
        if name in taken or not str(name).isidentifier():
            raise ValueError(
                "A name in `signatures` must be an identifier other than "
                f"{sorted(taken)}. Received: {name!r}"
            )
        root.parts[name] = make(served.predict)
    for name, part in root.parts.items():
        functions[name] = getattr(part, "__call__", None)  # noqa: B004
        if not hasattr(functions[name], "get_concrete_function"):
            raise ValueError(
                "A function in `signatures` must return a `tf.Module` whose `__call__` "
                f"is a `tf.function`. Received: {name!r}, which returned {part!r}"
            )
    concrete = {name: f.get_concrete_function() for name, f in functions.items()}
    root.weights = list(
        {id(v): v for f in concrete.values() for v in f.graph.variables}.values()
    )
    return root, {DEFAULT_SIGNATURE: concrete[SERVE], **concrete}


class VersionExistsError(FileExistsError, ValueError):
    """A version to be exported is there already."""


def _refuse_stateful(model):
    for layer in sublayers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                "A stateful layer would carry one request's state into the next: "
                "rebuild the model with `stateful=False` and set its weights. The "
                "signatures `step` and `chunk` then take and give its states. "
                f"Received: layer {layer.name!r} with stateful=True"
            )


def _check_options(lengths, streaming, quantize, provenance):
    if lengths is not None and not isinstance(lengths, bool):
        raise ValueError(
            f"`lengths` must be True, False or None. Received: lengths={lengths!r}"
        )
    if streaming not in ("auto", True, False):
        raise ValueError(
            "`streaming` must be 'auto', True or False. "
            f"Received: streaming={streaming!r}"
        )
    if quantize not in (None, "float16"):
        raise ValueError(
            f"`quantize` must be None or 'float16'. Received: quantize={quantize!r}"
        )
    try:
        json.dumps(provenance)
        fits = provenance is None or isinstance(provenance, dict)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            "`provenance` must be a dict that JSON can carry, or None. "
            f"Received: provenance={provenance!r}"
        )


def _check_xla_warmup(xla_warmup, xla_buckets):
    if not isinstance(xla_warmup, bool):
        raise ValueError(
            f"`xla_warmup` must be True or False. Received: xla_warmup={xla_warmup!r}"
        )
    if xla_warmup and not xla_buckets:
        raise ValueError(
            "`xla_warmup=True` needs `xla_buckets`. Received: xla_warmup=True, "
            f"xla_buckets={xla_buckets or None}"
        )


def _check_version(version):
    if version is not None and (
        isinstance(version, bool) or not isinstance(version, int) or version < 0
    ):
        raise ValueError(
            "`version` must be a non-negative integer or None. "
            f"Received: version={version!r}"
        )


def _versions(directory):
    """The versions in a model's directory, as TensorFlow Serving reads names."""
    if not directory.is_dir():
        return []
    return [int(p.name) for p in directory.iterdir() if re.fullmatch(r"\d+", p.name)]


def _refuse_existing(directory, version):
    if version in _versions(directory):
        raise VersionExistsError(
            "`version` is there already and is never overwritten. "
            f"Received: version={version} with directory={os.fspath(directory)!r}"
        )


def _write_version(directory, version, write):
    """Has `write(path)` fill a folder of another name, which is then renamed."""
    directory.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(directory)
    unfinished = directory / unfinished_name(os.getpid())
    try:
        write(unfinished)
        _sync(unfinished)
        while True:
            chosen = version
            if chosen is None:
                chosen = max(_versions(directory), default=0) + 1
            _refuse_existing(directory, chosen)
            final = directory / str(chosen)
            try:
                unfinished.rename(final)
                break
            except OSError:
                # Another export took the number since it was looked for.
                if version is not None or not final.exists():
                    raise
        _sync_one(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def unfinished_name(pid):
    """A name that no server takes for a version, which tells whose it is."""
    return f".unfinished-{socket.gethostname()}-{pid}-{uuid.uuid4().hex}"


def _remove_unfinished(directory):
    """Removes what an export left that was killed, on this machine."""
    pattern = rf"\.unfinished-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{32}}"
    for path in directory.iterdir():
        if (match := re.fullmatch(pattern, path.name)) and not _runs(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(folder):
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_one(os.path.join(root, name))
        _sync_one(root)


def _sync_one(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
