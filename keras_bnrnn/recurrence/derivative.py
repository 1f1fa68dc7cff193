"""Defines the step of a cell and its derivative in closed form."""

import typing

from keras import ops


class Parts(typing.NamedTuple):
    """The tensors that hold the gradients of the two terms of the pre-activations.

    Attributes:
        widths: List of the widths of the tensors.
        projected: The indices of those that are, side by side, the gradient (B, G*U) of
            the input projection.
        recurrent: The same for the recurrent product.
    """

    widths: list
    projected: tuple
    recurrent: tuple


def joined(parts):
    """Concatenates columns."""
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1)


class StepDerivative:
    """A cell's elementwise step in two parts, and its derivative in closed form.

    `keep` computes values from the pre-activations, such as gates. `advance` computes
    the new states from these values and the states before the step. The forward loop
    keeps the values and the states for the backward loop.

    A time loop calls `factors` with the tensors of all timesteps at once, (T, B, ...),
    or `step_back` with those of one timestep, (B, ...), whichever is faster.

    Attributes:
        gates: In how many tensors of equal width, side by side, `keep` gets the input
            projection. If more than one: as a list. Default: 1.
        products: The same for the recurrent product: 1 or `gates`. Default: 1.
    """

    gates = 1
    products = 1

    def block_of(self, weights):
        """Returns the name of the backend's operations with these equations, or `None`.

        Args:
            weights: The `Weights` of the recurrence.
        """
        return None

    def by_operation(self, weights):
        """Returns a derivative that runs best one timestep after another in a graph.

        Its `step_back` is an operation of the backend. It has no `factors`.

        Args:
            weights: As in `block_of`.

        Returns:
            `StepDerivative`, or `None` if there is no such operation.
        """
        return None

    def by_gate(self, weights):
        """Returns a derivative that gets the terms of each gate as tensors of its own.

        In a plain graph this saves copies. If each gate has a product of its own, the
        gates of a timestep run side by side. The derivative has no `factors`.

        Args:
            weights: As in `block_of`.

        Returns:
            `StepDerivative`, or `None` if there is none for these equations.
        """
        return None

    def of_slices(self):
        """Returns the derivative by which slices of a batch run instead of this one."""
        return self

    def widths(self, units):
        """Returns the list of the widths of the values that `keep` returns."""
        raise NotImplementedError

    def width(self, units):
        """Returns P, the width of the gradient that `pull_back` returns."""
        raise NotImplementedError

    def keep(self, projected, recurrent, states, weights):
        """Returns the list of the values (B, ...) that the forward loop keeps.

        Args:
            projected: Tensor (B, G*U), the input projection; or `gates` tensors.
            recurrent: Tensor (B, G*U), the recurrent product; or `products` tensors.
            states: List of tensors (B, U), the states before the step.
            weights: The `Weights` of the recurrence.
        """
        raise NotImplementedError

    def advance(self, kept, states, weights):
        """Returns the list of the new states (B, U).

        Args:
            kept: The values that `keep` returned.
            states, weights: As in `keep`.
        """
        raise NotImplementedError

    def factors(self, kept, before, after, weights):
        """Returns the list of the tensors by which `pull_back` multiplies gradients.

        Args:
            kept: The values that `keep` returned.
            before, after: Lists of the states before and after each step.
            weights: The `Weights` of the recurrence.
        """
        raise NotImplementedError

    def pull_back(self, gradients, factors):
        """Backpropagates through one step. The result is linear in `gradients`.

        Args:
            gradients: List of tensors (B, U), the gradients of the new states.
            factors: List of tensors (B, ...), the factors of the timestep.

        Returns:
            A gradient (B, P), from which the methods below make those of the input
            projection, the recurrent product and the weights; and the list of the
            gradients (B, U) of the states before the step, `None` for 0. These exclude
            the gradients that pass through the recurrent product.
        """
        raise NotImplementedError

    def parts(self, units, width):
        """Returns the `Parts` that `step_back` returns.

        Args:
            units: U.
            width: G*U.
        """
        if self._has_one_gradient():
            return Parts([width], (0,), (0,))
        return Parts([width, width], (0,), (1,))

    def _has_one_gradient(self):
        """Returns whether projection and recurrent product have the same gradient."""
        return (
            type(self).of_projected is StepDerivative.of_projected
            and type(self).of_recurrent is StepDerivative.of_recurrent
        )

    def arranged(self, columns):
        """Brings the columns (..., G*U) of a weight in the order of `parts`, and back.

        By default they have this order.
        """
        return columns

    def step_back(self, gradients, kept, before, after, weights):
        """Backpropagates through one step, in a loop that computes factors by step.

        A derivative may override it to save operations.

        Args:
            gradients: As in `pull_back`.
            kept, before, after, weights: As in `factors`, of one timestep.

        Returns:
            The list of the tensors (B, ...) of `parts`, and the list of the gradients
            of the states, as of `pull_back`.
        """
        factors = self.factors(kept, before, after, weights)
        gradient, others = self.pull_back(gradients, factors)
        if self._has_one_gradient():
            return [gradient], others
        return [self.of_projected(gradient), self.of_recurrent(gradient)], others

    def of_recurrent(self, gradient):
        """Returns the gradient (..., G*U) of the recurrent product.

        `gradient` is that of `pull_back`, (..., P).
        """
        return gradient

    def of_projected(self, gradient):
        """Returns the gradient (..., G*U) of the input projection.

        `gradient` is that of `pull_back`, (..., P).
        """
        return gradient

    def of_weights(self, parts, before, after, weights):
        """Returns the gradients of weights other than recurrent kernel and bias.

        Args:
            parts: List of tensors (T, B, ...), side by side the gradient (T, B, G*U)
                of the recurrent product.
            before, after: Lists of the states (T, B, U) before and after each step.
            weights: The `Weights` of the recurrence.

        Returns:
            Dict from names in `weights.more` to tensors.
        """
        return {}
