#!/usr/bin/env python3
"""第 3 步：从零训练一个中文 GPT-2（82.1 M 参数：8 层 × 768 维，12 个头，词表 32,000，上下文 1,024）。

读 corpus/ 和 tokenizer/（没有就自动运行前两步），写 final_model/、loss_curve.png、generation_samples.md。

    python a100_train.py --preset demo           # 演示：没有显卡也行，几分钟
    python a100_train.py                         # 完整训练，一张 A100；加 --prepare_only 只准备数据
    torchrun --nproc_per_node=2 a100_train.py    # 两张卡

演示在 2 核 Intel Xeon 上 110 秒，每字比特 5.72（2026-11-24；越小越好，见第 5 节）；显卡上未测。
出处 results/demo/summary.json seconds=110; results/demo/train_log.jsonl 1350.eval_bits_per_char=5.72
中断了，同一条命令再跑，就从最近的检查点（完整训练每 500 步一个）接着，结果与没有中断的相同。
从上往下读：设置、数据、模型、优化器、评估、训练。第 8 节是防错和存盘，初学可以不看。
"""

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# torchrun 启动几个进程，每个进程从这两个环境变量知道自己是几号、一共几个；单独运行就是 0 号，一共 1 个
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
if WORLD_SIZE == 1:
    # 一个进程只用一张卡：看见几张，Trainer（第 6 节的训练循环）会改用很慢的 DataParallel。这几个变量要在导入 torch 之前设好
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[0]
    # 显卡之间的通信一个进程用不着。不关掉的话，几张 RTX 40 加旧驱动的机器上，accelerate 会拒绝启动
    os.environ["NCCL_P2P_DISABLE"] = "1"
    os.environ["NCCL_IB_DISABLE"] = "1"

import accelerate
import filelock
import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import sentencepiece as spm
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

START = time.time()
AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"
PAD, BOS, EOS = 0, 2, 3  # 三个特殊 token 的编号：补齐、开头、一篇的结束（</s>）
PROMPTS = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
# 续写时怎样抽下一个 token：温度 0.8 让分数高的更占优；top-p 只在概率最大、合计 95 % 的 token 里抽
SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=EOS, pad_token_id=PAD)

# ==== 1. 设置 ====
# 每个设置一个 add_argument，默认值是完整训练的；PRESETS 是别的预设，盖在默认值上面。以 asked_ 开头的，是命令行上要的；
# 实际用的由 choose_device、choose_speed、choose_packages 定，名字去掉 asked_；
# 词表大小和微批量要等数据准备好，在 derive 里定。

PRESETS = {
    "full": {},
    "demo": {
        "n_layer": 2,
        "n_embd": 128,
        "n_head": 4,
        "block_size": 64,
        "effective_batch_size": 32,
        "epochs": 1.0,
        "max_steps": 1350,
        "muon_learning_rate": 0.02,
        "eval_steps": 225,
    },
}
# 工作目录里没有语料、分词器时用的；有就用现成的
CORPUS = {"full": ["wiki", "zhihu"], "demo": ["demo"]}
VOCAB_SIZE = {"full": 32_000, "demo": 4_500}
# 最高学习率（用 Muon 时，是矩阵以外的）；由来见 results/recipe/README.md
LEARNING_RATE = {
    "muon": {"full": 3e-3, "demo": 1.6e-2},
    "adamw": {"full": 3e-4, "demo": 3e-3},
}
WARMUP = 0.05  # 预热占全程的几分之几
WEIGHT_DECAY = 0.1  # 每步把矩阵和词向量缩小 学习率 × 0.1，免得权重越长越大
BETAS = (0.9, 0.95)  # AdamW 两份历史每步留下的比例
# 改了其中一样，就是另一次训练，不能接着旧的检查点
RECIPE = [
    "data_fingerprint",
    "n_layer",
    "n_embd",
    "n_head",
    "block_size",
    "effective_batch_size",
    "epochs",
    "max_steps",
    "optim",
    "learning_rate",
    "muon_learning_rate",
    "seed",
]


def add_settings(parser):
    """命令行的全部设置，分成几组；括号里是完整训练的默认值。"""
    switch = argparse.BooleanOptionalAction  # --compile 打开，--no-compile 关上；不写，就看后面怎么定
    # 下面的 add(……) 就是 parser.add_argument(……)，只是每次换一组；--help 里一组一段

    add = parser.add_argument_group("数据").add_argument
    add(
        "--preset",
        type=str,
        choices=list(PRESETS),
        default="full",
        help="预设：full 完整训练（默认），demo 演示",
    )
    add("--work_dir", type=Path, default=HOME, help="输出到哪里（%(default)s）")
    add(
        "--corpus",
        type=str,
        nargs="+",
        action="extend",
        help="wiki zhihu demo 或 [名字=]路径（用已有的，没有就用预设的）",
    )
    add("--text_column", type=str, nargs="+", help="自己的语料里，文本所在的列")
    add("--simplify", action=switch, help="繁体先转成简体（要 opencc 包）")
    add(
        "--vocab_size",
        dest="asked_vocab_size",
        type=int,
        help="词表 V：几种 token（用已有的，没有就用预设的）",
    )
    add("--prepare_only", action=switch, help="只准备数据，不训练")
    add("--fresh", action=switch, help="删掉检查点，从头训练")

    add = parser.add_argument_group("模型").add_argument
    add("--n_layer", type=int, default=8, help="层数 L（%(default)s）")
    add("--n_embd", type=int, default=768, help="每个 token 的向量有多少维，C（%(default)s）")
    add("--n_head", type=int, default=12, help="注意力的头数（%(default)s）")
    add("--block_size", type=int, default=1024, help="上下文 T：一块几个 token（%(default)s）")

    add = parser.add_argument_group("训练").add_argument
    add("--effective_batch_size", type=int, default=96, help="有效批量：更新一次看几块（%(default)s）")
    add("--batch_size", dest="asked_batch_size", type=int, help="微批量：一次算几块（看显存选，选的至多 48）")
    add("--epochs", type=float, default=2.0, help="把语料读几遍，max_steps 是 0 时才用（%(default)s）")
    add("--max_steps", type=int, default=0, help="更新几次；0 是由 epochs 算（%(default)s）")
    add("--max_hours", type=float, help="到这么多小时就存好停下，下次接着来（不限）")
    add(
        "--learning_rate",
        dest="asked_learning_rate",
        type=float,
        help="最高学习率；用 Muon 时不管矩阵（看预设）",
    )
    add("--muon_learning_rate", type=float, default=0.025, help="Muon 管的矩阵的最高学习率（%(default)s）")
    add("--seed", type=int, default=42, help="随机种子（%(default)s）")

    add = parser.add_argument_group("速度；不写，就看这台机器").add_argument
    add("--device", type=str, dest="asked_device", help="cuda、cpu、mps（未测）")
    add("--precision", type=str, dest="asked_precision", help="矩阵乘用的数：bf16、fp16、fp32")
    add("--attn", type=str, dest="asked_attn", help="注意力的算法：flash_attention_2、sdpa、eager")
    add(
        "--optim",
        type=str,
        dest="asked_optim",
        help="优化器：muon（默认）、adamw_torch_fused、adamw_torch、adamw_bnb_8bit",
    )
    add("--compile", dest="asked_compile", action=switch, help="torch.compile：把相邻的小运算融合成一个")
    add("--tf32", dest="asked_tf32", action=switch, help="fp32 的矩阵乘只取 19 位")
    add("--gradient_checkpointing", action=switch, help="反向时重算激活：省显存，多算三分之一")

    add = parser.add_argument_group("记录").add_argument
    add("--logging_steps", type=int, default=10, help="几步记一行日志（%(default)s）")
    add("--eval_steps", type=int, default=500, help="几步验证、存检查点一次（%(default)s）")
    add("--snapshots", action=switch, default=True, help="途中留几份模型（默认留）")
    add(
        "--report_to",
        type=str,
        dest="asked_report_to",
        help="另外记到 tensorboard、swanlab、trackio 或 wandb",
    )


