"""训练的端到端：真的开子进程，从一个小 jsonl 到模型、日志、续写；中断再续与一口气跑完一样。"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, VOCAB_SIZE, call, environment, error_of, read_jsonl, run_script, write_jsonl
from safetensors.torch import load

import a100_train

STEPS = 6
TINY = ["--device", "cpu", "--n_layer", 1, "--n_embd", 32, "--n_head", 2, "--block_size", 32,
        "--batch_size", 4, "--effective_batch_size", 8, "--max_steps", STEPS, "--eval_steps", 2,
        "--logging_steps", 1, "--learning_rate", 0.01, "--warmup_ratio", 0.2]
TRAIN_FIELDS = [
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "elapsed_seconds",
]
EVAL_FIELDS = ["step", "eval_loss", "eval_bits_per_char", "eval_news_loss", "eval_news_bits_per_char",
               "eval_reviews_loss", "eval_reviews_bits_per_char"]


@pytest.fixture(scope="module")
def finished(real_texts, tmp_path_factory):
    """只有两个 jsonl，一条命令跑到底：语料、分词器、打包、训练。返回 (文件夹, 命令的参数, 进程结果)。"""
    folder = tmp_path_factory.mktemp("finished")
    sources = [
        f"{name}={write_jsonl(folder / f'{name}.jsonl', texts[:600])}" for name, texts in real_texts.items()
    ]
    arguments = ["--corpus", *sources, "--vocab_size", VOCAB_SIZE, *TINY]
    result = run_script("a100_train.py", *arguments, "--work_dir", folder / "work")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "work", arguments, result


@pytest.fixture
def work(finished, tmp_path):
    """跑完的工作目录的拷贝，可以随便改。"""
    shutil.copytree(finished[0], tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(a100_train, "plot_curve", lambda *_: None)


def digest(folder):
    """文件夹里每个文件的内容哈希；锁文件不算。"""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock")}


def weights(folder):
    return (folder / "final_model/model.safetensors").read_bytes()


def split_log(folder):
    rows = read_jsonl(folder / "train_log.jsonl")
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


# ==== 一口气跑完 ====

def test_expected_files(finished):
    folder = finished[0]
    for name in (
        "corpus/report.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        "tokenizer/sentencepiece.model", "packed/train.bin", "packed/eval.bin", "packed/meta.json",
        "config.json", "train_log.jsonl", "samples.jsonl", "generation_samples.md",
        "final_model/model.safetensors", "final_model/config.json", "final_model/generation_config.json",
        "final_model/tokenizer.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    leftovers = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old", ".staging"))]
    assert not leftovers


def test_train_log_fields(finished):
    """字段与说明书一字不差，每步一行。"""
    train, held_out = split_log(finished[0])
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    assert all(list(row) == TRAIN_FIELDS for row in train)
    assert all(list(row) == EVAL_FIELDS for row in held_out)
    assert len(read_jsonl(finished[0] / "train_log.jsonl")) == len(train) + len(held_out)


def test_train_log_values(finished):
    config = json.loads((finished[0] / "config.json").read_text("utf-8"))
    train, held_out = split_log(finished[0])
    assert held_out[0]["eval_loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] - 0.2, "真的在学"
    assert train[0]["learning_rate"] <= 0.01 and max(row["learning_rate"] for row in train) == pytest.approx(
        0.01
    )
    for row in train:
        assert row["epoch"] == pytest.approx(row["step"] * 8 / config["n_blocks"], abs=1e-3)
        assert row["tokens_per_second"] > 0 and row["grad_norm"] > 0
        assert row["mfu"] == pytest.approx(
            row["tokens_per_second"] * config["flops_per_token"] / config["peak_flops"], abs=1e-4
        )
    seconds = [row["elapsed_seconds"] for row in train]
    assert seconds == sorted(seconds)


def test_progress_lines(finished):
    """STYLE 第 14 条的那一行，每次日志一行。"""
    line = (r"步 (\d+)/6 \| loss \d+\.\d\d \| lr \d\.\de[+-]\d\d \| [\d.]+k tok/s \| MFU \d+% \| "
            r"剩余 [\d.]+ (秒|分钟|小时)")
    assert [int(found[1]) for found in re.finditer(line, finished[2].stdout + finished[2].stderr)] == [
        1, 2, 3, 4, 5, 6,
    ]


def test_final_model_loads_without_our_code(finished):
    """别人只有 transformers：AutoModelForCausalLM 和 pipeline 都能用。"""
    model = transformers.AutoModelForCausalLM.from_pretrained(finished[0] / "final_model")
    assert type(model) is transformers.GPT2LMHeadModel
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 2, 3)
    assert model.config.use_cache is True
    pipeline = transformers.pipeline("text-generation", str(finished[0] / "final_model"), device="cpu")
    text = pipeline("中国的历史", min_new_tokens=5, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("中国的历史") and len(text) > len("中国的历史")


def test_bits_per_char_is_what_it_says(finished):
    """用原版 transformers 和分词器从头另算：总 nat / ln 2 / 字符数，</s> 的代价算在内。"""
    folder = finished[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "final_model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "final_model")
    reported = split_log(folder)[1][-1]
    all_nats = all_tokens = all_characters = 0
    for name in ("news", "reviews"):
        texts = [text for text, source in a100_train.iter_corpus(folder / "corpus", "eval") if source == name]
        stream = [3] + [token for text in texts for token in [*tokenizer(text)["input_ids"], 3]]
        nats = 0.0
        for start in range(0, len(stream) - 1, 32):           # 与训练同样的窗口：32 个 token 一块，各块独立
            ids = torch.tensor([stream[start:start + 33]])
            with torch.no_grad():
                log_p = model(ids[:, :-1]).logits.double().log_softmax(-1)
            nats -= float(log_p.gather(-1, ids[:, 1:, None]).sum())
        characters = sum(map(len, texts))
        assert reported[f"eval_{name}_loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-4)
        assert reported[f"eval_{name}_bits_per_char"] == pytest.approx(
            nats / math.log(2) / characters, rel=1e-4
        )
        all_nats, all_tokens, all_characters = (
            all_nats + nats,
            all_tokens + len(stream) - 1,
            all_characters + characters,
        )
    assert reported["eval_loss"] == pytest.approx(all_nats / all_tokens, rel=1e-4)
    assert reported["eval_bits_per_char"] == pytest.approx(all_nats / math.log(2) / all_characters, rel=1e-4)


def table_rows(folder):
    return [
        line
        for line in (folder / "generation_samples.md").read_text("utf-8").splitlines()
        if line.startswith("| ")
    ][1:]


def test_samples(finished):
    """每次验证五条，开头固定；表格与 samples.jsonl 一一对应。"""
    rows = read_jsonl(finished[0] / "samples.jsonl")
    assert [list(row) for row in rows] == [["step", "prompt", "text", "eval_loss"]] * 20
    assert [row["prompt"] for row in rows] == ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"] * 4
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4, 6) for _ in range(5)]
    assert all(row["text"].startswith(row["prompt"]) for row in rows)
    losses = {row["step"]: row["eval_loss"] for row in split_log(finished[0])[1]}
    assert all(row["eval_loss"] == losses[row["step"]] for row in rows)
    table = table_rows(finished[0])
    assert len(table) == 20
    for row, line in zip(rows, table, strict=True):
        assert line.startswith(
            f"| {row['step']} | {row['eval_loss']:.3f} | **{row['prompt']}**"
        ) and line.endswith(" |")


def test_samples_with_odd_characters(tmp_path):
    """续写里什么字符都可能有：竖线、各种换行。表格仍是一条一行，samples.jsonl 读得回来。"""
    texts = ["中国|的\n历\r\n史", "人工\u2028智能\x85是\u2029", "今天\x0b天气\x0c\x1c"]
    a100_train.write_samples(tmp_path, 0, 5.0, [("开头", "开头" + text) for text in texts])
    a100_train.write_samples(tmp_path, 2, 4.0, [("开头", "开头正常")])
    assert [row["text"] for row in a100_train.read_jsonl(tmp_path / "samples.jsonl")] == \
        ["开头" + text for text in texts] + ["开头正常"]
    assert len(table_rows(tmp_path)) == 4
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table_rows(tmp_path))
    a100_train.truncate_logs(tmp_path, 0)
    assert [row["step"] for row in a100_train.read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 0]


def test_samples_are_reproducible_and_leave_the_random_state(finished):
    model = a100_train.GPT2LMHeadModel.from_pretrained(finished[0] / "final_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished[0] / "final_model")
    before = torch.get_rng_state()
    first = a100_train.generate_samples(model, tokenizer, 42, 32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert a100_train.generate_samples(model, tokenizer, 42, 32) == first
    rows = read_jsonl(finished[0] / "samples.jsonl")
    assert [text for _, text in first] == [row["text"] for row in rows[-5:]], "最后一次续写就是最终模型写的"


# ==== 中断与接着训练 ====

def test_interrupted_run_ends_like_an_uninterrupted_one(finished, tmp_path):
    """Ctrl-C 以后同一条命令再跑：权重逐位相同，日志每步一行，损失逐行相同。"""
    folder, arguments, _ = finished
    work = tmp_path / "work"
    work.mkdir()
    for name in ("corpus", "tokenizer", "packed"):
        shutil.copytree(folder / name, work / name)
    command = [sys.executable, str(ROOT / "a100_train.py"), *map(str, arguments), "--work_dir", str(work)]
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    log, deadline = work / "train_log.jsonl", time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if log.exists() and '"step": 3' in log.read_text("utf-8"):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130, output
    assert "接着训练：python" in output and "Traceback" not in output
    assert not (work / "final_model").exists(), "没有被打断，测不出什么"
    stopped = max(row["step"] for row in split_log(work)[0])
    assert 3 <= stopped < STEPS and (work / f"checkpoints/checkpoint-{stopped}").exists()
    resumed = subprocess.run(
        command, env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=200
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"从第 {stopped} 步接着训练" in resumed.stdout
    assert weights(work) == weights(folder)
    for ours, expected in zip(split_log(work), split_log(folder), strict=True):
        assert [row["step"] for row in ours] == [row["step"] for row in expected]
        for key in ("loss", "grad_norm", "learning_rate", "epoch", "eval_loss", "eval_bits_per_char"):
            assert [row.get(key) for row in ours] == [row.get(key) for row in expected], key
    assert read_jsonl(work / "samples.jsonl") == read_jsonl(folder / "samples.jsonl")
    assert (work / "generation_samples.md").read_text("utf-8") == (
        folder / "generation_samples.md"
    ).read_text("utf-8")
    seconds = [row["elapsed_seconds"] for row in split_log(work)[0]]
    assert seconds == sorted(seconds), "用时接着累计"


def test_truncated_newest_checkpoint_is_skipped(work, finished, no_plot, capsys):
    """最新的检查点断电写坏了：说一声，用前一个，结果与没坏时逐位相同。"""
    shutil.rmtree(work / "final_model")
    path = work / "checkpoints/checkpoint-6/optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert call(a100_train, "--work_dir", work, *TINY) == 0
    out = capsys.readouterr().out
    assert "跳过不完整的检查点" in out and "checkpoint-6" in out and "从第 4 步接着训练" in out
    assert weights(work) == weights(finished[0])
    train, held_out = split_log(work)
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    assert a100_train.checkpoint_problem(work / "checkpoints/checkpoint-6") is None, "坏的那个被好的换掉了"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json",
                                  "rng_state.pth"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_damaged_checkpoints_are_recognised(work, name, damage):
    folder = work / "checkpoints/checkpoint-6"
    assert a100_train.checkpoint_problem(folder) is None
    if damage == "missing":
        (folder / name).unlink()
    else:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:len(data) // 2] if damage == "half" else b"")
    assert a100_train.checkpoint_problem(folder)
    assert a100_train.newest_checkpoint(work / "checkpoints").name == "checkpoint-4"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--learning_rate", 0.02),
        ("--n_embd", 64),
        ("--effective_batch_size", 16),
        ("--seed", 7),
        ("--optim", "adamw_torch"),
        ("--max_steps", 8),
    ],
)
def test_changed_recipe_is_refused(work, no_plot, flag, value):
    """接着训练时改了会影响结果的设置：一行说清，什么也不动。"""
    before = digest(work)
    message = error_of(a100_train, "--work_dir", work, *TINY, flag, value)
    assert flag[2:] in message and str(value) in message and "--fresh" in message
    assert digest(work) == before


def test_changed_corpus_is_refused(work, tmp_path, no_plot, real_texts):
    """有检查点时换语料：子进程报错，什么也不动。"""
    other = write_jsonl(tmp_path / "other.jsonl", real_texts["news"][700:900])
    before = digest(work)
    with pytest.raises(SystemExit) as stopped:
        call(a100_train, "--work_dir", work, *TINY, "--corpus", other)
    assert stopped.value.code == 1 and digest(work) == before


def test_smaller_micro_batch_may_continue(work, finished, no_plot, capfd):
    """换一张小卡：微批量减半可以接着训练，权重几乎一样；Trainer 的英文警告只会吓人，不印。"""
    shutil.rmtree(work / "checkpoints/checkpoint-6")
    shutil.rmtree(work / "final_model")
    assert call(a100_train, "--work_dir", work, *TINY, "--batch_size", 2) == 0
    assert "do not match" not in "".join(capfd.readouterr())
    ours, expected = load(weights(work)), load(weights(finished[0]))
    assert all((ours[name] - expected[name]).abs().mean() < 1e-4 for name in expected)


def test_out_of_memory_halves_the_micro_batch(work, finished, no_plot, monkeypatch, capsys):
    """第 3 步显存不够：微批量减半，从停下的那一步接着来，结果几乎一样，日志每步一行。"""
    original, calls = a100_train.GPT2LMHeadModel.forward, []

    def forward(self, input_ids=None, labels=None, **kwargs):
        calls.append(1)
        if labels is not None and self.training and len(input_ids) == 4 and sum(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, input_ids=input_ids, labels=labels, **kwargs)

    monkeypatch.setattr(a100_train.GPT2LMHeadModel, "forward", forward)
    assert call(a100_train, "--work_dir", work, *TINY, "--fresh") == 0
    assert "微批量减到 2" in capsys.readouterr().out
    train, held_out = split_log(work)
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    ours, expected = load(weights(work)), load(weights(finished[0]))
    assert all((ours[name] - expected[name]).abs().mean() < 1e-4 for name in expected)


def test_a_step_without_a_finite_gradient_is_skipped(work, no_plot, monkeypatch):
    """第 3 步的损失是 NaN：跳过那一步，权重仍是有限数，训练照样到底。"""
    original, steps = a100_train.GPT2LMHeadModel.forward, []

    def forward(self, input_ids=None, labels=None, **kwargs):
        result = original(self, input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None and self.training:
            steps.append(1)
            if len(steps) == 5:                              # 每步两个微批量，第 5 次前向属于第 3 步
                result["loss"] = result["loss"] * float("nan")
        return result

    monkeypatch.setattr(a100_train.GPT2LMHeadModel, "forward", forward)
    assert call(a100_train, "--work_dir", work, *TINY, "--fresh") == 0
    assert all(torch.isfinite(value).all() for value in load(weights(work)).values())
    assert [row["step"] for row in split_log(work)[0]] == list(range(1, STEPS + 1))
    assert split_log(work)[0][-1]["loss"] < split_log(work)[0][0]["loss"]


def test_fresh_starts_over(work, finished, no_plot):
    """--fresh 丢掉检查点和日志；同样的设置得到逐位相同的模型。"""
    assert call(a100_train, "--work_dir", work, *TINY, "--fresh") == 0
    assert [row["step"] for row in split_log(work)[0]] == list(range(1, STEPS + 1))
    assert len(read_jsonl(work / "samples.jsonl")) == 20
    assert weights(work) == weights(finished[0])


def test_second_process_is_refused(work, no_plot):
    """同一个工作目录里已有一个在跑：一行说清，什么也不动。"""
    before = digest(work)
    with filelock.FileLock(work / ".lock"):
        result = run_script("a100_train.py", "--work_dir", work, *TINY, "--fresh")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "另一个训练正在使用" in result.stderr
    assert digest(work) == before


def test_prepare_only(work_dir, tmp_path, capsys):
    """只准备数据：不训练，不需要显卡。"""
    shutil.copytree(work_dir, tmp_path / "work")
    shutil.rmtree(tmp_path / "work/packed")
    assert call(a100_train, "--work_dir", tmp_path / "work", "--prepare_only") == 0
    assert "数据准备好了" in capsys.readouterr().out
    assert (tmp_path / "work/packed/meta.json").exists() and not (tmp_path / "work/config.json").exists()


# ==== 说明书里的命令 ====

def test_demo_command(tmp_path):
    """python a100_train.py --preset demo，只跑 4 步：语料、分词器、训练、图、模型都在。"""
    result = run_script(
        "a100_train.py", "--preset", "demo", "--max_steps", 4, "--eval_steps", 2, "--logging_steps", 2,
        "--work_dir", tmp_path / "demo", timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    train, held_out = split_log(tmp_path / "demo")
    assert [row["step"] for row in train] == [2, 4] and [row["step"] for row in held_out] == [0, 2, 4]
    config = json.loads((tmp_path / "demo/config.json").read_text("utf-8"))
    assert config["vocab_size"] == a100_train.PRESETS["demo"]["vocab_size"]
    assert held_out[0]["eval_loss"] == pytest.approx(math.log(config["vocab_size"]), abs=0.2)
    assert {"eval_news_loss", "eval_reviews_loss"} <= set(held_out[0])
    assert (tmp_path / "demo/loss_curve.png").exists() and (
        tmp_path / "demo/final_model/model.safetensors"
    ).exists()
    tokens = np.fromfile(tmp_path / "demo/packed/train.bin", dtype=np.uint16)
    assert len(tokens) > 1_000_000


def test_full_run_without_cuda_stops_at_once(tmp_path):
    """没有显卡：一行说清完整训练要多久、演示怎么跑；退出码 1，不建任何文件。"""
    result = run_script("a100_train.py", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert "CUDA" in result.stderr and "python a100_train.py --preset demo" in result.stderr
    assert re.search(r"至少要 [\d,]+ 天", result.stderr)
    assert os.listdir(tmp_path) == []
