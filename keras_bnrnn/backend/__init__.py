"""Selects the functions that depend on the Keras backend in use."""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_bnrnn.backend import tensorflow as _module
else:
    from keras_bnrnn.backend import missing as _module

FusedKernel = _module.FusedKernel
add_n = _module.add_n
between = _module.between
block_backward = _module.block_backward
block_forward = _module.block_forward
call_if = _module.call_if
column_sums = _module.column_sums
compiled = _module.compiled
compiled_by_xla = _module.compiled_by_xla
cores = _module.cores
custom_gradient = _module.custom_gradient
graph_of = _module.graph_of
has_block = _module.has_block
has_fused_kernels = _module.has_fused_kernels
in_plain_graph = _module.in_plain_graph
is_traced = _module.is_traced
lstm_step_gradient = _module.lstm_step_gradient
lstm_swapped = _module.lstm_swapped
plus_bias = _module.plus_bias
product_and_bias = _module.product_and_bias
products_by_onednn = _module.products_by_onednn
replica_count = _module.replica_count
require_positive = _module.require_positive
require_time_loop = _module.require_time_loop
run_by_executor = _module.run_by_executor
scan = _module.scan
scan_blocks = _module.scan_blocks
sigmoid_gradient = _module.sigmoid_gradient
slice_sizes = _module.slice_sizes
split = _module.split
summary_writer = _module.summary_writer
sum_over_replicas = _module.sum_over_replicas
transposed_times = _module.transposed_times
tanh_gradient = _module.tanh_gradient
traced_once = _module.traced_once
unstacked = _module.unstacked
value_and_slope = _module.value_and_slope
write_summaries = _module.write_summaries
