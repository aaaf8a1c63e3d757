"""Many adapters on one model: the memory that they lie in, who is in it, and which rows of a batch use which."""

import collections
import contextlib
import os
import threading
from typing import NamedTuple

import torch

from .checkpoint import read_adapter, sort_tensors
from .checks import check_finite, check_flag, check_float_dtype, check_number, check_size
from .models import check_model, find_targets, report_on, why_not_many
from .modules import lora_scaling
from .nf4_modules import NF4Linear
from .pool_modules import Shared
from .routes import NOBODY, NONE, SLOTS, Route, Tables
from .streams import Readers

# Children of one module that are given the same x: one product with A serves them all.
SHARE = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"wq", "wk", "wv"}, {"w1", "w3"}, {"wi_0", "wi_1"})


class Adapter:
    """One adapter of a pool: in a slot with its rank rows, or in CPU memory."""

    def __init__(self, modules, matrices):
        self.modules, self.matrices = modules, matrices  # {module: (rank, scaling)}; {module: (A (r,K), B (N,r))} while it is in no slot
        self.rank = max(rank for rank, _ in modules.values())
        self.slot, self.id, self.pages = None, None, []
        self.pinned, self.used, self.routes = False, 0, 0


class Place(NamedTuple):
    """Where a module's rows lie."""

    shared: Shared
    part: int
    rows_B: torch.Tensor  # (P, N, 1)
    row: int  # of the tables of its device


