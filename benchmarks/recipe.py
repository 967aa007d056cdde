#!/usr/bin/env python3
"""在小模型上找更好的训练配方：公开参考的配方、AdamW 换学习率、Muon，再一次改一个设置。

    python benchmarks/recipe.py --budget_minutes 30      # 接着上次没跑完的跑，到点停
    python benchmarks/recipe.py --table                  # 只重写 results/recipe/small/README.md
    python benchmarks/recipe.py --corpus wiki=a.jsonl --results my-recipe     # 换成自己的文本

每个试验是一次真的 a100_train.py（单线程、fp32）；脚本没有开关的设置用 patched_train.py 的补丁改。日志逐个写在
results/recipe/small/试验-s种子.jsonl：第一行是设置与出处，其后每次验证一行；失败的也留着。跑过的不再跑。
只看验证集的每字比特：步数写死，所以结果与机器忙不忙无关，只有用时会变。
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import ROOT, fresh_copy, prepare, provenance, read_lines, train, write_atomic

STEPS = 400
# 4 层 × 192 维，每步 8 × 128 = 1,024 token；400 步 = 409,600 token
PROXY = ("--preset demo --device cpu --n_layer 4 --n_embd 192 --n_head 6 --block_size 128 --batch_size 8 "
         "--effective_batch_size 8 --logging_steps 50 --eval_steps 50").split()
# 公开参考：AdamW 3e-4，预热 2,000 / 11,838 步 = 17 %，余弦，beta2 0.999，权重衰减 0.1
REFERENCE = "--optim adamw_torch --learning_rate 3e-4 --warmup_ratio 0.17 | args.adam_beta2=0.999"
ADAMW = "--optim adamw_torch --learning_rate {} --warmup_ratio 0.05"
MUON = "--optim muon --learning_rate {} --muon_learning_rate {} --warmup_ratio 0.05"
BEST = MUON.format("1.6e-2", "0.02")                   # 试完学习率以后选定的；下面的都在它上面一次改一处
LINEAR = BEST + " --lr_schedule linear"                # 其中改了有好处的，采用了
NO_WARMUP = BEST.replace("0.05", "0")
# (名字, 种子, 步数, 设置 | 补丁)。先是学习率，再是种子，然后一次改一处
TRIALS = [
    ("reference", 42, STEPS, REFERENCE),
    ("adamw-3e-3", 42, STEPS, ADAMW.format("3e-3")),
    ("adamw-6e-3", 42, STEPS, ADAMW.format("6e-3")),
    ("adamw-1e-3", 42, STEPS, ADAMW.format("1e-3")),
    ("muon-3e-3", 42, STEPS, MUON.format("3e-3", "0.02")),
    ("muon-6e-3", 42, STEPS, MUON.format("6e-3", "0.02")),
    ("muon", 42, STEPS, BEST),
    ("muon-half", 42, STEPS // 2, BEST),
    ("muon-matrix-0.04", 42, STEPS, MUON.format("1.6e-2", "0.04")),
    ("muon", 43, STEPS, BEST),
    ("reference", 43, STEPS, REFERENCE),
    ("muon-linear", 42, STEPS, LINEAR),
    ("muon-wsd", 42, STEPS, BEST + ' | args.lr_scheduler_type=warmup_stable_decay '
     'args.lr_scheduler_kwargs={"num_decay_steps":120,"decay_type":"linear"}'),
    ("muon-linear", 43, STEPS, LINEAR),
    ("muon-linear-half", 42, STEPS // 2, LINEAR),
    ("muon-warmup-0.17", 42, STEPS, BEST.replace("0.05", "0.17")),
    ("muon-no-warmup", 42, STEPS, NO_WARMUP),
    ("muon-linear", 44, STEPS, LINEAR),
    ("muon-linear-half", 43, STEPS // 2, LINEAR),
    ("muon-linear-half", 44, STEPS // 2, LINEAR),
    ("reference", 44, STEPS, REFERENCE),
    ("muon-beta2-0.99", 42, STEPS, BEST + " | args.adam_beta2=0.99"),
    ("muon-no-decay", 42, STEPS, BEST + " --weight_decay 0"),
    ("muon-linear-quarter", 42, STEPS // 4, LINEAR),
    ("muon-documents", 42, STEPS, BEST + " | attention=documents"),
    ("muon-z-loss", 42, STEPS, BEST + " | z_loss=1e-4"),
    ("muon-init-0.01", 42, STEPS, BEST + " | config.initializer_range=0.01"),
    ("muon-embedding-x3", 42, STEPS, MUON.format("6e-3", "0.02") + " | embedding_lr=3"),
    ("reference-long", 42, 3 * STEPS, REFERENCE),
    ("adamw-1e-3-linear", 42, STEPS, ADAMW.format("1e-3") + " --lr_schedule linear"),
    ("muon", 44, STEPS, BEST),
    ("muon-matrix-0.01", 42, STEPS, MUON.format("1.6e-2", "0.01")),
    ("muon-beta2-0.999", 42, STEPS, BEST + " | args.adam_beta2=0.999"),
    ("muon-decay-0.3", 42, STEPS, BEST + " --weight_decay 0.3"),
]


def run_trial(name, seed, steps, settings, base, work_dir):
    """跑一个试验，返回要写进日志的几行：第一行设置与出处，其后每次验证一行。"""
    flags, _, patches = settings.partition("|")
    arguments = [*PROXY, "--max_steps", steps, "--seed", seed, *flags.split()]
    fresh_copy(base, work_dir)
    result = train(work_dir, arguments, ["extras=off", *patches.split()], threads=1, timeout=1800)
    config, rows = result["config"], result["rows"]
    header = {"name": name, "seed": seed, "steps": steps, "settings": settings, **provenance(),
              "error": result["error"], "parameters": config.get("parameters"),
              "arguments": " ".join(map(str, arguments)), "wall_seconds": result["seconds"]}
    lines, seconds, loss = [], 0.0, None
    tokens = config.get("effective_batch_size", 0) * config.get("block_size", 0)
    for row in rows:
        if "loss" in row:
            seconds, loss = row["elapsed_seconds"], round(row["loss"], 4)
        else:
            lines.append({"step": row["step"], "tokens": row["step"] * tokens, "seconds": seconds,
                          "train_loss": loss,
                          "eval_loss": row["eval_loss"], "bits_per_char": row["eval_bits_per_char"]})
    return [header, *lines]


def tokens_to_reach(rows, target):
    """曲线第一次降到 target 每字比特时用了多少 token，两次验证之间按直线插值；没有降到返回 None。"""
    for before, after in zip(rows, rows[1:], strict=False):
        if after["bits_per_char"] <= target < before["bits_per_char"]:
            share = (before["bits_per_char"] - target) / (before["bits_per_char"] - after["bits_per_char"])
            return before["tokens"] + share * (after["tokens"] - before["tokens"])
    return None


def load(folder):
    """{试验名: [(第一行, 其余各行), 每个种子一个]}。"""
    trials = {}
    for path in sorted(folder.glob("*-s*.jsonl")):
        header, *rows = read_lines(path)
        trials.setdefault(header["name"], []).append((header, rows))
    return trials


def summary_line(name, runs, target, target_tokens):
    """表里的一行：最后的每字比特（几个种子的均值和范围），比参考省多少 token，每秒 token。"""
    header = runs[0][0]
    if any(run[0]["error"] for run in runs):
        errors = "；".join(run[0]["error"] for run in runs if run[0]["error"])
        return 99, f"| {name} | 失败：{errors[:80]} | | | | | `{header['settings']}` |"
    final = [rows[-1]["bits_per_char"] for _, rows in runs]
    mean, tokens = statistics.mean(final), runs[0][1][-1]["tokens"]
    spread = f"{min(final):.3f}–{max(final):.3f}（{len(final)} 个种子）" if len(final) > 1 else "1 个种子"
    reached = [tokens_to_reach(rows, target) for _, rows in runs]
    ratio = f"{statistics.mean(reached) / target_tokens:.2f}" if None not in reached else "没有达到"
    seconds = statistics.median(rows[-1]["seconds"] for _, rows in runs)
    return mean, (f"| {name} | **{mean:.3f}** | {spread} | {tokens:,} | {ratio} | {seconds:.0f} | "
                  f"`{header['settings'].replace('|', '补丁：')}` |")


def write_table(folder):
    trials = load(folder)
    reference = trials.get("reference")
    if not reference:
        return
    target = statistics.mean(rows[-1]["bits_per_char"] for _, rows in reference)
    target_tokens, first = reference[0][1][-1]["tokens"], reference[0][0]
    lines = sorted(summary_line(name, runs, target, target_tokens) for name, runs in trials.items())
    notes = folder / "notes.md"
    left = [f"{name}（种子 {seed}）" for name, seed, *_ in TRIALS
            if seed not in [header["seed"] for header, _ in trials.get(name, [])]]
    text = "\n".join([
        "# 配方搜索（CPU 上的小模型）", "",
        "命令：`python benchmarks/recipe.py`。每个试验即 `python benchmarks/patched_train.py [--patch 补丁] -- "
        f"{' '.join(PROXY)} --max_steps 步数 加表中的设置`，"
        f"{first['parameters']:,} 参数，单线程。",
        f"机器：{first['machine']}；{first['versions']}；{first['date']}。同时有别的程序在跑，训练秒只供参考。", "",
        "按验证集的每字比特从低到高。“达到参考所需”是验证曲线第一次降到参考配方（reference）最终的每字比特时用的 token，",
        f"除以参考用的 {target_tokens:,}；学习率还没有降下来，所以偏大，把同样的步数排完会更少（名字带 half 的就是）。", "",
        *([notes.read_text("utf-8")] if notes.exists() else []),
        "| 试验 | **每字比特** | 范围 | token | 达到参考所需 | 训练秒 | 设置 |", "|---|---:|---|---:|---:|---:|---|",
        *(line for _, line in lines), "", f"还没有跑的：{'、'.join(left) or '无'}。"])
    write_atomic(folder / "README.md", text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "recipe" / "small",
                        help="日志和表写在哪里")
    parser.add_argument("--corpus", nargs="+", help="换成别的文本，写法见 prepare_corpus.py")
    parser.add_argument("--base", type=Path, default=Path("recipe-work"), help="准备好的数据放在哪里")
    parser.add_argument("--budget_minutes", type=float, default=1e9, help="跑多少分钟就停，下次接着跑")
    parser.add_argument("--only", help="只跑名字以它开头的")
    parser.add_argument("--table", action="store_true", help="只重写表")
    args = parser.parse_args()
    start, base = time.time(), args.base.resolve()
    if not args.table:
        prepare(base, ["--preset", "demo", *(["--corpus", *args.corpus] if args.corpus else [])])
    for name, seed, steps, settings in TRIALS if not args.table else []:
        path = args.results / f"{name}-s{seed}.jsonl"
        if path.exists() or not name.startswith(args.only or ""):
            continue
        if time.time() - start > args.budget_minutes * 60:
            print("到时间了；同一条命令再跑一次就接着来")
            break
        with tempfile.TemporaryDirectory() as folder:
            lines = run_trial(name, seed, steps, settings, base, Path(folder) / "work")
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(name, seed, lines[-1].get("bits_per_char"), lines[0]["error"] or "",
              f"{lines[0]['wall_seconds']} 秒", flush=True)
        write_table(args.results)
    write_table(args.results)


if __name__ == "__main__":
    main()
