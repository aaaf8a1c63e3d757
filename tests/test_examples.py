"""The main job's parts, and the whole of it on a tiny model: interrupted and resumed it gives the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

for name in ("transformers", "peft", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(name, reason=f"{name} is not installed")

import chat  # noqa: E402
import harvest  # noqa: E402


@pytest.fixture(scope="module")
def pairs():
    return harvest.harvest()


def test_harvest_is_large_clean_and_split_by_module(pairs):
    assert len(pairs) > 4000
    assert len({pair["input"] for pair in pairs}) == len(pairs)
    train, held_out = harvest.split(pairs)
    assert len(train) + len(held_out) == len(pairs) and len(held_out) > 200
    assert not {pair["module"] for pair in train} & {pair["module"] for pair in held_out}
    for pair in pairs[::97]:
        compile(pair["input"], pair["module"], "exec")
        assert pair["output"] not in pair["input"] and pair["output"].isascii()


def test_malformed_rows_are_named_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"instruction": "a", "output": "b"})
    path.write_text("\n".join([good, "{", "[1]", json.dumps({"instruction": "a"}), "", json.dumps({"instruction": 3, "output": ""}), good]))
    with pytest.raises(SystemExit) as caught:
        chat.read_jsonl(path)
    message = str(caught.value)
    for words in ("4 malformed rows", "line 2: not JSON", "line 3: expected an object, got a list", "line 4: expected a text in 'output'", "line 6: expected a text in 'instruction', 'output'"):
        assert words in message
    path.write_text(good + "\n" + good)
    assert chat.read_jsonl(path)[0] == {"instruction": "a", "input": "", "output": "b", "module": ""}


def test_batches_repeat_and_cover_every_example():
    encoded = [([1] * n, [2]) for n in range(1, 51)]
    made = list(chat.batches(encoded, 8, seed=3, steps=7))
    assert made == list(chat.batches(encoded, 8, seed=3, steps=7))
    assert sorted(len(p) for batch in made for p, _ in batch) == list(range(1, 51))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, pairs):
    """A Llama of two layers with a word-level tokenizer and a chat template, as a Hugging Face directory, and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        (pair["input"] + " " + pair["output"] for pair in pairs[:400]), trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>", "<eos>", "<user>", "<bot>"])
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, eos_token_id=1, pad_token_id=1, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps({k: pair[k] for k in ("instruction", "input", "output")}) for pair in pairs[:150]))
    return folder, data


def command(tiny, out, *more):
    folder, data = tiny
    steps = ["--steps", "30", "--batch", "2", "--save-every", "10", "--lora-dropout", "0.1", "--eval-pairs", "4", "--max-tokens", "400"]
    return [sys.executable, str(ROOT / "examples" / "finetune.py"), "--model", str(folder), "--data", str(data), "--out", str(out), "--skip-eval", *steps, *more]


@pytest.mark.parametrize("engine", ["lorakernels", pytest.param("peft", marks=pytest.mark.full)])
def test_interrupted_and_resumed_gives_the_same_losses(tiny, tmp_path, engine):
    subprocess.run(command(tiny, tmp_path / "whole", "--engine", engine), check=True, capture_output=True)
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert len(whole["losses"]) == 30 and (tmp_path / "whole" / "loss.png").stat().st_size > 5000
    process = subprocess.Popen(command(tiny, tmp_path / "cut", "--engine", engine), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "cut" / "checkpoint" / "state.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    if "30/30" not in said:  # where the signal came late, training had ended
        assert process.returncode and "stopped after step" in said and "go on with --resume" in said, said[-2000:]
    resumed = subprocess.run(command(tiny, tmp_path / "cut", "--engine", engine, "--resume"), check=True, capture_output=True, text=True)
    assert "resumed after step" in resumed.stdout
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["losses"] == whole["losses"]
    a, b = (tmp_path / where / "adapter" / "adapter_model.safetensors" for where in ("whole", "cut"))
    assert a.read_bytes() == b.read_bytes()
    other = subprocess.run(command(tiny, tmp_path / "cut", "--engine", engine, "--resume", "--r", "4"), capture_output=True, text=True)
    assert other.returncode and "the checkpoint was made with other settings: r" in other.stderr


def test_the_engines_agree(tiny, tmp_path):
    """The same data order; with the same first step the loss before any update is the base's, to the last bit."""
    first = {}
    for engine in ("lorakernels", "peft"):
        subprocess.run(command(tiny, tmp_path / engine, "--engine", engine), check=True, capture_output=True)
        first[engine] = json.loads((tmp_path / engine / "summary.json").read_text())
    assert first["lorakernels"]["losses"][0] == first["peft"]["losses"][0]
    assert first["lorakernels"]["trainable"] == first["peft"]["trainable"]
    assert {what for what, _ in first["lorakernels"]["logits"]} == {"loaded into peft", "loaded back", "merged"}


def test_over_a_base_in_4_bits(tiny, tmp_path):
    done = subprocess.run(command(tiny, tmp_path, "--quantize", "nf4"), check=True, capture_output=True, text=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "14 QLoraLinear" in done.stdout and summary["losses"][-1] < summary["losses"][0]
    adapter_mib = summary["trainable"] * 4 / 2**20
    assert summary["parameters_mib"] - adapter_mib < summary["dense_mib"]  # most of this tiny model is its embedding
    assert {what for what, _ in summary["logits"]} == {"loaded into peft", "loaded back", "merged"}


def test_a_second_run_beside_the_first(tiny, tmp_path):
    """The dense model is evaluated once; both runs' figures stand in the last table. Another job's figures are refused."""

    def run(out, *more):
        evaluated = [word for word in command(tiny, tmp_path / out, "--steps", "2", "--new-tokens", "3", *more) if word != "--skip-eval"]
        return subprocess.run(evaluated, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})

    assert run("lora").returncode == 0
    second = run("qlora", "--quantize", "nf4", "--beside", str(tmp_path / "lora"))
    assert second.returncode == 0, second.stderr[-2000:]
    one, two = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("lora", "qlora"))
    assert one["before"] == two["before"] and "answers before" not in second.stderr and "answers after" in second.stderr
    table = second.stdout.partition("LoRA and QLoRA")[2]
    for run_ in (one, two):
        assert f"{run_['after']['perplexity']:.2f}" in table and f"{run_['peak_memory_mib']:.0f} MiB" in table
    other = run("other", "--beside", str(tmp_path / "lora"), "--seed", "1")
    assert other.returncode and "is of another job: seed" in other.stderr
    nothing = run("other", "--beside", str(tmp_path / "nowhere"))
    assert nothing.returncode and "is not the summary of an evaluated run (FileNotFoundError" in nothing.stderr


