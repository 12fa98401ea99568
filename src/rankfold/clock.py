"""Moments in time on the device that does the work, and the seconds between two of them.

What a CUDA device is given it does later. Its own events say when, without the program having to
wait for it after each layer, which no network does when it is used.
"""

import time

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now; on CUDA the moment at which what the device was given so far is done."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    wait(device)
    return time.perf_counter()


def seconds_between(first: Mark, last: Mark) -> float:
    """Of two marks of one device; waits for the second."""
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    assert isinstance(first, float) and isinstance(last, float)
    return last - first


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
