"""Chooses how the time loops run. The choice affects speed only."""

import typing

from keras import ops

from keras_bnrnn import backend

# In a plain graph, a batch of at least this many rows times units computes factors by
# step. With fewer, the operations that this adds to the loop cost more than the passes
# over memory that it saves: 10 to 20 % of a step of a GRU with one row.
BY_STEP_FROM = 1024

# A batch runs in slices from this many rows, and from this many multiplications of a
# recurrent product. Below, the second loop costs as much as it saves: 0.9 to 1.1 of the
# time of one loop. Above, slices take 0.5 to 0.95 of it. A loop that keeps nothing has
# less to do beside the product, and slices are worth while from half as many.
LEAST_SLICED_ROWS = 8
LEAST_SLICED_PRODUCT = 2**20
LEAST_SLICED_PRODUCT_AT_INFERENCE = 2**19

# The same where the backend has operations for whole sequences. Their loops need no
# scheduling, so smaller slices are worth while.
LEAST_SLICED_ROWS_OF_BLOCK = 32
LEAST_SLICED_PRODUCT_OF_BLOCK = 2**17

# TensorFlow computes a product (n, U) . (U, W) on two cores if it expects it to take
# more than this many cycles, 8 multiplications or a store of 1.5 numbers in each. While
# another slice has the second core, both wait: two products (128, 64) . (64, 192) side
# by side take 115 us, four of (64, 64) . (64, 192) two by two 60 us. So a loop that
# keeps nothing runs in four slices where these have fewer cycles, and two have more;
# in 0.8 to 0.95 of the time. Not with fewer rows than these: each product reads all
# weights. In training, where memory is the limit, four slices take as long as two. Not
# with oneDNN either, which computes products of this size on one core; four slices then
# take 1.2 times as long as two.
CYCLES_ON_ONE_CORE = 210_000
LEAST_ROWS_OF_FOUR_SLICES = 16

# The backend's gradient of such an operation computes all products timestep by timestep
# on one core. Up to this many multiplications in a timestep that is faster than a loop,
# which has other cores for products of many timesteps; by up to 50 %. With more weights
# than that, it is slower with few rows, too, because it adds to all in each timestep.
ONE_OPERATION_WEIGHTS = 2**15
ONE_OPERATION_ALONE = 2**18
ONE_OPERATION_IN_SLICES = 2**20

# Where oneDNN multiplies matrices, the operations for whole sequences, which do not use
# it, are slower than a loop from this many weights on, or from this many
# multiplications in the products of a timestep: an LSTM takes up to 1.4 times as long
# by them, and with fewer 0.75 to 1.0 of the time. In the two directions of a
# bidirectional LSTM loops are faster from half as many, and the weights decide only if
# the number of rows is unknown.
BLOCK_PRODUCT_WITH_ONEDNN = 2**22
BLOCK_WEIGHTS_WITH_ONEDNN = 2**16

# With oneDNN the gates of an LSTM run side by side, instead of slices of the batch.
# They take 0.7 to 1.0 of the time of slices in training, and 0.52 to 0.9 at inference.
# With fewer multiplications in a recurrent product than these, they take 1.05 to 1.14.
# With more rows than these, slices take 0.92 to 1.0 of the time of gates in training,
# and 0.86 to 0.93 at inference. At inference, gates gain nothing with fewer weights in
# the recurrent kernel: they take 0.96 to 1.1 of the time of slices or of one loop.
LEAST_PRODUCT_BY_GATE = 3 * 2**19
MOST_ROWS_BY_GATE = 192
MOST_ROWS_BY_GATE_AT_INFERENCE = 96
LEAST_WEIGHTS_BY_GATE_AT_INFERENCE = 2**15

# The number of timesteps in a turn of a loop that TensorFlow's executor runs. It
# schedules some 25 operations of the loop itself in each turn. A loop takes 0.75 to 1.0
# of the time with one timestep, and as long with 4, 5, 8 and 10. The first of these
# numbers that divides T spares a loop for the timesteps that are left.
TIMESTEPS_OF_A_TURN = (4, 5, 3)

