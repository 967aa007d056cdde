#!/usr/bin/env python3
"""第 3 步：从零训练一个中文 GPT-2（82.1 M 参数：8 层 × 768 维，12 个头，词表 32,000，上下文 1,024）。

读 <work_dir>/corpus/ 和 tokenizer/（没有就先运行前两步的脚本），写 final_model/、loss_curve.png、generation_samples.md。

    python a100_train.py --preset demo           # 演示：没有显卡也能跑，不用联网，几分钟
    python a100_train.py                         # 完整训练，一张 A100；加 --prepare_only 只准备数据
    torchrun --nproc_per_node=2 a100_train.py    # 两张卡
测过：演示在 2 核 Intel Xeon 上 110 秒，每字比特 5.72（2026-11-24）；显卡上未测。
中断了，同一条命令再跑一次就接着训练，结果不变。第 8 节只管防错，初学可以不看。
"""

import argparse
import ctypes
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import accelerate
import filelock
import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import sentencepiece as spm
import torch
import torch.nn.functional as F
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun 设的
START = time.time()
PAD, BOS, EOS = 0, 2, 3  # 特殊 token 的编号，与 train_tokenizer.py 一致
PROMPTS = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=EOS, pad_token_id=PAD)


# ==== 1. 设置 ====

def int_or_auto(text):
    return text if text == "auto" else int(text)


HOME = Path("/root/autodl-tmp" if Path("/root/autodl-tmp").is_dir() else "") / "gpt2-chinese"
SWITCH = argparse.BooleanOptionalAction  # --compile 打开，--no-compile 关上，不写是自动
# 每行：名字、类型、说明、完整训练（full）的默认值、演示（demo）的默认值（不写就相同）
SETTINGS = [
    ("work_dir", Path, "输出的文件夹", HOME),
    ("corpus", list, "wiki zhihu demo 或 [名字=]路径（格式见 prepare_corpus.py），可以几个", ["wiki", "zhihu"], ["demo"]),
    ("vocab_size", int, "词表 V：token 有多少种", 32_000, 4_500),
    ("n_layer", int, "层数 L", 8, 2),
    ("n_embd", int, "向量的维数 C", 768, 128),
    ("n_head", int, "注意力的头数", 12, 4),
    ("block_size", int, "上下文 T：一块有多少 token", 1024, 64),
    ("batch_size", int_or_auto, "微批量：一次算几块，或 auto", 48, 32),
    ("effective_batch_size", int, "有效批量：更新一次看几块", 96, 32),
    ("epochs", float, "把语料读几遍", 2.0, 1.0),
    ("max_steps", int, "更新几次；大于 0 时代替 epochs", 0, 1350),
    ("max_hours", float, "到这个时间前存好停下，下次接着来", None),
    ("learning_rate", float, "最高学习率（Muon 时管矩阵以外的）", None),
    ("muon_learning_rate", float, "矩阵的最高学习率（Muon）", 0.025, 0.02),
    ("seed", int, "随机种子", 42),
    ("device", str, "cuda、cpu 或 mps（苹果的显卡，未测）", "auto"),
    ("precision", str, "矩阵乘用的数：bf16、fp16、fp32", "auto"),
    ("attn", str, "注意力：flash_attention_2、sdpa、eager", "auto"),
    ("optim", str, "优化器：muon、adamw_torch_fused、adamw_torch、adamw_bnb_8bit", "auto"),
    ("compile", SWITCH, "torch.compile：把小运算融合成一个核", None),
    ("tf32", SWITCH, "fp32 的矩阵乘截成 19 位；bf16 时几乎用不上", None),
    ("liger", SWITCH, "融合的交叉熵，省显存", False),
    ("gradient_checkpointing", SWITCH, "不存激活，反向时重算：省显存，多算三分之一", False),
    ("logging_steps", int, "每多少步一行日志", 10),
    ("eval_steps", int, "每多少步验证、续写、存检查点", 500, 225),
    ("snapshots", SWITCH, "途中留几份模型（snapshots/），供网页比较", True),
    ("report_to", str, "同时记到：tensorboard、swanlab、trackio、wandb", "none"),
    ("prepare_only", bool, "只准备数据，不要显卡", False),
    ("fresh", bool, "丢掉检查点和日志，从头训练", False),
]
# learning_rate 的默认值：(Muon 时, 只用 AdamW)；怎么定的见 results/recipe/README.md
LEARNING_RATES = {"full": (3e-3, 3e-4), "demo": (1.6e-2, 3e-3)}
WARMUP, WEIGHT_DECAY, BETAS = 0.05, 0.1, (0.9, 0.95)  # 预热占总步数的 5%；其余见第 4 节
# 改了这些就是另一个模型，不能接着旧的检查点训练
RECIPE = ["key", "n_layer", "n_embd", "n_head", "block_size", "effective_batch_size", "epochs", "max_steps",
          "optim", "learning_rate", "muon_learning_rate", "seed"]


