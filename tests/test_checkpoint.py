"""Adapter files: what is written, and every way in which what is read can be wrong. After an error the model is as it was."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.modules import LoraLinear


def base():
    torch.manual_seed(1)
    return nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(8, 6, bias=False), "act": nn.ReLU()})


@pytest.fixture
def saved(tmp_path):
    model = base()
    lk.apply_lora(model, r=2, lora_alpha=3, target_modules=["q", "v"])
    for _, layer in lk.models.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    lk.save_adapter(model, tmp_path)
    return tmp_path


def outputs(model):
    x = torch.linspace(-1, 1, 16).view(2, 8)
    return torch.cat([model["q"](x), model["v"](x)])


def test_files_are_pefts(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2 and config["lora_alpha"] == 3 and config["target_modules"] == ["q", "v"]
    assert sorted(load_file(saved / "adapter_model.safetensors")) == [
        f"base_model.model.{name}.lora_{which}.weight" for name in "qv" for which in "AB"
    ]


def test_saved_tensors_are_copies_of_any_layout(tmp_path):
    model = base()
    lk.apply_lora(model, r=2, target_modules=["q"])
    model["q"].lora_B.data = torch.randn(2, 6).t()
    lk.save_adapter(model, tmp_path)
    loaded = base()
    lk.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded["q"].lora_B, model["q"].lora_B)


def test_load_into_a_model_that_has_the_adapter(saved):
    fresh, there = base(), base()
    assert lk.load_adapter(fresh, saved) == ["q", "v"]
    lk.apply_lora(there, r=2, lora_alpha=3, target_modules=["q", "v"])
    layer = there["q"]
    lk.load_adapter(there, saved)
    assert there["q"] is layer and torch.equal(outputs(there), outputs(fresh))


def test_loaded_adapters_train_and_the_rest_is_frozen(saved):
    model = base()
    lk.load_adapter(model, saved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{m}.lora_{w}" for m in "qv" for w in "AB"}


def test_mixed_ranks_and_alphas_survive(tmp_path):
    model = base()
    lk.apply_lora(model, r=2, lora_alpha=3, target_modules=["q", "v"], rank_pattern={"v": 5}, alpha_pattern={"q": 7.5})
    lk.save_adapter(model, tmp_path)
    loaded = base()
    lk.load_adapter(loaded, tmp_path)
    assert [(layer.r, layer.lora_alpha) for _, layer in lk.models.lora_layers(loaded)] == [(2, 7.5), (5, 3)]


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    before = (saved / "adapter_model.safetensors").read_bytes()
    model = base()
    lk.load_adapter(model, saved)
    nn.init.normal_(model["q"].lora_B)

    def failing(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        lk.save_adapter(model, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert len(list(saved.iterdir())) == 2


def test_saving_a_spent_adapter_is_refused(tmp_path):
    model = base()
    lk.apply_lora(model, r=2, target_modules=["q"])
    lk.merge_adapters(model)
    with pytest.raises(ValueError, match="q was merged with keep_base=False"):
        lk.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_saving_a_merged_adapter_that_kept_its_base(saved, tmp_path):
    model = base()
    lk.load_adapter(model, saved)
    lk.merge_adapters(model, keep_base=True)
    lk.save_adapter(model, tmp_path / "again")
    for name, tensor in load_file(saved / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "again" / "adapter_model.safetensors")[name])


def test_layers_that_pefts_config_cannot_describe(tmp_path):
    model = nn.ModuleDict({"a": LoraLinear(4, 4), "b": LoraLinear(4, 4, use_rslora=True)})
    with pytest.raises(ValueError, match="differ in use_rslora"):
        lk.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# -- what can be wrong ---------------------------------------------------------------------------------------------------


def config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def weights(edit):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def raw(edit):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"never": "read"}))


def hostile_header(data):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    return struct.pack("<Q", len(header)) + header


P = "base_model.model."


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json: no such file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "adapter_model.safetensors: no such file"),
        (pickled, FileNotFoundError, "adapter_model.bin is a pickle, which is never read"),
        (config_text(""), ValueError, "adapter_config.json: not JSON"),
        (config_text("{"), ValueError, "adapter_config.json: not JSON"),
        (config_text("[" * 100000), ValueError, "adapter_config.json: not JSON"),
        (config_text("[]"), ValueError, "expected a JSON object, got a list"),
        (config_text('{"peft_type": "LORA", "x": "' + "a" * (1 << 20) + '"}'), ValueError, "expected at most 1048576 bytes"),
        (config(peft_type="IA3"), ValueError, "peft_type: expected LORA, got 'IA3'"),
        (config(r=0), ValueError, "r: expected an int of at least 1, got 0"),
        (config(r="2"), ValueError, "r: expected an int of at least 1, got '2'"),
        (config(r=3), ValueError, "q.lora_A: expected shape (3, 8) (rank 3 by adapter_config.json), got (2, 8)"),
        (config(lora_alpha=float("nan")), ValueError, "lora_alpha: expected a finite number"),
        (config(lora_dropout=2), ValueError, "lora_dropout: expected a probability"),
        (config(bias="some"), ValueError, "bias: expected one of none, all, lora_only"),
        (config(rank_pattern=[1]), ValueError, "rank_pattern: expected a dict"),
        (config(rank_pattern={"(": 1}), ValueError, "rank_pattern: '(' is not a regular expression"),
        (config(rank_pattern={"q": -1}), ValueError, "r: expected an int of at least 1, got -1"),
        (config(rank_pattern={"q": 5}), ValueError, "q.lora_A: expected shape (5, 8)"),
        (config(use_dora=True), ValueError, "use_dora=True is not supported"),
        (config(fan_in_fan_out=True), ValueError, "fan_in_fan_out=True is not supported"),
        (config(modules_to_save=["lm_head"]), ValueError, "modules_to_save=['lm_head'] is not supported"),
        (config(target_parameters=["w"]), ValueError, "target_parameters=['w'] is not supported"),
        (config(something_new={"a": 1}), ValueError, "something_new={'a': 1} is not supported"),
        (config(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights='pissa_niter_4' changed the base weights"),
        (config(lora_bias=True), ValueError, "q: lora_bias=True in adapter_config.json, but lora_B.bias is missing"),
        (config(use_rslora="yes"), ValueError, "use_rslora: expected a bool, got a str"),
        (config(lora_bias=1), ValueError, "lora_bias: expected a bool, got a int"),
        (raw(lambda data: data[:50]), ValueError, "not a whole safetensors file"),
        (raw(lambda data: data[:-8]), ValueError, "not a whole safetensors file"),
        (raw(lambda data: b""), ValueError, "not a whole safetensors file"),
        (raw(lambda data: pickle.dumps({"a": 1})), ValueError, "not a whole safetensors file"),
        (raw(hostile_header), ValueError, "not a whole safetensors file"),
        (raw(lambda data: struct.pack("<Q", 2**63) + data[8:]), ValueError, "not a whole safetensors file"),
        (weights(lambda t: t.clear()), ValueError, "it holds no LoRA tensors"),
        (weights(lambda t: t.pop(P + "q.lora_B.weight")), ValueError, "q: expected both lora_A.weight and lora_B.weight"),
        (weights(lambda t: [t.pop(P + "v.lora_A.weight"), t.pop(P + "v.lora_B.weight")]), None, ""),
        (weights(lambda t: t.update({P + "z.lora_A.weight": torch.zeros(2, 8)})), ValueError, "z: the model has no such module"),
        (weights(lambda t: t.update({P + "act.lora_A.weight": torch.zeros(2, 8), P + "act.lora_B.weight": torch.zeros(2, 8)})), ValueError, "act: a ReLU is not an nn.Linear"),
        (weights(lambda t: t.update({P + "q.lora_A.weight": torch.zeros(2, 9)})), ValueError, "q.lora_A: expected shape (2, 8)"),
        (weights(lambda t: t.update({P + "v.lora_B.weight": torch.zeros(7, 2)})), ValueError, "v.lora_B: expected shape (6, 2)"),
        (weights(lambda t: t.update({P + "v.lora_B.weight": torch.zeros(6, 2, dtype=torch.int32)})), ValueError, "v.lora_B.weight: expected a floating-point tensor"),
        (weights(lambda t: t.update({P + "q.lora_magnitude_vector": torch.zeros(6)})), ValueError, "q.lora_magnitude_vector: not a LoRA tensor or a bias"),
        (weights(lambda t: t.update({P + "q.lora_B.bias": torch.zeros(6)})), ValueError, "q: lora_bias=False in adapter_config.json, but lora_B.bias is there"),
        (weights(lambda t: t.update({P + "v.bias": torch.zeros(6)})), ValueError, "v.bias: the model has no such parameter"),
        (weights(lambda t: t.update({P + "q.base_layer.bias": torch.zeros(7)})), ValueError, "q.bias: expected shape (6,), got (7,)"),
        (weights(lambda t: t[P + "v.lora_B.weight"][3, 1].fill_(float("nan"))), ValueError, "v.lora_B.weight: expected finite values in torch.float32, the adapter's dtype"),
        (weights(lambda t: t.update({P + "q.lora_A.weight": torch.full((2, 8), 1e300, dtype=torch.float64)})), ValueError, "q.lora_A.weight: expected finite values in torch.float32"),
        (weights(lambda t: t.update({P + "q.base_layer.bias": torch.full((6,), float("inf"))})), ValueError, "q.bias: expected finite values"),
        (weights(lambda t: t.update({"q.lora_A.weight": torch.zeros(2, 8)})), ValueError, "a second value for the same lora_A.weight"),
        (weights(lambda t: t.update({P + "q.base_layer.bias": torch.zeros(6), P + "q.bias": torch.ones(6)})), ValueError, "a second value for the same q.bias"),
    ],
)
def test_damaged_files(saved, damage, error, words):
    damage(saved)
    model = base()
    modules, values = list(model.values()), [p.detach().clone() for p in model.parameters()]
    if error is None:  # an adapter on fewer modules is a whole adapter
        lk.load_adapter(model, saved)
        return
    with pytest.raises(error) as caught:
        lk.load_adapter(model, saved)
    assert words in str(caught.value)
    assert list(model.values()) == modules and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters()))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(r=3), "'r': 3"),
        (dict(r=2, lora_alpha=4), "'lora_alpha': 4"),
        (dict(r=2, lora_alpha=3, use_rslora=True), "'use_rslora': True"),
        (dict(r=2, lora_alpha=3, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (dict(r=2, lora_alpha=3, lora_bias=True), "the model's adapter has"),
    ],
)
def test_an_adapter_of_another_kind_in_the_model(saved, arguments, words):
    model = base()
    lk.apply_lora(model, target_modules=["q", "v"], **arguments)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError) as caught:
        lk.load_adapter(model, saved)
    assert words in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_an_adapter_in_the_model_that_the_file_lacks(saved):
    model = base()
    lk.apply_lora(model, r=2, lora_alpha=3, target_modules=["q", "v"])
    weights(lambda t: [t.pop(P + "v.lora_A.weight"), t.pop(P + "v.lora_B.weight")])(saved)
    with pytest.raises(ValueError, match="it has nothing for v, which has an adapter in the model"):
        lk.load_adapter(model, saved)


def test_an_adapter_of_the_model_itself(tmp_path):
    """A layer that is the whole model takes its adapter; an nn.Linear cannot be replaced in its own place."""
    layer, linear = lk.LoraLinear(8, 6, r=2), nn.Linear(8, 6)
    nn.init.normal_(layer.lora_B)
    lk.save_adapter(layer, tmp_path)
    fresh = lk.LoraLinear(8, 6, r=2)
    lk.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.lora_A, layer.lora_A) and torch.equal(fresh.lora_B, layer.lora_B)
    with pytest.raises(ValueError, match="its adapter is of the model itself"):
        lk.load_adapter(linear, tmp_path)
    assert type(linear) is nn.Linear and not list(linear.children()) and linear.weight.requires_grad


def test_loading_onto_a_merged_adapter(saved):
    model = base()
    lk.load_adapter(model, saved)
    lk.merge_adapters(model, keep_base=True)
    with pytest.raises(ValueError, match="q: its adapter is merged; unmerge it first"):
        lk.load_adapter(model, saved)


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    lk.load_adapter(base(), saved)