class AdapterPool:
    """Adapters of any rank in one preallocated memory, for a model that serves them (serve_adapters)

    The memory is `capacity` rank rows of every target module: of A (P, K) and of B (P, N). An adapter of rank r (the largest of its
    modules') holds r of them, anywhere, and a slot. When either runs out, the least recently used adapter that is neither pinned nor
    in an open route goes to CPU memory, and comes back when it is routed to.

    model: as it is before serve_adapters. capacity: the sum of the ranks of all adapters that fit at once. max_rank: of an adapter, at
    most 512. slots: how many adapters fit at once (as many as capacity has rows, up to 1024). target_modules, exclude_modules: as
    apply_lora's. dtype: what adapters are kept in; None: float32 over half-precision and NF4 weights, else the weights' dtype.

    Every call of `add` and `replace` gives the adapter an id that no other ever has; `remove` and `replace` end it. A row with an id
    that has ended is an error, or NaN on a GPU (check()); it is never served by another adapter. Methods may be called while
    another thread serves; one forward of the model runs at a time.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, model, capacity, *, max_rank=64, slots=None, target_modules="all-linear", exclude_modules=None, dtype=None):
        check_model(model)
        for name, value in (("capacity", capacity), ("max_rank", max_rank)) + ((("slots", slots),) if slots is not None else ()):
            check_size(name, value)
        if max_rank > 512:
            raise ValueError(f"max_rank: expected at most 512, got {max_rank}")
        slots = min(capacity, 1024) if slots is None else slots
        if slots > SLOTS:
            raise ValueError(f"slots: expected at most {SLOTS}, got {slots}")
        if dtype is not None:
            check_float_dtype("dtype", dtype)
        wanted = find_targets(model, target_modules, exclude_modules, None, None)
        report = report_on(model, wanted, why_not_many)
        self.skipped = report.skipped
        bases = {name: model.get_submodule(name) for name in report.replaced}
        if not bases:
            raise ValueError(f"target_modules: nothing that a pool can serve; skipped: {self.skipped or 'nothing'}")
        self.capacity, self.max_rank, self.slots, self.open_route = capacity, max_rank, slots, None
        self._dtype, self._lock, self._clock, self._generation = dtype, threading.RLock(), 0, 0
        self._adapters, self._leaving, self._open_to_all = {}, [], 0
        self._free_slots, self._free_pages = collections.deque(range(slots)), collections.deque(range(capacity))
        self._allocate(bases)
        self._readers = Readers(self.tables)

    def _allocate(self, bases):
        device_of = {name: weight_of(base).device for name, base in bases.items()}
        counts = collections.Counter(device_of.values())
        self.tables = {device: Tables(device, count, self.slots, self.max_rank) for device, count in counts.items()}
        self.places, row = {}, collections.Counter()
        for names in _sharing(bases):
            base, device = bases[names[0]], device_of[names[0]]
            tables, first = self.tables[device], row[device]
            dtype = self._dtype_over(names[0], base)
            rows_A = torch.zeros(self.capacity, len(names), base.in_features, dtype=dtype, device=device)
            of_these = slice(first, first + len(names))
            shared = Shared(rows_A, tables.ranks[of_these], tables.scaling[of_these], tables.pages)
            for part, name in enumerate(names):
                rows_B = torch.zeros(self.capacity, bases[name].out_features, 1, dtype=dtype, device=device)
                self.places[name] = Place(shared, part, rows_B, first + part)
            row[device] += len(names)

    def _dtype_over(self, name, base):
        own = base.dtype if isinstance(base, NF4Linear) else base.weight.dtype
        if self._dtype is None:
            return torch.float32 if own.itemsize == 2 or isinstance(base, NF4Linear) else own
        if self._dtype not in (own, torch.float32):
            raise TypeError(f"dtype: expected {own} ({name}'s) or torch.float32, got {self._dtype}")
        return self._dtype

    def __reduce_ex__(self, protocol):
        raise TypeError("an AdapterPool, and a model that serves from one, cannot be copied or pickled: copy the model before serve_adapters()")

    # -- who is in the pool --------------------------------------------------------------------------------------------

    def names(self):
        """The adapters' names, in the order in which they came."""
        return list(self._adapters)

    def resident(self):
        """Those that are in the pool's memory, not in the CPU's."""
        return [name for name, adapter in self._adapters.items() if adapter.slot is not None]

    def __len__(self):
        return len(self._adapters)

    def __contains__(self, name):
        return name in self._adapters

    def free_rows(self):
        """How many rank rows nobody holds."""
        return len(self._free_pages)

    def memory(self):
        """Bytes of all rank rows."""
        tensors = {id(t): t for place in self.places.values() for t in (place.shared.rows_A, place.rows_B)}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def add(self, name, adapter, *, lora_alpha=None, use_rslora=False):
        """Put an adapter into the pool and return its id.

        adapter: a directory with PEFT's files, or {tensor name: tensor} under PEFT's names; for these lora_alpha (each matrix's rank by
        default) and use_rslora give the scaling. It may lack modules of the pool, and differ in rank from module to module.

        Raises TypeError, ValueError or FileNotFoundError naming the argument, file, module or tensor: a name that is taken, modules
        that the pool has not, shapes, ranks above max_rank, values that are not finite, biases, DoRA; RuntimeError where there is no
        room among what is pinned and in use. The pool is then as it was.
        """
        self._check_new(name)
        made = self._read(adapter, lora_alpha, use_rslora)
        with self._lock:
            self._check_new(name)
            self._check_room(repr(name), made.rank)
            self._stage(made)
            self._adapters[name] = made
            self._bring([name])
            return made.id

    def replace(self, name, adapter, *, lora_alpha=None, use_rslora=False):
        """Give a name another adapter, as `add`; the old one's id ends. Returns the new id. After an error the old one stands."""
        self._known(name)
        made = self._read(adapter, lora_alpha, use_rslora)
        with self._lock:
            old = self._known(name)
            own = (0, 0) if old.slot is None or self._busy(old) else (old.rank, 1)
            self._check_room(repr(name), made.rank, 1, {name}, own)
            self._stage(made)
            made.pinned = old.pinned
            self._drop(old)
            self._adapters[name] = made
            self._bring([name])
            return made.id

    def remove(self, name):
        """Forget an adapter; its id ends, in open routes too."""
        with self._lock:
            self._drop(self._known(name))
            del self._adapters[name]

    def pin(self, name):
        """Keep an adapter in the pool's memory until unpin()."""
        with self._lock:
            adapter = self._known(name)
            self._bring([name])
            adapter.pinned = True

    def unpin(self, name):
        """Let an adapter go to CPU memory again when others need its room."""
        with self._lock:
            self._known(name).pinned = False

    def evict(self, name):
        """Move an adapter to CPU memory now. Its id ends; it gets another when it comes back."""
        with self._lock:
            adapter = self._known(name)
            if adapter.pinned or self._busy(adapter):
                raise RuntimeError(f"name: {name!r} is {'pinned' if adapter.pinned else 'in an open route'}")
            if adapter.slot is not None:
                self._evict(adapter)

    def id(self, name):
        """An adapter's id, for adapter_ids: good until it is removed, replaced or evicted. Brings it into the pool's memory."""
        with self._lock:
            adapter = self._known(name)
            self._bring([name])
            return adapter.id

    # -- routes --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def route(self, adapters):
        """Inside, row (or sequence) i of a batch uses adapters[i]: a name, None for no adapter, or an id

        adapters: a list, or an int64 tensor of ids, -1 for none, of shape (batch,) or x.shape[:-1]. Those of a list are brought into the
        pool's memory, all at once, and stay there while the route is open. A tensor is read by the kernels, where it lies: ids changed in
        place, before a captured graph is replayed too, are those of the next forward; while it is open nobody leaves the memory.

        Raises TypeError or ValueError naming what is wrong; RuntimeError where the adapters do not fit at once.
        """
        with self._lock:
            if isinstance(adapters, torch.Tensor):
                if adapters.dtype != torch.int64:
                    raise TypeError(f"adapters: expected int64 ids, got {adapters.dtype}")
                ids, held = adapters, None
            else:
                ids, held = self._of_list(adapters)
            self._hold(held, 1)
            before, self.open_route = self.open_route, Route(self, ids, given=held is None)
        try:
            yield self.open_route
        finally:
            with self._lock:
                self.open_route = before
                self._hold(held, -1)
                self._readers.have_read()
                for adapter in [adapter for adapter in self._leaving if not self._busy(adapter)]:
                    self._leaving.remove(adapter)
                    self._free(adapter)

    def _of_list(self, adapters):
        """The ids of a list of adapters, and the adapters."""
        if isinstance(adapters, str) or not isinstance(adapters, (list, tuple)):
            raise TypeError(f"adapters: expected a list of names, ids and None, or a tensor of ids, got {adapters!r}")
        name_of = {adapter.id: name for name, adapter in self._adapters.items() if adapter.slot is not None}
        names = []
        for adapter in adapters:
            if adapter is not None and not isinstance(adapter, str) and type(adapter) is not int:
                raise TypeError(f"adapters: expected names, ids and None, got {adapter!r}")
            name = name_of.get(adapter, adapter) if type(adapter) is int else adapter
            if type(name) is int and name != NONE:
                raise ValueError(f"adapters: {name} is no adapter's id, or its adapter has left the pool's memory")
            names.append(name if isinstance(name, str) else None)
        held = [self._known(name) for name in dict.fromkeys(names) if name is not None]
        self._bring(list(dict.fromkeys(name for name in names if name is not None)))
        return torch.tensor([NONE if name is None else self._adapters[name].id for name in names], dtype=torch.int64), held

    def _hold(self, held, change):
        if held is None:
            self._open_to_all += change
        for adapter in held or ():
            adapter.routes += change

    def _busy(self, adapter):
        """Whether a forward may be reading it now."""
        return bool(adapter.routes or self._open_to_all)

    # -- the memory ----------------------------------------------------------------------------------------------------

    def _check_new(self, name):
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a name, got {name!r}")
        if name in self._adapters:
            raise ValueError(f"name: {name!r} is in the pool already; replace() gives it another adapter")

    def _known(self, name):
        if name not in self._adapters:
            raise ValueError(f"name: the pool has no adapter {name!r}; it has {', '.join(map(repr, self._adapters)) or 'none'}")
        return self._adapters[name]

    def _idle(self, besides):
        """Adapters that may go to CPU memory, those used longest ago first."""
        idle = [a for name, a in self._adapters.items() if a.slot is not None and not a.pinned and not self._busy(a) and name not in besides]
        return sorted(idle, key=lambda adapter: adapter.used)

    def _check_room(self, what, rows, slots=1, besides=(), more=(0, 0)):
        """RuntimeError unless there is room once the idle ones have gone; `more` rows and slots become free as well."""
        idle = self._idle(besides)
        if len(self._free_pages) + sum(a.rank for a in idle) + more[0] < rows or len(self._free_slots) + len(idle) + more[1] < slots:
            raise RuntimeError(
                f"the pool has no room for {what}: {rows} rank rows and {slots} slots; {len(self._free_pages)} of {self.capacity} rows and"
                f" {len(self._free_slots)} of {self.slots} slots are free, {sum(a.rank for a in idle)} and {len(idle)} can be, the rest is pinned or in use"
            )

    def _bring(self, names):
        """Into the memory, all of them or none; they are those used last."""
        absent = [self._adapters[name] for name in names if self._adapters[name].slot is None]
        rows, slots = sum(adapter.rank for adapter in absent), len(absent)
        if absent:
            self._check_room(", ".join(map(repr, names)), rows, slots, names)
        for adapter in absent:
            self._stage(adapter)
        for other in self._idle(names):
            if len(self._free_pages) >= rows and len(self._free_slots) >= slots:
                break
            self._evict(other)
        if absent:
            self._readers.wait()
            for adapter in absent:
                self._write(adapter)
            self._readers.finish()
        self._clock += 1
        for name in names:
            self._adapters[name].used = self._clock

    def _stage(self, adapter):
        """Its matrices onto their devices: what can run out of memory does so before anything is changed."""
        for name, (A, B) in adapter.matrices.items():
            device = self.places[name].rows_B.device
            adapter.matrices[name] = A.to(device), B.to(device)

    @torch.no_grad()
    def _write(self, adapter):
        """Into free rows and a free slot: its rows first, then the tables, the generation that makes its id good last."""
        slot, pages = self._free_slots.popleft(), [self._free_pages.popleft() for _ in range(adapter.rank)]
        self._generation += 1
        for device, tables in self.tables.items():
            at = torch.tensor(pages, device=device)
            ranks, scaling = [0] * len(tables.ranks), [0.0] * len(tables.ranks)
            for name, (rank, scale) in adapter.modules.items():
                place = self.places[name]
                if place.rows_B.device == device:
                    A, B = adapter.matrices[name]
                    place.shared.rows_A[at[:rank], place.part] = A
                    place.rows_B[at[:rank], :, 0] = B.t()
                    ranks[place.row], scaling[place.row] = rank, scale
            tables.pages[slot, : len(pages)] = at
            tables.ranks[:, slot] = torch.tensor(ranks, device=device)
            tables.scaling[:, slot] = torch.tensor(scaling, device=device)
            tables.generation[slot] = self._generation
        adapter.slot, adapter.pages, adapter.id, adapter.matrices = slot, pages, self._generation * SLOTS + slot, None

    @torch.no_grad()
    def _evict(self, adapter):
        """To CPU memory, as it is."""
        matrices = {}
        for name, (rank, _) in adapter.modules.items():
            place = self.places[name]
            at = torch.tensor(adapter.pages[:rank], device=place.rows_B.device)
            matrices[name] = place.shared.rows_A[at, place.part].cpu(), place.rows_B[at, :, 0].t().cpu()
        self._end_id(adapter)
        self._free(adapter)
        adapter.matrices = matrices

    def _drop(self, adapter):
        """End its id; its rows and slot are free once no open route can be reading them."""
        if adapter.slot is None:
            return
        self._end_id(adapter)
        if self._busy(adapter):
            self._leaving.append(adapter)
        else:
            self._free(adapter)

    def _end_id(self, adapter):
        for tables in self.tables.values():
            tables.generation[adapter.slot] = NOBODY
        self._readers.finish()

    def _free(self, adapter):
        self._free_slots.append(adapter.slot)
        self._free_pages.extend(adapter.pages)
        adapter.slot, adapter.id, adapter.pages = None, None, []

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self, source, lora_alpha, use_rslora):
        """An Adapter, every piece of it checked."""
        if isinstance(source, (str, os.PathLike)):
            if lora_alpha is not None or use_rslora:
                raise ValueError("lora_alpha, use_rslora: a directory's adapter_config.json has its own")
            config, pieces = read_adapter(source)
            where = str(source)
        elif isinstance(source, dict):
            config, where = None, "adapter"
            pieces, biases = sort_tensors(source, where)
            if biases:
                raise ValueError(f"{where}: {next(iter(biases))}: a pool holds no biases")
        else:
            raise TypeError(f"adapter: expected a directory or a dict of tensors, got a {type(source).__name__}")
        check_flag("use_rslora", use_rslora)
        alpha = None if lora_alpha is None else check_number("lora_alpha", lora_alpha)
        modules, matrices = {}, {}
        for name, found in pieces.items():
            place = self.places.get(name)
            if place is None:
                raise ValueError(f"{where}: {name}: {self.skipped.get(name, 'not one of the modules that the pool serves')}")
            A, B = found.get("lora_A.weight"), found.get("lora_B.weight")
            if A is None or B is None:
                raise ValueError(f"{where}: {name}: expected both lora_A.weight and lora_B.weight")
            if "lora_B.bias" in found:
                raise ValueError(f"{where}: {name}: lora_bias is not supported in a pool")
            rank, own_alpha, rslora = (A.shape[0] if A.dim() else 0, alpha, use_rslora) if config is None else config(name)
            K, N = place.shared.rows_A.shape[2], place.rows_B.shape[1]
            if not 1 <= rank <= self.max_rank:
                raise ValueError(f"{where}: {name}: expected a rank from 1 to max_rank={self.max_rank}, got {rank}")
            for kind, tensor, shape in (("lora_A", A, (rank, K)), ("lora_B", B, (N, rank))):
                if tuple(tensor.shape) != shape:
                    raise ValueError(f"{where}: {name}.{kind}: expected shape {shape}, got {tuple(tensor.shape)}")
            A, B = (tensor.detach().to(place.rows_B.dtype) for tensor in (A, B))
            for kind, tensor in (("lora_A", A), ("lora_B", B)):
                check_finite(f"{where}: {name}.{kind}", tensor, "the pool's")
            modules[name] = rank, lora_scaling(rank if own_alpha is None else own_alpha, rank, rslora)
            matrices[name] = A, B
        if not modules:
            raise ValueError(f"{where}: it holds no LoRA tensors")
        return Adapter(modules, matrices)


def weight_of(base):
    """A base's weight where it lies: dense (N, K), or packed."""
    return base.packed if isinstance(base, NF4Linear) else base.weight


def _sharing(bases):
    """Names of modules that are given the same x, by the names that models give to such; the rest one by one."""
    taken = set()
    for name, base in bases.items():
        if name in taken:
            continue
        parent, _, child = name.rpartition(".")
        kin = next((kin for kin in SHARE if child in kin), {child})
        full = [f"{parent}.{other}".lstrip(".") for other in sorted(kin)]
        full = [n for n in full if n in bases and bases[n].in_features == base.in_features and weight_of(bases[n]).device == weight_of(base).device]
        full = [n for n in full if weight_of(bases[n]).dtype == weight_of(base).dtype]
        taken.update(full)
        yield full
