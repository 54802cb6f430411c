"""A run around the loop: how it ends, what it says, what its ranks share."""

import os
import sys

import torch
import torch.distributed as dist

from checkpoint import newest


def stop(message, status=1):
    """End with one line a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr)
    sys.exit(status)


def last_checkpoint(out):
    """What a run that was stopped can go on from. The folder knows: memory may be a moment behind it."""
    try:
        state, file = newest(out)
    except ValueError:
        return "no checkpoint was written yet"
    return f"the last checkpoint, of step {state['step']}, is {file}"


def speed(done, left, seconds):
    """How fast a run goes, and how long it has to go"""
    return {"steps_per_second": round(done / seconds, 2), "minutes_left": round(left * seconds / done / 60, 1)}


def gather(x):
    """x of all ranks, stacked"""
    if not dist.is_initialized():
        return x[None]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)
