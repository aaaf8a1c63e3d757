"""Time of contenders in turn (A B C A B C), so that drift of the machine meets all of them alike."""

import contextlib
import os
import sys
import time

import torch

from .cases import is_ours

SHORT = 1e-3  # seconds that one sample takes at least: a shorter call is repeated within it
SLOW = 10  # another's contender that takes so many times the first one's time is timed twice, no more; ours, which all are held to, always
ROUNDS = 3  # at least


def seconds(contender, device, calls, plant=0.0):
    """Seconds of one of `calls` calls in a row. `plant`: that share of the time is waited besides."""
    if device == "cpu":
        if contender.ready:
            contender.ready()
        start = time.perf_counter()
        for _ in range(calls):
            contender.call()
        spent = time.perf_counter() - start
        if plant:
            end = start + spent * (1 + plant)
            while time.perf_counter() < end:
                pass
            spent = time.perf_counter() - start
        return spent / calls / contender.within
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if contender.ready:
        contender.ready()
    start.record()
    for _ in range(calls):
        contender.call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls / contender.within * (1 + plant)


def graph(contender):
    """A replay of the contender's calls, one for each of its weights, in a CUDA graph of their own: no launch gaps, and as cold as
    they were. Its results are the graph's own buffers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender.call()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    if contender.restart:
        contender.restart()
    with torch.cuda.graph(captured):
        for _ in range(contender.turns):
            out = contender.call()

    def replay():
        captured.replay()
        return out

    return replay


def in_turn(contenders, device, budget, deadline, plant=None):
    """{name: [seconds of each round]}, rounds until the budget of seconds is spent; None where one sat out a round.

    plant: {name: share of time to wait besides}, to see whether a comparison notices.
    """
    plant, times, calls = plant or {}, {c.name: [] for c in contenders}, {}
    for contender in contenders:  # once, to warm up and to see how long it takes
        with contender.context():
            seconds(contender, device, 1)
            took = seconds(contender, device, 1)
        calls[contender.name] = 1 if contender.ready else max(1, min(1000, round(SHORT / max(took, 1e-7))))
    first, end = contenders[0].name, min(time.perf_counter() + budget, deadline)
    rounds = 0
    while rounds < ROUNDS or time.perf_counter() < end:
        for contender in contenders:
            name = contender.name
            if rounds >= 2 and not is_ours(name) and min(times[name][:2]) > SLOW * min(times[first][:2]):
                times[name].append(None)
                continue
            with contender.context():
                times[name].append(seconds(contender, device, calls[name], plant.get(name, 0.0)))
        rounds += 1
    return times


@contextlib.contextmanager
def quiet():
    """Without what torch's profiler writes to the error output by itself."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def memory(contender, device, parameters):
    """{"peak": bytes above what was there at the most in one call, "kept": bytes between forward and backward, "launches"}."""
    owned = {t.untyped_storage().data_ptr() for t in parameters}
    kept = {}

    def pack(tensor):
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in owned:  # others': a weight in a format of its own
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if device != "cpu" else [])
    with contender.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if contender.ready:
            contender.ready()
        if device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with quiet(), torch.profiler.profile(activities=activities, profile_memory=device == "cpu") as profile:
            result = contender.call()
    del result
    events = profile.profiler.kineto_results.events()
    if device != "cpu":
        launches = sum("memcpy" not in e.name().lower() and "memset" not in e.name().lower() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA)
        return {"peak": torch.cuda.max_memory_allocated() - before, "kept": sum(kept.values()), "launches": launches}
    at = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        at += event.nbytes()
        peak = max(peak, at)
    return {"peak": peak, "kept": sum(kept.values()), "launches": None}
