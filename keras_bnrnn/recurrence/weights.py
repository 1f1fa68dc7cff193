"""Holds the tensors of one recurrence."""

import typing


class Weights(typing.NamedTuple):
    """The tensors of one recurrence: the trained or the folded weights of a cell.

    Attributes:
        kernel: Tensor (D, G*U). `None` if the input is already projected.
        recurrent_kernel: Tensor (U, G*U).
        bias: Tensor (G*U,), added to the input projection. `None` (default) for 0.
        more: Dict from names to the other tensors of the cell. A value is `None` if the
            cell does not have the weight.
        recurrent_dropout_mask: Tensor (B, U) that multiplies the output before a
            recurrent product. Default: `None`.
    """

    kernel: typing.Any
    recurrent_kernel: typing.Any
    bias: typing.Any = None
    more: dict = {}  # noqa: RUF012
    recurrent_dropout_mask: typing.Any = None

    def in_loop(self):
        """Returns the dict of the tensors that a time loop differentiates, by name."""
        tensors = {
            "kernel": self.kernel,
            "recurrent_kernel": self.recurrent_kernel,
            "bias": self.bias,
        }
        tensors |= self.more
        return {name: value for name, value in tensors.items() if value is not None}

    def replaced(self, tensors):
        """Returns these weights with the tensors of `in_loop` replaced."""
        named = dict(tensors)
        fields = {
            name: named.pop(name)
            for name in ("kernel", "recurrent_kernel", "bias")
            if name in named
        }
        return self._replace(more={**self.more, **named}, **fields)

    def dropped(self, output):
        """Applies recurrent dropout to an output (B, ..., U)."""
        mask = self.recurrent_dropout_mask
        return output if mask is None else output * mask
