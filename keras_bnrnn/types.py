"""Types of arguments, for annotations.

Keras and TensorFlow have no types for static checkers. A checker therefore treats
models, layers and tensors as `Any`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import keras

# A tensor or variable of the Keras backend, a `KerasTensor` or an array.
Tensor: TypeAlias = Any
# A shape. `None` is a size that is not known.
Shape: TypeAlias = Sequence[int | None]
# The arguments of `keras.activations.get`, `keras.initializers.get` and so on.
Activation: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Initializer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Regularizer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Constraint: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
DType: TypeAlias = str | Mapping[str, Any] | keras.DTypePolicy | None
Seed: TypeAlias = int | keras.random.SeedGenerator | None
# The function that `BNCell.step` normalises with: `norm(site, a, columns)`.
Norm: TypeAlias = Callable[..., Tensor]
# The result of `get_config`.
Config: TypeAlias = dict[str, Any]

Normalize: TypeAlias = Literal["input", "joint"]
Statistics: TypeAlias = Literal["sequence", "frame"]
Population: TypeAlias = Literal["pooled"]
UseCudnn: TypeAlias = bool | Literal["auto"]
