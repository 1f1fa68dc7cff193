"""The derivative of a cell's step in closed form."""


class StepDerivative:
    """The derivative of a cell's elementwise step, in closed form.

    A step makes its new states from its pre-activations and the states before it.
    Pre-activations are tensors of shape (..., P) for a P of the cell's own. All methods
    but `pull_back` are also called on all timesteps at once.
    """

    def width(self, units):
        """P, the number of pre-activations."""
        raise NotImplementedError

    def pre_activations(self, projected, recurrent, weights):
        """The values that the forward loop keeps for the gradient, (B, P).

        Args:
            projected: Tensor (B, G*U), the input projection.
            recurrent: Tensor (B, G*U), the recurrent product.
            weights: The `Weights` of the recurrence.
        """
        raise NotImplementedError

    def factors(self, pre_activations, before, after, weights):
        """The tensors that `pull_back` multiplies gradients by.

        Args:
            pre_activations: Tensor (T, B, P).
            before, after: Lists of tensors (T, B, U), the states before and after
                each step.
            weights: The `Weights` of the recurrence.

        Returns:
            List of tensors (T, B, ...).
        """
        raise NotImplementedError

    def pull_back(self, gradients, factors):
        """Backpropagates through one step, linearly in `gradients`.

        Args:
            gradients: List of tensors (B, U), the gradients of the new states.
            factors: List of tensors (B, ...), those of the timestep.

        Returns:
            The gradient of the pre-activations, (B, P), and the list of the gradients
            of the states before the step, (B, U) or `None` for 0, without what reaches
            them through the recurrent product.
        """
        raise NotImplementedError

    def of_recurrent(self, gradient):
        """The gradient of the recurrent product, from that of pre-activations."""
        return gradient

    def of_projected(self, gradient):
        """The gradient of the input projection, from that of pre-activations."""
        return gradient

    def of_weights(self, gradient, before, after, weights):
        """The gradients of weights other than the recurrent kernel and the bias.

        Args:
            gradient: Tensor (T, B, P), that of the pre-activations.
            before, after, weights: As in `factors`.

        Returns:
            Dict from names in `weights.more` to tensors.
        """
        return {}
