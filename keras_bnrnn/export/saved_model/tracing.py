"""Passes information about the traced call to the layers of a served model."""

import contextlib
import dataclasses
import typing


@dataclasses.dataclass
class Call:
    """A call of a served model, as its layers see it.

    Attributes:
        lengths: Tensor (B,), or `None` if every frame is valid.
        sequences: The sequences of the call and their masks. `lengths` applies to every
            mask that is computed from one of these tensors.
        masks: The masks of `lengths`, not combined with other masks.
        before: The states before the call: a list for each recurrent layer, in the
            order in which the layers run. `None`: the initial states of the layers.
        after: The states after the call, in the same order.
        compiled: Whether XLA compiles the call.
        in_frames: Whether the running layer is inside a `TimeDistributed`. Such a layer
            keeps no states from frame to frame.
    """

    lengths: typing.Any = None
    sequences: list = dataclasses.field(default_factory=list)
    masks: list = dataclasses.field(default_factory=list)
    before: list | None = None
    after: list = dataclasses.field(default_factory=list)
    compiled: bool = False
    in_frames: bool = False


@dataclasses.dataclass
class Tracing:
    """The state that the layers of a served model share while a call is traced.

    Attributes:
        call: The `Call` being traced; `None` while Keras infers shapes.
        recurrent: The recurrent layers that the last call ran, in order: pairs of a
            layer and the list of the shapes of its states without the batch.
    """

    call: Call | None = None
    recurrent: list = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def of(self, call):
        """Sets `call` as the current call inside a `with` block."""
        before = self.recurrent
        self.call, self.recurrent = call, []
        try:
            yield
        finally:
            self.call = None
            if before:
                # Every call runs the same layers in the same order.
                self.recurrent = before
