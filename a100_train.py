#!/usr/bin/env python3
"""第 3 步：从零训练一个中文 GPT-2（82.1 M 参数：8 层 × 768 维，12 个头，词表 32,000，上下文 1,024）。

读 corpus/ 和 tokenizer/（没有就自动运行前两步），写 final_model/、loss_curve.png、generation_samples.md。

    python a100_train.py --preset demo           # 演示：没有显卡也行，几分钟
    python a100_train.py                         # 完整训练，一张 A100；加 --prepare_only 只准备数据
    torchrun --nproc_per_node=2 a100_train.py    # 两张卡
演示在 2 核 Intel Xeon 上 110 秒，每字比特 5.72（2026-11-24）；显卡上未测。
中断了，同一条命令再跑，从最近的检查点（每 500 步）接着，结果不变。第 8 节初学可以不看。
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
from contextlib import suppress
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

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
START = time.time()
PAD, BOS, EOS = 0, 2, 3
PROMPTS = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=EOS, pad_token_id=PAD)

# ==== 1. 设置 ====

def int_or_auto(text):
    return text if text == "auto" else int(text)

HOME = Path("/root/autodl-tmp" if os.path.isdir("/root/autodl-tmp") else "") / "gpt2-chinese"
SWITCH = argparse.BooleanOptionalAction  # --compile 打开，--no-compile 关上，不写是自动
# 名字、类型、说明、完整训练的默认值、演示的默认值（不写就相同）
SETTINGS = [
    ("work_dir", Path, "输出到哪里", HOME),
    ("corpus", list, "wiki zhihu demo 或 [名字=]路径", ["wiki", "zhihu"], ["demo"]),
    ("vocab_size", int, "词表 V：几种 token", 32_000, 4_500),
    ("n_layer", int, "层数 L", 8, 2),
    ("n_embd", int, "向量的维数 C", 768, 128),
    ("n_head", int, "注意力的头数", 12, 4),
    ("block_size", int, "上下文 T：一块几个 token", 1024, 64),
    ("batch_size", int_or_auto, "微批量：一次算几块，或 auto", 48, 32),
    ("effective_batch_size", int, "有效批量：更新一次看几块", 96, 32),
    ("epochs", float, "把语料读几遍", 2.0, 1.0),
    ("max_steps", int, "更新几次（0：看 epochs）", 0, 1350),
    ("max_hours", float, "这么久就存好停下，下次接着来", None),
    ("learning_rate", float, "最高学习率（Muon 时，矩阵以外的）", None),
    ("muon_learning_rate", float, "矩阵的最高学习率（Muon）", 0.025, 0.02),
    ("seed", int, "随机种子", 42),
    ("device", str, "cuda、cpu、mps（未测）", "auto"),
    ("precision", str, "矩阵乘用 bf16、fp16、fp32", "auto"),
    ("attn", str, "flash_attention_2、sdpa、eager", "auto"),
    ("optim", str, "muon、adamw_torch_fused、adamw_torch、adamw_bnb_8bit", "auto"),
    ("compile", SWITCH, "torch.compile：融合小运算", None),
    ("tf32", SWITCH, "fp32 的矩阵乘只算 19 位；bf16 时用不上", None),
    ("liger", SWITCH, "融合的交叉熵：省显存", False),
    ("gradient_checkpointing", SWITCH, "反向时重算激活：省显存，多算三分之一", False),
    ("logging_steps", int, "几步一行日志", 10),
    ("eval_steps", int, "几步验证、存检查点一次", 500, 225),
    ("snapshots", SWITCH, "途中留几份模型", True),
    ("report_to", str, "tensorboard、swanlab、trackio、wandb", "none"),
    ("prepare_only", SWITCH, "只准备数据", False),
    ("fresh", SWITCH, "从头训练", False),
]
# learning_rate 的默认值：(Muon, 只用 AdamW)；由来见 results/recipe/README.md
LEARNING_RATES = {"full": (3e-3, 3e-4), "demo": (1.6e-2, 3e-3)}
WARMUP, WEIGHT_DECAY, BETAS = 0.05, 0.1, (0.9, 0.95)
# 改了就不能接着旧的检查点训练
RECIPE = ["key", "n_layer", "n_embd", "n_head", "block_size", "effective_batch_size", "epochs", "max_steps",
          "optim", "learning_rate", "muon_learning_rate", "seed"]

def read_settings():
    """命令行和 SETTINGS -> 一个对象 s：s.n_layer 是层数，等等；s.given 是写明了的。"""
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="python a100_train.py [--设置 值 ……]")
    parser.add_argument("--preset", choices=["full", "demo"], default="full", help="完整训练（默认）或演示")
    kinds = {SWITCH: {"action": SWITCH}, list: {"action": "extend", "nargs": "+"}}
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
            fail(f"--{name} 是 {value}；要大于 0 的数")
    if s.n_embd % s.n_head:
        fail(f"--n_embd {s.n_embd} 不是 --n_head {s.n_head} 的整数倍")
    if s.effective_batch_size % (s.batch_size * WORLD_SIZE):
        fail(f"--effective_batch_size {s.effective_batch_size} 不是 --batch_size {s.batch_size} × "
             f"{WORLD_SIZE} 个进程的整数倍")
    return s

def choose_speed(s):
    """把 auto 换成这台机器上最快而可靠的；写明了却办不到的，报错。"""
    # A100（计算能力 8.0）有 bf16、TF32、FlashAttention；T4（7.5）用 fp16。bf16 的范围同 fp32，位数少；fp16 超过
    # 65,504 就溢出，要 GradScaler 跳过那一步。FlashAttention 分块算注意力，不存 T × T 的矩阵；SDPA 里也有它
    find = importlib.util.find_spec
    cuda, flash = torch.cuda.is_available() and s.device in ("auto", "cuda"), bool(find("flash_attn"))
    capability = torch.cuda.get_device_capability() if cuda else (0, 0)
    ampere, compiler = capability >= (8, 0), bool(shutil.which("g++") and (find("triton") or not cuda))
    trusted = not torch.__version__.startswith("2.10.")  # 它的 compile 在 A100 上出过 NaN
    possible = {  # 办得到的值，最好的在前
        "device": ["cuda"] * cuda + ["cpu"] + ["mps"] * torch.backends.mps.is_available(),
        "precision": ["bf16"] * ampere + ["fp16"] * cuda + ["fp32"],
        "attn": ["flash_attention_2"] * (ampere and flash and s.precision != "fp32") + ["sdpa", "eager"],
        "optim": ["muon", "adamw_torch_fused", "adamw_torch",
                  *["adamw_bnb_8bit"] * bool(find("bitsandbytes"))],
        "compile": [True] * (ampere and compiler and trusted) + [False] + [True] * compiler,
        "tf32": [True] * ampere + [False], "liger": [False] + [True] * bool(cuda and find("liger_kernel")),
        "report_to": ["none", *filter(find, ("tensorboard", "swanlab", "trackio", "wandb"))]}
    for name, values in possible.items():
        wanted = vars(s)[name]
        vars(s)[name] = values[0] if wanted in ("auto", None) else wanted
        if vars(s)[name] not in values:
            fail(f"--{name} {wanted} 在这里办不到，缺显卡、软件包或编译器；可以是 {values}")
    s.learning_rate = s.learning_rate or LEARNING_RATES[s.preset][s.optim != "muon"]
    if cuda:
        print(f"计算能力 {capability}，torch {torch.__version__}，{'有' if flash else '没有'} flash-attn 包")
    elif s.preset == "full" and not {"max_steps", "device", "prepare_only"} & set(s.given):
        fail("没有 CUDA 显卡，CPU 要几个月。演示：--preset demo；只准备数据：--prepare_only；硬要用：--device cpu")

def derive(s):
    vars(s).update(read_report(s.work_dir / "packed", "meta.json"))
    s.n_blocks = s.train_tokens // s.block_size
    if s.n_blocks < 1:
        fail(f"--block_size {s.block_size} 比整个语料（{s.train_tokens} token）还大；改小它，或多加语料")
    s.tokens_per_step = s.effective_batch_size * s.block_size  # 96 × 1,024 = 98,304
    s.steps_per_epoch = s.n_blocks / s.effective_batch_size
    s.total_steps = s.max_steps or math.ceil(s.epochs * s.steps_per_epoch)
    per_layer = 12 * s.n_embd**2 + 13 * s.n_embd
    s.parameters = (s.vocab_size + s.block_size) * s.n_embd + s.n_layer * per_layer + 2 * s.n_embd
    # PaLM 论文附录 B：每个参数 6 次浮点运算（前向 2，反向 4；位置向量不算），另加注意力
    s.flops_per_token = 6 * s.parameters + (12 * s.n_layer - 6) * s.block_size * s.n_embd
    s.device_name = torch.cuda.get_device_name() if s.device == "cuda" else s.device
    print(f"{s.device_name}，{s.precision}，{s.attn}，{s.optim}，compile {s.compile}，{s.parameters:,} 参数，"
          f"{s.train_tokens:,} token，每步 {s.tokens_per_step:,}，共 {s.total_steps:,} 步")

# ==== 2. 数据：文字 → token → 块 ====

# token 是模型读写的单位：分词器（第 2 步）把文字切成词块，每块一个编号。全部文档的 token 首尾相接，切成每
# block_size 个一块，一块是一个样本：没有填充，不浪费。

def prepare(s, checkpoint):
    """缺语料或分词器，就运行前两步。有 checkpoint 而数据或设置变了，就报错，什么也不动。"""
    corpus, tokenizer, config = (s.work_dir / name for name in ("corpus", "tokenizer", "config.json"))
    flag = "--no-rebuild" if checkpoint else "--rebuild"
    made = read_report(corpus).get("corpus")
    if "corpus" in s.given or made in (None, ["demo"]) and made != s.corpus:  # 演示的不能用于完整训练
        run_script("prepare_corpus.py", corpus, flag, "--corpus", *s.corpus)
    corpus_hash, old = read_report(corpus)["corpus_hash"], read_report(tokenizer)
    if old.get("corpus_hash") != corpus_hash or "vocab_size" in s.given and old["vocab_size"] != s.vocab_size:
        run_script("train_tokenizer.py", tokenizer, flag,
                   "--corpus_dir", corpus, "--vocab_size", s.vocab_size)
    s.key = [corpus_hash, read_report(tokenizer)["key"]]
    old = json.loads(config.read_text(encoding="utf-8")) if checkpoint else vars(s)
    for name in RECIPE:
        if old.get(name) != vars(s)[name]:
            fail(f"{name} 原来是 {old.get(name)}，现在是 {vars(s)[name]}：改回去，或换 --work_dir，或加 --fresh")

def encode(sp, texts):
    """一批文档 -> 一维 uint16 数组。每篇后面跟一个 </s>：模型由它学会一篇在哪里结束。"""
    ids = sp.encode(texts, add_eos=True, num_threads=os.cpu_count(), return_type="numpy")
    return np.concatenate(ids).astype(np.uint16)

def pack(s):
    """语料编码成 packed/train.bin 和 eval.bin（按来源排）。6 亿 token，各 2 字节，是 1.2 GB。"""
    corpus, packed, counts, sources = s.work_dir / "corpus", s.work_dir / "packed", 0, {}
    if read_report(packed, "meta.json").get("key") == s.key:
        return print(f"数据没有变，沿用 {packed}")
    packed.mkdir(exist_ok=True)
    (packed / "meta.json").unlink(missing_ok=True)  # 最后才写：没有它不算数
    sp = spm.SentencePieceProcessor(model_file=str(s.work_dir / "tokenizer" / "sentencepiece.model"))
    with open(packed / "train.bin", "wb") as file:
        for path in sorted(corpus.glob("train-*.parquet")):
            for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(2000):
                file.write(tokens := encode(sp, batch["text"].to_pylist()))
                counts += np.bincount(tokens, minlength=sp.get_piece_size())
    held_out = pq.read_table(sorted(corpus.glob("eval-*.parquet")), partitioning=None).to_pandas()
    with open(packed / "eval.bin", "wb") as file:
        for name, texts in held_out.groupby("source")["text"]:
            start = file.tell() // 2
            file.write(encode(sp, texts.tolist()))
            sources[name] = {"start": start, "end": file.tell() // 2, "characters": sum(map(len, texts))}
    share = counts[counts > 0] / counts.sum()
    write_json(packed / "meta.json", {
        "key": s.key, "vocab_size": len(counts), "train_tokens": int(counts.sum()), "eval_sources": sources,
        "unigram_entropy": float(-(share * np.log(share)).sum()),
        "files": {name: (packed / name).stat().st_size for name in ("train.bin", "eval.bin")}})

class BlockStream(torch.utils.data.Dataset):
    """整个训练要用的块，每一遍重新打乱；次序与微批量、进程数无关，换一张小卡续训也不变。"""

    def __init__(self, path, block_size, length, seed):
        self.data, self.size = np.memmap(path, np.uint16, "r"), block_size
        n_blocks = len(self.data) // block_size  # 只丢掉末尾不满一块的
        self.order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n_blocks)
                                     for epoch in range(math.ceil(length / n_blocks))])[:length]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        """{"input_ids", "labels"}，形状都是 (T,)；labels 是每个位置的下一个 token。"""
        start = self.order[index] * self.size
        tokens = np.append(self.data[start:start + self.size + 1].astype(np.int64), -100)  # -100 不计损失
        return {"input_ids": tokens[:self.size], "labels": tokens[1:self.size + 1]}

# ==== 3. 模型：GPT-2 ====

# token → 词向量 + 位置向量 (B, T, C) → L 层 → LayerNorm → 与每个词向量比对，得到每种 token 的分数 (B, T, V)。
# 每层两步，结果都加回去（残差）：注意力从前面的位置取信息，MLP 在各个位置上加工。参数：
#   词向量 V·C = 24,576,000（输出层与它共用），位置向量 T·C = 786,432，最后的 LayerNorm 2·C = 1,536
#   每层 12·C² + 13·C = 7,087,872：q、k、v 3C²，注意力的输出 C²，MLP 的 C → 4C → C 8C²，其余是偏置和 LayerNorm
#   24,576,000 + 786,432 + 8 × 7,087,872 + 1,536 = 82,066,944
# 每个位置都预测下一个 token，损失是 -ln(正确答案的概率) 的平均，单位 nat。什么都没学时概率都是 1/V，损失是
# ln 32,000 = 10.37（演示 ln 4,500 = 8.41）：第一行日志应当接近它。

class GPT2(transformers.GPT2LMHeadModel):
    """transformers 的 GPT-2，只是给了 labels（错开一位的 input_ids，(B, T)）就只返回损失。"""

    _keys_to_ignore_on_save = ["lm_head.weight"]  # 与词向量共用
    # 原版还返回 logits，fp32 的一份就是 48 × 1,024 × 32,000 × 4 字节 = 6.3 GB
    def forward(self, input_ids=None, labels=None, **kwargs):
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.transformer(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)  # (B·T, C)
        if self.liger:  # 不产生 (B·T, V) 的 logits
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
            return {"loss": fused(hidden, self.lm_head.weight.to(hidden.dtype), labels.flatten())}
        return {"loss": F.cross_entropy(self.lm_head(hidden).float(), labels.flatten())}

def build_model(s):
    # compile 时 "sdpa" 会造 T × T 的掩码，用不上 FlashAttention；换个名字，就只传 is_causal（只看前面）
    attention = transformers.AttentionInterface()
    attention.register("sdpa_causal", attention["sdpa"])
    torch.manual_seed(s.seed)
    model = GPT2(transformers.GPT2Config(
        n_layer=s.n_layer, n_embd=s.n_embd, n_head=s.n_head, vocab_size=s.vocab_size,
        n_positions=s.block_size, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=None,  # 有的话，每次前向 GPU 都要停下来查
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,  # 文字只读一两遍，不用 dropout
        attn_implementation="sdpa_causal" if s.attn == "sdpa" else s.attn))
    model.liger = s.liger
    return model

# ==== 4. 优化器与学习率 ====

# 一步：参数 -= 学习率 × 方向。AdamW 给每个数各定步长，记两份历史（梯度和梯度平方的平均）。
# Muon（Keller Jordan 等，2024）看整个矩阵：梯度往往集中在几个方向上，把它正交化（奇异值都变成 1），各方向就走得一样
# 远；只记一份动量。词向量每行各管一个 token，偏置和 LayerNorm 是向量，没有这样的方向，仍用 AdamW。
# 8 位 AdamW（adamw_bnb_8bit）的历史每个数 1 字节：0.66 GB 减到 0.32 GB（词向量仍是 4 字节）。

def orthogonalize(matrix):
    """Newton–Schulz 迭代：(k, m, n) 的 k 个矩阵，奇异值都变成约 1。系数来自 Jordan。"""
    x = matrix.float() / (matrix.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.half() if x.is_cuda else x  # 都不超过 1
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrix.dtype)

class Muon(torch.optim.AdamW):
    """split > 0 的参数组是矩阵，走正交化的动量；其余的由 AdamW。"""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["split"] else []:  # (输入, 输出)；c_attn 是并排的 q、k、v，(C, 3C)
                state, lr = self.state[p], group["lr"]
                if not state:  # AdamW 读检查点时，要每个参数都有 step
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
                state["momentum"].lerp_(p.grad, 0.05)  # 动量：旧的占 95%
                update = p.grad.lerp(state["momentum"], 0.95)  # Nesterov
                parts = orthogonalize(torch.stack(update.chunk(group["split"], dim=1)))
                scale = max(1, parts.size(2) / parts.size(1)) ** 0.5  # C → 4C 的，步子放大 √4 倍
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(torch.cat(parts.unbind(), dim=1), alpha=lr * scale)
                p.grad = None  # 没有梯度的，AdamW 不动
        super().step(closure)

def parameter_groups(model, adamw_lr, muon_lr):
    """四组：词向量和位置向量；偏置和 LayerNorm（不衰减）；c_attn；其余的矩阵。"""
    groups = {}
    for name, p in model.named_parameters():
        split = (3 if "c_attn" in name else 1) if p.ndim == 2 and ".h." in name else 0
        groups.setdefault((split, WEIGHT_DECAY if p.ndim == 2 else 0.0), []).append(p)
    return [{"params": params, "split": split, "weight_decay": decay,
             "lr": muon_lr if split else adamw_lr} for (split, decay), params in groups.items()]

def learning_rate_scale(step, total_steps):
    """第 step 步（从 0 数）是最高学习率的几分之几：先线性升到 1（预热），再线性降到 0。"""
    # 开头的梯度又大又乱，要小步走；最后步子越走越细，损失还会再降一截。
    # 共 11,838 步，预热 592 步，第 1,000 步是 (11,838 - 1,000) / (11,838 - 592) = 0.964：
    # 矩阵的学习率 0.025 × 0.964 = 0.0241，其余的 3e-3 × 0.964 = 2.9e-3
    warmup_steps = round(WARMUP * total_steps)
    return min((step + 1) / max(1, warmup_steps), (total_steps - step) / max(1, total_steps - warmup_steps))

# ==== 5. 评估与续写 ====

@torch.no_grad()
def held_out_loss(model, s):
    """每个来源的每个 token（包括 </s>）恰好预测一次。返回 {"eval_loss", "eval_bits_per_char", ……}。"""
    # 损失是 nat/token，换了词表就不能比。每字比特 = 总 nat ÷ ln 2 ÷ 总字数：照它压缩，一个字占多少比特
    data = np.fromfile(s.work_dir / "packed" / "eval.bin", np.uint16).astype(np.int64)
    sums = {"": np.zeros(3)}
    for name, source in s.eval_sources.items():
        tokens = torch.from_numpy(data[source["start"]:source["end"]])
        padding, nats, size = -len(tokens) % s.block_size, 0.0, min(s.batch_size, 16)
        inputs = F.pad(tokens[:-1], (1, padding), value=EOS).view(-1, s.block_size)
        labels = F.pad(tokens, (0, padding), value=-100).view(-1, s.block_size)
        for x, y in zip(inputs.split(size), labels.split(size), strict=True):
            nats += float(model(x.to(model.device), y.to(model.device))["loss"]) * int((y != -100).sum())
        sums[f"{name}_"] = np.array([nats, len(tokens), source["characters"]])
        sums[""] += sums[f"{name}_"]
    return {f"eval_{name}{metric}": round(float(value), 6) for name, (nats, tokens, chars) in sums.items()
            for metric, value in (("loss", nats / tokens), ("bits_per_char", nats / math.log(2) / chars))}

def generate_samples(model, tokenizer, s):
    samples = {}  # 温度 0.8 让分数高的更占优；top-p 只在概率最大、合计 95% 的 token 里抽
    torch.manual_seed(s.seed)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = min(64, s.block_size - ids.size(1))
        output = model.generate(ids, max_new_tokens=length, use_cache=True, **SAMPLING)
        samples[prompt] = tokenizer.decode(output[0], skip_special_tokens=True)
    return samples

# ==== 6. 训练 ====

# Trainer 替我们做的一步：
#     for micro_batch in 96 // 48 个微批量:       # 显存只放得下 48 块，就分两次算，梯度相加（梯度累积）
#         loss = model(**micro_batch)["loss"] / 2 # 前向；矩阵乘用 bf16（autocast），权重仍是 fp32
#         loss.backward()                         # 反向：每个参数的梯度
#     clip_grad_norm_(model.parameters(), 1.0)    # 梯度总长超过 1 就缩到 1：一批坏数据毁不了模型
#     optimizer.step(); optimizer.zero_grad()     # 第 4 节
#     scheduler.step()                            # 下一步的学习率 = 最高学习率 × learning_rate_scale(步数)
#     步数是 10 的倍数就记日志，是 500 的倍数就验证、存检查点
# 微批量只影响显存和速度，不影响结果。

class GPT2Trainer(transformers.Trainer):
    """换掉优化器、学习率、验证、日志。想试别的优化器，改 create_optimizer，换 --work_dir。"""

    def create_optimizer(self, model=None):
        s = self.settings
        if s.optim != "muon":
            return super().create_optimizer(model)
        groups = parameter_groups(self.model, s.learning_rate, s.muon_learning_rate)
        fused = s.precision != "fp16"  # 溢出时，fused 的 AdamW 在核里跳过，矩阵那一半可不会跳
        self.optimizer = Muon(groups, betas=BETAS, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_scale(step, num_training_steps))
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        s, step, history = self.settings, self.state.global_step, self.state.log_history
        metrics = held_out_loss(self.model.eval(), s)
        loss, bits = metrics["eval_loss"], metrics["eval_bits_per_char"]
        for prompt, text in generate_samples(self.model, self.tokenizer, s).items():
            history.append({"eval_loss": loss, "prompt": prompt, "step": step, "text": text})
        self.log(dict(metrics))
        print(f"验证 {step} | loss {loss:.3f} | 每字比特 {bits:.3f} | {text[:60]!r}")
        save_snapshot(self.model, s, step, history)
        self.clock = time.perf_counter(), step  # 验证不计时
        self.control.should_evaluate = False
        return metrics

    def log(self, logs, start_time=None):
        s, step, history = self.settings, self.state.global_step, self.state.log_history
        if "loss" in logs:
            # fp16 开头几步梯度溢出是正常的，GradScaler 会跳过
            if not math.isfinite(logs["loss"] + (s.precision != "fp16" and logs["grad_norm"])):
                fail(f"第 {step} 步的损失是 {logs['loss']}，梯度 {logs['grad_norm']}，发散了（检查点完好）："
                     f"减半 --learning_rate {s.learning_rate:g}，加 --fresh 重来")
            seconds, steps = time.perf_counter() - self.clock[0], step - self.clock[1]
            self.clock, speed = (time.perf_counter(), step), steps * s.tokens_per_step / seconds
            elapsed = seconds + max([row.get("elapsed_seconds", 0) for row in history], default=0)
            logs |= {"tokens_per_second": round(speed, 1), "elapsed_seconds": round(elapsed, 2),
                     "mfu": round(speed * s.flops_per_token / 312e12, 4)}  # A100 的峰值 312 TFLOP/s
            left = (s.total_steps - step) / steps * seconds / 60
            print(f"步 {step}/{s.total_steps} | loss {logs['loss']:.2f} | lr {logs['learning_rate']:.1e} | "
                  f"{speed / 1000:.3g}k tok/s | MFU {logs['mfu']:.0%} | 剩余 {left:.1f} 分钟")
        super().log(logs, start_time)
        if RANK == 0:
            write_history(s.work_dir, history)

def build_trainer(s, checkpoint, stop):
    arguments = transformers.TrainingArguments(
        output_dir=s.work_dir / "checkpoints", max_steps=s.total_steps,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.effective_batch_size // (s.batch_size * WORLD_SIZE),
        learning_rate=s.learning_rate, weight_decay=WEIGHT_DECAY, adam_beta2=BETAS[1],
        optim="adamw_torch" if s.optim == "muon" else s.optim, torch_compile=s.compile,
        bf16=s.precision == "bf16", fp16=s.precision == "fp16", tf32=s.tf32,
        activation_checkpointing=s.gradient_checkpointing, use_cpu=s.device == "cpu",
        dataloader_pin_memory=s.device == "cuda", train_sampling_strategy="sequential",  # 次序已排好
        logging_nan_inf_filter=False,  # 否则每个微批量都要等 GPU
        logging_steps=s.logging_steps, logging_first_step=True, disable_tqdm=True, report_to=s.report_to,
        eval_strategy="steps", eval_steps=s.eval_steps, eval_on_start=checkpoint is None,
        save_steps=s.eval_steps, save_total_limit=2, ddp_find_unused_parameters=False)
    packed, length = s.work_dir / "packed", s.total_steps * s.effective_batch_size
    blocks = BlockStream(packed / "train.bin", s.block_size, length, s.seed)
    trainer = GPT2Trainer(build_model(s), arguments, train_dataset=blocks, eval_dataset=packed / "eval.bin",
                          callbacks=[stop])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # 每块一样长，损失取平均就对
    trainer.tokenizer = transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer")
    trainer.settings, trainer.clock = s, (time.perf_counter(), step_of(checkpoint))
    return trainer

def train(s, checkpoint, stop):
    """训练到底，或被叫停。显存不够就微批量减半、累积加倍，结果不变。"""
    while True:
        for path in [*s.work_dir.glob("checkpoints/checkpoint-*"), *s.work_dir.glob("snapshots/step-*")]:
            if RANK == 0 and step_of(path) > step_of(checkpoint):  # 坏了的，或 --fresh
                shutil.rmtree(path)
        trainer = build_trainer(s, checkpoint, stop)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            return trainer
        except torch.OutOfMemoryError:
            if s.batch_size % 2 or WORLD_SIZE > 1:  # 只有一个进程减半，别的会永远等它
                sys.exit(f"错误：显存放不下微批量 {s.batch_size}：减小 --batch_size，或加 --gradient_checkpointing")
        del trainer
        s.batch_size, checkpoint = s.batch_size // 2, newest_checkpoint(s.work_dir)
        print(f"显存不够：微批量减到 {s.batch_size}，累积加倍，从第 {step_of(checkpoint)} 步接着训练")

# ==== 7. 主程序 ====

def main():
    if RANK:  # 只有 0 号说话；它出错时，torchrun 用 SIGTERM 叫停别的
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if WORLD_SIZE == 1:  # 看见几张显卡，Trainer 会用很慢的 DataParallel
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    transformers.utils.logging.disable_progress_bar()
    s = read_settings()
    choose_speed(s)
    checkpoint = None if s.fresh else newest_checkpoint(s.work_dir)
    s.work_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(s.work_dir / ".lock")
    if RANK == 0:
        lock.acquire(timeout=0)
        prepare(s, checkpoint)
        pack(s)
    accelerate.PartialState(cpu=s.device == "cpu", timeout=timedelta(days=1)).wait_for_everyone()  # 等 0 号
    if s.prepare_only:
        return print("数据准备好了；去掉 --prepare_only 就训练")
    derive(s)
    check_disk(s, s.parameters * (16 if checkpoint else 40 + 24 * s.snapshots))  # 3 个检查点，模型，12 个快照
    if checkpoint:
        print(f"从第 {step_of(checkpoint)} 步接着训练")
    elif RANK == 0:
        write_json(s.work_dir / "config.json", vars(s))
    if s.device == "cpu" and sys.platform == "linux":  # 不还内存给系统：再要时逐页清零，慢两成
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 1 << 30)
    if s.report_to == "swanlab" and RANK == 0:  # transformers 漏了它，会崩溃
        import swanlab
        swanlab.init(project="gpt2-chinese")
    stop = StopRequest(s)
    trainer = train(s, checkpoint, stop)
    if RANK:  # gloo 有时会卡住解释器的收尾
        os._exit(0)
    if (step := trainer.state.global_step) == s.total_steps:
        return save_final_model(s.work_dir, trainer.model, trainer.tokenizer)
    print(f"停在第 {step} 步，检查点已存好。接着训练：同一条命令（不要 --fresh）再跑一次")
    code = 128 + stop.reason if stop.reason > 1 else 0
    sys.exit(code) if WORLD_SIZE == 1 else os._exit(code)

def save_final_model(work_dir, model, tokenizer):
    model.__class__ = transformers.GPT2LMHeadModel  # 加载时不用本脚本
    model.config.use_cache, model.config.pad_token_id = True, PAD
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=min(100, model.config.n_positions // 2), bos_token_id=BOS, **SAMPLING)
    model.save_pretrained(work_dir / "final_model")
    tokenizer.save_pretrained(work_dir / "final_model")
    if (plot := Path(__file__).with_name("plot_loss.py")).exists():
        subprocess.run([sys.executable, plot, work_dir, "--output", work_dir / "loss_curve.png"])
    print(f"完成。模型在 {work_dir / 'final_model'}")

# ==== 8. 防错与落盘（初学可以跳过）====

def fail(message):
    sys.exit(f"错误：{message}" if RANK == 0 else 1)

def run_script(name, output, *arguments):
    with filelock.FileLock(output.with_name(f".{output.name}.lock")):  # 上次被杀掉，子进程可能还在写
        print(f"── 运行 {name}（应当在本脚本旁边）")
    command = [sys.executable, Path(__file__).with_name(name), "--output_dir", output, *map(str, arguments)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)

def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0

def newest_checkpoint(work_dir):
    """最新的完整检查点，或 None。"""
    for path in sorted((work_dir / "checkpoints").glob("checkpoint-*"), key=step_of, reverse=True):
        with suppress(OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            safetensors.torch.load_file(path / "model.safetensors")
            files = path / "optimizer.pt", path / "scheduler.pt", min(path.glob("rng_state*.pth"))
            if not any(zipfile.ZipFile(file).testzip() for file in files):
                return path
        print(f"跳过不完整的检查点 {path}")

def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, default=str), encoding="utf-8")

def write_history(folder, history):
    """由 log_history 写日志和续写。它随检查点存取，所以续训时每一步也恰好一份。"""
    log = [{"step": row["step"]} | {k: v for k, v in row.items() if k != "epoch" and math.isfinite(v)}
           for row in history if "loss" in row or "eval_bits_per_char" in row]
    samples = [row for row in history if "prompt" in row]
    for name, rows in ("train_log", log), ("samples", samples):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    table = "| 步 | 验证损失 | 续写 |\n|---:|---:|---|\n"
    for row in samples:
        text = " ⏎ ".join(row["text"].replace("|", "\\|").splitlines())
        table += f"| {row['step']} | {row['eval_loss']:.3f} | {text} |\n"
    (folder / "generation_samples.md").write_text(table, encoding="utf-8")

def save_snapshot(model, s, step, history):
    """第 0、100、200、500、1,000……步和最后一步，留一份权重和最近的验证结果。"""
    wanted = step in (0, s.total_steps) or re.fullmatch("[125]0{2,}", str(step))
    if RANK == 0 and s.snapshots and wanted:
        folder = s.work_dir / "snapshots" / f"step-{step}"
        weights = {name: p.bfloat16() for name, p in model.named_parameters()}
        model.save_pretrained(folder, state_dict=weights)
        metrics = next(row for row in reversed(history) if "eval_bits_per_char" in row)
        write_json(folder / "snapshot.json", metrics | {
            "eval_step": metrics["step"], "step": step, "tokens": step * s.tokens_per_step})

def check_disk(s, need):
    if (free := shutil.disk_usage(s.work_dir).free) < need:
        fail(f"{s.work_dir} 的磁盘不够：剩 {free >> 20:,} MB，要 {need >> 20:,} MB；清出空间，或加 --no-snapshots")

class StopRequest(transformers.TrainerCallback):
    """Ctrl-C、SIGTERM（reason 是编号）或 --max_hours（1）：做完这一步，存好再停。"""

    def __init__(self, s):
        self.settings, self.asked, self.reason = s, 0, 0
        self.deadline = START + 3600 * 0.99 * (s.max_hours or math.inf)
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self.request)

    def request(self, which, frame):
        print("收到停止信号：做完这一步就存检查点（再按一次立即停）")
        self.asked = which
        signal.signal(which, signal.SIG_DFL)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        s, step = self.settings, state.global_step
        save_snapshot(model, s, step, state.log_history)
        if WORLD_SIZE == 1 or step % s.logging_steps == 0:  # 几个进程要停在同一步
            late = int(time.time() > self.deadline)
            self.reason = max(accelerate.utils.gather_object([self.asked or late]))
            if self.reason:
                control.should_training_stop = control.should_save = True
        if control.should_save:
            check_disk(s, 16 * s.parameters)

def read_report(folder, name="report.json"):  # 没做完、缺文件或大小不对，是 {}
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
        return report if sizes == report["files"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

def run(main):
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        what = "另一个进程正在写" if isinstance(error, filelock.Timeout) else "读写失败"
        sys.exit(f"错误：{what}（{error}）；等它结束，或清出空间、检查权限，再跑同一条命令")

if __name__ == "__main__":
    run(main)
