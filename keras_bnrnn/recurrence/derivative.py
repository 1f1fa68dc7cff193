"""Defines the derivative of a cell's step in closed form."""


class StepDerivative:
    """The derivative of a cell's elementwise step, in closed form.

    A step computes its new states from its pre-activations and the states before it.
    Pre-activations have the shape (..., P). Each cell chooses its own P. All methods
    except `pull_back` are also called on all timesteps at once.
    """

    def width(self, units):
        """Returns P, the number of pre-activations."""
        raise NotImplementedError

    def pre_activations(self, projected, recurrent, weights):
        """Returns the values (B, P) that the forward loop keeps for the gradient.

        Args:
            projected: Tensor (B, G*U), the input projection.
            recurrent: Tensor (B, G*U), the recurrent product.
            weights: The `Weights` of the recurrence.
        """
        raise NotImplementedError

    def factors(self, pre_activations, before, after, weights):
        """Returns the tensors by which `pull_back` multiplies gradients.

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
        """Backpropagates through one step. The result is linear in `gradients`.

        Args:
            gradients: List of tensors (B, U), the gradients of the new states.
            factors: List of tensors (B, ...), the factors of the timestep.

        Returns:
            The gradient (B, P) of the pre-activations, and the list of the gradients
            (B, U) of the states before the step, `None` for 0. These exclude the
            gradients that pass through the recurrent product.
        """
        raise NotImplementedError

    def of_recurrent(self, gradient):
        """Returns the gradient (..., G*U) of the recurrent product.

        `gradient` is that of the pre-activations, (..., P).
        """
        return gradient

    def of_projected(self, gradient):
        """Returns the gradient (..., G*U) of the input projection.

        `gradient` is that of the pre-activations, (..., P).
        """
        return gradient

    def of_weights(self, gradient, before, after, weights):
        """Returns the gradients of weights other than recurrent kernel and bias.

        Args:
            gradient: Tensor (T, B, P), the gradient of the pre-activations.
            before, after, weights: As in `factors`.

        Returns:
            Dict from names in `weights.more` to tensors.
        """
        return {}