# The number of frames (timesteps times rows) of a block of the backward loop in a plain
# graph. From 1,024 to 8,192 frames a step takes the same time, within 5 %. Long blocks
# need more memory, and short ones more turns of the outer loop.
BLOCK_FRAMES = 2048


class Schedule(typing.NamedTuple):
    """How a time loop runs.

    Attributes:
        unroll: Whether the loop is unrolled. T must then be static. Default: `False`.
        keeps: Whether the forward loop keeps the values that a closed-form gradient
            needs, as in training. Otherwise the forward loop saves time and memory, and
            a gradient runs the loop again. Default: `True`.
        reads_ahead: Whether a loop that keeps nothing reads the projection one timestep
            ahead. XLA does not vectorise arithmetic for CPUs if the arithmetic reads a
            slice at an index that is only known as the loop runs. A copy of the slice,
            made one timestep earlier, separates the two: a GRU then takes half the
            time. In an LSTM the tanh of all gates already separates them, and a copy
            would only cost time. Default: `False`.
        has_company: Whether another loop like this one runs at the same time: that of
            the other direction. Slices would then add work, and find no free core: a
            loop in slices takes 1.05 to 1.15 of the time. Default: `False`.
        by_step: Whether the backward loop computes factors timestep by timestep, while
            the values they depend on are in the cache. Otherwise it computes them for
            all timesteps before the loop. `settled` sets it. Default: `False`.
        sliced_from: The least number of rows of a batch that runs in two slices, where
            its size is unknown and the loop keeps nothing. `None` (default): none does.
        turn_length: The number of timesteps in a turn of the loop, where TensorFlow's
            executor runs it. `settled` sets it. Default: 1.
    """

    unroll: bool = False
    keeps: bool = True
    reads_ahead: bool = False
    has_company: bool = False
    by_step: bool = False
    sliced_from: int | None = None
    turn_length: int = 1

    def settled(self, timesteps, batch, units):
        """Returns the schedule with `by_step` and `turn_length` set.

        Args:
            timesteps: T, an int or a tensor.
            batch: The number of rows, an int or a tensor.
            units: U.
        """
        small = isinstance(batch, int) and batch * units < BY_STEP_FROM
        by_step = (
            backend.is_traced()
            and not self.unroll
            and not backend.has_fused_kernels()
            and not (small and backend.in_plain_graph())
        )
        turn_length = 1
        if backend.run_by_executor():
            turn_length = TIMESTEPS_OF_A_TURN[0]
            if isinstance(timesteps, int):
                divisors = (n for n in TIMESTEPS_OF_A_TURN if timesteps % n == 0)
                turn_length = next(divisors, turn_length)
        return self._replace(by_step=by_step, turn_length=turn_length)


class Slices(typing.NamedTuple):
    """Numbers of rows from which a batch runs in slices.

    Attributes:
        two_from: The least number of rows of a batch in two slices.
        four: Range of the numbers of rows of a batch in four slices.
    """

    two_from: int
    four: range = range(0)