def read_settings():
    """命令行 -> s：s.n_layer 是层数，等等。"""
    parser = argparse.ArgumentParser(
        usage="python a100_train.py [--设置 值 ……]",
        allow_abbrev=False,
        formatter_class=argparse.MetavarTypeHelpFormatter,
    )
    add_settings(parser)
    parser.epilog = f"--preset demo 时的默认值：{PRESETS['demo']}"
    # 先只看 --preset，把这个预设的数变成默认值，再全部读一遍
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS[preset])
    s = parser.parse_args()
    for name in vars(s):
        value = getattr(s, name)
        if type(value) not in (int, float):  # 开关、路径、没有写的，不用查
            continue
        zero_is_fine = name in ("max_steps", "seed")
        if not 0 <= value < 2**32 or (value == 0 and not zero_is_fine):
            fail(
                f"--{name.removeprefix('asked_')} 是 {value}；要大于 0 的数，--max_steps 和 --seed 也可以是 0"
            )
    if s.n_embd % s.n_head != 0:
        fail(f"--n_embd {s.n_embd} 不是 --n_head {s.n_head} 的整数倍")
    batch_size = s.asked_batch_size or 1  # 没有写的以后再定，至少 1 块
    if s.effective_batch_size % (batch_size * WORLD_SIZE) != 0:
        size = f"--batch_size {batch_size} × {WORLD_SIZE} 个进程"
        fail(f"--effective_batch_size {s.effective_batch_size} 不是 {size}的整数倍")
    return s


def choose(option, asked, possible):
    """possible 是这里办得到的，最好的在前。没有指明就取第一个；指明的办不到就报错，不悄悄换成别的。"""
    if asked in (None, "auto"):
        return possible[0]
    if asked not in possible:
        fail(f"--{option} {asked} 在这里办不到（缺显卡、软件包、编译器，或与精度不配）；可以是 {possible}")
    return asked


def choose_device(s):
    """在哪里算，以及那张卡的名字和年代。"""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    s.device = choose("device", s.asked_device, devices)
    s.device_name = s.device
    capability = (0, 0)  # 计算能力，NVIDIA 给每代显卡的编号：T4 是 (7, 5)，A100 是 (8, 0)
    if s.device == "cuda":
        s.device_name = torch.cuda.get_device_name()
        capability = torch.cuda.get_device_capability()
    s.ampere = capability >= (8, 0)  # A100 那一代，或更新的


def choose_speed(s):
    """精度、注意力、编译：这张卡上快而可靠的。"""
    # 一个数占几位。fp32 是 4 字节。bf16 是 2 字节：位数少，范围与 fp32 一样，矩阵乘快得多。
    # fp16 也是 2 字节，但超过 65,504 就溢出，太小的又成了 0。GradScaler 先把损失放大再求梯度，
    # 溢出就跳过那一步；T4、V100 用它
    precisions = ["fp32"]
    if s.device == "cuda":
        precisions.insert(0, "fp16")
    if s.ampere:  # 不问 is_bf16_supported()：T4 上靠模拟也说 True，却慢得没法用
        precisions.insert(0, "bf16")
    s.precision = choose("precision", s.asked_precision, precisions)

    # TF32：fp32 的矩阵乘只取 19 位来算，快，舍入大一点。bf16、fp16 时矩阵乘已经是 2 字节的，用不上它
    tf32 = [False]
    if s.ampere and s.precision == "fp32":
        tf32 = [True, False]
    s.tf32 = choose("tf32", s.asked_tf32, tf32)

    # FlashAttention 分块算注意力，不存 T × T 的矩阵。torch 的 SDPA 里也有它的核，所以没有 flash-attn 包也行；
    # eager 不分块，用来对照
    attentions = ["sdpa", "eager"]
    if s.ampere and s.precision != "fp32" and flash_attn_imports():
        attentions.insert(0, "flash_attention_2")
    s.attn = choose("attn", s.asked_attn, attentions)

    # torch.compile 先花一两分钟，把模型编译成融合的核（在显卡上运行的小程序）；以后每步少读写几遍显存。
    # torch 2.10 的 compile 在别人的 A100 上出过 NaN，所以那一版不自动打开
    compiling = [False]  # 排第一的是默认
    if compiler_is_complete(s.device):
        compiling = [False, True]
        if s.ampere and not torch.__version__.startswith("2.10."):
            compiling = [True, False]
    s.compile = choose("compile", s.asked_compile, compiling)


def choose_packages(s):
    """优化器和记录器：装了的才能用。"""
    optimizers = ["muon", "adamw_torch_fused", "adamw_torch"]
    if find_spec("bitsandbytes"):
        optimizers.append("adamw_bnb_8bit")
    s.optim = choose("optim", s.asked_optim, optimizers)
    family = "muon" if s.optim == "muon" else "adamw"
    s.learning_rate = s.asked_learning_rate or LEARNING_RATE[family][s.preset]
    trackers = filter(find_spec, ("tensorboard", "swanlab", "trackio", "wandb"))
    s.report_to = choose("report_to", s.asked_report_to, ["none", *trackers])


