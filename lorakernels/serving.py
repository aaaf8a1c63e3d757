"""A whole model on a pool of adapters."""

from .models import Report, check_model, why_not_many
from .pool import AdapterPool, weight_of
from .pool_modules import PoolLinear


class Calls:
    """A served model's hooks: its adapter_ids open a route for one forward."""

    def __init__(self, pool):
        self.pool, self.opened = pool, []

    def before(self, module, arguments, named):
        named = dict(named)
        adapters = named.pop("adapter_ids", None)
        route = None if adapters is None else self.pool.route(adapters)
        if route is not None:
            route.__enter__()
        self.opened.append(route)
        if self.pool.open_route is not None:
            self.pool.open_route.begin()
        return arguments, named

    def after(self, module, arguments, named, output):
        if self.pool.open_route is not None:
            self.pool.open_route.end()
        if self.opened and (route := self.opened.pop()) is not None:
            route.__exit__(None, None, None)


def serve_adapters(model, pool):
    """Put a model on a pool that was made for it, in place: with pool.route([...]): model(...), or model(..., adapter_ids=[...])

    adapter_ids: what pool.route takes. Without either the model gives its base's own answer. Returns a Report of the modules
    replaced, and of those skipped and why. Raises TypeError or ValueError, and leaves the model as it was.
    """
    check_model(model)
    if not isinstance(pool, AdapterPool):
        raise TypeError(f"pool: expected an AdapterPool, got a {type(pool).__name__}")
    layers = {}
    for name, place in pool.places.items():
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"pool: it was made for a model with {name}, which this one has not") from None
        if why := why_not_many(model, name):
            raise ValueError(f"model: {name}: {why}")
        want = place.shared.rows_A.shape[2], place.rows_B.shape[1], place.rows_B.device
        if (base.in_features, base.out_features, weight_of(base).device) != want:
            raise ValueError(f"pool: {name} was {want[0]} -> {want[1]} on {want[2]}, and is {base.in_features} -> {base.out_features} on {weight_of(base).device}")
        layers[name] = PoolLinear(base, pool, place.shared, place.part, place.rows_B)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    calls = Calls(pool)
    model.register_forward_pre_hook(calls.before, with_kwargs=True)
    model.register_forward_hook(calls.after, with_kwargs=True, always_call=True)
    report = Report({name: "replaced" for name in layers})
    report.update({name: f"skipped: {why}" for name, why in pool.skipped.items()})
    return report
