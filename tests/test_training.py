"""训练的端到端：从文本到模型、日志、续写；设置变了、显存不够、检查点坏了、磁盘满了、参数写错了。

中断与信号见 test_fault.py，几个进程见 test_distributed.py。
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import fault_injection
import filelock
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import (
    ROOT,
    STEPS,
    TINY,
    VOCAB_SIZE,
    call,
    defaults,
    environment,
    error_of,
    read_jsonl,
    run_script,
    write_jsonl,
)
from safetensors.torch import load

import a100_train

TRAIN_FIELDS = {"step", "loss", "learning_rate", "grad_norm"}
TRAIN_FIELDS |= {"averaged_steps", "tokens_per_second", "elapsed_seconds"}


def digest(folder):
    """文件夹里每个文件的内容哈希；锁文件不算。"""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def weights(folder):
    return (folder / "final_model/model.safetensors").read_bytes()


def split_log(folder):
    rows = read_jsonl(folder / "train_log.jsonl")
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def check_close(work, finished, tolerance=1e-4):
    """权重几乎相同，日志每步恰一行。"""
    ours = load(weights(work))
    expected = load(weights(finished))
    assert all((ours[name] - expected[name]).abs().mean() < tolerance for name in expected)
    train, held_out = split_log(work)
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]


# ==== 一口气跑完 ====


def test_demo_command(tmp_path):
    """--preset demo --max_steps 3：一条命令从文本到模型。第一步的损失约为 ln V；我们的代码没有 EncodingWarning。"""
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "a100_train.py"),
            "--preset",
            "demo",
            "--max_steps",
            "3",
            "--device",
            "cpu",
            "--work_dir",
            str(tmp_path / "demo"),
        ],
        env=environment() | {"PYTHONWARNDEFAULTENCODING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    scripts = r"(?:a100_train|prepare_corpus|train_tokenizer|plot_loss)\.py:\d+: EncodingWarning"
    assert not re.search(scripts, result.stdout + result.stderr)
    train, held_out = split_log(tmp_path / "demo")
    config = json.loads((tmp_path / "demo/config.json").read_text("utf-8"))
    assert config["vocab_size"] == 4500 and train[0]["step"] == 1
    assert train[0]["loss"] == pytest.approx(math.log(4500), abs=0.1)
    assert held_out[0]["step"] == 0 and held_out[0]["eval_loss"] == pytest.approx(math.log(4500), abs=0.2)
    assert {"eval_news_loss", "eval_reviews_loss"} <= set(held_out[0])
    for name in (
        "corpus/report.json",
        "tokenizer/tokenizer.json",
        "packed/meta.json",
        "samples.jsonl",
        "generation_samples.md",
        "final_model/model.safetensors",
        "final_model/tokenizer.json",
    ):
        assert (tmp_path / "demo" / name).stat().st_size > 0, name
    assert (tmp_path / "demo/loss_curve.png").read_bytes().startswith(b"\x89PNG")
    line = r"步 1/3 \| loss 8\.\d\d \| lr \d\.\de[+-]\d\d \| [\d.]+k tok/s \| 剩余 [\d.]+ 分钟"
    assert re.search(line, result.stdout)


def test_log_and_checkpoints(finished):
    """字段与说明书一样，每步一行；学习率就是公式算的；只留最近两个检查点。"""
    train, held_out = split_log(finished)
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    for row in train:
        assert set(row) == TRAIN_FIELDS and row["averaged_steps"] == 1
        # Trainer 记的是这一步用过的学习率
        scale = a100_train.learning_rate_scale(row["step"] - 1, STEPS)
        next_scale = a100_train.learning_rate_scale(row["step"], STEPS)
        assert row["learning_rate"] == pytest.approx(0.01 * scale) or row["learning_rate"] == pytest.approx(
            0.01 * next_scale
        )
    assert held_out[0]["eval_loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] - 0.1, "真的在学"
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_final_model_loads_without_our_code(finished):
    """别人只有 transformers：加载、续写都能用；记下的每字比特，用它从头另算也是那个数，</s> 的代价算在内。"""
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "final_model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "final_model")
    assert type(model) is transformers.GPT2LMHeadModel and model.config.use_cache is True
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 2, 3)
    pipeline = transformers.pipeline("text-generation", str(finished / "final_model"), device="cpu")
    text = pipeline("中国的历史", min_new_tokens=5, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("中国的历史") and len(text) > 5
    texts = {"news": [], "reviews": []}
    for path in sorted((finished / "corpus").glob("eval-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            texts[row["source"]].append(row["text"])
    stream = [token for name in texts for text in texts[name] for token in [*tokenizer(text)["input_ids"], 3]]
    nats = []
    inputs = [3, *stream[:-1]]
    for start in range(0, len(stream), 32):  # 与训练同样的窗口：各来源首尾相接，32 个 token 一块，各块独立
        ids = torch.tensor([inputs[start : start + 32]])
        answers = torch.tensor([stream[start : start + 32]])
        with torch.no_grad():
            log_p = model(ids).logits.double().log_softmax(-1)
        nats += (-log_p.gather(-1, answers[:, :, None]).flatten()).tolist()
    reviews = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts["reviews"])
    reported = split_log(finished)[1][-1]
    losses = nats[-reviews:]
    bits = sum(losses) / math.log(2) / sum(map(len, texts["reviews"]))
    assert reported["eval_reviews_loss"] == pytest.approx(sum(losses) / reviews, rel=1e-4)
    assert reported["eval_reviews_bits_per_char"] == pytest.approx(bits, rel=1e-4)
    assert reported["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)


def table_rows(folder):
    lines = (folder / "generation_samples.md").read_text("utf-8").splitlines()
    return [line for line in lines if line.startswith("| ")][1:]


def test_samples(finished):
    """每次验证五条，开头固定；表格与 samples.jsonl 一一对应，一条一行。"""
    rows = read_jsonl(finished / "samples.jsonl")
    assert [set(row) for row in rows] == [{"step", "prompt", "text", "eval_loss"}] * 20
    assert [row["prompt"] for row in rows] == a100_train.PROMPTS * 4
    losses = {row["step"]: row["eval_loss"] for row in split_log(finished)[1]}
    table = table_rows(finished)
    assert len(table) == 20
    for row, line in zip(rows, table, strict=True):
        assert row["text"].startswith(row["prompt"]) and row["eval_loss"] == losses[row["step"]]
        assert line.startswith(f"| {row['step']} | {row['eval_loss']:.3f} | {row['prompt']}")
        assert line.endswith(" |") and len(re.findall(r"(?<!\\)\|", line)) == 4


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H20", 148),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H200", 989),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A6000", None),
        ("cpu", None),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_mfu_uses_the_peak_of_the_card_that_is_there(monkeypatch, capsys, card, tflops, world):
    """10 步，每步 1,000 token，一步 2 秒：每秒 500 token。MFU 按这张卡、这几张卡的峰值；不认识的卡不记也不印。"""
    monkeypatch.setattr(a100_train, "WORLD_SIZE", world)
    monkeypatch.setattr(a100_train.time, "perf_counter", lambda: 120.0)
    s = argparse.Namespace(tokens_per_step=1000, flops_per_token=1e9, device_name=card, total_steps=50)
    observer = a100_train.Observer.__new__(a100_train.Observer)
    observer.settings, observer.clock, observer.logged_step, observer.print_steps = s, 100.0, 30, 10
    observer.bar = a100_train.tqdm(disable=True)
    row = {"loss": 5.0, "learning_rate": 0.1, "step": 40}
    state = argparse.Namespace(global_step=40, log_history=[{"elapsed_seconds": 60.0}, dict(row)])
    observer.add_speed(dict(row), state)
    added = state.log_history[-1]
    assert (added["averaged_steps"], added["tokens_per_second"], added["elapsed_seconds"]) == (
        10,
        500.0,
        80.0,
    )
    out = capsys.readouterr().out
    assert "步 40/50 | loss 5.00 | lr 1.0e-01 | 0.5k tok/s" in out and "剩余 0.3 分钟" in out
    if tflops:
        expected = 500 * 1e9 / (tflops * 1e12 * world)
        assert added["mfu"] == pytest.approx(expected, abs=1e-4) and f"MFU {expected:.0%}" in out
    else:
        assert "mfu" not in added and "MFU" not in out


def test_first_row_after_a_resume_says_how_many_steps_it_averages(copied, finished, no_plot):
    """每 3 步一行，从第 4 步接着：第 6 步那一行只是第 5、6 两步的平均，行里说明。"""
    call(a100_train, "--work_dir", copied, *TINY, "--logging_steps", 3)
    assert [(row["step"], row["averaged_steps"]) for row in split_log(copied)[0]] == [(1, 1), (3, 2), (6, 3)]
    shutil.rmtree(copied / "checkpoints/checkpoint-6")
    call(a100_train, "--work_dir", copied, *TINY, "--logging_steps", 3)
    (row,) = [row for row in split_log(copied)[0] if row["step"] == 6]
    before = {row["step"]: row["loss"] for row in split_log(finished)[0]}
    assert row["averaged_steps"] == 2 and row["loss"] == pytest.approx((before[5] + before[6]) / 2, abs=1e-3)


# ==== 微批量、显存 ====


@pytest.mark.parametrize(("optimizer", "size"), [("muon", 8), ("muon", 1), ("adamw_torch", 2)])
def test_accumulation_changes_nothing(work_dir, work, finished, no_plot, tmp_path, optimizer, size):
    """有效批量 8，微批量 8、4、1：权重和损失几乎一样。"""
    expected = finished
    if optimizer != "muon":
        call(a100_train, "--work_dir", work, *TINY, "--optim", optimizer, "--fresh")
        expected = work
    other = tmp_path / "other"
    shutil.copytree(work_dir, other)
    call(a100_train, "--work_dir", other, *TINY, "--optim", optimizer, "--batch_size", size)
    check_close(other, expected)
    for a, b in zip(split_log(other)[0], split_log(expected)[0], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def out_of_memory(monkeypatch, rows, after=0):
    """前 after 次前向以后，训练时一次 rows 块或更多就显存不够。"""
    original = a100_train.GPT2LMHeadModel.forward
    calls = []

    def forward(self, input_ids=None, labels=None, **kwargs):
        if labels is not None:
            calls.append(1)
            if len(input_ids) >= rows and len(calls) > after:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, input_ids=input_ids, labels=labels, **kwargs)

    monkeypatch.setattr(a100_train.GPT2LMHeadModel, "forward", forward)


@pytest.mark.parametrize("after", [0, 7])
def test_out_of_memory_names_the_next_smaller_size(work, finished, no_plot, monkeypatch, after):
    """第 1 步或第 4 步显存不够：一行说清换成多大；照它说的再跑，从检查点接着，结果几乎一样，日志每步一行。"""
    out_of_memory(monkeypatch, rows=4, after=after)
    message = error_of(a100_train, "--work_dir", work, *TINY, "--fresh")
    assert "微批量 4；" in message and "--batch_size 2" in message
    assert getattr(a100_train.newest_checkpoint(work), "name", None) == ("checkpoint-2" if after else None)
    call(a100_train, "--work_dir", work, *TINY, "--batch_size", 2)
    check_close(work, finished)


def test_out_of_memory_at_one_block_is_one_line(work, no_plot, monkeypatch):
    out_of_memory(monkeypatch, rows=1)
    message = error_of(a100_train, "--work_dir", work, *TINY, "--batch_size", 1, "--fresh")
    assert "微批量 1；" in message and "--gradient_checkpointing" in message and "--batch_size" not in message


def test_micro_batch_is_chosen_when_none_is_typed(copied, no_plot):
    """没有写 --batch_size：自动的放得下就是整个有效批量。从前的检查点换了微批量，照样接得上。"""
    training = TINY[: TINY.index("--batch_size")] + TINY[TINY.index("--batch_size") + 2 :]
    call(a100_train, "--work_dir", copied, *training, "--max_steps", 2)
    config = json.loads((copied / "config.json").read_text("utf-8"))
    assert (config["asked_batch_size"], config["batch_size"]) == (None, 8)


def test_smaller_micro_batch_may_continue(work, finished, no_plot):
    """换一张小卡：微批量减半可以接着训练，权重几乎一样。"""
    shutil.rmtree(work / "checkpoints/checkpoint-6")
    shutil.rmtree(work / "final_model")
    call(a100_train, "--work_dir", work, *TINY, "--batch_size", 2, "--gradient_checkpointing")
    check_close(work, finished)


def test_nan_stops_with_one_line(work, finished, no_plot, monkeypatch):
    """第 5 步的损失是 NaN：一行说清，之前的检查点完好，照着再跑（没有坏数了）逐位相同。"""
    original = a100_train.GPT2LMHeadModel.forward
    calls = []

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = original(self, input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None and self.training:
            calls.append(1)
            output = {"loss": output["loss"] * (math.nan if len(calls) == 9 else 1)}
        return output

    monkeypatch.setattr(a100_train.GPT2LMHeadModel, "forward", forward)
    message = error_of(a100_train, "--work_dir", work, *TINY, "--fresh")
    assert "第 5 步" in message and "nan" in message and "--learning_rate" in message
    assert a100_train.newest_checkpoint(work).name == "checkpoint-4"
    call(a100_train, "--work_dir", work, *TINY)
    assert weights(work) == weights(finished)
    check_close(work, finished)


# ==== 检查点 ====


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_damaged_checkpoints_are_recognised(work, capsys, name, damage):
    if (name, damage) == ("rng_state.pth", "missing"):
        pytest.skip("没有 dropout，随机数的状态用不着；有而写坏了的才说明断过电")
    path = work / "checkpoints/checkpoint-6" / name
    assert a100_train.newest_checkpoint(work).name == "checkpoint-6"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
    if damage == "missing":
        path.unlink()
    assert a100_train.newest_checkpoint(work).name == "checkpoint-4"
    assert "跳过不完整的检查点" in capsys.readouterr().out


def test_unreadable_newest_checkpoint_is_skipped(work, finished, no_plot, capsys):
    """最新的检查点断电写坏了：说一声，用前一个，结果与没坏时逐位相同，坏的那个被好的换掉。"""
    shutil.rmtree(work / "final_model")
    path = work / "checkpoints/checkpoint-6/optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    call(a100_train, "--work_dir", work, *TINY)
    assert "checkpoint-6" in capsys.readouterr().out
    assert weights(work) == weights(finished)
    check_close(work, finished)
    assert a100_train.newest_checkpoint(work).name == "checkpoint-6"
    assert read_jsonl(work / "samples.jsonl") == read_jsonl(finished / "samples.jsonl")


def test_fresh_starts_over(work, finished, no_plot):
    call(a100_train, "--work_dir", work, *TINY, "--fresh")
    check_close(work, finished)
    assert weights(work) == weights(finished)


# ==== 设置、语料、分词器变了 ====


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate", 0.02),
        ("--muon_learning_rate", 0.1),
        ("--n_embd", 64),
        ("--effective_batch_size", 16),
        ("--seed", 7),
        ("--optim", "adamw_torch"),
        ("--max_steps", 8),
        ("--block_size", 16),
    ],
)
def test_changed_setting_is_refused(work, no_plot, flag, value):
    """接着训练时改了会影响结果的设置：一行说清，什么也不动。"""
    before = digest(work)
    message = error_of(a100_train, "--work_dir", work, *TINY, flag, value)
    assert flag[2:] in message and str(value) in message and "--fresh" in message
    assert digest(work) == before


@pytest.mark.parametrize("folder", ["corpus", "tokenizer"])
def test_changed_data_is_refused_before_packing(work, no_plot, folder):
    """有检查点时语料或分词器换了一份：packed/ 和检查点一个字节也不动。"""
    for name in {folder, "tokenizer"}:
        path = work / name / "report.json"
        key = "corpus_hash" if folder == "corpus" else "key"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: "另一份"}), "utf-8")
    before = digest(work)
    assert "--fresh" in error_of(a100_train, "--work_dir", work, *TINY)
    assert digest(work) == before


@pytest.mark.parametrize("argv", [["--corpus", "{other}"], ["--vocab_size", 800]])
def test_other_data_asked_for_is_refused(work, tmp_path, real_texts, argv):
    """有检查点时，命令行上要另一份语料或词表：旁边的脚本报错，什么也不动。"""
    other = write_jsonl(tmp_path / "other.jsonl", real_texts["news"][700:900])
    before = digest(work)
    with pytest.raises(SystemExit) as stopped:
        call(a100_train, "--work_dir", work, *TINY, *[str(a).format(other=other) for a in argv])
    assert stopped.value.code not in (0, None) and digest(work) == before


def settings_of(work_dir, preset="full", **changes):
    s = defaults(preset)
    s.work_dir, s.corpus, s.optim = work_dir, None, "muon"
    for name in changes:
        setattr(s, name, changes[name])
    return s


@pytest.fixture
def ran(monkeypatch):
    """prepare() 会运行哪些脚本：[[名字, 选项……]]；不真的运行，也不打包。"""
    found = []
    monkeypatch.setattr(
        a100_train, "run_script", lambda name, output, *options: found.append([name, *options])
    )
    monkeypatch.setattr(a100_train, "pack", lambda s: None)
    return found


@pytest.mark.parametrize(
    ("made", "preset", "again"),
    [(["demo"], "full", True), (["demo"], "demo", False), (["书=a.txt"], "full", False)],
)
def test_demo_corpus_is_not_used_for_the_full_training(copied, ran, made, preset, again):
    """演示跑过的文件夹里做完整训练：语料重做；自己的语料不动。"""
    path = copied / "corpus/report.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"corpus": made}), "utf-8")
    a100_train.prepare(settings_of(copied, preset), None)
    assert ran == [["prepare_corpus.py", "--rebuild", "--corpus", "wiki", "zhihu"]] * again


def test_corpus_options_are_passed_on(copied, ran):
    """自己的语料、取哪几列、转不转简体，都传给 prepare_corpus.py；有检查点时不许重做。"""
    changes = dict(corpus=["书=a.csv", "b.txt"], text_column=["标题", "正文"], simplify=True)
    a100_train.prepare(settings_of(copied, **changes), None)
    options = ["--corpus", "书=a.csv", "b.txt", "--text_column", "标题", "正文", "--simplify"]
    assert ran == [["prepare_corpus.py", "--rebuild", *options]]


@pytest.mark.parametrize(("typed", "again"), [(None, False), (VOCAB_SIZE, False), (800, True)])
def test_tokenizer_with_another_vocabulary_than_typed(copied, ran, typed, again):
    """盘上的分词器不是命令行上要的那么大：没有检查点就重做；没有写就用现成的。"""
    a100_train.prepare(settings_of(copied, asked_vocab_size=typed), None)
    options = ["--corpus_dir", copied / "corpus", "--vocab_size", 800]
    assert ran == [["train_tokenizer.py", "--rebuild", *options]] * again


def test_typed_vocabulary_is_really_made(copied):
    """真的重做一次：分词器、打包、以后训练用的词表都是 800。"""
    call(a100_train, "--work_dir", copied, "--device", "cpu", "--prepare_only", "--vocab_size", 800)
    assert json.loads((copied / "tokenizer/report.json").read_text("utf-8"))["vocab_size"] == 800
    assert json.loads((copied / "packed/meta.json").read_text("utf-8"))["vocab_size"] == 800
    assert max((copied / "packed/train.bin").read_bytes()[1::2]) <= 800 >> 8


# ==== 写错了的、放不下的 ====


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--n_layer", "-1"], ["--n_layer", "-1"]),
        (["--batch_size", "0"], ["--batch_size", "0"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--learning_rate", "inf"], ["--learning_rate", "inf"]),
        (["--max_hours", "-2"], ["--max_hours"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--max_steps", "-1"], ["--max_steps", "-1", "--max_steps 和 --seed 也可以是 0"]),
        (["--eval_steps", "0"], ["--eval_steps"]),
        (["--n_embd", "100", "--n_head", "3"], ["--n_embd", "100", "--n_head", "3"]),
        (["--batch_size", "3"], ["--batch_size", "3", "--effective_batch_size"]),
        (["--vocab_size", "0"], ["--vocab_size", "0"]),
    ],
)
def test_bad_values(tmp_path, argv, words):
    message = error_of(a100_train, "--preset", "demo", "--work_dir", tmp_path / "w", *argv)
    assert all(word in message for word in words) and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "fast"],
        ["--n_layer", "2.5"],
        ["--batch_size", "auto"],
        ["--preset", "a100"],
        ["--learning_rat", "1"],
        ["--corpus"],
        ["stray"],
    ],
)
def test_argparse_refuses(tmp_path, capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        call(a100_train, "--work_dir", tmp_path / "w", *argv)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err and not (tmp_path / "w").exists()


def test_corpus_takes_several_values_and_repeats(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["a100_train.py", "--corpus", "a=1.txt", "b", "--corpus", "*.jsonl"])
    assert a100_train.read_settings().corpus == ["a=1.txt", "b", "*.jsonl"]


def test_block_larger_than_the_corpus(copied, no_plot):
    message = error_of(a100_train, "--work_dir", copied, *TINY, "--block_size", 1_000_000)
    assert "--block_size 1000000" in message and not (copied / "config.json").exists()


def command(*argv):
    """作为命令运行；返回 (退出码, 最后的那一行错误)。没有 traceback。"""
    result = run_script("a100_train.py", *argv)
    assert "Traceback" not in result.stderr and result.stderr.count("错误：") == 1, result.stderr
    return result.returncode, next(line for line in result.stderr.splitlines() if "错误：" in line)


def test_full_run_without_cuda_and_file_as_work_dir(tmp_path):
    (tmp_path / "file").write_text("心血", "utf-8")
    code, line = command("--preset", "demo", "--work_dir", tmp_path / "file" / "run")
    assert code == 1 and "读写失败" in line and (tmp_path / "file").read_text("utf-8") == "心血"


def guarded(monkeypatch, capsys, *argv):
    """在本进程里，经过 run()：返回那一行错误。"""
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    monkeypatch.setattr(sys.stderr, "reconfigure", lambda **_: None, raising=False)
    handlers = [a100_train.signal.getsignal(which) for which in (2, 15)]
    try:
        a100_train.run(lambda: call(a100_train, *argv))
    except SystemExit as stop:
        assert str(stop.code).startswith("错误：") and "\n" not in stop.code
        return stop.code
    finally:
        for which, handler in zip((2, 15), handlers, strict=True):
            a100_train.signal.signal(which, handler)
    raise AssertionError("应当报错")


def test_two_runs_in_one_folder(work, no_plot, monkeypatch, capsys):
    """同一个工作目录里已有一个在跑：一行说清，什么也不动。"""
    before = digest(work)
    with filelock.FileLock(work / ".lock", is_singleton=False):
        assert "另一个进程正在写" in guarded(monkeypatch, capsys, "--work_dir", work, *TINY, "--fresh")
    assert digest(work) == before


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(大小)：挂一个很小的内存盘；没有权限就跳过。"""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, source):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("挂不了内存盘（要 Linux 的 root），没法让磁盘写满")
        shutil.copytree(source, disk / "run")
        return disk

    yield mount
    subprocess.run(["umount", "-l", disk], capture_output=True)