def read_settings():
    """命令行和 SETTINGS -> 一个对象 s，s.n_layer 是层数，等等；s.given 是命令行上写明了的名字。"""
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="python a100_train.py [--设置 值 ……]")
    parser.add_argument("--preset", choices=["full", "demo"], default="full", help="完整训练（默认）或演示")
    kinds = {SWITCH: {"action": SWITCH}, bool: {"action": "store_true"},
             list: {"action": "extend", "nargs": "+"}}
    for name, kind, text, *defaults in SETTINGS:
        parser.add_argument(f"--{name}", help=f"{text}（默认 {'，演示 '.join(map(str, defaults))}）",
                            default=argparse.SUPPRESS, **kinds.get(kind, {"type": kind}))
    given = vars(parser.parse_args())
    column = 3 if given["preset"] == "full" else -1
    s = argparse.Namespace(**{row[0]: row[column] for row in SETTINGS} | given, given=sorted(given))
    if s.batch_size == "auto":
        s.batch_size = s.effective_batch_size // WORLD_SIZE
    for name, value in vars(s).items():
        low = 0 if name in ("max_steps", "seed") else 1e-9
        if type(value) in (int, float) and not low <= value < 2**32:
            fail(f"--{name} 是 {value}；要一个大于 0 的数")
    if s.n_embd % s.n_head:
        fail(f"--n_embd {s.n_embd} 不是 --n_head {s.n_head} 的整数倍")
    if s.effective_batch_size % (s.batch_size * WORLD_SIZE):
        fail(f"--effective_batch_size {s.effective_batch_size} 不是 --batch_size {s.batch_size} × {WORLD_SIZE} "
             f"个进程的整数倍；改小 --batch_size")
    return s


def choose_speed(s):
    """把 auto 换成这台机器上最快而可靠的做法；写明了却办不到的，报错。"""
    # A100（计算能力 8.0）与 T4（7.5）的区别都由这里来：8.0 起有 bf16、TF32、FlashAttention，T4 用 fp16。
    # bf16 每个数 2 字节，范围与 4 字节的 fp32 一样，位数少；fp16 大于 65,504 就溢出，要 GradScaler 放大损失、跳过
    # 溢出的一步。FlashAttention 分块算注意力，不存 T × T 的矩阵；torch 的 SDPA 里也有它
    def has(package):
        return importlib.util.find_spec(package) is not None
    cuda, flash = torch.cuda.is_available() and s.device in ("auto", "cuda"), has("flash_attn")
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    ampere, compiler = capability >= (8, 0), has("triton") if cuda else bool(shutil.which("g++"))
    trusted = not torch.__version__.startswith("2.10.")  # 2.10 的 compile 在 A100 上出过 NaN，默认不开
    possible = {  # 每个设置在这里办得到的值，最好的在前
        "device": ["cuda"] * cuda + ["cpu"] + ["mps"] * torch.backends.mps.is_available(),
        "precision": ["bf16"] * ampere + ["fp16"] * cuda + ["fp32"],
        "attn": ["flash_attention_2"] * (ampere and flash and s.precision != "fp32") + ["sdpa", "eager"],
        "optim": ["muon", "adamw_torch_fused", "adamw_torch"] + ["adamw_bnb_8bit"] * has("bitsandbytes"),
        "compile": [True] * (ampere and compiler and trusted) + [False] + [True] * compiler,
        "tf32": [True] * ampere + [False], "liger": [False] + [True] * (cuda and has("liger_kernel")),
        "report_to": ["none", *filter(has, ("tensorboard", "swanlab", "trackio", "wandb"))]}
    for name, values in possible.items():
        vars(s)[name] = values[0] if vars(s)[name] in ("auto", None) else vars(s)[name]
        if vars(s)[name] not in values:
            fail(f"--{name} {vars(s)[name]} 在这里办不到（缺显卡、软件包或编译器），可以是 {values}")
    s.learning_rate = s.learning_rate or LEARNING_RATES[s.preset][s.optim != "muon"]
    if cuda:
        print(f"计算能力 {capability}，torch {torch.__version__}，flash-attn 包{'有' if flash else '没有（不要紧）'}")
    elif s.preset == "full" and not {"max_steps", "device", "prepare_only"} & set(s.given):
        fail("没有 CUDA 显卡，CPU 上要几个月。看演示：--preset demo；只准备数据：--prepare_only；硬要用：--device cpu")


def derive(s):
    """数据准备好以后，由它决定的数也放进 s。"""
    vars(s).update(read_report(s.work_dir / "packed", "meta.json"))
    s.n_blocks = s.train_tokens // s.block_size
    if s.n_blocks < 1:
        fail(f"--block_size {s.block_size} 比整个训练语料（{s.train_tokens} token）还大；改小它，或多加语料")
    s.tokens_per_step = s.effective_batch_size * s.block_size  # 96 × 1,024 = 98,304
    s.steps_per_epoch = s.n_blocks / s.effective_batch_size
    s.total_steps = s.max_steps or math.ceil(s.epochs * s.steps_per_epoch)
    per_layer = 12 * s.n_embd**2 + 13 * s.n_embd  # 怎么来的见第 3 节
    s.parameters = (s.vocab_size + s.block_size) * s.n_embd + s.n_layer * per_layer + 2 * s.n_embd
    # 一个 token 的浮点运算（PaLM 论文附录 B）：每个参数 6 次（前向 2，反向 4；位置向量不算），另加注意力的两两相乘
    s.flops_per_token = 6 * s.parameters + (12 * s.n_layer - 6) * s.block_size * s.n_embd
    check_disk(s.work_dir, s.parameters * (3 * 12 + 4 + 2 * 12 * s.snapshots))  # 检查点 × 3，最终模型，快照 × 12
    s.device_name = torch.cuda.get_device_name() if s.device == "cuda" else s.device
    print(f"{s.device_name}，{s.precision}，{s.attn}，{s.optim}，compile {s.compile}，{s.parameters:,} 参数，"
          f"{s.train_tokens:,} 个训练 token，每步 {s.tokens_per_step:,}，共 {s.total_steps:,} 步，"
          f"读 {s.total_steps / s.steps_per_epoch:.2f} 遍")


