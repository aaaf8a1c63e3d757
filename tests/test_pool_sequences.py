"""Any sequence of calls of a pool, against a dictionary."""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numerics import check
from test_multi import F32
from test_pool import adapter_of, alone, by_hand
from torch import nn

import lorakernels as lk


class PoolAgainstDictionary(RuleBasedStateMachine):
    NAMES = st.sampled_from("abcdef")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
        self.model = copy.deepcopy(self.plain)
        self.pool = lk.AdapterPool(self.model, 12, slots=4, max_rank=6)
        lk.serve_adapters(self.model, self.pool)
        self.x, self.adapters, self.pinned, self.ended, self.last, self.seed = torch.randn(1, 6), {}, set(), set(), {}, 0

    def new(self, rank):
        self.seed += 1
        return adapter_of(self.plain, rank, self.seed)

    def rank(self, name):
        return next(iter(self.adapters[name].values())).shape[0]

    def room_for(self, names, more=0):
        kept = self.pinned | set(names)
        return sum(map(self.rank, kept)) + more <= 12 and len(kept) + bool(more) <= 4

    def note_ids(self):
        for name, old in list(self.last.items()):
            adapter = self.pool._adapters.get(name)
            if adapter is None or adapter.id != old:
                self.ended.add(self.last.pop(name))
        for name in self.pool.resident():
            self.last[name] = self.pool._adapters[name].id

    @rule(name=NAMES, rank=st.integers(1, 6))
    def add(self, name, rank):
        tensors = self.new(rank)
        if name in self.adapters:
            with pytest.raises(ValueError):
                self.pool.add(name, tensors)
        elif self.room_for([], rank):
            self.pool.add(name, tensors)
            self.adapters[name] = tensors
        else:
            with pytest.raises(RuntimeError):
                self.pool.add(name, tensors)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), rank=st.integers(1, 6))
    def replace(self, data, rank):
        name, tensors = data.draw(st.sampled_from(sorted(self.adapters))), self.new(rank)
        others = self.pinned - {name}
        if sum(map(self.rank, others)) + rank <= 12 and len(others) < 4:
            self.pool.replace(name, tensors)
            self.adapters[name] = tensors
        else:
            with pytest.raises(RuntimeError):
                self.pool.replace(name, tensors)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        self.pool.remove(name)
        del self.adapters[name]
        self.pinned.discard(name)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def pin_or_unpin(self, data):
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        if name in self.pinned:
            self.pool.unpin(name)
            self.pinned.discard(name)
        elif self.room_for([name]):
            self.pool.pin(name)
            self.pinned.add(name)
        else:
            with pytest.raises(RuntimeError):
                self.pool.pin(name)

    @precondition(lambda self: set(self.adapters) - self.pinned)
    @rule(data=st.data())
    def evict(self, data):
        self.pool.evict(data.draw(st.sampled_from(sorted(set(self.adapters) - self.pinned))))

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def serve(self, data):
        names = data.draw(st.lists(st.sampled_from([None, *sorted(self.adapters)]), min_size=1, max_size=5))
        x = self.x.expand(len(names), 6)
        if not self.room_for([name for name in names if name]):
            with pytest.raises(RuntimeError):
                self.pool.route(names).__enter__()
            return
        with torch.no_grad():
            y = self.model(x, adapter_ids=names)
            for i, name in enumerate(names):
                tensors = self.adapters.get(name, {})
                single = alone(self.plain, tensors, x, self.rank(name))[i] if name else self.plain(x)[i]
                check("pool stateful", y[i], by_hand(self.plain, tensors, x[i], 1.0), single, base=F32, K=6)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def serve_an_ended_id(self, data):
        with pytest.raises(ValueError), torch.no_grad():
            self.model(self.x, adapter_ids=torch.tensor([data.draw(st.sampled_from(sorted(self.ended)))]))

    @invariant()
    def the_pool_is_whole(self):
        pool, resident = self.pool, [self.pool._adapters[name] for name in self.pool.resident()]
        self.note_ids()
        assert set(pool.names()) == set(self.adapters) and self.pinned <= set(pool.resident())
        pages = [p for adapter in resident for p in adapter.pages] + list(pool._free_pages)
        slots = [adapter.slot for adapter in resident] + list(pool._free_slots)
        assert sorted(pages) == list(range(12)) and sorted(slots) == list(range(4)) and not pool._leaving


TestPoolAgainstDictionary = PoolAgainstDictionary.TestCase
TestPoolAgainstDictionary.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
