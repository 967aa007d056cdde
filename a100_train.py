#!/usr/bin/env python3
"""第 3 步：从零训练一个中文 GPT-2（82.1 M 参数：8 层 × 768 维，12 个头，词表 32,000，上下文 1,024）。

读什么：<work_dir>/corpus/ 和 tokenizer/；缺哪个，就先运行旁边的 prepare_corpus.py 或 train_tokenizer.py。
留下什么（都在 --work_dir，默认 gpt2-chinese/）：
    packed/                   编码好的语料，每个 token 两字节
    checkpoints/              检查点；同一条命令再跑一次就从最新的接着训练
    train_log.jsonl           每次日志一行：损失、学习率、速度；验证时另有一行
    samples.jsonl、generation_samples.md   训练途中的续写
    loss_curve.png            损失曲线（由旁边的 plot_loss.py 画）
    final_model/              最终模型，AutoModelForCausalLM.from_pretrained 直接加载

    python a100_train.py --preset demo      # 演示：没有显卡也能跑，不用联网，几分钟
    python a100_train.py                    # 完整训练：维基 + 知乎，一张 A100
    python a100_train.py --prepare_only     # 只准备数据，不需要显卡
"""

import argparse
import ctypes
import errno
import gc
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.trainer import safe_globals

FORMAT = 1                           # 工作目录的格式版本
START = time.time()                  # --max_hours 从这里算起
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # torchrun 设的
FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"         # accelerate launch --config_file fsdp.yaml 设的
LAUNCHER = (f"accelerate launch --config_file fsdp.yaml --num_processes {WORLD_SIZE}" if FSDP else
            f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE')}" if WORLD_SIZE > 1 else "python")
DEADLINE = 1                         # “到时间了”，与信号编号（SIGINT 2、SIGTERM 15）放在一起比较
PRESETS = {
    "full": dict(corpus=["wiki", "zhihu"], vocab_size=32_000,
                 n_layer=8, n_embd=768, n_head=12, block_size=1024,
                 batch_size=48, effective_batch_size=96,          # 48 × 2 × 1,024 = 98,304 token/步
                 # 学习率和曲线由小模型上的搜索定（results/recipe/），按宽度换算到 768 维；这个大小上未测
                 epochs=2.0, max_steps=0, learning_rate=4e-3, adamw_learning_rate=3e-4,
                 lr_schedule="linear", warmup_ratio=0.05, weight_decay=0.1, logging_steps=10, eval_steps=500),
    # 演示：在两个慢核上几分钟学得最多的一组，比较过的都在 results/demo_recipe.md
    "demo": dict(corpus=["demo"], vocab_size=4_500, n_layer=2, n_embd=128, n_head=4, block_size=64,
                 batch_size=32, effective_batch_size=32,          # 32 × 64 = 2,048 token/步
                 epochs=1.0, max_steps=1350, learning_rate=1.6e-2, adamw_learning_rate=3e-3,
                 lr_schedule="linear", warmup_ratio=0.05, weight_decay=0.1, logging_steps=10, eval_steps=225),
}
REFERENCE_TOKENS = 11_838 * 98_304   # 公开参考的训练量，约 11.6 亿 token；只用来估算时间
PAD, BOS, EOS = 0, 2, 3               # 特殊 token 的编号，与 train_tokenizer.py 一致
PROMPTS = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
# 稠密矩阵乘的峰值（TFLOP/s，bf16；T4、V100 是 fp16），来自各显卡的官方规格，用来算 MFU
PEAK_TFLOPS = {"A100": 312, "A800": 312, "H100": 989, "H800": 989, "H200": 989, "H20": 148, "4090": 165,
               "3090": 71, "L40S": 362, "L4": 121, "A10": 125, "T4": 65, "V100": 125}


# ==== 0. 控制台与出错（各脚本里一字不差，由 tests/test_consistency.py 看守）====

class UserError(Exception):
    """使用者自己能改正的错误：只打印一行中文，退出码 1，没有 traceback。"""


class ArgumentParser(argparse.ArgumentParser):
    """argparse，但报错是一行中文，而且 --work-dir 和 --work_dir 都认。"""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        dashes = re.compile(r"^--[\w-]+")
        args = [dashes.sub(lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in args]
        args = [re.sub(r"^--no_(?=\w)", "--no-", a) for a in args]
        return super().parse_args(args, namespace)

    def error(self, message):
        for english, chinese in (("ignored explicit argument", "不接受取值"), ("argument ", "参数 "),
                                 ("unrecognized arguments:", "不认识的参数："),
                                 ("expected one argument", "后面要跟一个值"),
                                 ("expected at least one argument", "后面至少要跟一个值"),
                                 ("invalid choice:", "没有这个选项："), ("choose from", "可选")):
            message = message.replace(english, chinese)
        print(f"错误：{message}（--help 列出全部参数）", file=sys.stderr)
        sys.exit(2)


def number(kind, low, high=1e18):
    """给 argparse 的 type=：返回一个函数，它只收 low 到 high 之间的 kind（int 或 float）。"""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"要一个{'整数' if kind is int else '数'}，得到 {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"要在 {low:g} 到 {high:g} 之间，得到 {text}")
        return value
    return parse


def run(main):
    """运行 main()，把使用者能造成的错误变成一行中文和非零退出码。"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # 让 finally 里的清理有机会执行
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except OSError as error:
        full = error.errno == 28 or "No space left" in str(error)
        where = f"{error.filename}：" if error.filename else ""
        message = f"磁盘写满了：{where}清出空间后重跑同一条命令" if full else f"读写文件失败：{error}；检查路径和权限"
    except KeyboardInterrupt:
        print("已按 Ctrl-C 停下，未完成的部分不算数；重跑同一条命令即可", file=sys.stderr)
        sys.exit(130)
    print("错误：" + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


def replace_directory(staging, final):
    """把写好的 staging 文件夹一步换成 final。先落盘，后改名。"""
    for path in sorted(staging.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())          # 先落盘再改名：断电也不会留下一个空壳
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def open_output_directory(final, marker="report.json", keep_staging=False):
    """锁住输出文件夹，建一个暂存文件夹；返回 (锁, 暂存文件夹)。keep_staging：上次中断留下的半成品还有用。

    final 里没有 marker 文件，就不是我们生成的，拒绝覆盖；另一个进程正在写同一处也拒绝。
    """
    if final.exists() and not (final / marker).exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} 已存在，但不是本脚本生成的，不覆盖；换一个 --output_dir")
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"另一个进程正在写 {final}；等它结束，或换一个 --output_dir") from None
    staging = final.with_name(f".{final.name}.tmp")
    if not keep_staging:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    return lock, staging


def iter_tables(corpus_dir, split, path=None):
    """逐块给出 pyarrow 的表（列 text、source），一块约 16 MB；split 是 train 或 eval，path 指定只读哪一个文件。"""
    paths = [path] if path else sorted(Path(corpus_dir).glob(f"{split}-*.parquet"))
    if not paths:
        raise UserError(f"找不到 {corpus_dir}/{split}-*.parquet，请先运行 python prepare_corpus.py")
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            for i in range(file.num_row_groups):
                yield file.read_row_group(i, columns=["text", "source"])
        except (pa.ArrowException, KeyError, OSError) as error:
            if getattr(error, "errno", None):            # 真的读不了（没有权限……），不是内容坏了
                raise
            raise UserError(f"{path} 已损坏（{error}）；删掉 {corpus_dir} 后重跑 prepare_corpus.py") from None


def iter_corpus(corpus_dir, split):
    """逐篇给出 (text, source)；split 是 train 或 eval。一次只有一块在内存里。"""
    for table in iter_tables(corpus_dir, split):
        yield from zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True)


def read_report(folder, name="report.json"):
    """读一个生成的文件夹的 report.json（或 meta.json）；没有或坏了返回 {}。"""
    try:
        report = json.loads((Path(folder) / name).read_text("utf-8"))
        complete = all((Path(folder) / file).stat().st_size == size for file, size in report["files"].items())
        return report if complete and report["corpus_hash"] else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_text(path, text):
    """先写到旁边再改名：中途断电，原来的文件也还在。"""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def read_jsonl(path):
    """读 JSON lines；断电时只写了一半的行、别的程序写的行（没有 step）略过。"""
    rows = []
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):             # 不用 splitlines()：续写里的 U+2028 也会被它当成换行
        try:
            row = json.loads(line)
            rows += [row] if row["step"] >= 0 else []
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return rows


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def file_hash(path):
    """文件内容的哈希，十六进制。"""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(*values):
    """几个可以写成 JSON 的值 -> 十六进制的指纹。"""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_note(path, key, files, **note):
    """一块做完了：落盘，再写说明（指纹、每个文件的哈希）。没有说明的文件都不算数。"""
    for name in files:
        with open(path.with_name(name), "rb") as file:
            os.fsync(file.fileno())
    note |= {"key": key, "files": {name: file_hash(path.with_name(name)) for name in files}}
    note["note_hash"] = fingerprint(note)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(note, ensure_ascii=False), "utf-8")
    os.replace(temporary, path)
    return note


def read_note(path, key):
    """上次做完的一块的说明；没做完、输入或设置变了、哈希不对，都返回 None（重做）。"""
    try:
        note = json.loads(path.read_text("utf-8"))
        good = note["key"] == key and note.pop("note_hash") == fingerprint(note)
        good = good and all(file_hash(path.with_name(name)) == value for name, value in note["files"].items())
        return note if good else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Meter:
    """进度条：百分比、剩余时间、每秒多少 MB 文本。输出不是终端时十秒更新一次。"""

    def __init__(self, title, total):
        self.bar = tqdm(total=total, desc=title, mininterval=0.5 if sys.stderr.isatty() else 10, delay=2,
                        bar_format="{desc} {percentage:3.0f}%|{bar:30}|{postfix}，已用 {elapsed}，剩余 {remaining}")
        self.start, self.bytes = time.monotonic(), 0

    def update(self, position, text_bytes):
        """position：已处理到 total 里的第几；text_bytes：这一次处理了多少字节文本。"""
        self.bytes += text_bytes
        rate = self.bytes / 1e6 / (time.monotonic() - self.start + 1e-9)
        self.bar.set_postfix_str(f"{self.bytes / 1e6:,.0f} MB，{rate:.1f} MB/s", refresh=False)
        self.bar.update(max(0, position - self.bar.n))

    def close(self):
        self.bar.close()


# ==== 1. 设备与加速 ====

def peak_flops(device):
    """设备每秒浮点运算次数的峰值，和它的来历。表里没有的设备就实测一次大矩阵乘。"""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for key, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b", name):
            return tflops * 1e12, "官方规格"
    size, dtype = (8192, torch.float16) if device == "cuda" else (1024, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(20):                      # 取最快的一次：别的程序只会让它变慢
        start = time.perf_counter()
        (a @ a)[0, 0].item()                 # .item() 等 GPU 算完
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, "实测矩阵乘"


def cpu_name():
    """CPU 的型号和线程数：速度只和同样的比。"""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8", "replace") if info.exists() else "")
    return f"CPU（{found[1].strip() if found else '型号不明'}，{torch.get_num_threads()} 线程）"


def keep_freed_memory():
    """让 glibc 留住释放的内存，只在 CPU 上训练时用。

    它默认把几十 MB 的大块一释放就还给系统（mmap），下一步再要时逐页清零：演示因此慢两成，见 results/cpu_step.md。
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:                              # 不是 glibc 就没有，也不需要
        mallopt(-4, 0)                       # M_MMAP_MAX：大块也从堆里拿
        mallopt(-1, 1 << 30)                 # M_TRIM_THRESHOLD：堆顶空闲 1 GB 以内不还


def check_disk(folder, need, purpose):
    """写之前先看磁盘够不够；need 是字节数。"""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{folder} 只剩 {free / 2**30:.1f} GB，{purpose}要 {need / 2**30:.1f} GB；清出空间，"
                        f"或用 --work_dir 换一块盘")


def flops_per_token(parameters, n_layer, n_embd, block_size):
    """训练一个 token 的浮点运算次数：6N + 12·L·d·T（PaLM 论文附录 B；N 不含位置向量）。"""
    return 6 * (parameters - block_size * n_embd) + 12 * n_layer * n_embd * block_size


def stop_without_cuda():
    """没有显卡就别开始几天的训练：一行说清要多久、演示怎么跑。"""
    flops = REFERENCE_TOKENS * flops_per_token(82_066_944, 8, 768, 1024)
    peak, _ = peak_flops("cpu")
    raise UserError(f"没有找到 CUDA 显卡。完整训练约 {flops:.1e} 次浮点运算，这台 CPU 实测每秒 {peak / 1e9:.0f} G 次，至少要 "
                    f"{flops / peak / 86400:.0f} 天。先看几分钟的演示：python a100_train.py --preset demo"
                    f"（只准备数据用 --prepare_only，一定要用 CPU 就加 --device cpu）")


def installed(package):
    return importlib.util.find_spec(package) is not None


def choose_speed(device, precision, attention, optimizer, compile_, tf32, liger):
    """按设备决定精度、注意力、优化器和开关。参数是命令行的原值：None 和 auto 表示自动，办不到就退而求其次并说一声；

    明说的办不到就报错。返回字典。
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("指定了 --device cuda，但没有可用的 CUDA 显卡；检查驱动和 torch 的 CUDA 版本，或去掉这个参数")
    device = ("cuda" if cuda else "cpu") if device == "auto" else device
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    ampere = capability >= (8, 0)               # T4 是 7.5：没有 bf16、TF32 和 FlashAttention 2
    if precision == "auto":
        precision = "bf16" if ampere else "fp16" if device == "cuda" else "fp32"
    elif precision == "bf16" and not ampere or precision == "fp16" and device == "cpu":
        raise UserError(f"{'这张显卡' if device == 'cuda' else 'CPU'} 不适合 --precision {precision}："
                        f"{'它用 fp16' if device == 'cuda' else '用 fp32'}，去掉这个参数即可")
    flash = device == "cuda" and ampere and installed("flash_attn")
    if attention == "auto":
        attention = "flash_attention_2" if flash and precision != "fp32" else "sdpa"
        if device == "cuda" and not flash:
            print("没有装 flash-attn，用 PyTorch 自带的 SDPA（Ampere 及以后的卡上同样是 FlashAttention 核）")
    elif attention == "flash_attention_2" and not flash:
        raise UserError("指定了 --attn flash_attention_2，但它要 Ampere 以后的显卡和 flash-attn 包；改用 --attn sdpa")
    optimizer = "muon" if optimizer == "auto" else optimizer
    if optimizer == "adamw_bnb_8bit" and not installed("bitsandbytes"):
        raise UserError("指定了 --optim adamw_bnb_8bit，但没有装 bitsandbytes：pip install bitsandbytes")
    if tf32 and not ampere:
        raise UserError("指定了 --tf32，但只有 Ampere（如 A100、3090）以后的显卡有 TF32；去掉这个参数")
    if liger and not (device == "cuda" and installed("liger_kernel")):
        raise UserError("指定了 --liger，但它要 CUDA 显卡和 liger-kernel 包；去掉这个参数")
    compiler = installed("triton") if device == "cuda" else shutil.which("g++") or shutil.which("clang++")
    if compile_ and not compiler:
        missing = "triton" if device == "cuda" else "C++ 编译器（g++）"
        raise UserError(f"指定了 --compile，但缺少 {missing}；装上它，或用 --no-compile")
    return {"device": device, "precision": precision, "attention": attention, "optimizer": optimizer,
            "compile": device == "cuda" and bool(compiler) if compile_ is None else compile_,
            "tf32": ampere if tf32 is None else tf32, "liger": bool(liger)}


# ==== 2. 切分与打包 ====

def run_script(name, arguments, output):
    """以子进程运行旁边的脚本，它写 output；它失败就跟着退出（它自己已经打印了那一行错误）。"""
    script = Path(__file__).with_name(name)
    if not script.exists():
        raise UserError(f"缺少 {script.name}：请把它放在 {Path(__file__).name} 旁边，或先准备好它的输出")
    lock = filelock.FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:                 # 训练被强行杀掉，它的子进程还活着：等它写完，正好拿来用
        print(f"另一个进程正在写 {output}，等它结束")
        lock.acquire()
    lock.release()
    print(f"── 运行 {name}")
    command = [sys.executable, str(script), *map(str, arguments), "--output_dir", str(output)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def prepare(work_dir, corpus, text_column, vocab_size, preset, rebuild):
    """确保 corpus/ 和 tokenizer/ 存在且配套。corpus、vocab_size 为 None 表示用户没有指定，有现成的就用。"""
    flag = ["--rebuild" if rebuild else "--no-rebuild"]
    if corpus or not read_report(work_dir / "corpus"):
        column = ["--text_column", text_column] if text_column else []
        run_script("prepare_corpus.py", ["--corpus", *(corpus or PRESETS[preset]["corpus"]), *column, *flag],
                   work_dir / "corpus")
    tokenizer = read_report(work_dir / "tokenizer")
    fits = tokenizer.get("corpus_hash") == read_report(work_dir / "corpus").get("corpus_hash")
    if not fits or vocab_size not in (None, tokenizer["vocab_size"]):
        run_script("train_tokenizer.py", ["--vocab_size", vocab_size or PRESETS[preset]["vocab_size"], *flag,
                                          "--corpus_dir", work_dir / "corpus"], work_dir / "tokenizer")


def cut(text, limit):
    """把长文本切成不超过 limit 个字符的段，尽量在行尾切；接起来与原文一字不差。"""
    if len(text) <= limit:
        return [text]
    return re.findall(rf"[\s\S]{{0,{limit - 1}}}(?:\n|\S\Z)|[\s\S]{{1,{limit}}}", text)


def encode(sp, texts, threads):
    """一批文档 -> 逐篇给出 uint16 数组，末尾是 </s>（eos）：模型由它学会一篇在哪里结束。"""
    # SentencePiece 在超长的字符串上会累积误差，所以先切成页；换行自成一个词块，在行尾切不改变编号
    pages = [cut(text, 8000) for text in texts]
    flat = [page for document in pages for page in document]
    encoded = iter(sp.encode(flat, num_threads=threads, return_type="numpy"))
    end = np.array([EOS], dtype=np.int32)
    for document in pages:
        yield np.concatenate([*islice(encoded, len(document)), end]).astype(np.uint16)


def encode_shard(path, sp, folder, corpus_hash, tokenizer_hash, threads, meter):
    """编码语料的一个分片，写 <分片名>.tokens（uint16）和 .npy（每篇的 token 数）；上次做完了就沿用。返回说明。"""
    key = fingerprint(FORMAT, corpus_hash, tokenizer_hash, path.name)
    tokens_path = folder / f"{path.stem}.tokens"
    if note := read_note(tokens_path.with_suffix(".json"), key):
        meter.update(meter.bar.n + note["bytes"], note["bytes"])
        return note
    lengths, counts, size = [], np.zeros(sp.get_piece_size(), dtype=np.int64), 0
    with open(tokens_path, "wb") as file:
        for table in iter_tables(path.parent, "train", path):
            documents = list(encode(sp, table["text"].to_pylist(), threads))
            lengths.append(np.fromiter(map(len, documents), dtype=np.int64))
            tokens = np.concatenate(documents)
            file.write(tokens.tobytes())
            counts += np.bincount(tokens, minlength=len(counts))
            size += table["text"].nbytes
            meter.update(meter.bar.n + table["text"].nbytes, table["text"].nbytes)
    np.save(tokens_path.with_suffix(".npy"), np.concatenate(lengths))
    return write_note(tokens_path.with_suffix(".json"), key, [tokens_path.name, f"{path.stem}.npy"],
                      counts=counts.tolist(), bytes=size)


def shuffle_documents(shards, path, seed):
    """各分片的 token 按打乱的文档次序抄成一个平坦的 uint16 文件。

    全局打乱，内存里却只有每篇的位置和次序，各 8 字节。
    """
    lengths = [np.load(shard.with_suffix(".npy")) for shard in shards]
    borders = np.cumsum([0, *(int(part.sum()) for part in lengths)])          # 各分片从第几个 token 开始
    starts = np.cumsum(np.concatenate([[0], *lengths]))
    files = [open(shard, "rb", buffering=0) for shard in shards]
    with open(path, "wb") as output:
        for document in np.random.default_rng(seed).permutation(len(starts) - 1):
            start, length = int(starts[document]), int(starts[document + 1] - starts[document])
            shard = bisect(borders, start) - 1
            output.write(os.pread(files[shard].fileno(), 2 * length, 2 * (start - int(borders[shard]))))
    for file in files:
        file.close()


def pack_train(corpus_dir, sp, folder, corpus_hash, tokenizer_hash, seed, threads):
    """编码训练集，文档打乱后首尾相接，写成 folder/train.bin。返回每个 token 出现的次数，形状 (vocab,)。

    一个分片一个分片地编码；中断了，做完的分片不用重做。
    """
    paths = sorted(Path(corpus_dir).glob("train-*.parquet"))
    meter = Meter("打包", sum(shard.row_group(i).column(0).total_uncompressed_size
                            for shard in map(pq.read_metadata, paths) for i in range(shard.num_row_groups)))
    notes = [encode_shard(path, sp, folder, corpus_hash, tokenizer_hash, threads, meter) for path in paths]
    meter.close()
    shards = [folder / f"{path.stem}.tokens" for path in paths]
    shuffle_documents(shards, folder / "train.bin", seed)
    return sum(np.array(note["counts"]) for note in notes)


def pack_eval(corpus_dir, sp, path, threads):
    """编码验证集，按来源排在一起。返回 {来源: {"start", "end"（token 位置）, "characters"}}。"""
    by_source = {}
    for text, source in iter_corpus(corpus_dir, "eval"):
        by_source.setdefault(source, []).append(text)
    position, sources = 0, {}
    with open(path, "wb") as file:
        for source, texts in by_source.items():
            tokens = np.concatenate(list(encode(sp, texts, threads)))
            file.write(tokens.tobytes())
            start, position = position, position + len(tokens)
            sources[source] = {"start": start, "end": position, "characters": sum(map(len, texts))}
    return sources


def pack(work_dir, seed):
    """打包语料（或沿用已有的），返回 meta：token 数、按来源的验证集位置、单字频率的熵。"""
    corpus, packed = read_report(work_dir / "corpus"), work_dir / "packed"
    model_path = work_dir / "tokenizer" / "sentencepiece.model"
    tokenizer_hash = hashlib.blake2b(model_path.read_bytes(), digest_size=16).hexdigest()
    key = [FORMAT, corpus["corpus_hash"], tokenizer_hash, seed]
    if packed.exists():
        meta = read_report(packed, "meta.json")
        if meta.get("key") == key:
            print(f"打包好的数据没有变，沿用 {packed}")
            return meta
        print(f"重新打包：{'语料、分词器或随机种子变了' if meta else packed.name + '/ 不完整'}")
    characters = sum(source.get("train_characters", 0) for source in corpus["sources"].values())
    check_disk(work_dir, 4 * characters, "打包")       # 每 token 2 字节，打乱时有两份；按一字一 token 估计
    try:
        sp = spm.SentencePieceProcessor(model_file=str(model_path))
    except RuntimeError:
        raise UserError(f"{model_path} 已损坏；删掉 tokenizer/ 后重跑（会重新运行 train_tokenizer.py）") from None
    lock, staging = open_output_directory(packed, "meta.json", keep_staging=True)
    with lock:
        try:
            start, threads = time.time(), os.cpu_count()
            counts = pack_train(work_dir / "corpus", sp, staging, corpus["corpus_hash"], tokenizer_hash, seed,
                                threads)
            sources = pack_eval(work_dir / "corpus", sp, staging / "eval.bin", threads)
            for path in staging.glob("train-*"):             # 编码好的分片，用完了
                path.unlink()
            share = counts[counts > 0] / counts.sum()
            files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
            meta = {"key": key, "corpus_hash": corpus["corpus_hash"], "tokenizer_hash": tokenizer_hash,
                    "vocab_size": len(counts), "train_tokens": int(counts.sum()), "eval_sources": sources,
                    "unigram_entropy": float(-(share * np.log(share)).sum()),     # 只猜词频能到的损失，nat
                    "files": files}
            write_text(staging / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1))
            replace_directory(staging, packed)
        except (UserError, OSError):                 # 语料坏了，或磁盘满了；被杀掉则留着编码好的分片，下次接着用
            shutil.rmtree(staging, ignore_errors=True)
            raise
    print(f"打包 {counts.sum():,} 个训练 token，用时 {time.time() - start:.1f} 秒")
    return meta


class BlockStream(torch.utils.data.Dataset):
    """整个训练过程要用的全部块，排成一列：第 i 个是第 i // n 遍里打乱后的第 i % n 块。

    次序只由 seed 和 i 决定，与微批量、进程数无关，所以换一张小卡续训，数据次序也不变。
    """

    def __init__(self, path, block_size, length, seed):
        self.path, self.block_size, self.length, self.seed = path, block_size, length, seed
        self.n_blocks = path.stat().st_size // 2 // block_size       # 只丢掉末尾不满一块的
        self.permutations = {}

    def __len__(self):
        return self.length

    def block_index(self, i):
        epoch, place = divmod(i, self.n_blocks)
        if epoch not in self.permutations:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks)
            self.permutations = {epoch: order}
        return int(self.permutations[epoch][place])

    def __getitems__(self, indices):
        """返回 {"input_ids", "labels"}，形状都是 (B, T) 的 int64；labels 是每个位置的下一个 token。"""
        data = np.memmap(self.path, dtype=np.uint16, mode="r")      # 每批重开：一直开着会让内存看起来越涨越多
        size = self.block_size
        tokens = np.full((len(indices), size + 1), -100, dtype=np.int64)   # 文件末尾没有下一个：-100 不计损失
        for row, i in zip(tokens, indices, strict=True):
            start = self.block_index(i) * size
            block = data[start:start + size + 1]
            row[:len(block)] = block
        tokens = torch.from_numpy(tokens)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def pass_batch(batch):
    """__getitems__ 已经拼好了一批，不用再拼。"""
    return batch


# ==== 3. 模型 ====

class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """transformers 的 GPT-2，只改一处：训练时只返回损失。

    原版还返回 logits，混合精度下会再复制成一份 fp32：48 × 1,024 × 32,000 × 4 字节 = 6.3 GB。
    同名，所以存出来的 config.json 和原版一样，别人不需要这个脚本就能加载。
    """
    liger = False

    def forward(self, input_ids=None, labels=None, **kwargs):
        """labels 是已经错开一位的下一个 token（原版在内部错位），形状 (B, T)，-100 不计。"""
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.transformer(input_ids, use_cache=False).last_hidden_state       # (B, T, C)
        if self.liger:      # 输出层和交叉熵融合成一个核，不产生 (B, T, V) 的 logits
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
            return {"loss": liger_fused_linear_cross_entropy(
                hidden.flatten(0, 1), self.lm_head.weight.to(hidden.dtype), labels.flatten())}
        logits = self.lm_head(hidden)                                                  # (B, T, V)
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten())}


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy，但反向时把 log_softmax 就地改写成梯度：少分配、少清零一份 (B·T, V)。"""

    @staticmethod
    def forward(ctx, logits, labels):
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, labels)
        return F.nll_loss(log_probabilities, labels)

    @staticmethod
    def backward(ctx, grad_loss):
        log_probabilities, labels = ctx.saved_tensors
        kept = labels != -100
        scale = grad_loss / kept.sum()
        grad = log_probabilities.exp_().mul_(scale)                    # 梯度 = (softmax - 独热) / 个数
        grad[torch.arange(len(labels)), labels.clamp_min(0)] -= scale
        return grad if kept.all() else grad.masked_fill_(~kept[:, None], 0), None


