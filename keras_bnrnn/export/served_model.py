"""A folded model as functions of named tensors: whole sequences, and pieces of them."""

import contextlib
import dataclasses
import inspect
import re
import typing
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.loops import has_served_loop, joins_kernels, served_loop
from keras_bnrnn.export.shapes import require_shapes
from keras_bnrnn.traversal import clone_graph, copy_of, numbered, sublayers

LENGTHS = "lengths"
TIME = "t"
TIMESTEPS = "T"


class State(typing.NamedTuple):
    """A state that a recurrent layer carries from frame to frame.

    Attributes:
        name: Its name in signatures, such as `"lstm_h"`.
        shape: Its shape without the batch, such as `(128,)`.
    """

    name: str
    shape: tuple


@dataclasses.dataclass
class _Call:
    """The call of the model that is being traced.

    Attributes:
        lengths: Tensor (B,), or `None` where every frame is valid.
        sequences: Tensors that a mask of the lengths' sequences is computed from.
        masks: The masks that are those of the lengths and nothing else.
        before: The states to start from, a list for each recurrent layer in the order
            in which they run; `None` for the layers' own start.
        after: The states that the layers ended in.
        compiled: Whether XLA compiles the call.
        in_frames: Whether a layer runs that `TimeDistributed` applies to each frame:
            its states do not last from frame to frame.
    """

    lengths: typing.Any = None
    sequences: list = dataclasses.field(default_factory=list)
    masks: list = dataclasses.field(default_factory=list)
    before: list | None = None
    after: list = dataclasses.field(default_factory=list)
    compiled: bool = False
    in_frames: bool = False


