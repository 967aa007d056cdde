#!/usr/bin/env python3
"""学习率怎样随宽度、批量、步数变：在几个宽度上扫学习率，外推到 768 维、98,304 token/步；再在真实大小上比三种配方。

    python benchmarks/width.py --corpus 百科=a.jsonl 问答=b.jsonl --work_dir width-work    # 按 QUEUE 的次序跑，跑过的略过
    python benchmarks/width.py --work_dir width-work --only w768x8                   # 只跑名字以它开头的
    python benchmarks/width_report.py                                                # 由日志重写表和图

几个进程可以一起跑（OMP_NUM_THREADS=1，一核一个）：每个试验有一把锁。日志在 results/recipe/scaling/，每个试验一个文件：
第一行是设置与出处，其后每次验证一行；发散的也留着。模型、优化器、数据次序、验证都是 a100_train.py 里的函数。
在有 AMX 的 CPU 上用 bf16 autocast，与显卡上一样；--precision fp32 的对照也在队列里。
"""

import argparse
import ctypes
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import filelock
import torch
from common import ROOT, prepare, provenance, write_atomic

sys.path.insert(0, str(ROOT))
import a100_train

RESULTS = ROOT / "results" / "recipe" / "scaling"
BLOCK_SIZE = 256  # 上下文
MICRO_BATCH = 32  # 一次前向至多 32 × 256 token，再大的批量靠累积
VOCABULARY = 8_000  # 扫学习率用：窄模型的时间大半花在输出层上，32,000 要慢 2.7 倍；差别另有一组对照


@dataclass(frozen=True)
class Trial:
    """一个试验的全部设置。缺省值就是 192 维的小模型、每步 2,048 token、我们的配方。"""

    rate: float  # AdamW 管的部分（词向量、位置向量、LayerNorm、偏置）的学习率
    muon: float = 0.02  # 矩阵的学习率；0 表示矩阵也用 AdamW
    width: int = 192
    layers: int = 2
    vocab: int = VOCABULARY
    batch: int = 2048  # 每步 token
    steps: int = 160
    schedule: str = "linear"
    warmup: float = 0.05
    beta2: float = 0.95
    vectors: float = 1.0  # LayerNorm 和偏置的学习率是 rate 的几倍
    precision: str = "bf16"
    seed: int = 42

    @property
    def name(self):
        """文件名：大小和学习率总要写，别的只写与缺省不同的。"""
        base = f"w{self.width}x{self.layers}-b{self.batch}-n{self.steps}-a{self.rate:g}-m{self.muon:g}"
        always = {"width", "layers", "batch", "steps", "rate", "muon", "seed"}
        rest = [
            f"-{f.name}{getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in always and getattr(self, f.name) != f.default
        ]
        return base + "".join(rest) + f"-s{self.seed}"


# ==== 1. 队列，按要紧的次序 ====


def sweep(rates, **settings):
    return [Trial(rate=rate, **settings) for rate in rates]