def fill(disk, leave):
    (disk / "ballast").write_bytes(b"\0" * max(0, shutil.disk_usage(disk).free - leave))


@pytest.mark.parametrize("leave", [20_000, 400_000, 900_000])
def test_disk_full_while_saving(small_disk, work, finished, no_plot, monkeypatch, capsys, leave):
    """存检查点时磁盘满：一行说清，旧检查点还在；清出空间再跑同一条命令，与没有满过的逐位相同。"""
    shutil.rmtree(work / "checkpoints/checkpoint-6")
    shutil.rmtree(work / "final_model")
    disk = small_disk("24m", work)
    fill(disk, leave)
    before = digest(disk / "run/checkpoints/checkpoint-4")
    argv = ["--work_dir", disk / "run", *TINY]
    assert "磁盘不够" in error_of(a100_train, *argv), "开始之前就看得出来"
    usage = shutil.disk_usage
    answers = [argparse.Namespace(free=1 << 40)]  # 假装开始时看着够
    monkeypatch.setattr(shutil, "disk_usage", lambda path: answers.pop() if answers else usage(path))
    assert "磁盘不够" in guarded(monkeypatch, capsys, *argv)
    assert digest(disk / "run/checkpoints/checkpoint-4") == before
    (disk / "ballast").unlink()
    call(a100_train, *argv)
    assert weights(disk / "run") == weights(finished)