def derive(s):
    """由数据和设置算出来的数，一行一个；印出来，可以照着算一遍。"""
    meta = read_report(s.work_dir / "packed", "meta.json")
    s.vocab_size = meta["vocab_size"]
    s.train_tokens = meta["train_tokens"]
    s.eval_sources = meta["eval_sources"]
    s.unigram_entropy = meta["unigram_entropy"]  # 只知道每种 token 多常见时的损失
    s.n_blocks = s.train_tokens // s.block_size
    if s.n_blocks < 1:
        fail(f"--block_size {s.block_size} 比整个语料（{s.train_tokens} token）还大；改小它，或多加语料")
    s.tokens_per_step = s.effective_batch_size * s.block_size  # 96 × 1,024 = 98,304
    s.steps_per_epoch = s.n_blocks / s.effective_batch_size
    s.total_steps = s.max_steps or math.ceil(s.epochs * s.steps_per_epoch)
    per_layer = 12 * s.n_embd**2 + 13 * s.n_embd  # 一层的参数，见第 3 节
    embeddings = (s.vocab_size + s.block_size) * s.n_embd
    s.parameters = embeddings + s.n_layer * per_layer + 2 * s.n_embd
    # PaLM 论文附录 B：每个参数 6 次浮点运算（前向 2，反向 4；位置向量不做乘法，不算），另加注意力
    multiplied = s.parameters - s.block_size * s.n_embd
    s.flops_per_token = 6 * multiplied + 12 * s.n_layer * s.block_size * s.n_embd
    s.batch_size = s.asked_batch_size or choose_batch_size(s)
    print(
        f"{s.device_name}，{s.precision}，注意力 {s.attn}，{s.optim}，compile {s.compile}，微批量 {s.batch_size} 块"
    )
    print(
        f"{s.parameters:,} 参数，{s.train_tokens:,} token，每步 {s.tokens_per_step:,}，共 {s.total_steps:,} 步"
    )


def choose_batch_size(s):
    """微批量：一次前向算几块。只影响显存和速度，不影响结果（只差浮点舍入）：少了就多累积几次，有效批量不变。"""
    # 每个参数约 18 字节（权重 4、半精度副本 2、梯度 4、优化器至多 8），另留 1.5 GB；每个 token 在每层留下 36 C 字节的
    # 激活给反向用，输出层还有 V 个分数的三份 fp32。一块是 1,024 × (36 × 8 × 768 + 12 × 32,000) = 0.62 GB：
    # T4（15.8 GB）上得 16 块，A100（42 GB）上得 48 块；CPU 当作有 2 GB
    memory = 2e9
    if s.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory - 18 * s.parameters - 1.5e9
    bytes_per_block = s.block_size * (36 * s.n_layer * s.n_embd + 12 * s.vocab_size)
    for size in range(48, 1, -1):
        fits = size * bytes_per_block <= memory
        divides = s.effective_batch_size % (size * WORLD_SIZE) == 0
        if fits and divides:
            return size
    return 1


# ==== 2. 数据：文字 → token → 块 ====

# token 是模型读写的单位：分词器（第 2 步）把文字切成词块，每种词块一个编号。
# 打包（packing）：全部文档的 token 首尾相接，切成每 block_size 个一块，一块是一个样本。文档有长有短，若一篇一个样本，短的
# 要补齐到一样长，补的都是白算；打包一个也不浪费。每篇后面有一个 </s>，模型由它知道前后不是同一篇。


def prepare(s, checkpoint):
    """缺语料或分词器，就运行前两步；打包。有 checkpoint 而数据或设置变了，就报错，什么也不动。"""
    corpus = s.work_dir / "corpus"
    tokenizer = s.work_dir / "tokenizer"
    rebuild = "--no-rebuild" if checkpoint else "--rebuild"
    made_from = read_report(corpus).get("corpus")
    if made_from == ["demo"] and s.preset != "demo":
        made_from = None  # 演示的语料不用于完整训练
    if made_from is None or s.corpus or s.text_column or s.simplify:
        options = ["--corpus", *(s.corpus or made_from or CORPUS[s.preset])]
        if s.text_column:
            options += ["--text_column", *s.text_column]
        if s.simplify:
            options.append("--simplify")
        run_script("prepare_corpus.py", corpus, rebuild, *options)
    corpus_hash = read_report(corpus)["corpus_hash"]
    made = read_report(tokenizer)
    outdated = made.get("corpus_hash") != corpus_hash
    if outdated or s.asked_vocab_size not in (None, made["vocab_size"]):
        vocab_size = s.asked_vocab_size or VOCAB_SIZE[s.preset]
        options = ["--corpus_dir", corpus, "--vocab_size", vocab_size]
        run_script("train_tokenizer.py", tokenizer, rebuild, *options)
    s.data_fingerprint = [corpus_hash, read_report(tokenizer)["key"]]
    if checkpoint:
        check_recipe(s)
    pack(s)


def encode(sp, texts):
    """一批文档 -> 一维 uint16 数组（编号小于 65,536，2 字节装得下）。每篇后面跟一个 </s>。"""
    ids = sp.encode(texts, add_eos=True, num_threads=os.cpu_count(), return_type="numpy")
    return np.concatenate(ids).astype(np.uint16)


def pack(s):
    """语料编码成 packed/train.bin 和 eval.bin（验证集，按来源排）。6 亿 token，各 2 字节，是 1.2 GB。"""
    packed = s.work_dir / "packed"
    if read_report(packed, "meta.json").get("key") == s.data_fingerprint:
        print(f"打包好的数据没有变，沿用 {packed}")
        return
    packed.mkdir(exist_ok=True)
    (packed / "meta.json").unlink(missing_ok=True)  # 最后才写：没有它，就是没有做完
    sp = spm.SentencePieceProcessor(model_file=str(s.work_dir / "tokenizer/sentencepiece.model"))
    counts = np.zeros(len(sp), np.int64)
    with open(packed / "train.bin", "wb") as file:
        for texts in read_texts(s.work_dir / "corpus"):
            tokens = encode(sp, texts)
            file.write(tokens)
            counts += np.bincount(tokens, minlength=len(sp))
    sources = {}
    files = sorted(s.work_dir.glob("corpus/eval-*.parquet"))
    held_out = pq.read_table(files, partitioning=None).to_pandas()
    with open(packed / "eval.bin", "wb") as file:
        for name, texts in held_out.groupby("source")["text"]:
            start = file.tell() // 2  # 一个 token 2 字节
            file.write(encode(sp, list(texts)))
            end = file.tell() // 2
            sources[name] = {"start": start, "end": end, "characters": len("".join(texts))}
    share = counts[counts > 0] / counts.sum()
    meta = {
        "key": s.data_fingerprint,
        "vocab_size": len(sp),
        "train_tokens": int(counts.sum()),
        "eval_sources": sources,
        "unigram_entropy": float(-share @ np.log(share)),
        "files": {path.name: path.stat().st_size for path in sorted(packed.glob("*.bin"))},
    }
    write_json(packed / "meta.json", meta)


