"""Instruction data that is on every machine: Python's standard library, as (function -> first sentence of its docstring)."""

import ast
import hashlib
import re
import sysconfig
from pathlib import Path

INSTRUCTION = "Say in one sentence what this Python function does."
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
SOURCE_CHARACTERS = (30, 1000)  # shorter ones say nothing; longer ones cost more than they teach
ANSWER_WORDS = (3, 30)


def harvest():
    """[{"instruction", "input", "output", "module"}], sorted, without repeats: the same list for the same Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not LEFT_OUT & set(inside.parts):
            for source, answer in _functions(path):
                pairs.setdefault(source, {"instruction": INSTRUCTION, "input": source, "output": answer, "module": inside.parts[0].removesuffix(".py")})
    return list(pairs.values())


def split(pairs, held_out_share=0.15):
    """(train, held out), by module: no module stands on both sides."""
    train, held_out = [], []
    for pair in pairs:
        digest = hashlib.sha256(pair["module"].encode()).digest()
        (held_out if digest[0] < 256 * held_out_share else train).append(pair)
    return train, held_out


def _functions(path):
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        answer = _first_sentence(docstring) if docstring else None
        if answer:
            node.body = node.body[1:]
            node.decorator_list = []
            source = ast.unparse(node)
            if SOURCE_CHARACTERS[0] <= len(source) <= SOURCE_CHARACTERS[1]:
                yield source, answer


def _first_sentence(docstring):
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    words = sentence.split()
    if not ANSWER_WORDS[0] <= len(words) <= ANSWER_WORDS[1] or not sentence.isascii() or re.search(r"[<>{}|=]|->|::", sentence):
        return None
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."


def general_text():
    """Prose that has nothing to do with the task: the language reference that ships with pydoc."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