# ==== 2. 数据：文字 → token → 块 ====

# token 是模型读写的单位：分词器（第 2 步）把文字切成词块，每块一个编号。全部文档的 token 首尾相接，
# 再切成每 block_size 个一块，一块是一个训练样本：没有填充，一个 token 也不浪费。

def prepare(s, checkpoint):
    """缺语料或分词器，就运行前两步的脚本。接着 checkpoint 训练时，数据和设置必须没有变，否则报错，什么也不动。"""
    corpus, tokenizer, config = (s.work_dir / name for name in ("corpus", "tokenizer", "config.json"))
    flag = "--no-rebuild" if checkpoint else "--rebuild"
    made = read_report(corpus).get("corpus")
    if "corpus" in s.given or made in (None, ["demo"]) and made != s.corpus:  # 演示的语料不能拿来做完整训练
        run_script("prepare_corpus.py", corpus, flag, "--corpus", *s.corpus)
    corpus_hash, old = read_report(corpus)["corpus_hash"], read_report(tokenizer)
    if old.get("corpus_hash") != corpus_hash or "vocab_size" in s.given and old["vocab_size"] != s.vocab_size:
        run_script("train_tokenizer.py", tokenizer, flag,
                   "--corpus_dir", corpus, "--vocab_size", s.vocab_size)
    s.key = [corpus_hash, read_report(tokenizer)["key"]]
    old = json.loads(config.read_text(encoding="utf-8")) if checkpoint else {}
    for name in RECIPE if checkpoint else []:
        if old.get(name) != vars(s)[name]:
            fail(f"已有的训练用的 {name} 是 {old.get(name)}，这次是 {vars(s)[name]}：改回去，或换 --work_dir，或加 --fresh 从头来")


def read_corpus(s, split):
    """逐批给出 (文本的列表, 来源的列表)。"""
    for path in sorted((s.work_dir / "corpus").glob(f"{split}-*.parquet")):
        file = pq.ParquetFile(path, pre_buffer=False)  # True 会把整个文件读进内存
        for batch in file.iter_batches(2000, columns=["text", "source"]):
            yield batch["text"].to_pylist(), batch["source"].to_pylist()


def encode(sp, texts):
    """一批文档 -> 一维 uint16 数组。每篇后面跟一个 </s>，文档之间只有它：模型由它学会一篇在哪里结束。"""
    # 太长的字符串 SentencePiece 会累积误差，所以切成页，尽量在行尾切：换行自成一个词块，切开不改变编号
    documents = [re.findall(r"(?s).{1,8000}(?:\n|\Z)|.{1,8000}", text) for text in texts]
    ids = sp.encode([page for pages in documents for page in pages], num_threads=os.cpu_count(),
                    return_type="numpy")
    for last in np.cumsum([len(pages) for pages in documents]) - 1:
        ids[last] = np.append(ids[last], EOS)
    return np.concatenate(ids).astype(np.uint16)


def pack(s):
    """语料编码成 packed/train.bin 和 eval.bin（按来源排在一起）；语料和分词器没变就沿用。"""
    # uint16 装得下 65,536 种 token：6 亿 token 是 1.2 GB，训练时映射着读
    packed, counts, sources, end = s.work_dir / "packed", 0, {}, 0
    if read_report(packed, "meta.json").get("key") == s.key:
        return print(f"打包好的数据没有变，沿用 {packed}")
    packed.mkdir(exist_ok=True)
    (packed / "meta.json").unlink(missing_ok=True)  # 最后才写它：没有它，别的文件不算数
    sp = spm.SentencePieceProcessor(model_file=str(s.work_dir / "tokenizer" / "sentencepiece.model"))
    with open(packed / "train.bin", "wb") as file:
        for texts, _ in read_corpus(s, "train"):  # 文档在第 1 步已经打乱
            file.write(tokens := encode(sp, texts))
            counts += np.bincount(tokens, minlength=sp.get_piece_size())
    pairs = [pair for texts, names in read_corpus(s, "eval") for pair in zip(names, texts, strict=True)]
    with open(packed / "eval.bin", "wb") as file:
        for name in sorted({name for name, _ in pairs}):
            texts = [text for source, text in pairs if source == name]
            file.write(tokens := encode(sp, texts))
            sources[name] = {"start": end, "end": end + len(tokens), "characters": sum(map(len, texts))}
            end += len(tokens)
    share = counts[counts > 0] / counts.sum()
    write_json(packed / "meta.json", {
        "key": s.key, "vocab_size": len(counts), "train_tokens": int(counts.sum()), "eval_sources": sources,
        "unigram_entropy": float(-(share * np.log(share)).sum()),  # 只猜词频能到的损失，nat
        "files": {name: (packed / name).stat().st_size for name in ("train.bin", "eval.bin")}})


