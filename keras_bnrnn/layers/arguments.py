"""Defines the normalisation arguments of all cells and layers."""

import inspect
import typing

import keras

from keras_bnrnn import types
from keras_bnrnn.checks import check_flag, is_integer, is_number


class NormalizationArguments(typing.TypedDict, total=False):
    """The arguments of normalisation and of every Keras layer.

    A public class takes them as `**normalization: Unpack[NormalizationArguments]`.
    """

    normalize: types.Normalize
    statistics: types.Statistics
    population: types.Population
    max_timesteps: int | None
    momentum: float
    epsilon: float
    gamma_initializer: types.Initializer
    synchronized: bool
    name: str | None
    dtype: types.DType
    trainable: bool


Class = typing.TypeVar("Class")

DEFAULTS = {
    "normalize": "input",
    "statistics": "sequence",
    "population": "pooled",
    "max_timesteps": None,
    "momentum": 0.99,
    "epsilon": 1e-3,
    "gamma_initializer": "ones",
    "synchronized": False,
}

DOCS = """normalize: Where to normalise. `"input"` (default):
            `BN(W x_t) + U h`, the method of the paper. `"joint"`:
            `BN(W x_t + U h)`, its negative result. The sum exists one timestep
            at a time, so its statistics are frame-wise whatever `statistics` is.
        statistics: The frames over which a training step takes mean and variance:
            `"sequence"` (default), all valid frames of the batch together, or
            `"frame"`, each timestep alone. Sequence-wise statistics include later
            frames of the training batch. Use `"frame"` to predict the next frame.
        population: `"pooled"`, the only value: see `SequenceBatchNorm`.
        max_timesteps: Must be `None`.
        momentum: Float in [0, 1), weight of the past in the population
            statistics. Default: 0.99.
        epsilon: Float > 0, added to the variance. Default: 1e-3.
        gamma_initializer: Initializer of `gamma`. Default: `"ones"`.
        synchronized: Whether batch statistics are taken over all replicas. It needs
            `normalize="input"`. Default: `False`."""


def with_normalization_arguments(cls: type[Class]) -> type[Class]:
    """Adds the normalisation arguments to the docstring and signature of a class.

    `DOCS` replaces `{normalization}` in the docstring.

    The signature of `__init__` shows each normalisation argument with its default.
    """
    if cls.__doc__:  # `python -OO` drops docstrings
        cls.__doc__ = cls.__doc__.replace("{normalization}", DOCS)
    own = inspect.signature(cls.__init__)
    *spelled, rest = own.parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    hints = typing.get_type_hints(NormalizationArguments)
    normalization = [
        inspect.Parameter(name, kind, default=default, annotation=hints[name])
        for name, default in DEFAULTS.items()
    ]
    kwargs = rest.replace(name="kwargs", annotation=inspect.Parameter.empty)
    cls.__init__.__signature__ = own.replace(
        parameters=[*spelled, *normalization, kwargs]
    )
    return cls


def given(scope):
    """Returns the arguments of an `__init__` as one dict.

    Args:
        scope: The `locals()` of the `__init__`.
    """
    arguments = {
        name: value
        for name, value in scope.items()
        if name not in ("self", "__class__", "normalization")
    }
    return {**arguments, **scope["normalization"]}


def check_normalize(normalize, synchronized):
    if normalize == "recurrent":
        raise ValueError(
            "`normalize` must be 'input' or 'joint': 'recurrent' is not available "
            f"yet. Received: normalize={normalize!r}"
        )
    if normalize not in ("input", "joint"):
        raise ValueError(
            f"`normalize` must be 'input' or 'joint'. Received: normalize={normalize!r}"
        )
    check_flag("synchronized", synchronized)
    if synchronized and normalize == "joint":
        raise ValueError(
            "`synchronized=True` needs `normalize='input'`: replicas cannot "
            "exchange sums inside the time loop. "
            f"Received: synchronized={synchronized!r}, normalize={normalize!r}"
        )


def check_rate(name, rate):
    """Raises an error for a dropout rate that the stock cell would clamp."""
    if not is_number(rate) or not 0.0 <= rate < 1.0:
        raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={rate!r}")


def check_seed(seed):
    is_generator = isinstance(seed, keras.random.SeedGenerator)
    if seed is not None and not is_generator and not is_integer(seed):
        raise ValueError(
            "`seed` must be an integer, a `keras.random.SeedGenerator` or None. "
            f"Received: seed={seed!r}"
        )


def check_use_cudnn(use_cudnn):
    if not isinstance(use_cudnn, bool) and use_cudnn != "auto":
        raise ValueError(
            "`use_cudnn` must be 'auto', True or False. "
            f"Received: use_cudnn={use_cudnn!r}"
        )
