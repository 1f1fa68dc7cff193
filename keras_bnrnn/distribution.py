"""What differs by backend when a model is trained on several replicas."""

import keras


def replica_count():
    """Replicas of the `tf.distribute` strategy in force; 1 without."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.get_strategy().num_replicas_in_sync
    return 1


def sum_over_replicas(x):
    """The sum of `x` over the replicas of the `tf.distribute` strategy in force.

    Differentiable. Outside a strategy, with a single replica and on other backends
    than TensorFlow, where a distributed batch is one tensor, `x` itself.
    """
    if replica_count() > 1:
        import tensorflow as tf

        if not tf.distribute.in_cross_replica_context():
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, x)
    return x
