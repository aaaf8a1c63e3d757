"""Adapter ids that are none, found on a GPU without waiting for it: such rows get NaN, and a flag is raised later. A leaf."""

import torch


class Flag:
    """Whether a device has seen an id that is none. `seen` lies there; `copy` is what the host last got of it."""

    def __init__(self, device):
        self.seen = torch.zeros((), dtype=torch.bool, device=device)
        self.copy = torch.zeros((), dtype=torch.bool, pin_memory=device.type == "cuda")

    def note(self, wrong):
        """Remember whether any of `wrong` is true; nothing is waited for."""
        self.seen.logical_or_(wrong.any())
        self.copy.copy_(self.seen, non_blocking=True)

    def raise_if_set(self, where):
        """ValueError where the host has got it, which then forgets it."""
        if self.copy.item():  # the host's own memory
            self.seen.zero_()
            self.copy.zero_()
            raise ValueError(f"adapter_ids: {where} had an id that is no adapter's, or one whose adapter has gone; its rows are NaN")


_flags = {}  # by device: what a kernel has met is the device's, whichever call raises it


def note(wrong):
    """Raise what an earlier call met on this device, then note whether this one's ids are wrong. In a CUDA graph only the second
    happens, and only where a call before the capture has made the flag."""
    device, capturing = wrong.device, wrong.is_cuda and torch.cuda.is_current_stream_capturing()
    if device not in _flags:
        if capturing:
            return
        _flags[device] = Flag(device)
    if not capturing:
        _flags[device].raise_if_set(f"an earlier call on {device}")
    _flags[device].note(wrong)


def check():
    """Wait for every device that has had adapter ids, and raise ValueError where one of them was no adapter's.

    On a GPU ids are not checked before the kernels run (check_ids="async"): a row whose id is none gets NaN, never the base's
    answer, and the next call that is given ids raises, or this one.
    """
    for device, flag in _flags.items():
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a forward may run on any stream
        flag.copy.copy_(flag.seen)
        flag.raise_if_set(f"a call on {device}")
