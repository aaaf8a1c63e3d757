"""On a GPU, who reads a memory and who changes it, in order, whichever streams they are on. A leaf."""

import torch


class Readers:
    """The streams on which kernels that read may still run. A change waits for them there, not on the host, and is over when it returns:
    who is told of it on the host may read on any stream."""

    def __init__(self, devices):
        self._devices = [device for device in devices if device.type == "cuda"]
        self._last = {}  # by stream: after what reads there

    def have_read(self):
        """All reads so far are on the devices' current streams. Those of a graph that is being captured are where it is replayed."""
        for device in self._devices:
            stream = torch.cuda.current_stream(device)
            if not torch.cuda.is_current_stream_capturing():
                self._last.setdefault(stream, torch.cuda.Event()).record(stream)

    def wait(self):
        """Let what comes on the current streams wait for them."""
        for stream, event in self._last.items():
            torch.cuda.current_stream(stream.device).wait_event(event)

    def finish(self):
        """Wait on the host for what the current streams have been given."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
