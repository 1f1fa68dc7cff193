"""Tells the layers of a served model about the call that is being traced."""

import contextlib
import dataclasses
import typing


@dataclasses.dataclass
class Call:
    """A call of a served model, as its layers see it.

    Attributes:
        lengths: Tensor (B,), or `None` where every frame is valid.
        sequences: The sequences of the call and their masks. A mask that is computed
            from one of them belongs to the lengths.
        masks: The masks that are those of the lengths and nothing else.
        before: The states to start from, a list for each recurrent layer in the order
            in which they run; `None`: the layers' own initial states.
        after: The final states of the layers, in the same order.
        compiled: Whether XLA compiles the call.
        in_frames: Whether the layer that runs is inside a `TimeDistributed`, which
            applies it to each frame: its states do not last from frame to frame.
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
    """What the layers of a served model share while a call is traced.

    Attributes:
        call: The `Call` that is being traced; `None` while Keras asks for shapes.
        recurrent: The recurrent layers that the last call ran, in order: pairs of a
            layer and the list of its states' shapes without the batch.
    """

    call: Call | None = None
    recurrent: list = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def of(self, call):
        """Makes `call` the one that the layers see."""
        before = self.recurrent
        self.call, self.recurrent = call, []
        try:
            yield
        finally:
            self.call = None
            if before:
                self.recurrent = before  # the same layers in the same order