def read_texts(corpus):
    """逐批给出训练的文档，一批两千篇；在终端里显示进度。"""
    for path in sorted(corpus.glob("train-*.parquet")):
        file = pq.ParquetFile(path, pre_buffer=False)
        total = math.ceil(file.metadata.num_rows / 2000)
        batches = file.iter_batches(2000)
        for batch in tqdm(batches, desc="打包", total=total, file=sys.stdout, disable=None):
            yield batch["text"].to_pylist()


class BlockStream(torch.utils.data.Dataset):
    """整个训练要用的块，每一遍重新打乱；次序与微批量、进程数无关，换一张小卡续训也不变。"""

    def __init__(self, path, block_size, length, seed):
        self.data = np.memmap(path, np.uint16, "r")  # 用到哪里读哪里，不占内存
        self.block_size = block_size
        n_blocks = len(self.data) // block_size  # 只丢掉末尾不满一块的
        orders = []
        for epoch in range(math.ceil(length / n_blocks)):
            random = np.random.default_rng([seed, epoch])
            orders.append(random.permutation(n_blocks))
        self.order = np.concatenate(orders)[:length]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        """{"input_ids", "labels"}，形状都是 (T,)；labels 是每个位置的下一个 token，也就是答案。"""
        start = self.order[index] * self.block_size
        end = start + self.block_size
        tokens = self.data[start : end + 1].astype(np.int64)
        # 答案比输入错开一位，所以一块读 T + 1 个。只有语料的最后一块可能没有第 T + 1 个，这个位置就没有答案：
        # 接上 -100，cross_entropy 规定它的意思是“这里不计损失”（别的块上，多接的这个会被截掉）
        tokens = np.append(tokens, -100)
        size = self.block_size
        return {"input_ids": tokens[:size], "labels": tokens[1 : size + 1]}


# ==== 3. 模型：GPT-2 ====

# 输入 (B, T)：B 块，每块 T 个 token 的编号。每个编号查表得到一个 C 维的词向量，加上它所在位置的位置向量，成为 (B, T, C)。
# 然后是 L 层，每层两步：
#   注意力（attention）：每个位置从它前面的各个位置取信息。向量乘三个矩阵得到 q（要找什么）、k（我是什么）、v（我有什么）；
#     q 与前面每个 k 的内积，经 softmax（取 e 的幂，再除以总和）变成加起来是 1 的权重，按权重把那些 v 平均。
#     分 12 个头，各找各的。不许看后面：后面的就是答案（因果掩码）。
#   MLP：注意力只搬运、平均，MLP 才把搬来的变成新的特征。每个位置自己加工：C 维变成 4C 维，过一个弯曲的函数（GELU），
#     再变回 C 维。
# 每步的结果都加回原来的向量（残差连接）：向量像一条主干道，每层只改一点；梯度（损失对每个数的导数，见第 4 节）也沿着它
# 直达最底层，所以层数多也训练得动。
# 每步之前先 LayerNorm：把向量缩放到差不多大，训练才稳。最后再 LayerNorm 一次，与 V 个词向量各做内积，得到每种 token 的
# 分数（logits）(B, T, V)，softmax 变成概率。
#
# 参数：词向量 V·C = 24,576,000（输出层与它共用），位置向量 T·C = 786,432，最后的 LayerNorm 2·C = 1,536
#   每层 12·C² + 13·C = 7,087,872：q、k、v 3C²，注意力的输出 C²，MLP 的 C → 4C → C 8C²，其余是偏置和 LayerNorm
#   24,576,000 + 786,432 + 8 × 7,087,872 + 1,536 = 82,066,944
#
# 损失（loss）：每个位置都预测下一个 token，损失是 -ln(给正确答案的概率) 的平均；用自然对数 ln，单位就叫 nat。
# 什么都没学时，每种 token 的概率都是 1/V，损失就是 ln V：ln 32,000 = 10.37，演示 ln 4,500 = 8.41。
# 第一次验证应当接近它，差得多就是程序有错。


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """transformers 的 GPT-2，只有一处不同：给了 labels，就只返回损失。

    原版同时返回 logits，fp32 的一份就是 48 × 1,024 × 32,000 × 4 字节 = 6.3 GB 显存。
    """

    _keys_to_ignore_on_save = ["lm_head.weight"]  # 与词向量是同一个矩阵，检查点里只存一份；读的时候不要提醒
    accepts_loss_kwargs = False  # 告诉 Trainer：损失已经是平均值。每块一样长，几个微批量再平均就是总的平均

    def forward(self, input_ids=None, labels=None, **kwargs):
        """input_ids、labels：(B, T)，labels 已经错开一位，-100 的不算。返回 {"loss": 标量}；没有 labels 就同原版。"""
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.transformer(input_ids, use_cache=False).last_hidden_state
        logits = self.lm_head(hidden).flatten(0, 1)  # (B·T, V)
        return {"loss": F.cross_entropy(logits.float(), labels.flatten())}


