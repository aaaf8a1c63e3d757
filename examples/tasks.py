"""Eight small tasks out of one harvest, so that eight adapters have something of their own to learn."""

import ast


def _first(source):
    return ast.parse(source).body[0]


def _arguments(source):
    a = _first(source).args
    names = [x.arg for x in a.posonlyargs + a.args + ([a.vararg] if a.vararg else []) + a.kwonlyargs + ([a.kwarg] if a.kwarg else [])]
    return ", ".join(names) or "none"


# name -> (instruction, what is given, what is wanted), of a harvested pair
TASKS = {
    "describe": ("Say in one sentence what this Python function does.", "input", lambda pair: pair["output"]),
    "name": ("Name a Python function that does this. Answer with the name alone.", "output", lambda pair: _first(pair["input"]).name),
    "signature": ("Write the def line of a Python function that does this.", "output", lambda pair: pair["input"].splitlines()[0]),
    "arguments": ("List the parameters of this Python function, separated by commas.", "input", lambda pair: _arguments(pair["input"])),
    "module": ("Which module of the standard library is this from?", "input", lambda pair: pair["module"]),
    "lines": ("How many lines has this Python function? Answer with a number.", "input", lambda pair: str(len(pair["input"].splitlines()))),
    "shout": ("Repeat this in capital letters.", "output", lambda pair: pair["output"].upper()),
    "verb": ("Answer with the first word of this text.", "output", lambda pair: pair["output"].split()[0]),
}


def rows(task, pairs):
    """Instruction rows of one task."""
    instruction, given, wanted = TASKS[task]
    return [{"instruction": instruction, "input": pair[given], "output": wanted(pair), "module": pair["module"]} for pair in pairs]
