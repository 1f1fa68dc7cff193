"""Defines `recalibrate`, which computes exact population statistics of a data set."""

import contextlib
import itertools
import typing
import warnings

import keras
import numpy as np
from keras import ops

from keras_bnrnn import backend
from keras_bnrnn import statistics as stats
from keras_bnrnn.checks import check_positive_integer, check_verbose
from keras_bnrnn.sequence_batch_norm import warn_of_nonfinite_batches
from keras_bnrnn.targets import (
    find_targets,
    inputs_of,
    is_array,
    listening,
    state_variables,
    unchanged_states,
)
from keras_bnrnn.traversal import numbered

# Statistics that depend on themselves are recomputed for at most this many passes,
# until a pass moves them by less than `SETTLED` standard deviations.
MAX_PASSES = 50
SETTLED = 1e-6

INFINITE_CARDINALITY = -1  # of a `tf.data.Dataset`


def recalibrate(
    model: keras.Model,
    data: typing.Any,
    steps: int | None = None,
    batch_size: int = 32,
    verbose: int = 1,
) -> dict[str, dict[str, float]]:
    """Sets every normalised layer to the exact population statistics of `data`.

    The moving averages of training lag behind the weights, and are averages over
    batches. This function computes mean and variance over all valid frames of the data,
    with `model(x, training=False)`, layer by layer from the bottom. The inputs of a
    layer are computed with the final statistics of the layers below. Sums are float64.
    The batch size does not change the result.

    The data is read once for each normalised layer, and once for both directions of a
    `Bidirectional`. Statistics depend on themselves with `normalize="joint"`, or if a
    layer is called twice. The data is then read until the statistics settle.

    Args:
        model: A built `keras.Model`. Only its population statistics change, also those
            of frozen layers. If an error occurs, nothing changes.
        data: Arrays as for `model.predict`, a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or another iterable of batches, each `x` or
            `(x, y, ...)`. For a model with one input, a list is a list of batches. The
            data must give the same frames each time it is read.
        steps: Number of batches to use. These batches are kept in memory. Default: all
            batches. Endless data sets and iterators require `steps`. Pass `steps` too
            if a data set of unknown size may be endless.
        batch_size: Int, for arrays. Default: 32.
        verbose: 1 (default) for a progress bar, 2 for a line, 0 for silence.

    Returns:
        A dict from layer name to `{"mean": ..., "variance": ...}`: the largest change
        of a component of the mean, in standard deviations, and the largest relative
        change of a component of the variance. Equal layer names are numbered.

    Raises:
        ValueError: If `model` is not built or has no normalised layer. If `data` has no
            batch, no valid frame, fewer than `steps` batches or a valid frame that is
            not finite, or if it is endless and `steps` is `None`.

    Example:

    >>> model = keras.Sequential([keras.Input((None, 8)), BNLSTM(4, name="lstm")])
    >>> x = np.random.default_rng(0).normal(size=(100, 10, 8))
    >>> list(recalibrate(model, x, verbose=0))
    ['lstm']
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built `keras.Model`. Received: model={model!r}"
        )
    check_verbose(verbose)
    targets = find_targets(model)
    if not targets:
        raise ValueError(
            "`model` has no batch-normalised layer to recalibrate. "
            f"Received: model={model.name!r}"
        )
    batches = _Batches(model, data, steps, batch_size)
    with unchanged_states(model):
        groups = _in_order_of_calls(model, targets, batches.first())
        # A layer that is never called may not be built, and then has no statistics.
        called = [target for target in targets if target.calls]
        warn_of_nonfinite_batches(target.norm for target in called)
        before = {id(target): target.statistics() for target in called}
        with _unchanged_on_error(called):
            for number, group in enumerate(groups, start=1):
                _recalibrate_group(
                    model, group, batches, f"{number}/{len(groups)}", verbose
                )
    names = numbered(target.name for target in targets)
    return {
        name: _moved(before[id(target)], target.statistics(), target.norm.epsilon)
        for name, target in zip(names, targets, strict=True)
        if target.calls
    }


def population_statistics(model, norms, data, steps, batch_size, verbose):
    """Computes mean and variance of the inputs of some layers, in one pass.

    The inputs are those of `model(x, training=False)`. The model is not changed.

    Args:
        norms: List of `SequenceBatchNorm`, in `model`.
        model, data, steps, batch_size, verbose: As for `recalibrate`.

    Returns:
        List of `(mean, variance)` of each layer in `norms`: float64 arrays (F,).

    Raises:
        ValueError: As for `recalibrate`.
    """
    check_verbose(verbose)
    batches = _Batches(model, data, steps, batch_size)
    batches.first()
    by_norm = {id(target.norm): target for target in find_targets(model)}
    targets = [by_norm[id(norm)] for norm in norms]
    if verbose:
        print(f"Calibrating {', '.join(target.name for target in targets)}")
    with unchanged_states(model):
        return _reader(model, targets, batches, verbose)()


class _Batches:
    """Reads the `x` of each batch of a data set, any number of times."""

    def __init__(self, model, data, steps, batch_size):
        check_reading(data, steps, batch_size)
        single = len(getattr(model, "inputs", None) or [None]) == 1
        if single and isinstance(data, tuple) and data and all(map(is_array, data)):
            raise ValueError(
                "`data` must not be a tuple of arrays, such as (x, y), for a model of "
                "one input: pass x alone, or a list of batches. "
                f"Received: data=a tuple of {len(data)} arrays"
            )
        self._model = model
        if _is_arrays(model, data):
            data = _cut(data, batch_size)
        self.count = None  # the number of batches, if known before they are read
        if isinstance(data, keras.utils.PyDataset):
            self.count = data.num_batches
            if steps is not None:
                self.count = min(steps, self.count or steps)
            self._read = lambda: (data[i] for i in range(self.count))
        else:
            self._read = lambda: iter(data)
            if hasattr(data, "cardinality"):
                cardinality = int(data.cardinality())
                self.count = cardinality if cardinality >= 0 else None
            elif hasattr(data, "__len__"):
                self.count = len(data)
        if steps is not None:
            used = list(itertools.islice(self._read(), steps))
            if len(used) < steps:
                raise ValueError(
                    "`data` must have at least `steps` batches. "
                    f"Received: steps={steps} with {len(used)} batches"
                )
            self.count = steps
            self._read = lambda: iter(used)

    def __iter__(self):
        count = 0
        for batch in self._read():
            yield inputs_of(self._model, batch)
            count += 1
        self.count = count

    def first(self):
        for x in self:
            _require_fit(self._model, x)
            return x
        raise ValueError("`data` must have at least one batch. Received: an empty one")


def check_reading(data, steps, batch_size):
    """Checks how `recalibrate` would read its data, without reading it.

    Args:
        data, steps, batch_size: As for `recalibrate`.
    """
    check_positive_integer("steps", steps, optional=True)
    check_positive_integer("batch_size", batch_size)
    is_data_set = isinstance(data, keras.utils.PyDataset) or hasattr(data, "__iter__")
    if not is_data_set or isinstance(data, (str, bytes)):
        raise ValueError(
            "`data` must be arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or "
            f"another iterable of batches. Received: data={data!r}"
        )
    if steps is None and (hasattr(data, "__next__") or _is_endless(data)):
        raise ValueError(
            "`steps` must say how many batches to use of an endless data set or "
            f"an iterator. Received: steps=None with data={data!r}"
        )


def _require_fit(model, x):
    """Raises an error if a batch does not have the shapes of the model's inputs.

    Args:
        model: A model. A subclassed one has no inputs to compare with.
        x: The first batch. Keras finds the inputs of a dict by their names.
    """
    inputs = getattr(model, "inputs", None)
    if not inputs or isinstance(x, dict):
        return
    tensors = keras.tree.flatten(x)

    def fits(tensor, spec):
        sizes, expected = list(tensor.shape), list(spec.shape)
        # Keras adds or removes a last axis of size 1.
        if len(sizes) == len(expected) + 1 and sizes[-1] == 1:
            del sizes[-1]
        if len(sizes) == len(expected) - 1 and expected[-1] == 1:
            sizes.append(1)
        is_text = keras.backend.standardize_dtype(tensor.dtype) == "string"
        return (
            is_text == (spec.dtype == "string")
            and len(sizes) == len(expected)
            and all(n is None or n == m for m, n in zip(sizes, expected, strict=True))
        )

    if len(tensors) != len(inputs) or not all(map(fits, tensors, inputs)):
        specs = [(tuple(spec.shape), spec.dtype) for spec in inputs]
        received = [
            (tuple(t.shape), keras.backend.standardize_dtype(t.dtype)) for t in tensors
        ]
        raise ValueError(
            "`data` must have batches of the shapes and dtypes of the inputs of the "
            f"model: {specs}. Received: a batch of {received}"
        )


def _is_endless(data):
    if hasattr(data, "cardinality"):  # a `tf.data.Dataset`
        return int(data.cardinality()) == INFINITE_CARDINALITY
    return isinstance(data, keras.utils.PyDataset) and data.num_batches is None


def _is_arrays(model, data):
    """Returns whether `data` is the input of the model, not an iterable of batches."""
    if isinstance(data, dict):
        return True
    if isinstance(data, (list, tuple)):
        inputs = getattr(model, "inputs", None) or [None]
        return len(inputs) == len(data) > 1 and all(map(is_array, data))
    return is_array(data)


def _cut(arrays, batch_size):
    rows = {len(a) for a in keras.tree.flatten(arrays)}
    if len(rows) != 1:
        raise ValueError(
            "The arrays of `data` must have the same number of rows. "
            f"Received: {sorted(rows)} rows"
        )
    return [
        (keras.tree.map_structure(lambda a, i=i: a[i : i + batch_size], arrays),)
        for i in range(0, rows.pop(), batch_size)
    ]


@contextlib.contextmanager
def _unchanged_on_error(targets):
    before = [target.statistics() for target in targets]
    try:
        yield
    except BaseException:
        for target, (mean, variance, count) in zip(targets, before, strict=True):
            target.norm.moving_mean.assign(mean)
            target.norm.moving_variance.assign(variance)
            target.norm.update_count.assign(count)
        raise


def _in_order_of_calls(model, targets, x):
    """Groups the targets that can share a pass over the data, from the bottom up.

    Two targets share a pass if their layers receive the same tensor, as the two
    directions of a `Bidirectional` do. Neither then depends on the other.
    """
    order = []
    tensors = []  # keeps the tensors alive, so that their ids differ

    def heard(target, inputs, initial_state, mask):
        tensors.append(inputs)
        target.calls.append(id(inputs))
        if target not in order:
            order.append(target)

    with listening(targets, heard):
        model(x, training=False)
    unheard = [target.name for target in targets if target not in order]
    if unheard:
        warnings.warn(
            f"Not recalibrated, never called on the data: {', '.join(unheard)}",
            stacklevel=3,
        )
    groups = []
    for target in order:
        target.recursive = target.recursive or len(target.calls) > 1
        last = groups[-1] if groups else None
        if (
            last
            and not target.recursive
            and not last[-1].recursive
            and last[-1].layer is not target.layer
            and last[-1].calls == target.calls
        ):
            last.append(target)
        else:
            groups.append([target])
    return groups


def _open_axes(model):
    """Returns a function from a rank to the axes of unknown size in model inputs.

    Inputs of the same rank share their open axes: a tensor of a batch does not say
    which input it is.
    """
    free = {}
    for tensor in getattr(model, "inputs", None) or ():
        rank = len(tensor.shape)
        open_ = {i for i, size in enumerate(tensor.shape) if size is None}
        free[rank] = free.get(rank, open_) & open_
    return lambda rank: free.get(rank, ())


def _recalibrate_group(model, group, batches, label, verbose):
    names = ", ".join(target.name for target in group)
    one_pass = _reader(model, group, batches, verbose)
    if verbose:
        print(f"Recalibrating {label}: {names}")
    for _ in range(MAX_PASSES):
        before = group[0].statistics()
        for target, moments in zip(group, one_pass(), strict=True):
            target.norm.set_statistics(*moments)
        if not group[0].recursive:
            return
        moved = _moved(before, group[0].statistics(), group[0].norm.epsilon)
        if max(moved.values()) < SETTLED:
            return
    warnings.warn(
        f"The statistics of {names} depend on themselves and did not settle in "
        f"{MAX_PASSES} passes over the data: the last one moved them by {moved}",
        stacklevel=3,
    )


def _reader(model, targets, batches, verbose):
    """Returns a function that reads the data once and returns moments.

    The function returns a list of `(mean, variance)` of the pre-activations of each
    target, float64 arrays of shape (F,). It sets the states of stateful layers to 0.
    """
    sums = {id(target): _RunningMoments(target.norm) for target in targets}

    def heard(target, inputs, initial_state, mask):
        sums[id(target)].add(*target.pre_activations(inputs, initial_state, mask))

    def run(x):
        # Returns nothing, so the layers above the targets are not computed.
        model(x, training=False)

    compiled = []

    def one_pass():
        for variable in state_variables(model):
            variable.assign(ops.zeros_like(variable))
        for moments in sums.values():
            moments.reset()
        bar = keras.utils.Progbar(batches.count, verbose=verbose, unit_name="batch")
        with listening(targets, heard):
            for number, x in enumerate(batches, start=1):
                if not compiled:
                    compiled.append(backend.compiled(run, x, _open_axes(model)))
                compiled[0](x)
                for target in targets:
                    _require_finite(target, sums[id(target)], number)
                bar.update(number, finalize=False)
        bar.update(batches.count, finalize=True)
        found = []
        for target in targets:
            count, mean, variance = sums[id(target)].values()
            if count == 0:
                raise ValueError(
                    f"`data` has no valid frame for layer {target.name!r}. "
                    f"Received: {batches.count} batches, masked throughout"
                )
            found.append((mean, variance))
        return found

    return one_pass


def _require_finite(target, moments, number):
    _, mean, variance = moments.values()
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise ValueError(
            "`data` must be finite in its valid frames, and so must what the layers "
            f"make of it. Received: batch {number} of `data`, for which layer "
            f"{target.name!r} is given NaN, infinity or numbers too large to be "
            "squared. No statistics were changed"
        )


class _RunningMoments:
    """Count, mean and variance of all elements added so far, in float64."""

    def __init__(self, norm):
        (features,) = norm.moving_mean.shape
        self.variables = [
            keras.Variable(np.zeros(shape), dtype="float64", autocast=False)
            for shape in (1, features, features)
        ]

    def reset(self):
        for variable in self.variables:
            variable.assign(ops.zeros_like(variable))

    def values(self):
        """Returns count (1,), mean (F,) and variance (F,) as arrays."""
        return [ops.convert_to_numpy(v) for v in self.variables]

    def add(self, x, valid):
        axes = tuple(range(len(x.shape) - 1))
        mean, variance, count = stats.masked_moments(x, valid, axes)
        own = tuple(ops.reshape(v, (-1,)) for v in (mean, variance, count))
        count_so_far, mean_so_far, variance_so_far = map(ops.copy, self.variables)
        mean, variance, count = stats.pool(
            ops.stack([mean_so_far, own[0]]),
            ops.stack([variance_so_far, own[1]]),
            ops.stack([count_so_far, own[2]]),
        )
        for variable, value in zip(
            self.variables, (count, mean, variance), strict=True
        ):
            variable.assign(value)


def _moved(old, new, epsilon):
    (old_mean, old_variance, _), (new_mean, new_variance, _) = old, new
    spread = new_variance + epsilon
    return {
        "mean": float(np.max(np.abs(new_mean - old_mean) / np.sqrt(spread))),
        "variance": float(np.max(np.abs(new_variance - old_variance) / spread)),
    }