def build_model(s):
    """按 s 的形状随机初始化一个模型。"""
    attention = s.attn
    if attention == "sdpa":
        # transformers 名叫 sdpa 的注意力，编译时会造一张 T × T 的掩码，就用不上 FlashAttention 核；
        # 同一个函数换个名字登记，它就不造掩码，只传 is_causal=True（只看前面）
        attention = "sdpa_causal"
        functions = transformers.AttentionInterface()
        functions.register(attention, functions["sdpa"])
    config = transformers.GPT2Config(
        n_layer=s.n_layer,
        n_embd=s.n_embd,
        n_head=s.n_head,
        vocab_size=s.vocab_size,
        n_positions=s.block_size,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,  # 有的话，每次前向 GPU 都要停下来查一遍
        activation_function="gelu_pytorch_tanh",  # 与 GPT-2 的 gelu_new 只差浮点舍入，快得多
        resid_pdrop=0.0,  # dropout（随机关掉一些数）防背书；文字只读一两遍，用不着
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(s.seed)
    return GPT2LMHeadModel(config)


# ==== 4. 优化器与学习率 ====

# 一步：参数 -= 学习率 × 方向。方向由优化器从梯度（损失对每个参数的导数）算出。
# AdamW 给每个数各定步长，记两份历史：梯度的平均，和梯度平方的平均；方向约是前者 ÷ 后者的平方根，所以每个数走得差不多快。
# Muon（Keller Jordan 等，2024）把矩阵当整体看：梯度往往集中在少数几个方向上，别的方向几乎学不到。它把更新正交化：奇异值
#   都变成约 1，各个方向就走得一样远（奇异值是一个矩阵把各个方向的向量拉长的倍数）；只记一份历史（动量）。
#   只有矩阵才有奇异值，所以偏置、LayerNorm 仍用 AdamW；词向量虽是表格，每行各管一个 token，不是把向量变成向量的
#   矩阵，也用 AdamW。
# 8 位 AdamW（adamw_bnb_8bit）的历史每个数只占 1 字节：0.66 GB 减到 0.32 GB（词向量仍是 4 字节），要更省显存时用。


def orthogonalize(matrix):
    """Newton–Schulz 迭代：(k, m, n) 是 k 个矩阵，奇异值都变成约 1，方向不变。系数来自 Jordan。"""
    x = matrix.float()
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + 1e-7)
    if x.is_cuda:
        x = x.half()  # 每个数都不超过 1，2 字节够用
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    # 每次：x ← 3.4445 x − 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x
    # baddbmm(a, b, c, beta, alpha) 是 beta·a + alpha·(b @ c)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    if tall:
        x = x.mT
    return x.to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """split 大于 0 的参数组是矩阵，由 Muon 更新；其余的由它继承的 AdamW 更新，检查点里也在一起。"""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group["split"]:
                for p in group["params"]:
                    self.update_matrix(p, group)
                    p.grad = None  # AdamW 跳过没有梯度的：这些矩阵已经更新过了
        super().step(closure)

    def update_matrix(self, p, group):
        """p：(输入, 输出)。c_attn 是并排的 q、k、v，(C, 3C)，split 是 3：三个矩阵分开正交化。"""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)  # 我们不用它；AdamW 读检查点时，要每个参数都有
            state["momentum"] = torch.zeros_like(p)
        # a.lerp(b, w) 是 (1 − w)·a + w·b。先更新动量，旧的占 95 %；
        # 再算 更新 = 0.95 × 动量 + 0.05 × 这一次的梯度（Nesterov）
        state["momentum"].lerp_(p.grad, 0.05)
        update = p.grad.lerp(state["momentum"], 0.95)
        parts = torch.stack(update.chunk(group["split"], dim=1))
        _, rows, columns = parts.shape
        update = torch.cat(orthogonalize(parts).unbind(), dim=1)
        lr = group["lr"]
        scale = math.sqrt(max(1, columns / rows))  # 输出比输入宽 4 倍的（C → 4C），步子放大 √4 倍
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(update, alpha=lr * scale)


def parameter_groups(model, adamw_lr, muon_lr):
    """四组：词向量和位置向量；偏置和 LayerNorm（不衰减）；c_attn；其余的矩阵。名字如 transformer.h.0.attn.c_attn.weight。"""
    embeddings = {"params": [], "split": 0, "lr": adamw_lr, "weight_decay": WEIGHT_DECAY}
    vectors = {"params": [], "split": 0, "lr": adamw_lr, "weight_decay": 0.0}
    attention = {"params": [], "split": 3, "lr": muon_lr, "weight_decay": WEIGHT_DECAY}
    matrices = {"params": [], "split": 1, "lr": muon_lr, "weight_decay": WEIGHT_DECAY}
    for name, p in model.named_parameters():
        group = matrices
        if p.ndim == 1:
            group = vectors
        elif ".h." not in name:
            group = embeddings
        elif "c_attn" in name:
            group = attention
        group["params"].append(p)
    return [embeddings, vectors, attention, matrices]


def build_optimizer(model, s):
    """想试别的优化器：在这里加一个分支，名字加进 choose_packages 和 --optim 的说明，再换一个 --work_dir。

    默认的学习率在 LEARNING_RATE 里，choose_packages 决定用哪一族的。
    """
    if s.optim == "muon":
        # fused：整个更新在一个核里。fp16 溢出时，fused 的 AdamW 在核里跳过，矩阵那一半却不会；None 让 torch 选别的
        fused = None if s.precision == "fp16" else True
        groups = parameter_groups(model, s.learning_rate, s.muon_learning_rate)
        return Muon(groups, betas=BETAS, fused=fused)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if s.optim == "adamw_bnb_8bit":
        import bitsandbytes as bnb

        manager = bnb.optim.GlobalOptimManager.get_instance()
        for module in (model.transformer.wte, model.transformer.wpe):
            # 少见的词，一行里的梯度时有时无，8 位的历史记不准
            manager.register_module_override(module, "weight", {"optim_bits": 32})
        return bnb.optim.AdamW8bit(groups, s.learning_rate, BETAS)
    fused = True if s.optim == "adamw_torch_fused" else None
    return torch.optim.AdamW(groups, s.learning_rate, BETAS, fused=fused)


def learning_rate_scale(step, total_steps):
    """第 step 步（从 0 数）的学习率是最高学习率的几分之几：先直线升到 1（预热），再直线降到 0。"""
    # 开头的梯度又大又乱，先小步走，优化器的历史攒够了再大步；最后步子越走越细，损失还会再降一截。
    # 共 11,838 步，预热 592 步，第 1,000 步（从 0 数）是 (11,838 - 1,000) / (11,838 - 592) = 0.964：
    # 矩阵的学习率 0.025 × 0.964 = 0.0241，其余的 3e-3 × 0.964 = 2.9e-3
    warmup_steps = max(1, round(WARMUP * total_steps))
    rising = (step + 1) / warmup_steps
    falling = (total_steps - step) / max(1, total_steps - warmup_steps)
    return min(rising, falling)


# ==== 5. 评估与续写 ====


@torch.no_grad()
def held_out_loss(model, s):
    """验证：验证集的每个 token（包括 </s>）恰好预测一次。返回 {"eval_loss", "eval_bits_per_char", ……}，各来源也有。

    损失是 nat/token，换了词表就不能比。每字比特（bits per character）= 总 nat ÷ ln 2 ÷ 总字数：照模型的概率压缩这些文字，
    一个字平均占几个比特；换了词表也能比。
    """
    data = np.fromfile(s.work_dir / "packed/eval.bin", np.uint16).astype(np.int64)
    tokens = torch.from_numpy(data).to(model.device)
    # 输入是答案往后错一位：第一个答案前面放一个 </s>，好像前面刚结束一篇。末尾补 padding 个，凑成整块，补的不算
    padding = -len(tokens) % s.block_size
    inputs = F.pad(tokens[:-1], (1, padding), value=EOS)
    inputs = inputs.view(-1, s.block_size)
    labels = F.pad(tokens, (0, padding))
    labels = labels.view(-1, s.block_size)
    nats = torch.zeros(labels.shape, device=model.device)  # 每个 token 的损失
    for start in range(16 * RANK, len(inputs), 16 * WORLD_SIZE):  # 一次 16 块；几个进程各算一份
        rows = slice(start, start + 16)
        logits = model(inputs[rows]).logits.float()  # (16, T, V)
        # cross_entropy 要 V 在第二维，.mT 把后两维对调
        nats[rows] = F.cross_entropy(logits.mT, labels[rows], reduction="none")
    nats = accelerate.utils.reduce(nats, reduction="sum")  # 没有算的行是 0，各进程的相加就齐了
    nats = nats.cpu().double().flatten()
    metrics = {}
    for name, source in s.eval_sources.items():
        losses = nats[source["start"] : source["end"]]
        add_metrics(metrics, f"eval_{name}", losses, source["characters"])
    characters = sum(source["characters"] for source in s.eval_sources.values())
    add_metrics(metrics, "eval", nats[: len(tokens)], characters)
    return metrics


