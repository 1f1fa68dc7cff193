"""Selects the functions that depend on the Keras backend in use."""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_bnrnn.backend import tensorflow as _module
else:
    from keras_bnrnn.backend import missing as _module

FusedKernel = _module.FusedKernel
call_if = _module.call_if
compiled = _module.compiled
compiled_by_xla = _module.compiled_by_xla
custom_gradient = _module.custom_gradient
graph_of = _module.graph_of
has_fused_kernels = _module.has_fused_kernels
replica_count = _module.replica_count
require_positive = _module.require_positive
require_time_loop = _module.require_time_loop
scan = _module.scan
sum_over_replicas = _module.sum_over_replicas
times_transposed = _module.times_transposed
transposed_times = _module.transposed_times
value_and_slope = _module.value_and_slope
