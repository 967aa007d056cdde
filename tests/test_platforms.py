"""读者的机器：旧的 pip 在中文 Windows 上读得懂 requirements，多进程用 spawn，路径里有空格和汉字。

这里没有 Windows 和 Mac：试的是它们与 Linux 不同的几件事。真的系统由 .github/workflows/tests.yml 试（还没有跑过）。
"""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, read_jsonl
from packaging.requirements import Requirement

import a100_train

REQUIREMENTS = [*sorted(ROOT.glob("requirements*.txt")), ROOT / "space/requirements.txt"]
NAMES = [str(path.relative_to(ROOT)) for path in REQUIREMENTS]


@pytest.mark.parametrize("path", REQUIREMENTS, ids=NAMES)
def test_an_old_pip_reads_the_requirements(path):
    """2025 年以前的 pip 按系统的编码（中文 Windows 是 GBK）读，除非头两行里有 coding；-r 带进来的文件也各看各的。

    真的试过：pip 23.2.1 和 24.0，PYTHONUTF8=0 LC_ALL=zh_CN.GBK，见 results/platforms.md。
    """
    data = path.read_bytes()
    first = data.split(b"\n")[0]
    text = data.decode("utf-8")
    assert text.isascii() or first == b"# -*- coding: utf-8 -*-"
    with pytest.raises(UnicodeDecodeError):  # 不写第一行，真的会停：GBK 读不了这里的中文注释
        data.decode("gbk")


@pytest.mark.parametrize("path", REQUIREMENTS, ids=NAMES)
def test_every_requirement_line_is_understood(path):
    """每个包都写了理由；pip 认得每一行；用 -r 带进来的文件存在。"""
    for line in path.read_text(encoding="utf-8").splitlines():
        requirement, _, reason = line.partition("#")
        if not requirement.strip():
            continue
        assert reason.strip() or requirement.startswith("-r "), f"没有写为什么要它：{line}"
        included = re.match(r"-r (\S+)", requirement)
        if included:
            assert (path.parent / included[1]).is_file()
        else:
            Requirement(requirement)


def test_the_demo_needs_no_gpu_packages():
    """普通电脑上的演示不装它们：triton 要多下载 286 MB，bitsandbytes 43 MB，gradio 31 MB。"""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    names = {Requirement(line.partition("#")[0]).name for line in text.splitlines() if re.match(r"\w", line)}
    assert not names & {"bitsandbytes", "liger-kernel", "triton", "flash-attn", "gradio"}
    assert {"tqdm", "modelscope-hub"} <= names


def test_the_optional_optimizer_runs():
    """requirements-gpu.txt 里的 bitsandbytes 在 CPU 上也能跑：矩阵的历史是 8 位的，词向量的仍是 32 位的，损失下降。"""
    pytest.importorskip("bitsandbytes")
    shape = dict(vocab_size=500, n_layer=1, n_embd=128, n_head=2, block_size=16, attn="sdpa", seed=0)
    s = argparse.Namespace(**shape, optim="adamw_bnb_8bit", learning_rate=1e-3, precision="fp32")
    model = a100_train.build_model(s)
    optimizer = a100_train.build_optimizer(model, s)
    ids = torch.randint(4, 500, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=ids, labels=ids)["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    transformer = model.transformer
    assert optimizer.state[transformer.h[0].mlp.c_fc.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[transformer.wte.weight]["state1"].dtype == torch.float32


SPAWN = """
import multiprocessing
multiprocessing.set_start_method("spawn", force=True)
try:
    import multiprocess  # datasets 用的那一个
    multiprocess.set_start_method("spawn", force=True)
except ImportError:
    pass
"""


@pytest.fixture(scope="module")
def demo(real_texts, tmp_path_factory):
    """演示训练几步：spawn，文件夹和语料的名字里有空格和汉字，标准输出照中文 Windows 用 GBK。"""
    folder = tmp_path_factory.mktemp("platforms") / "我的 文档"
    corpus = folder / "语料 一" / "新闻 与 评论.txt"
    corpus.parent.mkdir(parents=True)
    corpus.write_text("\n\n".join(real_texts["news"][:500]), encoding="utf-8")
    startup = folder / "启动 文件"
    startup.mkdir()
    (startup / "sitecustomize.py").write_text(SPAWN, encoding="utf-8")  # 每个 Python 进程启动时都先读它
    settings = environment() | {"PYTHONPATH": str(startup), "PYTHONIOENCODING": "gbk"}
    work_dir = folder / "输出 文件夹"
    arguments = ["--preset", "demo", "--corpus", f"新 闻={corpus}", "--work_dir", work_dir, "--device", "cpu"]
    arguments += ["--vocab_size", 1000, "--max_steps", 4, "--eval_steps", 2, "--logging_steps", 1]
    arguments += ["--batch_size", 8, "--effective_batch_size", 8]
    command = [sys.executable, ROOT / "a100_train.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, timeout=600)
    return folder, work_dir, settings, done


def test_the_demo_runs_with_spawn_and_chinese_paths(demo):
    folder, work_dir, settings, done = demo
    errors = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, errors[-2000:]
    assert "Traceback" not in errors
    assert "第 4 步" in done.stdout.decode("utf-8") or "final_model" in done.stdout.decode("utf-8")
    for name in ("corpus/report.json", "tokenizer/report.json", "final_model/config.json", "loss_curve.png"):
        assert (work_dir / name).is_file(), name
    assert [row["step"] for row in read_jsonl(work_dir / "train_log.jsonl") if "loss" in row] == [1, 2, 3, 4]
    report = json.loads((work_dir / "corpus/report.json").read_text(encoding="utf-8"))
    assert "新闻 与 评论.txt" in json.dumps(report, ensure_ascii=False)


def test_what_it_made_can_be_used_from_there(demo):
    """接着用：续写、再画一次图，也都在那个文件夹里。"""
    folder, work_dir, settings, _ = demo
    for command in (
        ["generate.py", "今天", "--model", work_dir / "final_model", "--max_new_tokens", 5],
        ["plot_loss.py", work_dir, "--output", folder / "曲线 图.png"],
    ):
        command = [sys.executable, ROOT / command[0], *map(str, command[1:])]
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]
    assert (folder / "曲线 图.png").stat().st_size > 10_000


def test_spawn_was_really_chosen(demo):
    _, _, settings, _ = demo
    code = "import multiprocess, multiprocessing as m; print(m.get_start_method(), multiprocess.get_start_method())"
    assert os.environ.get("PYTHONPATH") != settings["PYTHONPATH"]
    out = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert out.stdout.split() == ["spawn", "spawn"]