FULL = dict(width=768, layers=8, vocab=32_000, steps=300)  # 82,066,944 参数
REFERENCE = dict(rate=3e-4, muon=0, schedule="cosine", warmup=0.17, beta2=0.999)  # 公开参考的配方
QUEUE = [
    Trial(**REFERENCE, **FULL),
    Trial(rate=2e-3, **FULL),
    Trial(rate=1e-3, muon=0, **FULL),
    *sweep([8e-3, 1.6e-2, 4e-3, 3.2e-2, 6.4e-2]),  # 192 维
    *sweep([4e-3, 8e-3, 2e-3, 1.6e-2, 3.2e-2, 1e-3], width=768),
    *sweep([2e-3, 8e-3, 3.2e-2, 1.6e-2], width=384),
    *sweep([1.6e-2, 4e-3, 6.4e-2, 3.2e-2, 8e-3], batch=8192),
    *sweep([2e-3, 8e-3, 3.2e-2, 4e-3, 1.6e-2], batch=512),
    *sweep([1.6e-2, 3.2e-2], batch=32_768),
    *[Trial(rate=1.6e-2, muon=muon) for muon in (0.01, 0.04)],
    *sweep([1.6e-2, 4e-3, 6.4e-2], steps=640),
    *sweep([1.6e-2, 4e-3], layers=8),
    *sweep([1.6e-2, 4e-3], vocab=32_000),
    Trial(rate=8e-3, batch=512, precision="fp32"),
    *sweep([1.6e-2, 4e-3, 6.4e-2], seed=43),
    *sweep([8e-3, 2e-3, 3.2e-2, 4e-3, 1.6e-2], batch=512, seed=43),
    *[Trial(rate=1.6e-2, vectors=vectors) for vectors in (0.25, 4.0, 0.0625)],  # LayerNorm、偏置另用一个
    Trial(rate=4e-3, vectors=0.25),
    *sweep([4e-3], width=384),
    *sweep([1e-3, 5e-4, 2e-3, 2.5e-4], width=768, muon=0),  # 只用 AdamW
    *[Trial(rate=1.6e-2, muon=muon, batch=8192) for muon in (0.04, 0.01)],
    *sweep([6.4e-2], vocab=32_000),
    *sweep([8e-3], steps=640),
    *sweep([6.4e-2], layers=8),
    *sweep([8e-3], batch=32_768),
    Trial(rate=4e-3, **FULL),
    Trial(rate=3e-4, muon=0, **FULL),
    Trial(rate=2e-3, seed=43, **FULL),
    Trial(**REFERENCE | dict(rate=6e-4), **FULL),
    Trial(**REFERENCE, seed=43, **FULL),
]


# ==== 2. a100_train.py 的函数：它改了名字，只改这里 ====


def model_settings(trial, work_dir):
    """a100_train.py 里叫 s 的那个对象，只填用得到的几项。"""
    return argparse.Namespace(
        vocab_size=trial.vocab,
        n_layer=trial.layers,
        n_embd=trial.width,
        n_head=trial.width // 64,
        block_size=BLOCK_SIZE,
        attn="sdpa",
        seed=trial.seed,
        work_dir=work_dir,
    )


def build(trial, work_dir):
    """返回 (模型, 优化器, 数据)。"""
    model = a100_train.build_model(model_settings(trial, work_dir))
    betas = (0.9, trial.beta2)
    groups = a100_train.parameter_groups(model, trial.rate, trial.muon)
    for group in groups:
        if all(p.ndim < 2 for p in group["params"]):
            group["lr"] *= trial.vectors
    if trial.muon:
        optimizer = a100_train.Muon(groups, lr=trial.rate, betas=betas, foreach=True, fused=False)
    else:
        groups = [dict(params=g["params"], weight_decay=g["weight_decay"]) for g in groups]
        optimizer = torch.optim.AdamW(groups, lr=trial.rate, betas=betas, fused=True)
    data = a100_train.BlockStream(
        work_dir / "packed" / "train.bin", BLOCK_SIZE, trial.steps * trial.batch // BLOCK_SIZE, trial.seed
    )
    return model, optimizer, data


def held_out(model, trial, work_dir):
    """验证集上的 (nat/token, 每字比特)。"""
    s = model_settings(trial, work_dir)
    s.eval_sources = a100_train.read_report(work_dir / "packed", "meta.json")["eval_sources"]
    metrics = a100_train.held_out_loss(model.eval(), s)
    model.train()
    return metrics["eval_loss"], metrics["eval_bits_per_char"]


def orthogonalize_bf16(matrix, steps=5):
    """a100_train.orthogonalize 在 A100 上走的那一支（bf16）；它在 CPU 上用 fp32，有 AMX 的机器上慢五倍。"""
    tall = matrix.size(-2) > matrix.size(-1)
    x = (matrix.mT if tall else matrix).bfloat16().contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


# ==== 3. 一个试验 ====