class BlockStream(torch.utils.data.Dataset):
    """整个训练过程要用的全部块，排成一列：每一遍把 n 块重新打乱。"""

    # 次序只由 seed 和第几遍决定，与微批量、进程数无关，所以换一张小卡续训，数据次序也不变
    def __init__(self, path, block_size, length, seed):
        self.path, self.block_size = path, block_size
        n_blocks = path.stat().st_size // 2 // block_size  # 只丢掉末尾不满一块的
        self.order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n_blocks)
                                     for epoch in range(math.ceil(length / n_blocks))])[:length]

    def __len__(self):
        return len(self.order)

    def __getitems__(self, indices):
        """返回 {"input_ids", "labels"}，形状都是 (B, T) 的 int64；labels 是每个位置的下一个 token。"""
        data = np.memmap(self.path, dtype=np.uint16, mode="r")  # 每批重开：一直开着，内存看起来会越涨越多
        places = self.order[indices][:, None] * self.block_size + np.arange(self.block_size + 1)
        tokens = torch.from_numpy(data[np.minimum(places, len(data) - 1)].astype(np.int64))
        tokens[torch.from_numpy(places == len(data))] = -100  # 文件末尾没有下一个：-100 不计损失
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


# ==== 3. 模型：GPT-2 ====

# token 编号 → 词向量 + 位置向量 (B, T, C) → L 层 → LayerNorm → 与每个词向量比对，得到每种 token 的分数 (B, T, V)。
# 每层两步，结果都加回原来的向量（残差）：注意力让每个位置从前面的位置取信息；MLP 在每个位置上各自加工。参数：
#   词向量 V·C = 24,576,000（输出层与它共用），位置向量 T·C = 786,432，最后的 LayerNorm 2·C = 1,536
#   每层 12·C² + 13·C = 7,087,872：注意力的 q、k、v 3C² 和输出 C²，MLP 的 C → 4C → C 共 8C²，其余是偏置和 LayerNorm
#   24,576,000 + 786,432 + 8 × 7,087,872 + 1,536 = 82,066,944
# 每个位置都预测下一个 token，损失是 -ln(给正确答案的概率) 的平均，单位 nat。什么都没学时概率都是 1/V，损失是 ln V：
# 词表 32,000 是 10.37，演示的 4,500 是 8.41。第一行日志应当接近它。

class GPT2(transformers.GPT2LMHeadModel):
    """transformers 的 GPT-2，只改一处：给了 labels 就只返回损失。labels 是错开一位的 input_ids，形状 (B, T)。"""

    # 原版还返回 logits，混合精度下会再复制成一份 fp32：48 × 1,024 × 32,000 × 4 字节 = 6.3 GB
    def forward(self, input_ids=None, labels=None, **kwargs):
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.transformer(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)  # (B·T, C)
        if self.liger:  # 输出层和交叉熵融合成一个核，不产生 (B·T, V) 的 logits
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
            return {"loss": fused(hidden, self.lm_head.weight.to(hidden.dtype), labels.flatten())}
        on_cpu = hidden.is_cpu and not torch.compiler.is_compiling()
        cross_entropy = InPlaceCrossEntropy.apply if on_cpu else F.cross_entropy
        return {"loss": cross_entropy(self.lm_head(hidden).float(), labels.flatten())}


class InPlaceCrossEntropy(torch.autograd.Function):
    """同 F.cross_entropy，反向时把概率就地改写成梯度（softmax − 独热）：少写两份 (B·T, V)，CPU 上一步快 8 %。"""

    @staticmethod
    def forward(ctx, logits, labels):
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(log_p, labels)
        return F.nll_loss(log_p, labels)

    @staticmethod
    def backward(ctx, gradient):
        log_p, labels = ctx.saved_tensors
        p, kept = log_p.exp_(), labels != -100
        p[kept, labels[kept]] -= 1
        return p.mul_((kept * gradient / kept.sum())[:, None]), None


def build_model(s):
    """新建一个随机初始化的 GPT-2。同一个 s.seed 得到同样的权重。"""
    # compile 时 "sdpa" 会造出 B × 1 × T × T 的掩码，用不上 FlashAttention；换个名字注册同一个函数，就只传 is_causal
    # （只许看前面）。它不看 padding，所以续写时一次只生成一条
    transformers.AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    torch.manual_seed(s.seed)
    model = GPT2(transformers.GPT2Config(
        n_layer=s.n_layer, n_embd=s.n_embd, n_head=s.n_head, vocab_size=s.vocab_size,
        n_positions=s.block_size, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=None,  # 有 pad 的话，每次前向都要让 GPU 停下来查一遍
        activation_function="gelu_pytorch_tanh",  # 就是 gelu_new，融合成一个核，少存三份中间结果
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,  # 文字只读一两遍，不用 dropout
        attn_implementation="sdpa_causal" if s.attn == "sdpa" else s.attn))
    model.liger = s.liger
    return model


# ==== 4. 优化器与学习率 ====

# 一步：参数 -= 学习率 × 方向。AdamW 给每个数各定步长，要记两份历史（梯度的平均，梯度平方的平均）。
# Muon（Keller Jordan 等，2024）看整个矩阵：梯度往往集中在少数几个方向上，把它正交化（奇异值都变成 1），各个方向就
# 走得一样远；只记一份动量。词向量每行各管一个 token，偏置和 LayerNorm 是向量，没有这样的方向，仍用 AdamW。
# 8 位 AdamW（adamw_bnb_8bit）把历史存成 1 字节：82 M 参数从 0.63 GB 减到 0.30 GB（词向量仍是 fp32）。

