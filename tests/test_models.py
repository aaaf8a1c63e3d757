"""Whole models: apply_lora's targets and report, merging, switching off, counting, against PEFT on the same model."""

import contextlib
import copy
import io
import logging

import pytest
import torch
from numerics import check
from torch import nn

import lorakernels as lk
from lorakernels.modules import LoraLinear

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CHAIN = 64 ** (3 * 7)  # the sums that a value of tiny_llama passes through: see numerics.floor


def tiny_llama(**changes):
    settings = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, attention_bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def adapted(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, LoraLinear))


CONFIGS = {
    "list": dict(target_modules=["q_proj", "down_proj"]),
    "regex": dict(target_modules=r".*layers\.[02]\..*(k|v)_proj"),
    "all-linear": dict(target_modules="all-linear"),
    "exclude": dict(target_modules="all-linear", exclude_modules=["layers.1.mlp.up_proj", "k_proj"]),
    "exclude regex": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.0.*"),
    "layers": dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]),
    "one layer": dict(target_modules=["o_proj"], layers_to_transform=1, layers_pattern="layers"),
    "patterns": dict(target_modules="all-linear", rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"^model.layers.0.self_attn.v_proj": 5}),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True),
    "bias all": dict(target_modules=["q_proj"], bias="all"),
    "bias lora_only": dict(target_modules=["q_proj"], bias="lora_only"),
    "lora_bias": dict(target_modules=["q_proj", "gate_proj"], lora_bias=True),
    "gaussian": dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
    "pissa": dict(target_modules=["q_proj"], init_lora_weights="pissa"),
    "olora": dict(target_modules=["q_proj", "down_proj"], init_lora_weights="olora"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def randomise(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model, tokens=None):
    tokens = torch.arange(24).view(2, 12) % 64 if tokens is None else tokens
    with torch.no_grad():
        return model(input_ids=tokens).logits


def same_logits(name, ours, theirs, model64):
    """Ours against a float64 copy of the model, measured by PEFT's error; returns nothing, asserts."""
    check(name, ours, model64, theirs, base=torch.float32, K=CHAIN)


@configs
def test_peft_loads_ours_and_we_load_pefts(config, tmp_path):
    attention_bias = "bias" in config
    model = tiny_llama(attention_bias=attention_bias)
    report = lk.apply_lora(model, r=4, lora_alpha=6, **config)
    assert report.replaced == [name for name in report if name in adapted(model)]
    randomise(p for p in model.parameters() if p.requires_grad)
    lk.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(attention_bias=attention_bias), tmp_path / "ours").eval()
    wide = logits(copy.deepcopy(theirs).double())
    same_logits("ours in peft", logits(model), logits(theirs), wide)

    source = peft.get_peft_model(tiny_llama(attention_bias=attention_bias), peft.LoraConfig(r=4, lora_alpha=6, **config)).eval()
    assert sorted(n.removeprefix("base_model.model.") for n, m in source.named_modules() if isinstance(m, peft.tuners.lora.Linear)) == adapted(model)
    counts = source.get_nb_trainable_parameters()
    assert counts == lk.models.count_parameters(model)
    randomise(p for p in source.parameters() if p.requires_grad)
    source.save_pretrained(tmp_path / "theirs")
    loaded = tiny_llama(attention_bias=attention_bias)
    assert sorted(lk.load_adapter(loaded, tmp_path / "theirs")) == adapted(model)
    assert lk.models.count_parameters(loaded) == counts
    same_logits("peft in ours", logits(loaded), logits(source), logits(copy.deepcopy(source).double()))

    again = tiny_llama(attention_bias=attention_bias)
    lk.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_gradients_are_pefts():
    ours, theirs = tiny_llama(), tiny_llama()
    lk.apply_lora(ours, r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, layer in theirs.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            mine = ours.get_submodule(name)
            randomise([layer.lora_A.default.weight, layer.lora_B.default.weight])
            mine.lora_A.data, mine.lora_B.data = layer.lora_A.default.weight.data.clone(), layer.lora_B.default.weight.data.clone()
    wide = copy.deepcopy(theirs).double()
    tokens = torch.arange(24).view(2, 12)
    for model in (ours, theirs, wide):
        model(input_ids=tokens, labels=tokens).loss.backward()
    for name, layer in theirs.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            mine, exact = ours.get_submodule(name), wide.base_model.model.get_submodule(name)
            for which in ("lora_A", "lora_B"):
                check(f"{name}.{which}", getattr(mine, which).grad, getattr(exact, which).default.weight.grad, getattr(layer, which).default.weight.grad, base=torch.float32, K=CHAIN)


def test_only_the_adapters_train():
    model = tiny_llama()
    lk.apply_lora(model, r=2)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_all_linear_leaves_the_head_out():
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)
        assert "lm_head" not in lk.apply_lora(model, r=2, target_modules="all-linear")
        assert len(adapted(model)) == 3 * 7


def test_targeted_tied_head_merges_without_touching_the_embedding():
    model = tiny_llama()
    before = model.model.embed_tokens.weight.clone()
    lk.apply_lora(model, r=2, target_modules=["lm_head"])
    randomise(model.lm_head.adapter_parameters())
    lk.merge_adapters(model)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_module_in_two_places_becomes_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    report = lk.apply_lora(model, r=2)
    assert model["a"] is model["b"] and isinstance(model["a"], LoraLinear) and model["c"] is not model["a"]
    assert report.replaced == ["a", "b", "c"]