def test_disk_too_small_for_the_snapshots(tmp_path, monkeypatch):
    """从头训练要多少盘：不留快照，就少要一些，提示的办法真的有用。接着训练只要一个检查点的。"""
    s = argparse.Namespace(
        work_dir=tmp_path, parameters=1000, snapshots=True, device="cuda", report_to="none"
    )
    monkeypatch.setattr(a100_train.shutil, "disk_usage", lambda path: argparse.Namespace(free=50_000))
    with pytest.raises(SystemExit, match="磁盘不够.*--no-snapshots"):
        a100_train.prepare_process(s, None)
    a100_train.prepare_process(s, tmp_path / "checkpoint-4")
    s.snapshots = False
    a100_train.prepare_process(s, None)


def test_disk_full_while_packing(small_disk, work_dir, no_plot, monkeypatch, capsys):
    disk = small_disk("24m", work_dir)
    shutil.rmtree(disk / "run/packed")
    fill(disk, 8192)
    argv = ["--work_dir", disk / "run", "--device", "cpu", "--prepare_only"]
    assert "No space left" in guarded(monkeypatch, capsys, *argv)
    (disk / "ballast").unlink()
    call(a100_train, *argv)
    assert digest(disk / "run/packed") == digest(work_dir / "packed")


# ==== 记到别处 ====