def orthogonalize(matrix, steps=5):
    """Newton–Schulz 迭代：把 (k, m, n) 的 k 个矩阵近似换成奇异值全为 1 的。系数来自 Keller Jordan 的 Muon。"""
    x = matrix.float() / (matrix.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.half() if x.is_cuda else x  # 每个数都不超过 1，fp16 不会溢出；CPU 上 fp16 反而慢
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """参数组里 split > 0 的是矩阵，走正交化的动量；其余的交给父类 AdamW。"""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["split"] else []:
                self.matrix_step(p, group)
                p.grad = None  # 没有梯度的，AdamW 不动
        super().step(closure)

    def matrix_step(self, p, group):
        """p 的形状是 (输入, 输出)。c_attn 把 q、k、v 并排放在一个 (C, 3C) 里，split=3 把它们分开正交化。"""
        state = self.state[p]
        if not state:  # AdamW 读检查点时，要每个参数都有 step
            state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
        state["momentum"].lerp_(p.grad, 0.05)  # 动量：旧的占 95%
        update = p.grad.lerp(state["momentum"], 0.95)  # Nesterov
        parts = orthogonalize(torch.stack(update.chunk(group["split"], dim=1)))
        scale = max(1, parts.size(2) / parts.size(1)) ** 0.5  # C → 4C 的矩阵，步子按 √4 放大
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(torch.cat(parts.unbind(), dim=1), alpha=group["lr"] * scale)


def parameter_groups(model, learning_rate, muon_learning_rate):
    """四组：词向量和位置向量；偏置和 LayerNorm（不衰减）；c_attn；其余的矩阵。前两组 split = 0，由 AdamW 更新。"""
    groups = {}
    for name, p in model.named_parameters():
        split = (3 if "c_attn" in name else 1) if p.ndim == 2 and ".h." in name else 0
        group = {"split": split, "lr": muon_learning_rate if split else learning_rate,
                 "weight_decay": WEIGHT_DECAY if p.ndim == 2 else 0.0}
        groups.setdefault(str(group), group | {"params": []})["params"].append(p)
    return list(groups.values())


def learning_rate_scale(step, total_steps):
    """第 step 步（从 0 数）的学习率是最高学习率的几分之几：先线性升到 1（预热），再线性降到 0。"""
    # 预热：开头的梯度又大又乱，小步走才不会带偏。降到 0：步子越走越细，损失还会再降一截。
    # 例：共 11,838 步时预热 592 步，第 1,000 步是 (11,838 - 1,000) / (11,838 - 592) = 0.964，
    # 矩阵的学习率 0.025 × 0.964 = 0.0241，其余的 3e-3 × 0.964 = 2.9e-3
    warmup_steps = round(WARMUP * total_steps)
    return min((step + 1) / max(1, warmup_steps), (total_steps - step) / max(1, total_steps - warmup_steps))


# ==== 5. 评估与续写 ====

@torch.no_grad()
def held_out_loss(model, s):
    """验证集上的损失：每个来源的每一个 token（包括 </s>）恰好被预测一次。返回 {"eval_loss", "eval_bits_per_char", ……}。"""
    # 损失是 nat/token，换了词表就不能比。每字比特 = 总 nat ÷ ln 2 ÷ 总字数：照这个模型压缩，一个字占多少比特
    data = torch.from_numpy(np.fromfile(s.work_dir / "packed" / "eval.bin", dtype=np.uint16).astype(np.int64))
    sums = {"": np.zeros(3)}
    for name, source in s.eval_sources.items():
        tokens = data[source["start"]:source["end"]]
        padding, nats, size = -len(tokens) % s.block_size, 0.0, min(s.batch_size, 16)
        inputs = F.pad(tokens[:-1], (1, padding), value=EOS).view(-1, s.block_size)
        labels = F.pad(tokens, (0, padding), value=-100).view(-1, s.block_size)  # -100 不计损失
        for x, y in zip(inputs.split(size), labels.split(size), strict=True):
            nats += float(model(x.to(model.device), y.to(model.device))["loss"]) * int((y != -100).sum())
        sums[f"{name}_"] = np.array([nats, len(tokens), source["characters"]])
        sums[""] += sums[f"{name}_"]
    return {f"eval_{name}{metric}": round(float(value), 6) for name, (nats, tokens, chars) in sums.items()
            for metric, value in (("loss", nats / tokens), ("bits_per_char", nats / math.log(2) / chars))}


def generate_samples(model, tokenizer, s):
    """每个开头续写一段，返回 {开头: 整段文字}。"""
    # 温度 0.8 让分数高的更占优；top-p 只在累计概率前 95% 的 token 里抽。训练不用随机数，所以可以在这里定种子
    samples = {}
    torch.manual_seed(s.seed)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True,
                                max_new_tokens=min(64, s.block_size - ids.size(1)), **SAMPLING)
        samples[prompt] = tokenizer.decode(output[0], skip_special_tokens=True)
    return samples


# ==== 6. 训练 ====

