"""What differs by backend when a model is trained on several replicas."""

import keras


def sum_over_replicas(x):
    """The sum of `x` over the replicas of the `tf.distribute` strategy in force.

    Differentiable. Outside a strategy, with a single replica and on other backends
    than TensorFlow, where a distributed batch is one tensor, `x` itself.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not tf.distribute.in_cross_replica_context():
            context = tf.distribute.get_replica_context()
            if context.num_replicas_in_sync > 1:
                return context.all_reduce(tf.distribute.ReduceOp.SUM, x)
    return x