TRACKERS = {"tensorboard": "events.out.tfevents*", "swanlab": "*", "trackio": "*.db", "wandb": "*.wandb"}


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers_run_offline(name, work_dir, tmp_path):
    """每个都离线跑一次：训练到底，记录找得到，里面有我们的损失。"""
    pytest.importorskip(name)
    shutil.copytree(work_dir, tmp_path / "work")
    logs = tmp_path / "logs"
    logs.mkdir()
    variables = {
        "TENSORBOARD_LOGGING_DIR": str(logs),
        "SWANLAB_MODE": "offline",
        "SWANLAB_LOG_DIR": str(logs),
        "TRACKIO_DIR": str(logs),
        "HOME": str(tmp_path),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(logs),
        "PWD": str(logs),
    }
    argv = ["--work_dir", tmp_path / "work", *TINY, "--max_steps", 2, "--report_to", name, "--no-snapshots"]
    with open(tmp_path / "run.log", "a") as log:  # fork 出来的：四个都省去 import
        code = fault_injection.Forked(list(map(str, argv)), log, variables).wait()
    assert code == 0, (tmp_path / "run.log").read_text("utf-8")
    found = [path for path in logs.rglob(TRACKERS[name]) if path.is_file()]
    assert found, list(logs.rglob("*"))
    assert any(
        b"eval_bits_per_char" in path.read_bytes() or b"eval/bits_per_char" in path.read_bytes()
        for path in found
    ), found