# Hugging Face 的 Trainer 替我们做的一步，就是这几行：
#     for micro_batch in 96 // 48 个微批量:          # 显存只放得下 48 块，就分两次算，梯度相加（梯度累积）
#         loss = model(**micro_batch)["loss"] / 2    # 前向；矩阵乘用 bf16（autocast），权重仍是 fp32
#         loss.backward()                            # 反向：每个参数的梯度
#     clip_grad_norm_(model.parameters(), 1.0)       # 梯度的总长度超过 1 就缩到 1：一批坏数据不至于毁掉模型
#     optimizer.step(); optimizer.zero_grad()        # 第 4 节
#     scheduler.step()                               # 下一步的学习率 = 最高学习率 × learning_rate_scale(步数)
#     步数是 10 的倍数就记日志，是 500 的倍数就验证、存检查点
# 有效批量是 96 块 × 1,024 = 98,304 token；微批量只影响显存和速度，不影响结果。

class GPT2Trainer(transformers.Trainer):
    """Trainer，换掉四样：优化器、学习率曲线、验证、日志。想试别的优化器，改 create_optimizer，换一个 --work_dir。"""

    def create_optimizer(self, model=None):
        s = self.settings
        if s.optim != "muon":
            return super().create_optimizer(model)
        groups = parameter_groups(self.model, s.learning_rate, s.muon_learning_rate)
        # fp16 不能用 fused 的 AdamW：溢出时 GradScaler 照样调用它，由它的核跳过；矩阵那一半可不会跳
        self.optimizer = Muon(groups, lr=s.learning_rate, betas=BETAS, fused=s.precision != "fp16")
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: learning_rate_scale(step, num_training_steps))
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        """验证、续写。几个进程时各自算同样的东西，只有 0 号写文件。"""
        s, step, history = self.settings, self.state.global_step, self.state.log_history
        metrics = held_out_loss(self.model.eval(), s)
        loss, bits = metrics["eval_loss"], metrics["eval_bits_per_char"]
        self.log(dict(metrics))
        samples = generate_samples(self.model, self.tokenizer, s)
        for prompt, text in samples.items():
            history.append({"step": step, "prompt": prompt, "text": text, "eval_loss": loss})
        print(f"验证 {step} | loss {loss:.3f} | 每字比特 {bits:.3f} | {samples[PROMPTS[0]][:60]!r}")
        write_samples(s.work_dir, history)
        save_snapshot(self.model, s, step, history)
        self.clock = time.perf_counter(), step  # 验证的时间不算进训练速度
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        """打印一行，同样的数写进 train_log.jsonl；损失成了 NaN 就停下。"""
        s, step, history = self.settings, self.state.global_step, self.state.log_history
        if "loss" in logs:
            # fp16 开头几步梯度溢出是正常的，GradScaler 会跳过那一步，所以只看损失
            if not math.isfinite(logs["loss"] + (s.precision != "fp16" and logs["grad_norm"])):
                fail(f"第 {step} 步的损失是 {logs['loss']}，梯度 {logs['grad_norm']}：发散了，之前的检查点完好。"
                     f"把 --learning_rate {s.learning_rate:g} 减半，加 --fresh 重来")
            seconds, steps = time.perf_counter() - self.clock[0], step - self.clock[1]
            self.clock, speed = (time.perf_counter(), step), steps * s.tokens_per_step / seconds
            elapsed = seconds + max([row.get("elapsed_seconds", 0) for row in history], default=0)
            logs |= {"tokens_per_second": round(speed, 1), "elapsed_seconds": round(elapsed, 2),
                     "mfu": round(speed * s.flops_per_token / 312e12, 4)}  # 占 A100 的 bf16 峰值 312 TFLOP/s 的多少
            print(f"步 {step}/{s.total_steps} | loss {logs['loss']:.2f} | lr {logs['learning_rate']:.1e} | "
                  f"{speed / 1000:.3g}k tok/s | MFU {logs['mfu']:.0%} | "
                  f"剩余 {(s.total_steps - step) / steps * seconds / 60:.1f} 分钟")
        super().log(logs, start_time)
        write_log(s.work_dir, history[-1:], "a")