def add_metrics(metrics, name, losses, characters):
    bits = float(losses.sum()) / math.log(2)
    metrics[f"{name}_loss"] = round(float(losses.mean()), 6)
    metrics[f"{name}_bits_per_char"] = round(bits / characters, 6)


def generate_samples(model, tokenizer, s):
    """{开头: 续写}。每次验证都用同样的开头、同样的种子，才看得出变化。"""
    samples = {}
    torch.manual_seed(s.seed)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = min(ids.size(1) + 64, s.block_size)
        output = model.generate(ids, max_length=length, use_cache=True, **SAMPLING)
        samples[prompt] = tokenizer.decode(output[0], skip_special_tokens=True)
    return samples


# ==== 6. 训练 ====

# Trainer 替我们做的一步：
#     for micro_batch in 96 // 48 个微批量:       # 显存只放得下 48 块，就分两次算，梯度相加（梯度累积）
#         loss = model(**micro_batch)["loss"] / 2 # 前向；矩阵乘用 bf16（autocast），权重仍是 fp32
#         loss.backward()                         # 反向：从损失倒着算出每个参数的梯度
#     clip_grad_norm_(model.parameters(), 1.0)    # 梯度总长超过 1 就缩到 1：一批坏数据毁不了模型
#     optimizer.step(); optimizer.zero_grad()     # 第 4 节；然后把梯度清零
#     scheduler.step()                            # 下一步的学习率 = 最高学习率 × learning_rate_scale(步数)
#     步数是 10 的倍数就记日志，是 500 的倍数就存检查点；然后叫两个回调（callback）：
#     Observer 显示进度、验证、续写；StopRequest（第 8 节）管停下
# 累积 2 次 48 块，和一次算 96 块，是同样的梯度（只差浮点舍入）：显存小的卡也能得到同样的模型。


class Observer(transformers.TrainerCallback):
    """每步之后看一眼：显示进度，记日志；每 eval_steps 步验证一次，写几段续写；有几步留一份快照。"""

    def __init__(self, s):
        self.settings = s
        self.trainer = None  # build_trainer 里填上：要用它的 log()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer")
        self.clock = time.perf_counter()  # 上一行日志的时刻和步数
        self.logged_step = 0
        # 在终端里是进度条；写进文件或 notebook 时，改成至多约四十行：11,838 步有 1,184 行日志，每 30 行印一行
        self.bar = tqdm(total=s.total_steps, desc="训练", unit="步", file=sys.stdout, disable=None)
        logs = s.total_steps / s.logging_steps
        self.print_steps = s.logging_steps * math.ceil(logs / 40)

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.clock = time.perf_counter()
        self.logged_step = state.global_step
        self.bar.update(state.global_step)
        if state.global_step == 0:
            self.evaluate(state, model)
            save_snapshot(model, self.settings, state)

    def on_step_end(self, args, state, control, model, **kwargs):
        step = state.global_step
        self.bar.update()
        if step % self.settings.eval_steps == 0 or step == state.max_steps:
            self.evaluate(state, model)
        save_snapshot(model, self.settings, state)

    def evaluate(self, state, model):
        start = time.perf_counter()
        s = self.settings
        step = state.global_step
        metrics = held_out_loss(model.eval(), s)  # 下一步开始时，Trainer 会换回 train()
        loss = metrics["eval_loss"]
        tqdm.write(
            f"\n── 第 {step} 步的验证：损失 {loss:.3f}，每字比特 {metrics['eval_bits_per_char']:.3f} ──"
        )
        for prompt, text in generate_samples(model, self.tokenizer, s).items():
            row = {"eval_loss": loss, "prompt": prompt, "step": step, "text": text}
            state.log_history.append(row)
            tqdm.write(f"    {' '.join(text.split())[:36]}")  # 全文在 samples.jsonl
        self.trainer.log(metrics)  # 记进 log_history，告诉 tensorboard 等，再叫下面的 on_log
        self.clock += time.perf_counter() - start  # 验证的时间不算在训练里：把起点往后挪

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_log(self, args, state, control, logs, **kwargs):
        s = self.settings
        if "loss" in logs:
            check_finite(logs, s, state.global_step)
            self.add_speed(logs, state)
        if RANK == 0:
            write_history(s.work_dir, state.log_history)

    def add_speed(self, logs, state):
        s = self.settings
        step = state.global_step
        seconds = time.perf_counter() - self.clock
        steps = step - self.logged_step
        speed = steps * s.tokens_per_step / seconds
        elapsed = max(row.get("elapsed_seconds", 0) for row in state.log_history)
        self.clock += seconds
        self.logged_step = step
        logs["averaged_steps"] = steps  # 这一行的损失是几步的平均：续训后的第一行，可能比别的少
        logs["tokens_per_second"] = round(speed, 1)
        logs["elapsed_seconds"] = round(elapsed + seconds, 2)
        line = f"loss {logs['loss']:.2f} | lr {logs['learning_rate']:.1e} | {speed / 1000:.3g}k tok/s"
        # MFU（model FLOPs utilization）：用上的浮点运算，占这些卡峰值的几分之几；不认识的卡就不记
        peak = peak_flops(s.device_name)
        if peak:
            logs["mfu"] = round(speed * s.flops_per_token / (peak * WORLD_SIZE), 4)
            line += f" | MFU {logs['mfu']:.0%}"
        state.log_history[-1].update(logs)
        self.bar.set_postfix_str(line)
        if self.bar.disable and (step == 1 or step % self.print_steps == 0):
            minutes = (s.total_steps - step) * s.tokens_per_step / speed / 60
            print(f"步 {step}/{s.total_steps} | {line} | 剩余 {minutes:.1f} 分钟")


def check_finite(logs, s, step):
    """损失成了 NaN、无穷大，就停下：再训练也回不来。fp16 开头几步梯度溢出是正常的，GradScaler 会跳过。"""
    numbers = [logs["loss"]]
    if s.precision != "fp16":
        numbers.append(logs["grad_norm"])
    if not all(map(math.isfinite, numbers)):
        fail(
            f"第 {step} 步的损失、梯度是 {numbers}，发散了（检查点完好）："
            f"把 --learning_rate（现在 {s.learning_rate:g}）和 --muon_learning_rate 减半，加 --fresh 从头来"
        )


