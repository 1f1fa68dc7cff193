"""Answers each line on stdin with the seconds of a training step of torch's LSTM.

The first line is the shape, `[B, T, D, U]`; it is answered when all is ready.
"""

import json
import sys
import time

import torch


def main():
    batch, timesteps, width, units = json.loads(sys.stdin.readline())
    layer = torch.nn.LSTM(width, units, batch_first=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    x = torch.randn(batch, timesteps, width)

    def step():
        optimizer.zero_grad()
        loss = layer(x)[0].square().mean()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