def cross_entropy(logits, labels):
    """平均交叉熵；logits 形状 (B·T, V)，labels 形状 (B·T,)，-100 不计。显卡上 torch.compile 自己会融合，用原来的。"""
    if logits.is_cpu and logits.dtype == torch.float32:
        return CrossEntropy.apply(logits, labels)
    return F.cross_entropy(logits.float(), labels)


def build_model(vocab_size, n_layer, n_embd, n_head, block_size, attention, liger, seed):
    """新建一个随机初始化的 GPT-2。同一个 seed 得到同样的权重。"""
    # 在 torch.compile 下 "sdpa" 会造出一个 B × 1 × T × T 的掩码，用不上 FlashAttention 核；换个名字注册同一个
    # 函数，就只传 is_causal=True。它不看 padding，所以续写时一次只生成一条
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    config = GPT2Config(
        vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=block_size,
        bos_token_id=BOS, eos_token_id=EOS,          # 默认的 50256 超出了词表
        pad_token_id=None,                           # 设了的话，每次前向都要让 GPU 停下来查一遍 padding
        activation_function="gelu_pytorch_tanh",     # 与 gelu_new 是同一个函数，融合成一个核，少存三份中间结果
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa_causal" if attention == "sdpa" else attention)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"                  # 否则原版的损失会多乘一个 (T-1)/T
    model.liger = liger
    if liger:
        from liger_kernel.transformers import LigerLayerNorm
        from liger_kernel.transformers.monkey_patch import _patch_layer_norm_module
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and not isinstance(module, LigerLayerNorm):
                _patch_layer_norm_module(module)
    return model


# ==== 4. 优化器 ====

def orthogonalize(matrix, steps=5):
    """Newton–Schulz 迭代：把 (..., m, n) 的矩阵近似换成奇异值全为 1 的矩阵。系数来自 Keller Jordan 的 Muon。"""
    # Ampere 以后的显卡上用 bf16 就够；CPU 和老显卡上 bf16 是模拟的，慢得多。torch.optim.Muon 固定用 bf16，所以自己写
    fast = matrix.is_cuda and torch.cuda.get_device_capability() >= (8, 0)
    x = matrix.bfloat16() if fast else matrix.float()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon（Jordan 等，2024）：矩阵沿正交化的动量走；嵌入、偏置、LayerNorm 仍用 AdamW。

    参数组里 muon=True 的是矩阵。GPT-2 的 c_attn 把 q、k、v 并排放在一个 (C, 3C) 里，这里分开正交化。
    """

    def __init__(self, groups, lr, betas, eps=1e-8, momentum=0.95):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, momentum=momentum, weight_decay=0.0,
                                      muon=False, split=1))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                (self.muon_step if group["muon"] else self.adamw_step)(group, params)

    def muon_step(self, group, params):
        """形状相同的矩阵叠在一起正交化：8 层只要几次大的批量矩阵乘，而不是几百次小的。"""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])                   # Nesterov
        for shape in dict.fromkeys(p.shape for p in params):
            same = [i for i, p in enumerate(params) if p.shape == shape]
            stacked = torch.stack([updates[i] for i in same])                              # (n, 输入, 输出)
            parts = orthogonalize(torch.cat(stacked.chunk(group["split"], dim=2)))         # q、k、v 分开
            scale = max(1, parts.size(2) / parts.size(1)) ** 0.5
            directions = torch.cat(parts.chunk(group["split"]), dim=2).unbind()
            torch._foreach_add_([params[i] for i in same], directions, alpha=-group["lr"] * scale)

    def adamw_step(self, group, params):
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            self.state[p]["step"] += 1
        (beta1, beta2), grads = group["betas"], [p.grad for p in params]
        states = [self.state[p] for p in params]
        averages, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), 1 - beta2)
        denominators = torch._foreach_div(squares, [1 - beta2 ** s["step"] for s in states])
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, averages, denominators,
                                [-group["lr"] / (1 - beta1 ** s["step"]) for s in states])


def muon_groups(model, learning_rate, muon_learning_rate, weight_decay):
    """把参数分成四组：AdamW（衰减、不衰减）和 Muon（c_attn 三份、其他矩阵）。"""
    names = {"decay": [], "no_decay": [], "attn": [], "matrix": []}
    for name, p in model.named_parameters():
        in_block = ".h." in name and p.ndim == 2
        names["attn" if in_block and "c_attn" in name else "matrix" if in_block else
              "decay" if p.ndim == 2 else "no_decay"].append(p)
    return [dict(params=names["decay"], lr=learning_rate, weight_decay=weight_decay),
            dict(params=names["no_decay"], lr=learning_rate, weight_decay=0.0),
            dict(params=names["attn"], lr=muon_learning_rate, weight_decay=weight_decay, muon=True, split=3),
            dict(params=names["matrix"], lr=muon_learning_rate, weight_decay=weight_decay, muon=True)]


# ==== 5. 评估与续写 ====

@torch.no_grad()
def evaluate(model, path, sources, block_size, batch_size, device):
    """验证集上的损失。每个来源的每一个 token（包括 </s>）恰好被预测一次。

    返回 {"eval_loss", "eval_bits_per_char", "eval_<来源>_loss", ...}。损失的单位是 nat/token；
    每字比特数 = 总 nat / ln 2 / 总字符数，与分词器无关，不同词表之间可以直接比较。
    """
    model.eval()
    data, metrics, total = np.fromfile(path, dtype=np.uint16).astype(np.int64), {}, np.zeros(3)
    for name, source in sources.items():
        y = data[source["start"]:source["end"]]
        x = np.concatenate([[EOS], y[:-1]])
        padding = -len(y) % block_size
        x = torch.from_numpy(np.pad(x, (0, padding), constant_values=EOS)).view(-1, block_size)
        y_blocks = torch.from_numpy(np.pad(y, (0, padding), constant_values=-100)).view(-1, block_size)
        nats = 0.0
        for start in range(0, len(x), batch_size):
            labels = y_blocks[start:start + batch_size].to(device)
            loss = model(input_ids=x[start:start + batch_size].to(device), labels=labels)["loss"]
            nats += float(loss) * int((labels != -100).sum())
        figures = np.array([nats, len(y), source["characters"]])
        total += figures
        metrics |= loss_metrics(f"eval_{name}_", *figures)
    return loss_metrics("eval_", *total) | metrics


def loss_metrics(prefix, nats, tokens, characters):
    return {f"{prefix}loss": nats / tokens, f"{prefix}bits_per_char": nats / math.log(2) / characters}


def sampling_config(max_new_tokens):
    """续写的设置：温度 0.8，只在累计概率 0.95 的词块里抽（top-p）。"""
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=True, temperature=0.8, top_p=0.95,
                            use_cache=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


@torch.no_grad()
def generate_samples(model, tokenizer, seed, block_size):
    """每个固定的开头续写一段，返回 [(prompt, text)]。用自己的随机数，不影响训练的随机数。"""
    model.eval()
    samples = []
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)], device=model.device)
            length = min(64, block_size - ids.size(1))
            output = model.generate(ids, attention_mask=torch.ones_like(ids),
                                    generation_config=sampling_config(length), synced_gpus=FSDP)
            samples.append((prompt, tokenizer.decode(output[0], skip_special_tokens=True)))
    return samples


def write_samples(work_dir, step, eval_loss, samples):
    """追加到 samples.jsonl，并重写给人看的 generation_samples.md。"""
    for prompt, text in samples:
        append_jsonl(work_dir / "samples.jsonl",
                     {"step": step, "prompt": prompt, "text": text, "eval_loss": eval_loss})
    lines = ["# 训练途中的续写", "", "| 步 | 验证损失 | 续写（开头加粗） |", "|---:|---:|---|"]
    for row in read_jsonl(work_dir / "samples.jsonl"):
        rest = " ⏎ ".join(row["text"].removeprefix(row["prompt"]).replace("|", "\\|").splitlines())
        lines.append(f"| {row['step']} | {row['eval_loss']:.3f} | **{row['prompt']}**{rest} |")
    write_text(work_dir / "generation_samples.md", "\n".join(lines) + "\n")


# ==== 6. 检查点 ====

def checkpoint_problem(folder):
    """检查点完整就返回 None，否则返回哪里不完整。真的把每个文件读一遍：截断的文件只有读了才知道。"""
    try:
        json.loads((folder / "trainer_state.json").read_text("utf-8"))["global_step"]
        with safe_open(folder / "model.safetensors", "pt") as file:       # 长度与文件头不符会报错
            file.keys()
        names = ["optimizer.pt", "scheduler.pt", *(path.name for path in folder.glob("rng_state*.pth"))]
        if len(names) < 3:
            return "缺少 rng_state.pth"
        with safe_globals():                                              # weights_only：不执行文件里的代码
            for name in names:
                torch.load(folder / name, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, UnpicklingError,
            SafetensorError) as error:
        return f"{type(error).__name__}：{str(error)[:60]}"
    return None


def checkpoint_step(path):
    return int(path.name.split("-")[1])


def sorted_checkpoints(folder):
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def newest_checkpoint(folder):
    """最新的完整检查点的路径；没有则 None。不完整的跳过，并说一声。"""
    for path in reversed(sorted_checkpoints(folder)):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        print(f"跳过不完整的检查点 {path}（{problem}）")
    return None


def delete_checkpoints(paths):
    """先改名再删：删到一半被杀，留下的是个隐藏的文件夹，不会被当成检查点；下次开始时收拾掉。"""
    for path in paths:
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden)


@contextmanager
def staged_save(staging):
    """存盘失败时删掉半成品；torch 和 safetensors 把“磁盘写满”报成各种异常，这里统一成 OSError。"""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = shutil.disk_usage(staging.parent).free < 1 << 24 or "No space left" in str(error)
        shutil.rmtree(staging, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(staging.parent)) from None
        raise


def truncate_logs(work_dir, last_step):
    """丢掉检查点之后的日志：那几步要重新训练，每一步只留一行。"""
    for name in ("train_log.jsonl", "samples.jsonl"):
        rows = [row for row in read_jsonl(work_dir / name) if row["step"] <= last_step]
        write_text(work_dir / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_config(work_dir):
    try:
        config = json.loads((work_dir / "config.json").read_text("utf-8"))
        return {"format": config["format"], **config}            # 不是字典、不是我们写的，都在这里报错
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{work_dir} 里有检查点，但 config.json 没有了或坏了；换一个 --work_dir，或加 --fresh") from None


# ==== 7. 训练 ====

class GPT2Trainer(Trainer):
    """Hugging Face 的 Trainer，改了四处：数据次序、优化器、评估与日志、存盘。"""

    def setup(self, work_dir, config, meta, start_step):
        """记下评估和日志要用的东西。config 是 config.json 的内容，start_step 是接着哪一步训练。

        分词器不走 processing_class：那样 Trainer 会给模型设上 pad_token_id，每次前向都要等 GPU 查一遍 padding。
        """
        self.work_dir, self.run_config, self.meta = work_dir, config, meta
        self.tokenizer = AutoTokenizer.from_pretrained(work_dir / "tokenizer")
        self.skipped_steps, self.window_skipped, self.recent_losses = 0, 0, []
        # 还没存过盘时，按每秒写 100 MB 估计；之后用量到的
        self.save_seconds, self.eval_seconds = config["parameters"] * 12 / 1e8, 0.0
        self.reference = read_reference(config, self.args.logging_steps)
        self.tokens_per_step = config["effective_batch_size"] * config["block_size"]
        self.model_accepts_loss_kwargs = False       # 每块一样长，损失取平均就对；梯度累积由 Trainer 除
        rows = read_jsonl(work_dir / "train_log.jsonl")
        self.elapsed = max((row.get("elapsed_seconds", 0) for row in rows), default=0.0)
        self.clock, self.clock_step, self.plot = time.perf_counter(), start_step, None
        self.plotted = self.clock
        self.remove_callback(transformers.PrinterCallback)

    def _issue_warnings_after_load(self, load_result):
        """输出层和词向量共用一个矩阵，检查点里只存一份；别为“缺少 lm_head.weight”吓人。"""
        if set(load_result.missing_keys) != {"lm_head.weight"} or load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)       # BlockStream 已经排好次序

    def create_optimizer(self, model=None):
        if self.run_config["optim"] != "muon" or self.optimizer is not None:
            return super().create_optimizer(model)
        groups = muon_groups(self.model, self.args.learning_rate, self.run_config["muon_learning_rate"],
                             self.args.weight_decay)
        self.optimizer = Muon(groups, lr=self.args.learning_rate,
                              betas=(self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)                     # 裁剪前的范数；Progress 靠它认出坏掉的一步
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm     # FSDP：各进程要一致
        return norm

    def training_step(self, *args, **kwargs):
        # 不是有限数的损失不记进平均值；那一步由 Progress 跳过
        return torch.nan_to_num(super().training_step(*args, **kwargs), nan=0.0, posinf=0.0, neginf=0.0)

    def reserve_seconds(self):
        """停下来收尾大约要多久：存盘、万一正赶上一次验证，再留 10 秒。"""
        return 2 * self.save_seconds + self.eval_seconds + 10

    def save_now(self):
        """立刻存一个检查点，返回它的路径。"""
        self.model.zero_grad(set_to_none=True)
        self._save_checkpoint(self.model)
        return newest_checkpoint(self.work_dir / "checkpoints")

    def log(self, logs, start_time=None):
        """补上速度，写一行 train_log.jsonl，打印一行，再交给 Trainer（和 --report_to 的工具）。"""
        step, loss = self.state.global_step, logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise UserError(f"第 {step} 步的损失是 {loss}：训练发散了。把 --learning_rate "
                            f"{self.args.learning_rate:g} 改小，加 --fresh 从头开始")
        if "loss" in logs:
            now = time.perf_counter()
            seconds, steps = now - self.clock, step - self.clock_step
            self.clock, self.clock_step = now, step
            self.elapsed += seconds
            tokens_per_second = steps * self.tokens_per_step / seconds
            logs["loss"] *= steps / max(1, steps - self.window_skipped)      # 跳过的步不算进平均
            self.window_skipped = 0
            mfu = tokens_per_second * self.run_config["flops_per_token"] / self.run_config["peak_flops"]
            logs |= {"tokens_per_second": round(tokens_per_second, 1), "mfu": round(mfu, 4),
                     "elapsed_seconds": round(self.elapsed, 2)}
            row = {"step": step, "epoch": round(step / self.run_config["steps_per_epoch"], 4)}
            row |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second",
                                               "mfu", "elapsed_seconds")
                    if math.isfinite(logs.get(key, math.nan))}       # JSON 里不能有 NaN
            if self.skipped_steps:
                row["skipped_steps"] = self.skipped_steps
            notes = reference_notes(self.reference, step * self.tokens_per_step,
                                    self.run_config["device_name"])
            tqdm.write(progress_line(row, self.state.max_steps, self.tokens_per_step, self.price_per_hour,
                                     notes))
            usual = sum(self.recent_losses[-10:]) / 10
            if len(self.recent_losses) >= 10 and row["loss"] > usual + 0.5:
                row["spike"] = True
                tqdm.write(f"损失突然升高：{row['loss']:.2f}，最近 10 次平均 {usual:.2f}；若不回落，减小 --learning_rate")
            self.recent_losses.append(row["loss"])
            if RANK == 0:
                append_jsonl(self.work_dir / "train_log.jsonl", row)
        elif "eval_loss" in logs and RANK == 0:
            append_jsonl(self.work_dir / "train_log.jsonl", {"step": step, **logs})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """验证、续写、重画曲线（至多半分钟一次）。这段时间不算进训练速度。多进程时各自算同样的东西，只有 0 号写文件。"""
        start, config, step = time.perf_counter(), self.run_config, self.state.global_step
        metrics = evaluate(self.model, self.work_dir / "packed" / "eval.bin", self.meta["eval_sources"],
                           config["block_size"], min(config["batch_size"], 16), self.args.device)
        metrics = {key: round(value, 6) for key, value in metrics.items()}
        self.log(dict(metrics))
        samples = generate_samples(self.model, self.tokenizer, config["seed"], config["block_size"])
        if RANK == 0:
            write_samples(self.work_dir, step, metrics["eval_loss"], samples)
            if step >= self.state.max_steps or time.perf_counter() - self.plotted > 30:     # 画一次要占 CPU 大半秒
                self.plot, self.plotted = plot_curve(self.work_dir, self.plot), time.perf_counter()
        tqdm.write(f"验证 {step} | loss {metrics['eval_loss']:.3f} | 每字比特 "
                   f"{metrics['eval_bits_per_char']:.3f} | " + samples[0][1].replace("\n", " ")[:60])
        self.eval_seconds = time.perf_counter() - start
        self.clock += self.eval_seconds
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial=None):
        return str(self.work_dir / "checkpoints" / ".staging")

    def _save_checkpoint(self, model, trial=None):
        """先写到 .staging，落盘，再一步改名：检查点要么完整，要么不存在。只留最新的两个。"""
        start = time.perf_counter()
        folder = self.work_dir / "checkpoints"
        staging, final = folder / ".staging", folder / f"checkpoint-{self.state.global_step}"
        if not final.exists():
            if RANK == 0:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            with staged_save(staging):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()         # 每个进程都存了自己的 rng_state
                if RANK == 0:
                    replace_directory(staging / final.name, final)
            if RANK == 0:
                shutil.rmtree(staging, ignore_errors=True)
                delete_checkpoints(sorted_checkpoints(folder)[:-2])
            self.accelerator.wait_for_everyone()
        self.save_seconds = time.perf_counter() - start
        self.clock += self.save_seconds


def progress_line(row, max_steps, tokens_per_step, price_per_hour, notes=("", "")):
    speed = row["tokens_per_second"]
    left = (max_steps - row["step"]) * tokens_per_step / speed
    left = f"{left / 3600:.1f} 小时" if left > 5400 else f"{left / 60:.0f} 分钟" if left > 90 else f"{left:.0f} 秒"
    speed = f"{speed / 1000:.0f}k" if speed > 10_000 else f"{speed / 1000:.1f}k"
    return (f"步 {row['step']}/{max_steps} | loss {row['loss']:.2f}{notes[0]} | "
            f"lr {row['learning_rate']:.1e} | {speed} tok/s{notes[1]} | MFU {row['mfu']:.0%} | 剩余 {left}"
            + (f" | 已花 {(time.time() - START) / 3600 * price_per_hour:.2f} 元" if price_per_hour else ""))


def read_reference(config, logging_steps):
    """同样设置、同样数据的参考训练（results/reference_curves.json）；没有那个文件或没有这样的一条，就返回 None。"""
    try:
        path = Path(__file__).parent / "results" / "reference_curves.json"
        for curve in json.loads(path.read_text("utf-8")):
            known = config | {"logging_steps": logging_steps}
            same = all(known.get(key) == value for key, value in curve["settings"].items())
            if same and all(abs(config[key] / value - 1) < 0.01 for key, value in curve["corpus"].items()):
                return curve
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def reference_notes(curve, tokens, device):
    """日志里跟在损失和速度后面的两句话；没有参考就是空串。± 是参考的几个种子上单次日志的两倍标准差。"""
    if curve is None:
        return "", ""
    loss, spread = (np.interp(tokens, curve["tokens"], curve[key]) for key in ("loss", "spread"))
    speed = curve["tokens_per_second"].get(device)
    return f"（参考 {loss:.2f}±{spread:.2f}）", f"（同型号 {speed / 1000:.1f}k）" if speed else ""


def plot_curve(work_dir, previous):
    """在后台运行旁边的 plot_loss.py，返回进程；没有那个脚本就不画。"""
    script = Path(__file__).with_name("plot_loss.py")
    if previous is not None:
        previous.wait()
    if not script.exists():
        return None
    command = [sys.executable, str(script), str(work_dir), "--output", str(work_dir / "loss_curve.png")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


class StopRequest:
    """谁要训练停下：Ctrl-C（SIGINT）、SIGTERM，或 --max_hours。信号按第二次立即停。"""

    def __init__(self, max_hours):
        self.reason, self.deadline = 0, START + max_hours * 3600 if max_hours else math.inf
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self.handle_signal)

    def handle_signal(self, which, frame):
        if self.reason:
            raise KeyboardInterrupt
        self.reason = which
        tqdm.write("收到停止信号：做完这一步就存检查点（再按一次立即停）")

    def agree(self, reserve_seconds, group):
        """各进程商量：有一个要停就都在这一步停。reserve_seconds 是存盘等收尾要的时间。返回原因，0 是不停。"""
        if not self.reason and time.time() + reserve_seconds > self.deadline:
            self.reason = DEADLINE
        if group is not None:
            reason = torch.tensor(self.reason)
            dist.all_reduce(reason, dist.ReduceOp.MAX, group=group)
            self.reason = int(reason)
        return self.reason


class Progress(TrainerCallback):
    """进度条；每步问一次要不要停；损失或梯度不是有限数时跳过这一步。"""

    def __init__(self, trainer, stop):
        self.trainer, self.stop, self.bar, self.bad_in_a_row = trainer, stop, None, 0
        # 各进程商量用 CPU 上的通信组：不打断 GPU
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if WORLD_SIZE > 1 else None

    def on_train_begin(self, args, state, control, **kwargs):
        # disable=None：输出不是终端时不画进度条，只有逐行日志
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="步",
                        disable=None if RANK == 0 else True)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.trainer.gradient_norm.isfinite():
            self.bad_in_a_row = 0
            return
        model.zero_grad(set_to_none=True)            # 没有梯度，优化器就什么也不做
        self.bad_in_a_row += 1
        self.trainer.skipped_steps += 1
        self.trainer.window_skipped += 1
        tqdm.write(f"第 {state.global_step + 1} 步的损失或梯度不是有限数，跳过（共跳过 {self.trainer.skipped_steps} 步）")
        # fp16 开头几步溢出是正常的：GradScaler 正在找合适的缩放倍数
        if self.bad_in_a_row >= (20 if args.fp16 else 5):
            raise UserError(f"连续 {self.bad_in_a_row} 步的损失或梯度不是有限数，停在第 {state.global_step} 步；之前的检查点完好。"
                            f"把 --learning_rate {args.learning_rate:g} 减半，加 --fresh 重来；fp16 可换成 bf16 或 fp32")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        # Trainer 把整个训练当成一遍，这里换回真正的遍数
        state.epoch = state.global_step / self.trainer.run_config["steps_per_epoch"]
        if self.stop.agree(self.trainer.reserve_seconds(), self.group):
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def training_arguments(args, speed, batch_size, steps):
    """命令行 -> Trainer 的参数。batch_size 是每个进程的微批量。"""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "/root/tf-logs" if Path("/root/tf-logs").is_dir() else
                          str(args.work_dir / "tensorboard"))       # AutoDL 的面板读 /root/tf-logs
    result = TrainingArguments(
        output_dir=str(args.work_dir / "checkpoints"), max_steps=steps, seed=args.seed,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=args.effective_batch_size // (batch_size * WORLD_SIZE),
        ddp_find_unused_parameters=False,
        # FSDP：每个微批量都把梯度切开放；攒到最后才切，每张卡要多放一份完整的梯度
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": FSDP}},
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_schedule,
        warmup_steps=round(steps * args.warmup_ratio), weight_decay=args.weight_decay,
        adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
        optim="adamw_torch" if speed["optimizer"] == "muon" else speed["optimizer"],
        bf16=speed["precision"] == "bf16" and not FSDP,              # FSDP 时见 build_trainer
        fp16=speed["precision"] == "fp16", tf32=speed["tf32"] or None,
        torch_compile=speed["compile"], use_cpu=speed["device"] == "cpu",
        dataloader_num_workers=args.num_workers, dataloader_pin_memory=speed["device"] == "cuda",
        remove_unused_columns=False, logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,                               # True 会让每个微批量都等 GPU 一次
        eval_strategy="steps", eval_steps=args.eval_steps, save_strategy="steps", save_steps=args.eval_steps,
        report_to=args.report_to, disable_tqdm=True)
    if result.n_gpu > 1:
        print(f"看到 {result.n_gpu} 张显卡，只用第一张；要都用上：torchrun --nproc_per_node={result.n_gpu} a100_train.py")
        result._n_gpu = 1                                           # 否则 Trainer 会悄悄用很慢的 DataParallel
    return result


def build_trainer(args, meta, config, checkpoint, batch_size):
    """模型、数据、Trainer；同样的参数得到同样的东西。返回 GPT2Trainer。"""
    speed, steps = config["speed"], config["total_steps"]
    if RANK == 0:
        truncate_logs(args.work_dir, checkpoint_step(checkpoint) if checkpoint else -1)
    model = build_model(config["vocab_size"], args.n_layer, args.n_embd, args.n_head, args.block_size,
                        speed["attention"], speed["liger"], args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    dataset = BlockStream(args.work_dir / "packed" / "train.bin", args.block_size,
                          steps * args.effective_batch_size, args.seed)
    trainer = (FSDPTrainer if FSDP else GPT2Trainer)(
        model, training_arguments(args, speed, batch_size, steps), data_collator=pass_batch,
        train_dataset=dataset, eval_dataset=dataset)
    trainer.args.eval_on_start = checkpoint is None
    if FSDP and speed["precision"] == "bf16":
        # accelerate 的 FSDP 混合精度把权重、残差、损失都换成 bf16；这里只用 autocast，和一张卡时一样
        model.forward = torch.autocast(speed["device"], torch.bfloat16)(model.forward)
    trainer.setup(args.work_dir, config, meta, checkpoint_step(checkpoint) if checkpoint else 0)
    trainer.price_per_hour = args.price_per_hour
    return trainer


def train(args, meta, config, checkpoint):
    """训练到底，或被信号、时限叫停；返回退出码。显存不够就把微批量减半，从停下的那一步接着来。"""
    batch_size, stop = args.batch_size, StopRequest(args.max_hours)
    args.learning_rate = config["learning_rate"]         # 由 0 号进程按实际用的优化器定
    if config["speed"]["device"] == "cpu":
        keep_freed_memory()
    while True:
        trainer = build_trainer(args, meta, config, checkpoint, batch_size)
        trainer.add_callback(Progress(trainer, stop))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            break
        except torch.OutOfMemoryError:
            if batch_size == 1 or batch_size % 2 or WORLD_SIZE > 1:
                raise UserError(f"显存不够：微批量 {batch_size} 放不下。把 --batch_size 减半再跑同一条命令（结果不变）；"
                                f"已经是 1 就加 --gradient_checkpointing，或减小 --block_size") from None
            # 内存不够只会出在前向或反向，权重还是上一步的：原样存下来，一步也不丢
            checkpoint = trainer.save_now() if trainer.state.global_step else None
            if trainer.plot is not None:
                trainer.plot.wait()
        batch_size //= 2
        print(f"显存不够：微批量减到 {batch_size}，梯度累积加倍，有效批量不变，"
              f"从第 {checkpoint_step(checkpoint) if checkpoint else 0} 步接着训练")
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
    if trainer.plot is not None:
        trainer.plot.wait()
    if trainer.state.global_step < config["total_steps"]:
        again = shlex.join(argument for argument in sys.argv if argument != "--fresh")
        print(f"停在第 {trainer.state.global_step} 步，检查点已存好。接着训练：{LAUNCHER} {again}")
        return 0 if stop.reason == DEADLINE else 128 + stop.reason
    weights = full_weights(trainer.model)
    if RANK == 0:
        save_final_model(args.work_dir, trainer.model, weights, trainer.tokenizer)
        if trainer.plot is None and (plot := plot_curve(args.work_dir, None)):
            plot.wait()                      # 上次只差收尾就被打断了，图没有画完
    print(f"完成。模型 {args.work_dir / 'final_model'}，曲线 {args.work_dir / 'loss_curve.png'}，"
          f"续写 {args.work_dir / 'generation_samples.md'}")
    if args.shutdown_when_done and RANK == 0:
        subprocess.run(["shutdown"])
    return 0


def save_final_model(work_dir, model, weights, tokenizer):
    """写 final_model/：权重、配置、生成设置、分词器；再真的加载一遍，确认别人也能用。"""
    lock, staging = open_output_directory(work_dir / "final_model", "config.json")
    with lock, staged_save(staging):
        model.config.use_cache, model.config.pad_token_id = True, PAD
        model.generation_config = sampling_config(max_new_tokens=100)
        model.save_pretrained(staging, state_dict=dict(weights))       # 一份拷贝：它边存边从里面拿走
        tokenizer.save_pretrained(staging)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(staging)
        if not all(torch.equal(weights[name].cpu(), p) for name, p in loaded.named_parameters()):
            raise RuntimeError(f"{staging} 读回来的权重和训练的不一样：磁盘可能坏了，检查点仍在 checkpoints/")
        replace_directory(staging, work_dir / "final_model")


# ==== 8. FSDP：一张卡放不下的模型 ====

# 用 fsdp.yaml 启动时生效：每个参数（连同它的梯度和优化器状态）切开放在各进程（DTensor），用到一层时才把它拼起来。

def gather(value):
    """切开的张量 -> 0 号进程上完整的一份（CPU 内存），别的进程得到 None；没切开的原样返回。各进程要一起调用。"""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if RANK == 0 else None


def spread(value, parameter):
    """完整的张量 -> 与 parameter 同样切开；不是和它同样大小的（优化器的步数等）原样返回。

    每个进程从自己读到的完整张量里取自己那一份，不用通信。
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


def full_weights(model):
    """{名字: 完整的权重}；输出层与词向量共用的矩阵只有一份。FSDP 时各进程要一起调用，只有 0 号拿到权重。"""
    return {name: gather(p.detach()) for name, p in model.named_parameters()}


def map_states(states, function):
    """对优化器状态 {参数编号: {名字: 值}} 里的每个值调用 function(参数编号, 值)。"""
    return {i: {name: function(i, value) for name, value in state.items()} for i, state in states.items()}


class FSDPTrainer(GPT2Trainer):
    """存盘时把切开的张量拼起来，读回时再切开：检查点和一个进程存的格式一样，换进程数、换回 DDP 都能接着训练。"""

    def save_model(self, output_dir=None, _internal_call=False):
        self._save(output_dir, full_weights(self.model))            # 只有 0 号进程真的写

    def _save_optimizer_and_scheduler(self, output_dir):
        saved = self.optimizer.state_dict()
        saved["state"] = map_states(saved["state"], lambda i, value: gather(value))
        if RANK == 0:
            torch.save(saved, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        for name, p in self.model.named_parameters():
            p.copy_(spread(weights[name], p))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]    # 按编号排
        saved["state"] = map_states(saved["state"], lambda i, value: spread(value, parameters[i]))
        self.optimizer.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def restrict_to_fsdp(speed, args):
    """FSDP 时的加速设置：自动选的换成 FSDP 下测过的；明说了别的就报错。就地修改 speed。"""
    if speed["device"] == "cpu":
        raise UserError("fsdp.yaml 要 CUDA 显卡：没有显卡时 accelerate 会悄悄改用 DDP，参数并没有切开；CPU 上改用 "
                        "torchrun --nproc_per_node=进程数 a100_train.py")
    if speed["precision"] == "fp16":
        raise UserError("FSDP 只支持 bf16 和 fp32，--precision 是 fp16；V100、T4 上加 --precision fp32，"
                        "或改用 torchrun（DDP）")
    for name, key, tested in (("optim", "optimizer", ("adamw_torch_fused", "adamw_torch")),
                              ("compile", "compile", (False,)), ("liger", "liger", (False,))):
        if speed[key] not in tested and getattr(args, name) not in ("auto", None):
            raise UserError(f"FSDP 不支持 --{name} {speed[key]}：优化器要用 adamw_torch_fused 或 adamw_torch，"
                            f"compile 和 liger 要关；改掉它，或改用 torchrun（DDP）")
        speed[key] = speed[key] if speed[key] in tested else tested[0]


# ==== 9. 主程序 ====

def parse_arguments():
    parser = ArgumentParser(description="第 3 步：训练中文 GPT-2", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    switch, count, positive = argparse.BooleanOptionalAction, number(int, 1), number(float, 1e-12)
    group = parser.add_argument_group("数据与输出")
    group.add_argument("--preset", choices=list(PRESETS), default="full", help="full 完整训练，demo 演示")
    group.add_argument("--work_dir", type=Path, default=Path(default_dir), help="一切输出所在的文件夹")
    group.add_argument("--corpus", nargs="+", action="extend", metavar="SOURCE", help="见 prepare_corpus.py")
    group.add_argument("--text_column", help="文本所在的列")
    group.add_argument("--vocab_size", type=number(int, 300, 65_536), help="词表大小")
    group.add_argument("--prepare_only", action="store_true", help="准备好数据就停，不需要显卡")
    group.add_argument("--fresh", action="store_true", help="丢掉已有的检查点和日志，从头训练")
    group = parser.add_argument_group("模型")
    group.add_argument("--n_layer", type=count, help="层数")
    group.add_argument("--n_embd", type=count, help="向量维数")
    group.add_argument("--n_head", type=count, help="注意力头数")
    group.add_argument("--block_size", type=number(int, 16), help="上下文长度，token")
    group = parser.add_argument_group("训练")
    group.add_argument("--batch_size", type=lambda text: text if text == "auto" else count(text),
                       help="微批量：一次前向放多少块，或 auto；显存放不下会自动减半，不影响结果")
    group.add_argument("--effective_batch_size", type=count, help="有效批量：每步多少块（微批量 × 累积次数）")
    group.add_argument("--epochs", type=positive, help="遍数")
    group.add_argument("--max_steps", type=number(int, 0), help="步数；大于 0 时代替 --epochs")
    group.add_argument("--learning_rate", type=positive,
                       help="最高学习率；Muon 时是词向量、偏置和 LayerNorm 的")
    group.add_argument("--muon_learning_rate", type=positive, default=0.02, help="--optim muon 时矩阵的学习率")
    group.add_argument("--warmup_ratio", type=number(float, 0, 1), help="预热占总步数的比例")
    group.add_argument("--lr_schedule", choices=["cosine", "linear"], help="学习率怎样降到 0")
    group.add_argument("--weight_decay", type=number(float, 0), help="权重衰减，只作用于矩阵")
    group.add_argument("--max_hours", type=positive, help="到这么多小时前存好检查点停下；再跑同一条命令接着来")
    group.add_argument("--seed", type=number(int, 0, 2**31), default=42, help="随机种子")
    group = parser.add_argument_group("速度（默认都是自动）")
    group.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="设备")
    group.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="精度")
    group.add_argument("--attn", choices=["auto", "flash_attention_2", "sdpa", "eager"], default="auto",
                       help="注意力的实现")
    group.add_argument("--optim", default="auto", help="优化器",
                       choices=["auto", "adamw_bnb_8bit", "adamw_torch_fused", "adamw_torch", "muon"])
    group.add_argument("--compile", action=switch, help="torch.compile")
    group.add_argument("--tf32", action=switch, help="fp32 矩阵乘用 TF32")
    group.add_argument("--liger", action=switch, help="Liger 融合核（省显存）")
    group.add_argument("--gradient_checkpointing", action=switch, default=False, help="重算激活，省显存但更慢")
    group.add_argument("--num_workers", type=number(int, 0, 256), default=0, help="读数据的进程数")
    group = parser.add_argument_group("日志")
    group.add_argument("--logging_steps", type=count, help="每多少步一行日志")
    group.add_argument("--eval_steps", type=count, help="每多少步验证、续写、存检查点")
    group.add_argument("--price_per_hour", type=number(float, 0), help="机器每小时多少元：日志里带上已花的钱")
    group.add_argument("--shutdown_when_done", action="store_true",
                       help="最终模型存好、验过以后关机（AutoDL 关机即停止计费）")
    group.add_argument("--report_to", default="none", help="同时记到哪个工具",
                       choices=["none", "tensorboard", "swanlab", "trackio", "wandb"])
    args = parser.parse_args()
    explicit = {"corpus": args.corpus, "vocab_size": args.vocab_size, "max_steps": args.max_steps,
                "learning_rate": args.learning_rate}
    for key, value in PRESETS[args.preset].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return args, explicit