def build_trainer(s, stop):
    arguments = transformers.TrainingArguments(
        output_dir=s.work_dir / "checkpoints",
        max_steps=s.total_steps,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.effective_batch_size // (s.batch_size * WORLD_SIZE),
        bf16=s.precision == "bf16",
        fp16=s.precision == "fp16",
        torch_compile=s.compile,
        activation_checkpointing=s.gradient_checkpointing,
        use_cpu=s.device == "cpu",
        dataloader_pin_memory=s.device == "cuda",
        train_sampling_strategy="sequential",  # BlockStream 已经排好了次序
        logging_steps=s.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # 打开的话，每个微批量都要等 GPU
        save_steps=s.eval_steps,
        save_total_limit=2,
        report_to=s.report_to,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    length = s.total_steps * s.effective_batch_size
    blocks = BlockStream(s.work_dir / "packed/train.bin", s.block_size, length, s.seed)
    model = build_model(s).to(arguments.device)
    optimizer = build_optimizer(model, s)
    scale = partial(learning_rate_scale, total_steps=s.total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=blocks,
        optimizers=(optimizer, scheduler),
        callbacks=[stop],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    observer = Observer(s)
    observer.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, observer)  # 排在最前：tensorboard 等要收到它加上的速度
    if s.device == "cuda":  # accelerate 编译时会自己打开 TF32，所以在它之后设
        torch.set_float32_matmul_precision("high" if s.tf32 else "highest")
    return trainer


# ==== 7. 主程序 ====


def main():
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  只有 0 号进程说话
    transformers.utils.logging.disable_progress_bar()
    s = read_settings()
    choose_device(s)
    choose_speed(s)
    choose_packages(s)
    asked_for_it = s.asked_device or s.max_steps or s.prepare_only
    if s.preset == "full" and s.device == "cpu" and not asked_for_it:
        fail(
            "没有 CUDA 显卡，CPU 要几个月。演示：--preset demo；只准备数据：--prepare_only；硬要用：--device cpu"
        )
    checkpoint = None if s.fresh else newest_checkpoint(s.work_dir)
    s.work_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(s.work_dir / ".lock")
    if RANK == 0:
        lock.acquire(timeout=0)  # 一个工作目录只许一个训练
        prepare(s, checkpoint)
    # 几个进程时，这一句让它们互相找到，并在这里等 0 号准备完数据
    accelerate.PartialState(cpu=s.device == "cpu", timeout=timedelta(days=1)).wait_for_everyone()
    if s.prepare_only:
        print("数据准备好了；去掉 --prepare_only 就训练")
        return
    print("\n第 3 步，共 4 步：训练模型\n猜每个位置的下一个 token；猜错多少，就照梯度把参数改多少。")
    derive(s)
    prepare_process(s, checkpoint)
    train(s, checkpoint)


def train(s, checkpoint):
    """训练到底，或被叫停。"""
    if s.report_to == "swanlab" and RANK == 0:
        import swanlab

        swanlab.init(project="gpt2-chinese")  # transformers 的回调以为已经有了一次记录，没有就崩溃
    stop = StopRequest(s)
    trainer = build_trainer(s, stop)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        smaller = "--gradient_checkpointing"
        if s.batch_size > 1:
            smaller = f"--batch_size {s.batch_size // 2}"
        sys.exit(f"错误：显存放不下微批量 {s.batch_size}；同一条命令加 {smaller}，结果不变")
    if RANK:
        os._exit(0)  # gloo（CPU 上的进程间通信）有时会卡住解释器的收尾
    step = trainer.state.global_step
    if step == s.total_steps:
        save_final_model(s, trainer.model)
        return
    print(f"停在第 {step} 步，检查点已存好。接着训练：同一条命令（不要 --fresh）再跑一次")
    if WORLD_SIZE > 1:
        os._exit(stop.exit_code)
    sys.exit(stop.exit_code)


def save_final_model(s, model):
    folder = s.work_dir / "final_model"
    model.config.use_cache = True  # 续写时存下前文的 k、v，不必每个 token 重算
    model.config.pad_token_id = PAD
    length = min(100, s.block_size // 2)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=length, bos_token_id=BOS, **SAMPLING
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer").save_pretrained(folder)
    plot = Path(__file__).with_name("plot_loss.py")
    if plot.exists():
        picture = s.work_dir / "loss_curve.png"
        subprocess.run([sys.executable, plot, s.work_dir, "--output", picture])
    print(
        f"\n完成。模型在 {folder}。接下来：\n"
        f'  1. 让它续写：python generate.py "{PROMPTS[0]}" --model {s.work_dir}\n'
        f"  2. 看它怎样学会的：{s.work_dir} 里的 loss_curve.png 和 generation_samples.md\n"
        f"  3. 打开网页：pip install -r space/requirements.txt，然后 python space/app.py --model {s.work_dir}"
    )


# ==== 8. 防错与落盘（初学可以跳过）====

# 稠密矩阵乘的峰值（TFLOP/s，bf16；T4、V100 是 fp16），来自各显卡的官方规格
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "H200": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "4090 D": 147,
    "4090": 165,
    "3090": 71,
    "T4": 65,
    "V100-PCIE": 112,
    "V100": 125,
}


def peak_flops(name):
    """名叫 name 的显卡每秒浮点运算次数的峰值；表里没有的，返回 None。"""
    if "Laptop" in name or "MIG" in name:  # 笔记本里的、切成几份的，名字相同，慢得多
        return None
    for card, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{card}\b", name):  # \b 是词的边界：找 A10 不会找到 A100
            return tflops * 1e12
    return None


def fail(message):
    """说一行就退出；几个进程时只有 0 号说。"""
    sys.exit(f"错误：{message}" if RANK == 0 else 1)


def flash_attn_imports():
    """不但装着，还能导入：为别的版本的 torch 编译的 flash-attn，导入时才报错。"""
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def compiler_is_complete(device):
    """torch.compile 要 C++ 编译器和 Python.h；显卡上还要 triton。"""
    if shutil.which("g++") is None:
        return False
    if device == "cuda" and find_spec("triton") is None:
        return False
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return os.path.isfile(header)


def check_disk_before(s, checkpoint):
    """每个参数的字节：接着训练，要再写一个检查点（12）和最终模型（4）；从头的话，三个检查点，最终模型，十来个快照（各 2）。"""
    bytes_per_parameter = 40
    if checkpoint:
        bytes_per_parameter = 16
    elif s.snapshots:
        bytes_per_parameter += 24
    check_disk(s, bytes_per_parameter)


def prepare_process(s, checkpoint):
    """训练之前：看磁盘，写下设置。从头训练的话，删掉旧的检查点和快照：--fresh 不要的，或没有一份完整的。"""
    check_disk_before(s, checkpoint)
    if checkpoint:
        print(f"从第 {step_of(checkpoint)} 步的检查点接着训练")
    elif RANK == 0:
        write_json(s.work_dir / "config.json", vars(s))
        for old in ("checkpoints", "snapshots"):
            shutil.rmtree(s.work_dir / old, ignore_errors=True)
    if s.device == "cpu" and sys.platform == "linux":
        # 用过的内存不还给系统：再要时，系统要逐页清零，慢两成
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    cards = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))  # torch 只看得见一张，见文件开头
    if s.device == "cuda" and cards > WORLD_SIZE:
        print(
            f"有 {cards} 张显卡，用了 {WORLD_SIZE} 张；都用上：torchrun --nproc_per_node={cards} a100_train.py ……"
        )