def build_trainer(s, checkpoint, stop):
    """模型、数据和 Trainer；checkpoint 不是 None 就是接着训练。"""
    model, tracker, callbacks = build_model(s), s.report_to, [stop]
    if s.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if tracker == "swanlab":  # transformers 自带的那个，在 swanlab 0.8 上会崩溃
        from swanlab.integration.transformers import SwanLabCallback
        tracker, callbacks = "none", [stop, SwanLabCallback(project="gpt2-chinese")]
    arguments = transformers.TrainingArguments(
        output_dir=str(s.work_dir / "checkpoints"), max_steps=s.total_steps, seed=s.seed,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.effective_batch_size // (s.batch_size * WORLD_SIZE),
        learning_rate=s.learning_rate, weight_decay=WEIGHT_DECAY, adam_beta2=BETAS[1], max_grad_norm=1.0,
        optim="adamw_torch" if s.optim == "muon" else s.optim, torch_compile=s.compile,
        bf16=s.precision == "bf16", fp16=s.precision == "fp16", tf32=s.tf32 or None,
        use_cpu=s.device == "cpu", dataloader_pin_memory=s.device == "cuda",
        train_sampling_strategy="sequential",  # BlockStream 已经排好次序
        remove_unused_columns=False, ddp_find_unused_parameters=False, disable_tqdm=True, report_to=tracker,
        logging_nan_inf_filter=False,  # True 会让每个微批量都等 GPU 一次
        logging_steps=s.logging_steps, logging_first_step=True,
        eval_strategy="steps", eval_steps=s.eval_steps, eval_on_start=checkpoint is None,
        save_strategy="steps", save_steps=s.eval_steps, save_total_limit=2)
    packed, length = s.work_dir / "packed", s.total_steps * s.effective_batch_size
    trainer = GPT2Trainer(
        model, arguments, train_dataset=BlockStream(packed / "train.bin", s.block_size, length, s.seed),
        eval_dataset=packed / "eval.bin", data_collator=lambda batch: batch, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # 每块一样长，损失取平均就对；梯度累积由 Trainer 除
    # 分词器不走 processing_class：那样 Trainer 会给模型设上 pad_token_id
    trainer.tokenizer = transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer")
    trainer.settings, trainer.clock = s, (time.perf_counter(), step_of(checkpoint))
    return trainer


def train(s, checkpoint, stop):
    """训练到底，或被叫停；返回 trainer。显存不够就把微批量减半、累积加倍（结果不变），从最新的检查点接着来。"""
    while True:
        for path in [*s.work_dir.glob("checkpoints/checkpoint-*"), *s.work_dir.glob("snapshots/step-*")]:
            if RANK == 0 and step_of(path) > step_of(checkpoint):  # 坏了的，或 --fresh 不要了的
                shutil.rmtree(path)
        trainer = build_trainer(s, checkpoint, stop)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            return trainer
        except torch.OutOfMemoryError:
            if s.batch_size % 2 or WORLD_SIZE > 1:  # 几个进程时只有一个减半，别的会永远等它
                sys.exit(f"错误：显存放不下微批量 {s.batch_size}。减半 --batch_size 再跑（结果不变），"
                         f"或加 --gradient_checkpointing")
        trainer = None  # 放掉显存
        torch.cuda.empty_cache()
        s.batch_size, checkpoint = s.batch_size // 2, newest_checkpoint(s.work_dir)
        print(f"显存不够：微批量减到 {s.batch_size}，梯度累积加倍，从第 {step_of(checkpoint)} 步接着训练")


# ==== 7. 主程序 ====

def main():
    if RANK:  # 几个进程时只有 0 号说话；它出错时，torchrun 用 SIGTERM 叫停等着的进程
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if WORLD_SIZE == 1:  # 有几张显卡时，Trainer 会用很慢的 DataParallel：只给它看第一张
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.get_logger("transformers.trainer").addFilter(  # 检查点里本来就没有：与词向量共用
        lambda record: "lm_head.weight" not in record.getMessage())
    s = read_settings()
    choose_speed(s)
    checkpoint = None if s.fresh else newest_checkpoint(s.work_dir)
    s.work_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(s.work_dir / ".lock", timeout=0)  # 一个工作目录只许一个训练
    if RANK == 0:
        lock.acquire()
        prepare(s, checkpoint)
        pack(s)
    accelerate.PartialState(cpu=s.device == "cpu", timeout=timedelta(days=1))  # 别的进程在这里等 0 号
    if s.prepare_only:
        return print("数据准备好了。去掉 --prepare_only 再跑一次就开始训练")
    derive(s)
    if checkpoint:
        print(f"从第 {step_of(checkpoint)} 步接着训练")
    elif RANK == 0:
        write_json(s.work_dir / "config.json", vars(s))
    if s.device == "cpu" and sys.platform == "linux":  # glibc 一释放内存就还给系统，再要时逐页清零：慢两成
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 1 << 30)
    stop = StopRequest(s)
    trainer = train(s, checkpoint, stop)
    if RANK:  # 不经过解释器的收尾：gloo 的线程有时会在那里卡住（torch 2.13）
        os._exit(0)
    if trainer.state.global_step < s.total_steps:
        print(f"停在第 {trainer.state.global_step} 步，检查点已存好。接着训练：同一条命令（不要 --fresh）再跑一次")
        code = 128 + stop.reason if stop.reason > 1 else 0
        sys.exit(code) if WORLD_SIZE == 1 else os._exit(code)
    save_final_model(s.work_dir, trainer.model, trainer.tokenizer)


