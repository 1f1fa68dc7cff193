"""Runs the time loop of every cell, forwards and backwards."""

from keras_bnrnn.recurrence.derivative import StepDerivative
from keras_bnrnn.recurrence.schedule import Schedule
from keras_bnrnn.recurrence.time_loop import Loop, time_loop
from keras_bnrnn.recurrence.weights import Weights

__all__ = ["Loop", "Schedule", "StepDerivative", "Weights", "time_loop"]
