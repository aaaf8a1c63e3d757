"""Huge pages: a wish that changes no value and reaches no memory but the tensor's own."""

import copy

import numpy
import pytest
import torch

import lorakernels as lk
from lorakernels import pages

SIZE = 4096  # of a huge page, here


@pytest.fixture
def advised(monkeypatch):
    """What the system was asked: [begin, end, advice]."""
    calls = []
    monkeypatch.setattr(pages, "_system", lambda: (lambda begin, count, advice: calls.append((begin, begin + count, advice)), SIZE))
    return calls


@pytest.mark.parametrize("offset, count", [(0, 5 * SIZE), (1, 5 * SIZE), (SIZE - 1, SIZE + 1), (7, 3 * SIZE + 11)])
def test_whole_pages_within_the_tensor_are_asked_for(advised, offset, count):
    tensor = torch.zeros(8 * SIZE, dtype=torch.uint8)
    tensor = tensor[-tensor.data_ptr() % SIZE :][offset : offset + count]
    assert pages.on_huge_pages(tensor) is tensor
    (begin, end, first), (again, _, second) = advised
    assert (first, second, again) == (pages.MADV_HUGEPAGE, pages.MADV_COLLAPSE, begin)
    assert begin % SIZE == end % SIZE == 0
    assert 0 <= begin - tensor.data_ptr() < SIZE and 0 <= tensor.data_ptr() + count - end < SIZE


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(SIZE // 8), torch.zeros(0), torch.zeros(9, SIZE).t(), torch.zeros(4 * SIZE, device="meta"), torch.zeros(4 * SIZE).to_sparse(), None],
    ids=["small", "empty", "transposed", "meta", "sparse", "none"],
)
def test_nothing_else_is_asked(advised, tensor):
    assert pages.on_huge_pages(tensor) is tensor
    assert not advised


def test_values_stay(tmp_path):
    """With the system's own answer, whatever it is; memory of a file that must not be written, too."""
    real = torch.randint(256, (5 << 20,), dtype=torch.uint8)
    before = real.clone()
    assert torch.equal(pages.on_huge_pages(real), before)
    numpy.save(tmp_path / "weights.npy", before.numpy())
    mapped = torch.from_numpy(numpy.load(tmp_path / "weights.npy", mmap_mode="c"))
    assert torch.equal(pages.on_huge_pages(mapped), before)


def test_layers_over_nf4_ask_for_their_codes(advised):
    linear = torch.nn.Linear(256, 256)
    layer = lk.NF4Linear.from_linear(linear)
    asked = {(begin, end) for begin, end, _ in advised}
    begin = layer.packed.data_ptr()
    assert any(begin <= first and last <= begin + layer.packed.nbytes for first, last in asked)
    advised.clear()
    loaded = copy.deepcopy(layer)
    loaded.load_state_dict(layer.state_dict())
    begin = loaded.packed.data_ptr()
    assert advised and all(begin <= first and last <= begin + loaded.packed.nbytes for first, last, _ in advised)


@pytest.mark.parametrize("said", ["always madvise [never]", None])
def test_a_system_without_huge_pages(monkeypatch, tmp_path, said):
    if said:
        (tmp_path / "enabled").write_text(said)
    monkeypatch.setattr(pages, "SYSTEM", tmp_path)
    pages._system.cache_clear()
    tensor = torch.zeros(5 << 20, dtype=torch.uint8)
    try:
        assert pages._system() is None and pages.on_huge_pages(tensor) is tensor
    finally:
        pages._system.cache_clear()