def save_final_model(work_dir, model, tokenizer):
    """写 final_model/，再画曲线。"""
    model.__class__ = transformers.GPT2LMHeadModel  # 换回原版的类：别人不需要这个脚本就能加载
    model.config.use_cache, model.config.pad_token_id = True, PAD
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=min(100, model.config.n_positions // 2), bos_token_id=BOS, **SAMPLING)
    model.save_pretrained(work_dir / "final_model")
    tokenizer.save_pretrained(work_dir / "final_model")
    if (plot := Path(__file__).with_name("plot_loss.py")).exists():
        subprocess.run([sys.executable, plot, work_dir, "--output", work_dir / "loss_curve.png"])
    print(f"完成。模型在 {work_dir / 'final_model'}，续写在 {work_dir / 'generation_samples.md'}")


# ==== 8. 防错与落盘（初学可以跳过）====

def fail(message):
    """使用者能改正的错误：0 号进程打印一行，退出码 1。"""
    sys.exit(f"错误：{message}" if RANK == 0 else 1)


def run_script(name, output, *arguments):
    """运行旁边的脚本，它写 output；它失败就跟着退出（它自己已经打印了那一行错误）。"""
    script = Path(__file__).with_name(name)
    if not script.exists():
        fail(f"缺少 {name}：请把它放在 {Path(__file__).name} 旁边，或先准备好 {output}")
    with filelock.FileLock(output.with_name(f".{output.name}.lock")):
        print(f"── 运行 {name}")  # 上次的训练被强行杀掉时，它的子进程可能还在写：拿到锁才是写完了
    command = [sys.executable, script, "--output_dir", output, *map(str, arguments)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest_checkpoint(work_dir):
    """最新的完整检查点；没有则 None。截断的文件只有真的读一遍才知道。"""
    for path in sorted((work_dir / "checkpoints").glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            safetensors.torch.load_file(path / "model.safetensors")
            files = path / "optimizer.pt", path / "scheduler.pt", min(path.glob("rng_state*.pth"))
            if any(zipfile.ZipFile(file).testzip() for file in files):
                raise zipfile.BadZipFile
            return path
        except (OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
            print(f"跳过不完整的检查点 {path}（{type(error).__name__}）")


# 日志和续写都在 Trainer 的 log_history 里，随检查点存取。所以续训时照它重写，每一步恰好一份

def write_jsonl(path, rows, mode="w"):
    with open(os.devnull if RANK else path, mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_log(work_dir, history, mode="w"):
    rows = [row for row in history if "loss" in row or "eval_bits_per_char" in row]
    rows = [{"step": row["step"]} | {name: value for name, value in row.items()  # JSON 里没有无穷
                                     if name != "epoch" and math.isfinite(value)} for row in rows]
    write_jsonl(work_dir / "train_log.jsonl", rows, mode)


def write_samples(work_dir, history):
    names, table = ("step", "prompt", "text", "eval_loss"), "| 步 | 验证损失 | 续写 |\n|---:|---:|---|\n"
    rows = [{name: row[name] for name in names} for row in history if "prompt" in row]
    write_jsonl(work_dir / "samples.jsonl", rows)
    for step, prompt, text, loss in map(dict.values, rows):
        rest = " ⏎ ".join(text.removeprefix(prompt).replace("|", "\\|").splitlines())
        table += f"| {step} | {loss:.3f} | **{prompt}**{rest} |\n"
    if RANK == 0:
        (work_dir / "generation_samples.md").write_text(table, encoding="utf-8")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, default=str), encoding="utf-8")


def save_snapshot(model, s, step, history):
    """第 0、100、200、500、1,000、2,000、5,000……步和最后一步，把权重（bf16）留一份，旁边是最近一次验证的结果。"""
    wanted = step in (0, s.total_steps) or re.fullmatch("[125]0{2,}", str(step))
    if RANK == 0 and s.snapshots and wanted:
        folder = s.work_dir / "snapshots" / f"step-{step}"
        weights = {name: p.bfloat16() for name, p in model.named_parameters()}  # 共用的输出层不重复存
        model.save_pretrained(folder, state_dict=weights)
        metrics = next(row for row in reversed(history) if "eval_bits_per_char" in row)
        write_json(folder / "snapshot.json", metrics | {
            "eval_step": metrics["step"], "step": step, "tokens": step * s.tokens_per_step})


def check_disk(folder, need):
    if (free := shutil.disk_usage(folder).free) < need:
        fail(f"{folder} 的磁盘不够：剩 {free >> 20:,} MB，要 {need >> 20:,} MB；清出空间再跑同一条命令，或加 --no-snapshots")


class StopRequest(transformers.TrainerCallback):
    """Ctrl-C、SIGTERM（reason 是信号的编号）或 --max_hours（reason 是 1）：做完这一步，存好检查点再停。"""

    def __init__(self, s):
        self.settings, self.asked, self.reason = s, 0, 0
        self.deadline = START + 3600 * 0.99 * (s.max_hours or math.inf)  # 留 1% 存盘
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self.request)

    def request(self, which, frame):
        print("收到停止信号：做完这一步就存检查点（再按一次立即停）")
        self.asked = which  # 不能直接写进 reason：正在商量的那一步会把它盖掉
        signal.signal(which, lambda *_: sys.exit(128 + which))

    def on_train_begin(self, args, state, control, **kwargs):
        write_log(self.settings.work_dir, state.log_history)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        save_snapshot(model, self.settings, state.global_step, state.log_history)
        if WORLD_SIZE == 1 or state.global_step % args.logging_steps == 0:  # 几个进程要停在同一步
            late = time.time() > self.deadline
            self.reason = max(accelerate.utils.gather_object([self.asked or int(late)]))
            control.should_training_stop |= self.reason > 0
            control.should_save |= self.reason > 0
        if control.should_save:  # 检查点每个参数 12 字节，最终模型 4 字节
            check_disk(args.output_dir, 16 * self.settings.parameters)


def read_report(folder, name="report.json"):
    """读一个做好的文件夹的说明；还没有、缺文件或文件大小不对，都返回 {}。"""
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
        return report if sizes == report["files"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run(main):
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行；没有料到的错误照样给出 traceback。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        busy, full = isinstance(error, filelock.Timeout), error.errno == 28
        reason = "另一个进程正在写这里" if busy else "磁盘写满了" if full else "读写文件失败"
        sys.exit(f"错误：{reason}（{error}）；{'清出空间' if full else '等它结束，或检查路径和权限'}，再跑同一条命令")


if __name__ == "__main__":
    run(main)