def slices_of(weights, is_block=False, keeps=True):
    """Returns the `Slices` of a loop.

    Args:
        weights: `Weights`.
        is_block: Whether slices run by the backend's operations for whole sequences.
            Default: `False`.
        keeps: As in `Schedule`. Default: `True`.
    """
    units, width = weights.recurrent_kernel.shape

    def least(rows, product):
        return max(rows, -(-product // (units * width)))

    if keeps:
        two_from = least(LEAST_SLICED_ROWS, LEAST_SLICED_PRODUCT)
        if is_block:
            of_block = least(LEAST_SLICED_ROWS_OF_BLOCK, LEAST_SLICED_PRODUCT_OF_BLOCK)
            two_from = min(two_from, of_block)
        return Slices(two_from)

    two_from = least(LEAST_SLICED_ROWS, LEAST_SLICED_PRODUCT_AT_INFERENCE)
    if backend.products_by_onednn():
        return Slices(two_from)
    most = int(CYCLES_ON_ONE_CORE / (width * (units / 8 + 1 / 1.5)))
    if most < LEAST_ROWS_OF_FOUR_SLICES:
        return Slices(two_from)
    return Slices(two_from, range(max(2 * most + 1, two_from), 4 * most + 1))


def runs_in_one_operation(rows, alone, kernel, recurrent_kernel):
    """Returns whether the gradient of a whole sequence is one operation of the backend.

    Args:
        rows: The number of rows, an int or a tensor.
        alone: As in `Loop`.
        kernel, recurrent_kernel: Tensors (D, G*U) and (U, G*U).

    Returns:
        A boolean, or a tensor if one of `rows` and `alone` is one.
    """
    width = kernel.shape[-1]
    product = (kernel.shape[0] + recurrent_kernel.shape[0]) * width
    if product > ONE_OPERATION_WEIGHTS:
        return False
    most_alone = ONE_OPERATION_ALONE // product
    most_in_slices = ONE_OPERATION_IN_SLICES // product
    if isinstance(alone, bool):
        return rows <= (most_alone if alone else most_in_slices)
    return rows <= ops.where(alone, most_alone, most_in_slices)


def is_faster_by_loop(rows, kernel, recurrent_kernel, has_company=False):
    """Returns whether a loop is faster than the operations for whole sequences.

    Args:
        rows: The number of rows of the batch, an int or a tensor.
        kernel, recurrent_kernel: Tensors (D, G*U) and (U, G*U).
        has_company: As in `Schedule`. Default: `False`.
    """
    if not backend.products_by_onednn():
        return False
    weights = (kernel.shape[0] + recurrent_kernel.shape[0]) * kernel.shape[-1]
    if has_company:
        weights *= 2
    if not isinstance(rows, int):
        return weights >= BLOCK_WEIGHTS_WITH_ONEDNN
    if weights >= BLOCK_WEIGHTS_WITH_ONEDNN and not has_company:
        return True
    return rows * weights >= BLOCK_PRODUCT_WITH_ONEDNN


def runs_by_gate(schedule, rows, weights, products):
    """Returns whether a loop in a plain graph gets its projection gate by gate.

    With one recurrent product this saves copies: a GRU takes 0.82 to 1.02 of the time,
    without oneDNN 0.9 to 1.03. If each gate has a product of its own, oneDNN computes
    it on one core, and another gate has the other core, so the batch needs no slices.
    Two directions fill the cores already, and need as few operations as possible.

    Args:
        schedule: `Schedule`.
        rows: The number of rows of the batch, an int or a tensor.
        weights: `Weights`.
        products: As in `StepDerivative`.
    """
    if not backend.run_by_executor():
        return False
    if products == 1:
        return True
    units, width = weights.recurrent_kernel.shape
    if isinstance(rows, int) and (
        rows > most_rows_by_gate(schedule)
        or rows * units * width < LEAST_PRODUCT_BY_GATE
    ):
        return False
    return (
        backend.products_by_onednn()
        and backend.cores() > 1
        and not schedule.has_company
        and (schedule.keeps or units * width >= LEAST_WEIGHTS_BY_GATE_AT_INFERENCE)
    )


def most_rows_by_gate(schedule):
    """Returns the number of rows above which slices of a batch are faster."""
    return MOST_ROWS_BY_GATE if schedule.keeps else MOST_ROWS_BY_GATE_AT_INFERENCE


def timesteps_of_block(rows):
    """Returns the number of timesteps of a block of the backward loop.

    Args:
        rows: The number of rows, an int or a tensor.
    """
    return ops.maximum(BLOCK_FRAMES // ops.maximum(rows, 1), 1)