def learning_rate_scale(trial, step):
    """第 step 步（从 0 数）的学习率是最高值的几倍：先升，再线性或余弦降到 0。"""
    warmup = max(1, round(trial.steps * trial.warmup))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (trial.steps - warmup)
    return 1 - progress if trial.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def one_step(model, optimizer, data, trial, step, autocast, pause):
    """前向、反向（分几个微批量）、裁剪、更新；返回这一步的平均损失。"""
    size = trial.batch // BLOCK_SIZE
    micro = min(size, MICRO_BATCH)
    total = 0.0
    for start in range(step * size, (step + 1) * size, micro):
        while pause and pause.exists():  # 别人在量时间
            time.sleep(1)
        batch = torch.utils.data.default_collate([data[i] for i in range(start, start + micro)])
        with autocast():
            loss = model(**batch)["loss"] * (micro / size)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def train(trial, work_dir, pause):
    """训练一次，逐次验证给出一行；损失不是有限数就停，最后一行带 error。"""
    bf16 = trial.precision == "bf16"
    start = time.process_time()
    evaluations = 6 if parameters(trial) > 8e7 else 1  # 扫学习率只看最后
    a100_train.orthogonalize = orthogonalize_bf16 if bf16 else ORTHOGONALIZE

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    model, optimizer, data = build(trial, work_dir)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(trial, step))
    marks = {round(trial.steps * i / evaluations) for i in range(evaluations + 1)}
    losses = []
    for step in range(trial.steps + 1):
        if step in marks:
            with autocast():
                loss, bits = held_out(model, trial, work_dir)
            yield {
                "step": step,
                "tokens": step * trial.batch,
                "cpu_seconds": round(time.process_time() - start, 1),
                "train_loss": round(sum(losses) / len(losses), 4) if losses else None,
                "eval_loss": round(loss, 5),
                "bits_per_char": round(bits, 5),
            }
            losses = []
        if step < trial.steps:
            losses.append(one_step(model, optimizer, data, trial, step, autocast, pause))
            scheduler.step()
            if not math.isfinite(losses[-1]):
                yield {"step": step, "error": f"损失 {losses[-1]}"}
                return


ORTHOGONALIZE = a100_train.orthogonalize


def run_trial(trial, work_dir, results, pause):
    """跑一个试验，写日志；已经跑过、或别的进程正在跑，就返回 False。"""
    path = results / f"{trial.name}.jsonl"
    lock = filelock.FileLock(work_dir / f"{trial.name}.lock")
    try:
        with lock.acquire(timeout=0):
            if path.exists():
                return False
            model_parameters = parameters(trial)
            lines = [
                {
                    "name": trial.name,
                    **asdict(trial),
                    "parameters": model_parameters,
                    "threads": torch.get_num_threads(),
                    **provenance(),
                }
            ]
            for row in train(trial, work_dir / f"v{trial.vocab}", pause):
                lines.append(row)
                print(trial.name, *(f"{key} {value}" for key, value in row.items()), flush=True)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                write_atomic(work_dir / f"{trial.name}.part", text)  # 半截的不进 results/
            write_atomic(path, text)
    except filelock.Timeout:
        return False
    return True


def parameters(trial):
    """参数量：词向量、位置向量、每层 12·C² + 13·C、最后的 LayerNorm。"""
    width = trial.width
    return (trial.vocab + BLOCK_SIZE) * width + trial.layers * (12 * width**2 + 13 * width) + 2 * width


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", nargs="+", default=[], help="名字=文件；写法见 prepare_corpus.py")
    parser.add_argument(
        "--work_dir", type=Path, default=Path("width-work"), help="语料、分词器、打包放在哪里"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="日志写到哪里")
    parser.add_argument("--only", default="", help="只跑名字以它开头的")
    parser.add_argument("--skip", default="-", help="不跑名字以它开头的")
    parser.add_argument("--pause", type=Path, help="这个文件存在时停着等，让别人量时间")
    args = parser.parse_args()
    if sys.platform == "linux":  # 与 a100_train.py 的 main() 相同
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 1 << 30)
    wanted = [t for t in QUEUE if t.name.startswith(args.only) and not t.name.startswith(args.skip)]
    for vocab in sorted({t.vocab for t in wanted}):
        corpus = [part for source in args.corpus for part in ("--corpus", source)]
        prepare(args.work_dir / f"v{vocab}", ["--vocab_size", str(vocab), "--device", "cpu", *corpus])
    for trial in wanted:
        run_trial(trial, args.work_dir, args.results, args.pause)


if __name__ == "__main__":
    main()