def test_what_is_read_without_being_called_is_skipped_with_the_reason():
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(16, 2), "head": nn.Linear(16, 4)})
    report = lk.apply_lora(model, r=2)
    assert "read by its parent" in report.skipped["encoder.self_attn.out_proj"]
    assert "reads its weight without calling it" in report.skipped["encoder.linear1"]
    assert report.replaced == ["head"] and "1 modules replaced, 3 skipped" in str(report)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_that_are_not_plain_parameters_are_skipped_with_the_reason():
    class Wrapped(torch.Tensor):
        pass

    model = nn.ModuleDict({"normed": nn.utils.weight_norm(nn.Linear(4, 4)), "wrapped": nn.Linear(4, 4), "float8": nn.Linear(4, 4), "plain": nn.Linear(4, 4)})
    model["wrapped"].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Wrapped))
    model["float8"].weight = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    report = lk.apply_lora(model, r=1)
    assert report.replaced == ["plain"]
    assert "computed by a hook" in report.skipped["normed"]
    assert "its weight is a Wrapped" in report.skipped["wrapped"]
    assert "its weight is float8_e4m3fn" in report.skipped["float8"]


def test_report_strict_warning_and_log(caplog):
    model = nn.Sequential(nn.Conv1d(1, 1, 1))
    with pytest.warns(UserWarning, match="(?s)apply_lora replaced nothing.*Conv1d is not an nn.Linear"):
        lk.apply_lora(model, target_modules=["0"])
    with pytest.raises(RuntimeError, match="(?s)strict=True.*Conv1d is not an nn.Linear"):
        lk.apply_lora(model, target_modules=["0"], strict=True)
    with pytest.warns(UserWarning, match="replaced nothing"):
        lk.apply_lora(model)
    with caplog.at_level(logging.INFO, "lorakernels"):
        lk.apply_lora(nn.Sequential(nn.Linear(2, 2)), r=1)
    assert "1 modules replaced, 0 skipped" in caplog.text


def test_second_apply_skips_what_has_an_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lk.apply_lora(model, r=1, target_modules=["0"])
    report = lk.apply_lora(model, r=2, target_modules="all-linear")
    assert report.skipped == {"0": "it has an adapter already"} and report.replaced == ["1"]
    assert model[0].lora_A.requires_grad and model[1].lora_A.requires_grad


def test_disable_adapters_gives_the_bases_own_answer():
    model = tiny_llama()
    base = logits(model)
    lk.apply_lora(model, r=2)
    randomise(p for p in model.parameters() if p.requires_grad)
    with_adapter = logits(model)
    with lk.disable_adapters(model):
        assert torch.equal(logits(model), base)
        with lk.disable_adapters(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_adapter) and not torch.equal(with_adapter, base)
    lk.merge_adapters(model, keep_base=True)
    with lk.disable_adapters(model):
        assert torch.equal(logits(model), base)
    for _, layer in lk.models.lora_layers(model):
        layer.unmerge()
    assert lk.merge_adapters(model) == 21
    with pytest.raises(RuntimeError, match="keep_base=False"), lk.disable_adapters(model):
        pass


def test_disable_adapters_restores_after_an_exception():
    model = nn.Sequential(LoraLinear(4, 4))
    with contextlib.suppress(KeyError), lk.disable_adapters(model):
        raise KeyError
    assert model[0].adapter_enabled


def test_merged_logits():
    model = tiny_llama()
    lk.apply_lora(model, r=4, lora_alpha=8)
    randomise(p for p in model.parameters() if p.requires_grad)
    wide = copy.deepcopy(model).double()
    plain = logits(model)
    theirs = logits(model)
    with pytest.warns(UserWarning, match="float64"):
        lk.backends._choose.cache_clear()
        exact = logits(wide)
    lk.merge_adapters(model)
    check("merged logits", logits(model), exact, theirs, base=torch.float32, K=CHAIN)
    check("plain logits", plain, exact, theirs, base=torch.float32, K=CHAIN)


def test_print_trainable_parameters_is_pefts_line():
    ours, theirs = tiny_llama(), tiny_llama()
    lk.apply_lora(ours, r=4)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules="all-linear"))
    lines = []
    for say in (lambda: lk.print_trainable_parameters(ours), theirs.print_trainable_parameters):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            say()
        lines.append(out.getvalue())
    assert lines[0] == lines[1]


def test_generation_and_training_mode():
    model = tiny_llama()
    lk.apply_lora(model, r=2, lora_dropout=0.3)
    assert not model.model.layers[0].self_attn.q_proj.training  # as the module that it replaced
    tokens = torch.arange(6).view(1, 6)
    assert model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 10)
    model.train()
    randomise(p for p in model.parameters() if p.requires_grad)
    assert not torch.equal(logits(model), logits(model))


def test_ambiguous_names_are_described_by_a_regular_expression(tmp_path):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)})})
    lk.apply_lora(model, r=2, target_modules=r"fc|block\.out")
    model["fc"].lora_B.data.normal_()
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)})}), tmp_path)
    assert [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)] == ["base_model.model.fc", "base_model.model.block.out"]
