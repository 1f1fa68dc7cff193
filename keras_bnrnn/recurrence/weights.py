"""The tensors of one recurrence."""

import typing


class Weights(typing.NamedTuple):
    """The tensors of one recurrence: a cell's own weights, or its folded ones.

    Attributes:
        kernel: (D, G*U).
        recurrent_kernel: (U, G*U).
        bias: (G*U,), added to the input projection; `None` for 0.
        more: Dict of the tensors that a cell adds, by the names it gives them; `None`
            for a weight that the cell does not have.
        recurrent_dropout_mask: (B, U), multiplies the output on its way to a recurrent
            product; or `None`.
    """

    kernel: typing.Any
    recurrent_kernel: typing.Any
    bias: typing.Any = None
    more: dict = {}  # noqa: RUF012
    recurrent_dropout_mask: typing.Any = None

    def in_loop(self):
        """Dict of the tensors in which a time loop is differentiable, by name."""
        tensors = {"recurrent_kernel": self.recurrent_kernel, "bias": self.bias}
        tensors |= self.more
        return {name: value for name, value in tensors.items() if value is not None}

    def replaced(self, tensors):
        """The same weights with other tensors for those that `in_loop` gives."""
        named = dict(tensors)
        fields = {
            name: named.pop(name)
            for name in ("recurrent_kernel", "bias")
            if name in named
        }
        return self._replace(more={**self.more, **named}, **fields)

    def dropped(self, output):
        """The output as recurrent products see it."""
        mask = self.recurrent_dropout_mask
        return output if mask is None else output * mask