def run_script(name, output, *options):
    """运行本脚本旁边的另一个脚本。"""
    script = Path(__file__).with_name(name)
    command = [sys.executable, script, "--output_dir", output, *options]
    code = subprocess.run(list(map(str, command))).returncode
    if code:
        sys.exit(code)


def check_recipe(s):
    """接着旧的检查点训练：数据和设置要与它的相同。"""
    old = json.loads((s.work_dir / "config.json").read_text(encoding="utf-8"))
    for name in RECIPE:
        now = getattr(s, name)
        if old.get(name) != now:
            fail(f"{name} 原来是 {old.get(name)}，现在是 {now}：改回去，或换 --work_dir，或加 --fresh")


def step_of(checkpoint):
    """checkpoint-500 -> 500；没有是 0。"""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest_checkpoint(work_dir):
    """最新的完整检查点，或 None。"""
    for path in sorted(work_dir.glob("checkpoints/checkpoint-*"), key=step_of, reverse=True):
        if is_complete(path):
            return path
        print(f"跳过不完整的检查点 {path}")
    return None


def is_complete(checkpoint):
    """各个文件都在，都读得出来：断电时可能只写了一半。trainer_state.json 是最后写的。"""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        safetensors.torch.load_file(checkpoint / "model.safetensors")
        for path in [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("*.pt*")]:
            if zipfile.ZipFile(path).testzip():
                return False
    except (OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError):
        return False
    return True


def write_text(path, text):
    """先写在旁边再改名：写到一半被杀，原来的还在。"""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1, default=str)
    write_text(path, text)


def write_history(folder, history):
    """由 log_history 写日志和续写。它随检查点存取，所以续训时每一步也恰好一份。"""
    samples = [row for row in history if "prompt" in row]
    log = []
    for row in history:
        if "tokens_per_second" in row or "eval_bits_per_char" in row:
            # NaN 和无穷大（fp16 开头几步的梯度）不是 JSON，不写
            log.append(
                {name: value for name, value in row.items() if name != "epoch" and math.isfinite(value)}
            )
    for name, rows in (("train_log", log), ("samples", samples)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / f"{name}.jsonl", "".join(lines))
    table = "| 步 | 验证损失 | 续写 |\n|---:|---:|---|\n"
    for row in samples:
        text = " ⏎ ".join(row["text"].replace("|", "\\|").splitlines())
        table += f"| {row['step']} | {row['eval_loss']:.3f} | {text} |\n"
    write_text(folder / "generation_samples.md", table)


def save_snapshot(model, s, state):
    """第 0、100、200、500、1,000、2,000……步和最后一步，留一份半精度的权重，和最近的验证结果。"""
    step = state.global_step
    wanted = step in (0, s.total_steps) or re.fullmatch("[125]00+", str(step))
    if RANK or not s.snapshots or not wanted:
        return
    if shutil.disk_usage(s.work_dir).free < 16 * s.parameters:
        tqdm.write(f"磁盘快满了，第 {step} 步不留快照")  # 留给检查点
        return
    folder = s.work_dir / "snapshots" / f"step-{step}"
    weights = {name: p.bfloat16() for name, p in model.named_parameters()}
    model.save_pretrained(folder, state_dict=weights)
    evaluations = [row for row in state.log_history if "eval_bits_per_char" in row]
    note = dict(evaluations[-1])
    note["eval_step"] = note["step"]
    note["step"] = step
    note["tokens"] = step * s.tokens_per_step
    write_json(folder / "snapshot.json", note)


def check_disk(s, bytes_per_parameter):
    free = shutil.disk_usage(s.work_dir).free
    need = bytes_per_parameter * s.parameters
    if free < need:
        fail(
            f"{s.work_dir} 的磁盘不够：剩 {free >> 20:,} MB，要 {need >> 20:,} MB；清出空间，或加 --no-snapshots"
        )


class StopRequest(transformers.TrainerCallback):
    """Ctrl-C、SIGTERM 或 --max_hours：做完这一步，存好再停。"""

    def __init__(self, s):
        self.settings = s
        self.exit_code = 0  # 被信号叫停是 128 + 编号：“命令 && shutdown” 就不会关机
        self.deadline = START + 0.99 * 3600 * (s.max_hours or math.inf)  # 留百分之一的时间存盘
        signal.signal(signal.SIGINT, self.request)
        signal.signal(signal.SIGTERM, self.request)

    def request(self, number, frame):
        tqdm.write("收到停止信号：做完这一步就存检查点（再按一次立即停）")
        self.exit_code = 128 + number
        signal.signal(number, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        stop = self.exit_code > 0 or time.time() > self.deadline
        if WORLD_SIZE > 1:  # 几个进程要停在同一步，所以每一步都商量
            stop = any(accelerate.utils.gather_object([stop]))
        if stop:
            control.should_training_stop = True
            control.should_save = True
        if control.should_save:
            check_disk(self.settings, 16)


def read_report(folder, name="report.json"):
    """读一份报告。没有、读不懂，或它列出的文件缺了、大小变了，返回 {}：这个文件夹没有做完。"""
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return report if sizes == report["files"] else {}


def run(main):
    """运行 main()。Ctrl-C、磁盘满、没有权限、别的进程正在写，都只说一行。"""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("停下了；同一条命令再跑一次，做好的不重做", file=sys.stderr)
        sys.exit(130)
    except filelock.Timeout as error:
        sys.exit(f"错误：另一个进程正在写（{error}）；等它结束，再跑同一条命令")
    except OSError as error:
        sys.exit(f"错误：读写失败（{error}）；清出空间、检查权限，再跑同一条命令")


if __name__ == "__main__":
    run(main)