def test_generate_with_every_engine_that_is_here(tiny, tmp_path):
    subprocess.run(command(tiny, tmp_path, "--steps", "2"), check=True, capture_output=True)
    script = [sys.executable, str(ROOT / "examples" / "generate.py"), "--model", str(tiny[0]), "--tokens", "5"]
    for more in ([], ["--adapter", str(tmp_path / "adapter"), "--dtype", "bfloat16"]):
        said = subprocess.run([*script, *more], check=True, capture_output=True, text=True).stdout
        for engine in ("lorakernels NF4", "dense"):
            assert f"{engine}: " in said and "tokens/s" in said.partition(f"{engine}: ")[2].splitlines()[0]
        assert "bitsandbytes NF4: " in said  # its tokens per second, or why it was left out
    wrong = subprocess.run([*script, "--tokens", "0"], capture_output=True, text=True)
    assert wrong.returncode and "--tokens: expected at least 1, got 0" in wrong.stderr


def test_many_adapters_trained_at_once_and_served_in_one_batch(tiny, tmp_path):
    run = {"capture_output": True, "text": True, "env": os.environ | {"COLUMNS": "250"}}
    script = [sys.executable, str(ROOT / "examples" / "train_many.py"), "--model", str(tiny[0]), "--out", str(tmp_path), "--max-tokens", "200"]
    trained = subprocess.run([*script, "--steps", "2", "--check", "1"], check=True, **run)
    assert trained.stdout.count("the same") == 8 and "DIFFERENT" not in trained.stdout
    ranks = {path.parent.name: json.loads(path.read_text())["r"] for path in tmp_path.glob("*/adapter_config.json")}
    assert len(ranks) == 8 and len(set(ranks.values())) == 8
    served = subprocess.run([sys.executable, str(ROOT / "examples" / "serve_many.py"), "--model", str(tiny[0]), "--adapters", str(tmp_path), "--tokens", "4"], check=True, **run)
    assert served.stdout.count("the same bits") == 9 and "DIFFERENT" not in served.stdout
    assert "PEFT gives the same tokens in 9 of 9 rows" in served.stdout
    for engine in ("lorakernels, all rows at once", "lorakernels, one row at a time", "PEFT, adapter_names"):
        assert f"{engine}: " in served.stdout
    for wrong, words in (([*script, "--check", "99"], "--check: expected 0 to --steps"), ([sys.executable, str(ROOT / "examples" / "serve_many.py"), "--adapters", str(tiny[0])], "holds no directory with an adapter_config.json")):
        done = subprocess.run(wrong, **run)
        assert done.returncode and words in done.stderr


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch, capsys):
    """The words with which finetune.py refuses options: it runs in this process, for another takes seconds to begin."""

    def run(*more):
        import finetune

        monkeypatch.setattr(sys, "argv", command(tiny, tmp_path, *more)[1:])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            finetune.main()
        assert caught.value.code
        return f"{caught.value.code} {capsys.readouterr().err}"

    return run


def test_resume_without_a_checkpoint(refused):
    assert "--resume: there is no checkpoint" in refused("--resume")


@pytest.mark.parametrize("more, words", [(["--steps", "0"], "--steps: expected at least 1"), (["--lr", "nan"], "--lr: expected above 0, got nan"), (["--lora-dropout", "2"], "--lora-dropout: expected from 0 to 1, got 2.0"), (["--device", "tpu"], "--device: "), (["--data", "nowhere"], "--data: there is no file nowhere"), (["--engine", "fast"], "invalid choice"), (["--engine", "peft", "--quantize", "nf4"], "--quantize: needs --engine lorakernels"), (["--max-tokens", "1"], "no row is short enough")])
def test_bad_options(refused, more, words):
    assert words in refused(*more)
