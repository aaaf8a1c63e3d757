"""Every contender's results against float64, by the error rule of the tests: there is no other."""

import importlib.util
from pathlib import Path

import torch

from .cases import SEED, is_ours

_spec = importlib.util.spec_from_file_location("numerics", Path(__file__).parent.parent / "tests" / "numerics.py")
numerics = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(numerics)


def results(contender, work):
    """{name: what is looked at of a result} of one call, and the mask it was under."""
    if contender.restart:
        contender.restart()
    with contender.context():
        torch.manual_seed(SEED)
        if contender.ready:
            contender.ready()
        found = (contender.look or contender.call)()
    torch.manual_seed(SEED)
    mask = contender.mask() if contender.mask else None
    return {name: work.look(name, tensor).detach() for name, tensor in found.items()}, mask


FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError)  # of other people's code, too


def judge(work, base):
    """{contender: {"error": its largest error over the eager layer's, "bound": over what the rule allows, "match"}}.

    Of others, who raises takes no further part, and stands in the work's `skipped` with the reason; where this library raises, that is its
    result, and is not caught.
    """
    eager, judged = {}, {}
    for contender in [c for c in work.contenders if not c.bare]:
        try:
            found, mask = results(contender, work)
        except FAILURES as error:
            if is_ours(contender.name):
                raise
            work.leave_out(contender, f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
            continue
        if contender.cast not in eager:
            outputs, mask_of_eager = work.eager(contender.cast)
            eager[contender.cast] = outputs, work.reference(mask_of_eager)
        outputs, exact = eager[contender.cast]
        expected = work.reference(mask)
        over_eager = over_bound = 0.0
        for name, out in found.items():
            measure = numerics.relative_error(outputs[name], exact[name])
            error = numerics.relative_error(out, expected[name]) if out.isfinite().all() else float("inf")
            over_bound = max(over_bound, error / numerics.allowed(out.dtype, measure, base, work.lengths[name]))
            over_eager = max(over_eager, error / measure if measure else 0.0)
        judged[contender.name] = {"error": over_eager, "bound": over_bound, "match": over_bound <= 1}
    return judged
