"""`export_saved_model`: a folded model as a version that TensorFlow Serving loads."""

import inspect
import os
import pathlib
import re
import shutil
import uuid
import warnings

import keras
import tensorflow as tf

from keras_bnrnn.folding import fold
from keras_bnrnn.traversal import (
    copy_of,
    numbered,
    require_built_graph,
    sublayers,
)

LENGTHS = "lengths"
DEFAULT_SIGNATURE = "serving_default"


def export_saved_model(model, directory, version=None, *, signatures=None):
    """Folds a model and writes it as `directory/<version>/`, a SavedModel.

    The signature `serving_default` takes the model's inputs by name and `lengths`, an
    int32 tensor (B,) with the number of valid frames of each row, clamped to 0..T.
    Frames past a row's length have no effect, whatever they hold, NaN included.
    It returns the model's outputs by name, floats as float32; an output with a frame
    for each input frame is zero past the lengths, in a model whose T is free. The
    batch size and T are as free as the model has them. The graph holds no Keras, no
    optimizer, no XLA and no cuDNN kernel, so that it loads anywhere.

    The version is written beside its place and renamed once it is whole: a server
    that polls `directory` never sees half of it.

    Inputs have the names of the `keras.Input`s, outputs those of the layers that they
    come from, numbered where a layer gives several; for a model of dicts, their keys.
    A single input that was given no name is called `inputs`. The lengths are those of
    every input with timesteps (whose T is free, if there are such): a request in
    which these differ in T fails.

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
        signatures: Dict of further signatures, from name to a function that takes
            `predict` and returns a `tf.Module` whose `__call__` is a `tf.function`
            with an `input_signature` and returns a dict of tensors. The module keeps
            its tables and assets. `predict(inputs, lengths)` takes a dict of tensors
            and returns one, as `serving_default` does.

    Returns:
        `pathlib.Path` of the version's directory.

    Raises:
        ValueError: If `model` is not built, subclassed or stateful, or has no
            input with timesteps; for a bad `version` or signature; if `directory` is
            not local.
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
    if "://" in os.fspath(directory):
        raise ValueError(
            "`directory` must be a path of this machine, where a folder can be renamed "
            f"at once: export, then copy. Received: directory={directory!r}"
        )
    directory = pathlib.Path(directory)
    if version is not None:
        _refuse_existing(directory, version)

    served = _ServedModel(fold(model))
    functions = {DEFAULT_SIGNATURE: served.signature()}
    root = tf.Module()  # what it holds is saved
    root.parts = {}
    for name, make in (signatures or {}).items():
        if name in functions or not str(name).isidentifier():
            raise ValueError(
                "A name in `signatures` must be an identifier other than "
                f"{DEFAULT_SIGNATURE!r}. Received: {name!r}"
            )
        root.parts[name] = make(served.predict)
        functions[name] = getattr(root.parts[name], "__call__", None)  # noqa: B004
        if not hasattr(functions[name], "get_concrete_function"):
            raise ValueError(
                "A function in `signatures` must return a `tf.Module` whose `__call__` "
                f"is a `tf.function`. Received: {name!r}, which returned "
                f"{root.parts[name]!r}"
            )
    concrete = {name: f.get_concrete_function() for name, f in functions.items()}
    root.weights = list(
        {id(v): v for f in concrete.values() for v in f.graph.variables}.values()
    )

    def write(path):
        tf.saved_model.save(root, os.fspath(path), signatures=concrete)

    return _write_version(directory, version, write)


class VersionExistsError(FileExistsError, ValueError):
    """A version to be exported is there already."""


class _ServedModel:
    """A folded model as a function of named tensors and lengths."""

    def __init__(self, folded):
        self._current = {}  # the lengths of the call that is being traced
        self._model = model = keras.models.clone_model(
            folded,
            clone_function=lambda layer: _with_lengths(layer, self._current),
            recursive=True,
        )
        model.set_weights(folded.get_weights())
        self._inputs = dict(zip(_input_names(model), model.inputs, strict=True))
        self._sequences = _sequence_inputs(self._inputs)
        self._output_names = _output_names(model)
        self._per_step = _per_step_outputs(model, self._inputs, self._sequences)

    def signature(self):
        """The `tf.function` behind `serving_default`."""
        batch_size = self._inputs[self._sequences[0]].shape[0]
        specs = [
            tf.TensorSpec(x.shape, x.dtype, name=name)
            for name, x in self._inputs.items()
        ]
        specs.append(tf.TensorSpec([batch_size], tf.int32, name=LENGTHS))
        return tf.function(self._serve, input_signature=specs)

    def _serve(self, *tensors):
        *inputs, lengths = tensors
        return self.predict(dict(zip(self._inputs, inputs, strict=True)), lengths)

    def predict(self, inputs, lengths):
        masks = dict.fromkeys(inputs)
        cleaned = dict(inputs)
        first = inputs[self._sequences[0]]
        for name in self._sequences:
            x = inputs[name]
            checks = [
                tf.debugging.assert_equal(
                    tf.shape(lengths)[0],
                    tf.shape(x)[0],
                    message=f"`{LENGTHS}` must have the batch size of `{name}`.",
                ),
                tf.debugging.assert_equal(
                    tf.shape(x)[1],
                    tf.shape(first)[1],
                    message=f"`{name}` must have as many timesteps as "
                    f"`{self._sequences[0]}`: `{LENGTHS}` are those of both.",
                ),
            ]
            # Checked before it is used: a batch of one would broadcast silently.
            with tf.control_dependencies(checks):
                # Beyond 0..T a sequence mask is that of the bound: clamped.
                mask = tf.sequence_mask(lengths, tf.shape(x)[1])
            masks[name] = mask
            cleaned[name] = tf.where(_expand(mask, x), x, tf.zeros([], x.dtype))

        self._current["lengths"] = lengths
        self._current["sequences"] = [
            tensor
            for name in self._sequences
            for tensor in (cleaned[name], masks[name])
        ]
        with warnings.catch_warnings():
            # Keras does not know that a model as a whole hands masks on.
            warnings.filterwarnings("ignore", f"Layer '{self._model.name}'.* mask")
            outputs = self._model(
                self._pack(cleaned), mask=self._pack(masks), training=False
            )
        self._current.clear()

        named = {}
        for name, y, per_step in zip(
            self._output_names,
            keras.tree.flatten(outputs),
            self._per_step,
            strict=True,
        ):
            if per_step:
                mask = tf.sequence_mask(lengths, tf.shape(y)[1])
                y = tf.where(_expand(mask, y), y, tf.zeros([], y.dtype))
            named[name] = tf.cast(y, tf.float32) if y.dtype.is_floating else y
        return named

    def _pack(self, named):
        flat = [named[name] for name in self._inputs]
        return keras.tree.pack_sequence_as(_structure(self._model, "input"), flat)


def _expand(mask, x):
    for _ in range(len(x.shape) - 2):
        mask = mask[..., None]
    return mask


def _with_lengths(layer, current):
    """A copy of a layer for the served graph."""
    clone = copy_of(layer)
    if not isinstance(clone, keras.layers.Layer):
        return clone
    for part in sublayers(clone):
        if hasattr(part, "use_cudnn"):
            # Traced where a GPU is visible, it would not load on a CPU server.
            part.use_cudnn = False
    if isinstance(clone, keras.layers.Embedding):
        _pass_mask_on(clone)
    _join_lengths(clone, current)
    return clone


def _pass_mask_on(embedding):
    """Lets the mask of the ids through, which `Embedding` drops."""
    own_mask = embedding.compute_mask

    def compute_mask(inputs, mask=None):
        own = own_mask(inputs, mask)
        if own is None or mask is None:
            return mask if own is None else own
        return keras.ops.logical_and(own, mask)

    embedding.compute_mask = compute_mask
    embedding.supports_masking = True


MASK_ARGUMENTS = {"mask", "query_mask", "value_mask", "key_mask"}


def _join_lengths(layer, current):
    """Whatever mask of a sequence reaches a layer, padding stays out.

    A Functional model computes the masks of `Masking` and `Embedding` from content, by
    the operations that it recorded as it was built: the lengths join them here.
    """
    call = layer.call
    signature = inspect.signature(call)
    names = MASK_ARGUMENTS.intersection(signature.parameters)
    if not names:
        return

    def join(mask):
        if mask is None or len(mask.shape) != 2:
            return mask
        if not _comes_from(mask, current["sequences"]):
            return mask  # of an input that the lengths are not about
        valid = tf.sequence_mask(current["lengths"], tf.shape(mask)[1])
        return tf.logical_and(tf.cast(mask, tf.bool), valid)

    def call_with_lengths(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if "lengths" in current:
            for name in names.intersection(bound.arguments):
                mask = bound.arguments[name]
                bound.arguments[name] = keras.tree.map_structure(join, mask)
        return call(*bound.args, **bound.kwargs)

    layer.call = call_with_lengths


def _comes_from(tensor, sources):
    """Whether a tensor of a graph is computed from one of others."""
    wanted = {id(source.op) for source in sources}
    seen, queue = set(), [tensor.op]
    while queue:
        operation = queue.pop()
        if id(operation) in wanted:
            return True
        if id(operation) not in seen:
            seen.add(id(operation))
            queue.extend(x.op for x in operation.inputs)
    return False


def _structure(model, end):
    """The tensors at one end of a model, as its user structured them.

    Args:
        end: `"input"` or `"output"`.
    """
    if isinstance(model, keras.Sequential):
        tensors = getattr(model, f"{end}s")
        return tensors[0] if len(tensors) == 1 else tensors
    return getattr(model, end)


def _keys(structure):
    """The keys of a flat dict, in the order in which `keras.tree` flattens it."""
    if isinstance(structure, dict):
        keys = keras.tree.flatten({key: key for key in structure})
        if len(keys) == len(keras.tree.flatten(structure)):
            return keys
    return None


def _input_names(model):
    names = _keys(_structure(model, "input"))
    if names is None:
        names = [x.name for x in model.inputs]
        for i, name in enumerate(names):
            if re.fullmatch(r"(input_layer|keras_tensor)(_\d+)?", name):
                names[i] = "inputs" if len(names) == 1 else f"inputs_{i}"
    if LENGTHS in names:
        raise ValueError(
            f"An input of the model must not be called {LENGTHS!r}: the signature has "
            f"that one of its own. Received: inputs {names}"
        )
    return names


def _output_names(model):
    structure = _structure(model, "output")
    if isinstance(model, keras.Sequential):
        names = [model.layers[-1].name] * len(keras.tree.flatten(model.outputs))
    else:
        names = _keys(structure) or model.output_names
    # One layer may give several outputs: states, or those of several calls.
    return numbered(names)


def _sequence_inputs(inputs):
    """Names of the inputs with timesteps, the axis after the batch.

    Those whose T is free, if there are any; else those of rank 3 and more, and ids.
    """
    free = [n for n, x in inputs.items() if len(x.shape) > 1 and x.shape[1] is None]
    if free:
        return free
    fixed = [
        name
        for name, x in inputs.items()
        if len(x.shape) > 2
        or (len(x.shape) == 2 and x.dtype.startswith(("int", "uint")))
    ]
    if not fixed:
        shapes = {name: x.shape for name, x in inputs.items()}
        raise ValueError(
            "`model` must have an input of shape (batch, timesteps, ...). "
            f"Received: inputs {shapes}"
        )
    return fixed


def _per_step_outputs(model, inputs, sequences):
    """For each output, whether its frames are those of the input, in order."""
    if _reverses_time(model):
        return [False] * len(model.outputs)

    if inputs[sequences[0]].shape[1] is not None:
        return [False] * len(model.outputs)  # a fixed T and any other size look alike

    def output_shapes(timesteps):
        probes = [
            keras.KerasTensor((1, timesteps, *x.shape[2:]), x.dtype)
            if name in sequences
            else keras.KerasTensor((1, *x.shape[1:]), x.dtype)
            for name, x in inputs.items()
        ]
        structure = _structure(model, "input")
        outputs = model(keras.tree.pack_sequence_as(structure, probes))
        return [tuple(y.shape) for y in keras.tree.flatten(outputs)]

    # Two numbers of timesteps tell a frame for each frame from any other size. Large
    # ones, for the convolutions and pooling that may come first.
    few, many = 4099, 8209
    return [
        len(a) > 1 and (a[1], b[1]) == (few, many)
        for a, b in zip(output_shapes(few), output_shapes(many), strict=True)
    ]


def _reverses_time(model):
    """Whether some layer hands sequences on in reverse, so that padding comes first."""
    parts = sublayers(model)
    turned_back = {
        id(inner)
        for layer in parts
        if isinstance(layer, keras.layers.Bidirectional)
        for inner in (layer.forward_layer, layer.backward_layer)
    }
    return any(
        isinstance(layer, keras.layers.RNN)
        and layer.go_backwards
        and layer.return_sequences
        and id(layer) not in turned_back
        for layer in parts
    )


def _refuse_stateful(model):
    for layer in sublayers(model):
        if getattr(layer, "stateful", False):
            raise ValueError(
                "A stateful layer would carry one request's state into the next: "
                "rebuild the model with `stateful=False` and set its weights. "
                f"Received: layer {layer.name!r} with stateful=True"
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
    # No server takes a name for a version that is not a number.
    unfinished = directory / f".unfinished-{uuid.uuid4().hex}"
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
