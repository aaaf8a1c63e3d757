"""Layers by model: (in_features K, out_features N) of every linear that adapters go to, those with most of the work first."""

from typing import NamedTuple


class Model(NamedTuple):
    hidden: int
    queries: int  # columns of q and rows of o
    keys: int  # columns of k and of v
    between: int  # of the MLP
    layers: int
    head: int  # columns of a head
    vocabulary: int

    def linears(self):
        sizes = ((self.hidden, self.between), (self.between, self.hidden), (self.hidden, self.queries), (self.queries, self.hidden), (self.hidden, self.keys))
        return list(dict.fromkeys(sizes))


MODELS = {
    "llama3-8b": Model(4096, 4096, 1024, 14336, 32, 128, 128256),
    "llama3-70b": Model(8192, 8192, 1024, 28672, 80, 128, 128256),
    "qwen2.5-7b": Model(3584, 3584, 512, 18944, 28, 128, 152064),
    "qwen3-32b": Model(5120, 8192, 1024, 25600, 64, 128, 151936),
    "smollm2-135m": Model(576, 576, 192, 1536, 30, 64, 49152),
}

AWKWARD = [(2049, 3424), (1000, 17), (7392, 1001)]  # no multiple of anything
CALLS = [(16, 16)]  # nothing to compute: what a call costs
SETS = ("design", *MODELS, "awkward", "calls")


def linears(name, design):
    """The layers of one set; `design`: those that an operator names as the design's own."""
    if name == "design":
        return design
    return {"awkward": AWKWARD, "calls": CALLS}.get(name) or MODELS[name].linears()
