"""What differs by backend when a model is trained on several replicas."""

import keras


def sum_over_replicas(x):
    """The sum of `x` over the replicas of the `tf.distribute` strategy in force.

    Differentiable. Outside a strategy, and with a single replica, `x` itself.

    Raises:
        NotImplementedError: On a Keras backend other than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "`synchronized=True` needs the TensorFlow backend of Keras. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    import tensorflow as tf

    if not tf.distribute.in_cross_replica_context():
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            return context.all_reduce(tf.distribute.ReduceOp.SUM, x)
    return x