def choose_learning_rate(args, explicit, speed):
    """没有明说学习率时，按实际用的优化器定：Muon 和单独的 AdamW 要的相差十倍。就地修改 args。"""
    if explicit["learning_rate"] is None and speed["optimizer"] != "muon":
        args.learning_rate = args.adamw_learning_rate


def check_arguments(args):
    """花时间之前先查能查的。"""
    if args.n_embd % args.n_head:
        raise UserError(f"--n_embd {args.n_embd} 不能被 --n_head {args.n_head} 整除；每个头的维数要相等")
    if args.batch_size == "auto":           # 从最大的试起，放不下再减半
        args.batch_size = max(1, args.effective_batch_size // WORLD_SIZE)
    if args.effective_batch_size % (args.batch_size * WORLD_SIZE):
        raise UserError(f"--effective_batch_size {args.effective_batch_size} 不是 --batch_size "
                        f"{args.batch_size} × {WORLD_SIZE} 个进程的整数倍；把 --batch_size 改成它的约数")
    if args.shutdown_when_done and not shutil.which("shutdown"):
        raise UserError("指定了 --shutdown_when_done，但这台机器没有 shutdown 命令；去掉这个参数")
    if args.report_to != "none" and not installed(args.report_to):
        raise UserError(f"指定了 --report_to {args.report_to}，但没有装：pip install {args.report_to}")


def recipe(args, speed):
    """决定模型结果的全部设置。接着训练时必须和检查点的一样；微批量、注意力、编译不在内。"""
    names = ("n_layer", "n_embd", "n_head", "block_size", "effective_batch_size", "epochs", "max_steps",
             "learning_rate", "muon_learning_rate", "warmup_ratio", "lr_schedule", "weight_decay", "seed")
    return {name: getattr(args, name) for name in names} | {"optim": speed["optimizer"], "format": FORMAT}


def check_same(old, new, checkpoint):
    """接着训练时，新旧设置要一样；不一样就一行说清，什么也不动。"""
    for key, value in new.items():
        if old.get(key) != value:
            raise UserError(f"{checkpoint} 训练时 {key} 是 {old.get(key)}，这次是 {value}：用原来的设置接着训练，"
                            f"或换一个 --work_dir，或加 --fresh 从头开始")


def resolve(args, speed, meta):
    """数据和设备都知道以后，算出 config.json 的内容。"""
    n_blocks = meta["train_tokens"] // args.block_size
    if n_blocks < 1:
        raise UserError(f"--block_size {args.block_size} 比整个训练语料（{meta['train_tokens']} token）还大；改小它，"
                        f"或多加语料")
    with torch.device("meta"):           # 只数参数，不占内存
        parameters = build_model(meta["vocab_size"], args.n_layer, args.n_embd, args.n_head, args.block_size,
                                 speed["attention"], False, args.seed).num_parameters()
    peak, peak_source = peak_flops(speed["device"])
    held_out = meta["eval_sources"].values()
    return recipe(args, speed) | {
        "corpus_hash": meta["corpus_hash"], "tokenizer_hash": meta["tokenizer_hash"],
        "vocab_size": meta["vocab_size"], "n_blocks": n_blocks, "parameters": parameters,
        "total_steps": args.max_steps or math.ceil(args.epochs * n_blocks / args.effective_batch_size),
        "steps_per_epoch": n_blocks / args.effective_batch_size,
        "flops_per_token": flops_per_token(parameters, args.n_layer, args.n_embd, args.block_size),
        "peak_flops": peak, "peak_source": peak_source, "unigram_entropy": meta["unigram_entropy"],
        "characters_per_token": sum(source["characters"] for source in held_out)
        / sum(source["end"] - source["start"] for source in held_out),
        "preset": args.preset, "batch_size": args.batch_size, "speed": speed,
        "device_name": torch.cuda.get_device_name() if speed["device"] == "cuda" else cpu_name(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "command": f"{LAUNCHER} {shlex.join(sys.argv)}"}


def print_summary(config, meta, checkpoint):
    """开始前的一览：实际采用了什么，要跑多少。"""
    speed, switch = config["speed"], {True: "开", False: "关"}
    tokens_per_step = config["effective_batch_size"] * config["block_size"]
    seconds = config["total_steps"] * tokens_per_step * config["flops_per_token"] / config["peak_flops"]
    rows = {
        "设备": f"{config['device_name']}，精度 {speed['precision']}",
        "版本": f"torch {torch.__version__}，transformers {transformers.__version__}",
        "加速": f"注意力 {speed['attention']}，优化器 {speed['optimizer']}，compile {switch[speed['compile']]}，"
                f"TF32 {switch[speed['tf32']]}，Liger {switch[speed['liger']]}",
        "模型": f"{config['parameters']:,} 参数：{config['n_layer']} 层 × {config['n_embd']} 维，"
                f"{config['n_head']} 头，词表 {config['vocab_size']:,}，上下文 {config['block_size']}",
        "数据": f"{meta['train_tokens']:,} token = {config['n_blocks']:,} 块，"
                f"每 token {config['characters_per_token']:.2f} 字",
        "每步": f"{config['effective_batch_size']} 块 × {config['block_size']} = {tokens_per_step:,} token"
                f"（微批量 {config['batch_size']} × {WORLD_SIZE} 个进程，其余靠梯度累积）",
        "步数": f"{config['total_steps']:,}，即 {config['total_steps'] / config['steps_per_epoch']:.2f} 遍"
                + (f"，从第 {checkpoint_step(checkpoint)} 步接着训练" if checkpoint else ""),
        "时间": f"至少 {seconds / 60:.1f} 分钟（{config['peak_source']}每秒 {config['peak_flops'] / 1e12:.2f} T 次，"
                f"利用率按 100% 算）；实际看日志的“剩余”",
    }
    for title, value in rows.items():
        print(f"{title}  {value}")


def lock_work_dir(work_dir):
    """一个工作目录只许一个训练。返回的锁要一直留着，进程结束时自动放开。"""
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(work_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"另一个训练正在使用 {work_dir}；等它结束，或换一个 --work_dir") from None
    return lock


def make_plan(args, explicit):
    """准备数据，决定从哪里开始、用什么设置。返回 (meta, config, checkpoint)；没有可训练的就返回 None。"""
    work_dir = args.work_dir
    speed = None if args.prepare_only else choose_speed(
        args.device, args.precision, args.attn, args.optim, args.compile, args.tf32, args.liger)
    if FSDP and speed:
        restrict_to_fsdp(speed, args)
    if speed:
        choose_learning_rate(args, explicit, speed)
    checkpoint = None if args.fresh else newest_checkpoint(work_dir / "checkpoints")
    old = read_config(work_dir) if checkpoint else None
    if checkpoint and speed:
        check_same(old, recipe(args, speed), checkpoint)
    prepare(work_dir, explicit["corpus"], args.text_column, explicit["vocab_size"], args.preset,
            rebuild=checkpoint is None)
    meta = pack(work_dir, args.seed)
    if args.prepare_only:
        print(f"数据准备好了：{meta['train_tokens']:,} 个训练 token。去掉 --prepare_only 再跑一次就开始训练")
        return None
    config = resolve(args, speed, meta)
    if checkpoint:
        check_same(old, {key: config[key] for key in ("corpus_hash", "tokenizer_hash", "total_steps")},
                   checkpoint)
        if checkpoint_step(checkpoint) == config["total_steps"] and (work_dir / "final_model").exists():
            print(f"已经训练完了：{work_dir / 'final_model'}。要重新训练加 --fresh，要另训一个换 --work_dir")
            return None
    # 每个参数 4 字节权重、8 字节优化器状态；最多同时有三个检查点（两个旧的、一个正在写的），外加最终模型
    check_disk(work_dir, config["parameters"] * (3 * 12 + 4), "检查点")
    if args.fresh:
        shutil.rmtree(work_dir / "final_model", ignore_errors=True)
    folder, start_step = work_dir / "checkpoints", checkpoint_step(checkpoint) if checkpoint else -1
    for leftover in folder.glob(".*"):                       # 存到一半、删到一半被杀留下的
        shutil.rmtree(leftover, ignore_errors=True)
    # --fresh 不要的和不完整的；剩下的只留两个
    delete_checkpoints(path for path in sorted_checkpoints(folder) if checkpoint_step(path) > start_step)
    delete_checkpoints(sorted_checkpoints(folder)[:-2])
    print_summary(config, meta, checkpoint)
    write_text(work_dir / "config.json", json.dumps(config, ensure_ascii=False, indent=1))
    return meta, config, checkpoint


def receive_plan(store):
    """由 torchrun 启动时，0 号进程准备数据、定下一切设置，别的进程在这里等；等多久都行，也随时叫得停。

    只用 torchrun 的键值表，不建通信组：建了再拆，Trainer 建自己的组时会连到旧地址上。
    """
    while not store.check(["plan"]):
        time.sleep(0.5)
    plan = json.loads(store.get("plan"))
    return plan and [*plan[:2], plan[2] and Path(plan[2])]


def main():
    transformers.utils.logging.disable_progress_bar()
    # 微批量、日志间隔与上次不同不要紧，Trainer 却会用英文警告；能不能接着训练由 check_same 判断
    logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "do not match" not in record.msg)
    plan, store = None, next(dist.rendezvous("env://"))[0] if WORLD_SIZE > 1 else None
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")          # 每行只打印一次
        plan = receive_plan(store)
    args, explicit = parse_arguments()
    check_arguments(args)
    asked = args.prepare_only or args.preset == "demo" or explicit["max_steps"] or args.device != "auto"
    if not torch.cuda.is_available() and not asked:
        stop_without_cuda()
    if RANK == 0:
        lock = lock_work_dir(args.work_dir)         # noqa: F841 变量留着，锁就留着
        plan = make_plan(args, explicit)
        if store is not None:
            store.set("plan", json.dumps(plan, default=str))     # default：检查点的 Path
    if plan is None:
        return 0
    code = train(args, *plan)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run(main)