class ServedModel:
    """A folded model as functions of named tensors and lengths.

    Attributes:
        inputs: Dict from name to `KerasTensor`.
        sequences: The names of those with timesteps.
        takes_lengths: Whether whole sequences come with `lengths`.
        outputs: The names of the outputs.
        per_step: For each output, whether it has a frame for each input frame.
        reverses_time: The name of a layer that hands sequences on in reverse, so that
            padding comes first; `None` if there is none.
        model: The copy of the folded model that runs.

    Args:
        folded: A folded model.
        lengths: Bool, whether whole sequences come with `lengths`. `None` (default):
            if T is free, or if a layer creates a mask.

    Raises:
        ValueError: If `lengths` is True for sequences of unequal fixed T.
    """

    def __init__(self, folded, lengths=None):
        self._now = None  # the `_Call` that is being traced
        self._recurrent = []  # the recurrent layers, in the order in which they run
        self._joined = {}  # id of an LSTM layer -> both its kernels
        self._halves = {}  # id of a weight -> the weight, and the same in float16
        self.model = model = clone_graph(folded, clone_function=self._served)
        for layer in sublayers(model):
            if joins_kernels(layer) and layer.built:
                self._joined[id(layer)] = tf.Variable(
                    self._both_kernels(layer), trainable=False, name=layer.name
                )
        self.set_weights(folded.get_weights())
        self.inputs = dict(zip(_input_names(model), model.inputs, strict=True))
        self.sequences = _sequence_inputs(self.inputs)
        self.takes_lengths = self._takes_lengths(lengths)
        self.outputs = _output_names(model)
        self.reverses_time = _reverses_time(model)
        self.per_step = _per_step_outputs(model, self.inputs, self.sequences)

    def _takes_lengths(self, lengths):
        timesteps = {name: self.inputs[name].shape[1] for name in self.sequences}
        one_for_all = len(set(timesteps.values())) == 1
        if lengths is None:
            free = None in timesteps.values()
            return free or (one_for_all and _makes_masks(self.model))
        if lengths and not one_for_all:
            raise ValueError(
                "`lengths=True` needs sequences of one T, since all of them share "
                f"`lengths`. Received: lengths=True with the T {timesteps}"
            )
        return lengths

    def set_weights(self, weights):
        """Sets the weights of the model, arrays in the order of `model.weights`."""
        self.model.set_weights(weights)
        for layer in sublayers(self.model):
            if id(layer) in self._joined:
                self._joined[id(layer)].assign(self._both_kernels(layer))

    def halve_weights(self, tolerance=1e-3):
        """Stores weights as float16, but for those that this would do harm to.

        Functions that were traced before do not know of it.

        Args:
            tolerance: How far the rounding of a weight may move outputs on random
                sequences, relative to the largest output.

        Returns:
            Dict of the names of the weights in `"float16"` and in `"float32"`.
        """
        weights = self.model.get_weights()
        candidates = [
            i
            for i, v in enumerate(self.model.weights)
            if len(v.shape) > 1
            and keras.backend.standardize_dtype(v.dtype) == "float32"
        ]
        inputs = self.example_inputs(2, 8, np.random.default_rng(2))
        predict = tf.function(self.predict, autograph=False)

        def outputs(weights):
            self.set_weights(weights)
            answers = predict(inputs, None)
            return [y.numpy() for y in answers.values() if y.dtype.is_floating]

        expected = outputs(weights)
        rounded = list(weights)
        for i in candidates:
            with np.errstate(over="ignore"):
                half = weights[i].astype("float16").astype("float32")
            found = outputs([*weights[:i], half, *weights[i + 1 :]])
            gaps = [
                np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-9)
                for a, b in zip(expected, found, strict=True)
            ]
            if np.max(gaps, initial=0.0) <= tolerance:
                rounded[i] = half
        self.set_weights(rounded)
        halved = [i for i in candidates if rounded[i] is not weights[i]]
        for i in halved:
            variable = self.model.weights[i]
            half = tf.Variable(rounded[i].astype("float16"), name=variable.name)
            self._halves[id(variable)] = (variable, half)
        for layer in sublayers(self.model):
            if id(layer) in self._joined:
                kernels = [layer.cell.kernel, layer.cell.recurrent_kernel]
                if all(id(kernel) in self._halves for kernel in kernels):
                    both = self._both_kernels(layer).astype("float16")
                    self._joined[id(layer)] = tf.Variable(both, name=layer.name)
                    for kernel in kernels:
                        del self._halves[id(kernel)]
        names = [v.path for v in self.model.weights]
        return {
            "float16": [names[i] for i in halved],
            "float32": [n for i, n in enumerate(names) if i not in halved],
        }

    def _both_kernels(self, layer):
        cell = layer.cell
        kernels = [cell.kernel, cell.recurrent_kernel]
        return np.concatenate([keras.ops.convert_to_numpy(k) for k in kernels])

    @property
    def batch_size(self):
        return self.inputs[self.sequences[0]].shape[0]

    def specs(self, one_frame=False):
        """`tf.TensorSpec` of each input, by name.

        Args:
            one_frame: Whether sequences come a frame at a time, without their T.
        """
        return {
            name: tf.TensorSpec(
                [x.shape[0], *x.shape[2:]]
                if one_frame and name in self.sequences
                else x.shape,
                x.dtype,
                name=name,
            )
            for name, x in self.inputs.items()
        }

    def shapes(self, one_frame=False, lengths=True):
        """The shape that each input must have, by name, for `require_shapes`.

        Free sizes are `"B"`, `"T"` for the timesteps of the sequences that share
        them, and a name of their own for all others. The first sequence comes first:
        it defines B and T.

        Args:
            one_frame: Whether sequences come a frame at a time, without their T.
            lengths: Whether all sequences share their lengths, and so their T.
        """
        first = self.sequences[0]
        shapes = {}
        for name in [first, *(name for name in self.inputs if name != first)]:
            sizes = list(self.inputs[name].shape)
            names = ["B", *(f"{name}_{axis}" for axis in range(1, len(sizes)))]
            if name == first or (lengths and name in self.sequences):
                names[1] = TIMESTEPS
            sizes = [n if x is None else x for n, x in zip(names, sizes, strict=True)]
            if one_frame and name in self.sequences:
                del sizes[1]
            shapes[name] = sizes
        return shapes

    @property
    def rows(self):
        """The first size of lengths and states, for `require_shapes`."""
        return "B" if self.batch_size is None else self.batch_size

    def example_inputs(self, rows, timesteps, rng):
        """Random inputs that a model takes, as a dict of tensors.

        Integers are below the `input_dim` of every `Embedding`, and below 2 if there is
        none.
        """
        sizes = [
            layer.input_dim
            for layer in sublayers(self.model)
            if isinstance(layer, keras.layers.Embedding)
        ]
        examples = {}
        for name, x in self.inputs.items():
            shape = [rows, *(1 if size is None else size for size in x.shape[1:])]
            if name in self.sequences and x.shape[1] is None:
                shape[1] = timesteps
            dtype = tf.as_dtype(x.dtype)
            if dtype.is_floating:
                value = rng.normal(size=shape)
            elif dtype == tf.string:
                value = np.full(shape, "a")
            elif dtype == tf.bool:
                value = rng.integers(0, 2, shape) == 1
            else:
                value = rng.integers(0, min(sizes, default=2), shape)
            examples[name] = tf.constant(value, dtype)
        return examples

    @property
    def state_specs(self):
        """List of `State`; known once `predict` or `advance` was traced."""
        names, shapes = [], []
        for layer, shape_of in self._recurrent:
            suffixes = _state_names(layer, len(shape_of))
            names += [f"{layer.name}_{suffix}" for suffix in suffixes]
            shapes += shape_of
        taken = [*self.inputs, LENGTHS, TIME, *self.outputs]
        names = numbered([*taken, *names])[len(taken) :]
        return [State(*pair) for pair in zip(names, shapes, strict=True)]

    def states(self, batch_size):
        """Dict of the states that a sequence starts from, float32."""
        return {
            state.name: tf.zeros([batch_size, *state.shape])
            for state in self.state_specs
        }

    @tf.autograph.experimental.do_not_convert
    def predict(self, inputs, lengths, compiled=False):
        """The outputs for whole sequences.

        Args:
            inputs: Dict of tensors. Their shapes are checked as the graph runs.
            lengths: int32 tensor (B,), clamped to 0..T; `None` where every frame
                counts.
            compiled: Whether XLA compiles this. It compiles no check of shapes.

        Returns:
            Dict of tensors, floats as float32; per-step ones zero past the lengths.
        """
        if not compiled:
            inputs, shapes = dict(inputs), self.shapes(lengths=lengths is not None)
            if lengths is not None:
                inputs[LENGTHS], shapes[LENGTHS] = lengths, [self.rows]
            inputs = require_shapes(inputs, shapes)
            lengths = inputs.pop(LENGTHS, None)
        return self._named(
            self._run(inputs, _Call(lengths, compiled=compiled)), lengths
        )

    @tf.autograph.experimental.do_not_convert
    def advance(self, inputs, lengths, states):
        """The outputs for the next frames of sequences.

        Args:
            inputs: Dict of tensors.
            lengths: int32 tensor (B,), clamped to 0..T; `None` where all T are valid.
            states: Dict of tensors, what the recurrent layers start from. Callers
                check the shapes of all three.

        Returns:
            Outputs as those of `predict`, and the dict of the states after the last
            valid frames.
        """
        flat = iter(states[state.name] for state in self.state_specs)
        before = [[next(flat) for _ in shapes] for _, shapes in self._recurrent]
        call = _Call(lengths, before=before)
        outputs = self._named(self._run(inputs, call), lengths)
        after = [tf.cast(x, tf.float32) for states in call.after for x in states]
        names = [state.name for state in self.state_specs]
        return outputs, dict(zip(names, after, strict=True))

    def _run(self, inputs, call):
        """The flat outputs of the model."""
        masks = dict.fromkeys(inputs)
        cleaned = dict(inputs)
        if call.lengths is not None:
            for name in self.sequences:
                x = inputs[name]
                # Beyond 0..T a sequence mask is that of the bound: clamped.
                masks[name] = mask = tf.sequence_mask(call.lengths, tf.shape(x)[1])
                cleaned[name] = tf.where(_expand(mask, x), x, _zero(x))
                call.sequences += [cleaned[name], mask]
                call.masks.append(mask)
        weights = [
            (variable, tf.cast(half, variable.dtype))
            for variable, half in self._halves.values()
        ]
        with (
            self._tracing(call),
            keras.StatelessScope(weights) if weights else contextlib.nullcontext(),
            warnings.catch_warnings(),
        ):
            # Keras does not know that a model as a whole hands masks on.
            warnings.filterwarnings("ignore", f"Layer '{self.model.name}'.* mask")
            outputs = self.model(
                self.packed(cleaned), mask=self.packed(masks), training=False
            )
        return keras.tree.flatten(outputs)

    @contextlib.contextmanager
    def _tracing(self, call):
        self._now, recurrent = call, self._recurrent
        self._recurrent = []
        try:
            yield
        finally:
            self._now = None
            if recurrent:
                self._recurrent = recurrent  # the same layers in the same order

    def _named(self, outputs, lengths):
        named = {}
        for name, y, per_step in zip(self.outputs, outputs, self.per_step, strict=True):
            if per_step and lengths is not None:
                mask = tf.sequence_mask(lengths, tf.shape(y)[1])
                y = tf.where(_expand(mask, y), y, _zero(y))
            named[name] = tf.cast(y, tf.float32) if y.dtype.is_floating else y
        return named

    def packed(self, named):
        """A dict of inputs, structured as the model takes them."""
        flat = [named[name] for name in self.inputs]
        return keras.tree.pack_sequence_as(structure_of(self.model, "input"), flat)

    def _served(self, layer):
        """A copy of a layer for the served graph."""
        clone = copy_of(layer)
        if not isinstance(clone, keras.layers.Layer):
            return clone
        for part in sublayers(clone):
            if hasattr(part, "use_cudnn"):
                # Traced where a GPU is visible, it would not load on a CPU server.
                part.use_cudnn = False
            if isinstance(part, keras.layers.RNN):
                self._run_served_loop(part)
            elif type(part) is keras.layers.TimeDistributed:
                self._run_frames_at_once(part)
        if isinstance(clone, keras.layers.Embedding):
            _pass_mask_on(clone)
            self._look_up_halves(clone)
        self._join_lengths(clone)
        return clone

    def _run_frames_at_once(self, time_distributed):
        """Has the layer inside see all frames as one batch, as it may.

        Keras 3.15 takes the batch size for the number of frames where T is free.
        """

        def call(inputs, training=None, mask=None):
            shape = tf.shape(inputs)
            frames = tf.reshape(inputs, tf.concat([[-1], shape[2:]], 0))
            frames.set_shape([None, *inputs.shape[2:]])
            now = self._now
            if now is not None:
                outer, now.in_frames = now.in_frames, True
            y = time_distributed.layer(frames, training=False)
            if now is not None:
                now.in_frames = outer
            outputs = tf.reshape(y, tf.concat([shape[:2], tf.shape(y)[1:]], 0))
            outputs.set_shape([*inputs.shape[:2], *y.shape[1:]])
            return outputs

        time_distributed.call = call

    def _look_up_halves(self, embedding):
        """Converts what is looked up in a table of float16, not the whole table."""
        call = embedding.call

        def call_with_halves(inputs):
            if id(embedding._embeddings) not in self._halves:
                return call(inputs)
            _, half = self._halves[id(embedding._embeddings)]
            rows = tf.gather(half, tf.cast(inputs, tf.int32))
            return tf.cast(rows, embedding.compute_dtype)

        embedding.call = call_with_halves

    def _run_served_loop(self, layer):
        """Has a recurrent layer run the loop for serving, from states of the call."""
        own_loop = layer.inner_loop

        def inner_loop(sequences, initial_state, mask, training=False):
            call = self._now
            if call is None:  # Keras asks for shapes
                return own_loop(sequences, initial_state, mask, training)
            lasts = not call.in_frames
            continues = lasts and call.before is not None
            if continues:
                given = call.before[len(call.after)]
                flat = keras.tree.flatten(initial_state)
                flat = [tf.cast(x, y.dtype) for x, y in zip(given, flat, strict=True)]
                initial_state = keras.tree.pack_sequence_as(initial_state, flat)
            if has_served_loop(layer):
                mask = None if mask is None else keras.tree.flatten(mask)[0]
                of_lengths = any(mask is own for own in call.masks)
                results = served_loop(
                    layer,
                    sequences,
                    initial_state,
                    mask,
                    lengths=call.lengths if of_lengths else None,
                    continues=continues,
                    joined=self._joined.get(id(layer)),
                    compiled=call.compiled,
                    wants_states=continues or layer.return_state,
                )
            else:
                results = own_loop(sequences, initial_state, mask, training)
            if lasts:
                states = keras.tree.flatten(results[2])
                self._recurrent.append((layer, [tuple(x.shape[1:]) for x in states]))
                call.after.append(states)
            return results

        layer.inner_loop = inner_loop

    def _join_lengths(self, layer):
        """Whatever mask of a sequence reaches a layer, padding stays out.

        A Functional model computes the masks of `Masking` and `Embedding` from
        content, by the operations that it recorded as it was built: the lengths join
        them here.
        """
        call = layer.call
        signature = inspect.signature(call)
        names = MASK_ARGUMENTS.intersection(signature.parameters)
        if not names:
            return

        def join(mask):
            now = self._now
            if mask is None or len(mask.shape) != 2:
                return mask
            if any(mask is own for own in now.masks):
                return mask
            if not _comes_from(mask, now.sequences):
                return mask  # of an input that the lengths are not about
            valid = tf.sequence_mask(now.lengths, tf.shape(mask)[1])
            return tf.logical_and(tf.cast(mask, tf.bool), valid)

        def call_with_lengths(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            if self._now is not None and self._now.lengths is not None:
                for name in names.intersection(bound.arguments):
                    mask = bound.arguments[name]
                    bound.arguments[name] = keras.tree.map_structure(join, mask)
            return call(*bound.args, **bound.kwargs)

        layer.call = call_with_lengths


MASK_ARGUMENTS = {"mask", "query_mask", "value_mask", "key_mask"}


def _makes_masks(model):
    return any(
        isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)
        for layer in sublayers(model)
    )


def _zero(x):
    return tf.zeros([], x.dtype)


def _expand(mask, x):
    for _ in range(len(x.shape) - 2):
        mask = mask[..., None]
    return mask


def _state_names(layer, count):
    if count == 1:
        return ["h"]
    if isinstance(getattr(layer, "cell", None), keras.layers.LSTMCell) or (
        count == 2 and hasattr(layer.cell, "peephole")
    ):
        return ["h", "c"]
    return [f"state_{i}" for i in range(count)]


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


def operations_of(model):
    """The layers and operations of a model."""
    return model.layers if isinstance(model, keras.Sequential) else model.operations


def structure_of(model, end):
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
    names = _keys(structure_of(model, "input"))
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
    structure = structure_of(model, "output")
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
    if _reverses_time(model) is not None:
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
        structure = structure_of(model, "input")
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
    parts = sublayers(model)
    turned_back = {
        id(inner)
        for layer in parts
        if isinstance(layer, keras.layers.Bidirectional)
        for inner in (layer.forward_layer, layer.backward_layer)
    }
    for layer in parts:
        if (
            isinstance(layer, keras.layers.RNN)
            and layer.go_backwards
            and layer.return_sequences
            and id(layer) not in turned_back
        ):
            return layer.name
    return None
