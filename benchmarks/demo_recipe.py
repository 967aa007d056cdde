#!/usr/bin/env python3
"""演示配方的搜索：每个试验用 a100_train.py 跑一遍，只比较验证集的每字比特（bits per character）。

    python benchmarks/demo_recipe.py trials.jsonl --jobs 2     # 每行 {"name": ..., "flags": "--n_layer 2 ..."}
    python benchmarks/demo_recipe.py --table                   # 只重写 results/demo_recipe.md

结果逐条追加到 results/demo_recipe.jsonl（跑过的同名试验跳过），表在 results/demo_recipe.md，失败的也留着。
每个试验只用一个线程，几个试验并行；步数写在 flags 里，所以结果与机器忙不忙无关，只有用时会变。
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "demo_recipe.jsonl"
NOTES = [
    "- 预算：假设两个慢核（合计约 60 GFLOP/s）。名字以 half 开头的是一半预算（约 200 秒的训练），步数按各配置在",
    "  单线程 AVX2 上量到的速度折算，所以慢的配置步数少；`demo` 是选定的配方，用全部预算（约 400 秒）。",
    "- 前四个（base、v6144、v4500、d192）是旧的分词器：单字最多占词表的 95 %。改成至多一半留给单字以后，",
    "  同样 6,144 的词表每 token 多看 15 % 的字，其余不变，每字比特从 6.61 降到 6.48。",
    "- 学习率从 3e-3 提到 6e-3、1.2e-2，每次都有好处，2.4e-2 与 1.2e-2 相近，取中间的 1.6e-2；Muon 的学习率 0.02 好于 0.04。",
    "- 更大的批量（2,048 token/步）好于 1,024，512 明显更差：小步多走在这里不划算。",
    "- `demo-cosine` 是 2026-11-22 的演示（余弦衰减）；`demo` 改成线性降到 0（results/recipe/ 里三个种子都更好），语料也多了",
    "  几步清洗，验证集随之略有不同，所以两行不能直接比；各自与 bigram 比，都低 0.47 nat：在演示上看不出差别。",
    "- 没有试完的：3 层、192 维（新分词器）、权重衰减 0、新分词器下只用 AdamW。",
]


def bigram_bits_per_char(packed):
    """插值二元模型（bigram）的每字比特：p(b|a) = (c(ab) + k·p(b)) / (c(a) + k)，k 在验证集上取最好的（对它有利）。

    词频 p(b) 加一平滑。它看过全部训练文本；是“模型有没有学到前一个词以外的东西”的标尺。返回 (每字比特, nat/token)。
    """
    meta = json.loads((packed / "meta.json").read_text("utf-8"))
    train = np.fromfile(packed / "train.bin", dtype=np.uint16).astype(np.int64)
    held = np.fromfile(packed / "eval.bin", dtype=np.uint16).astype(np.int64)
    size = meta["vocab_size"]
    unigram = (np.bincount(train, minlength=size) + 1) / (len(train) + size)
    context = np.bincount(train[:-1], minlength=size)
    pairs, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
    before = np.concatenate([[3], held[:-1]])              # 每个来源从 </s> 开始；来源之间本来就以它结尾
    wanted = before * size + held
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    joint = np.where(pairs[place] == wanted, counts[place], 0)
    nats = min(-np.log((joint + k * unigram[held]) / (context[before] + k)).sum()
               for k in np.geomspace(1, 3000, 60))
    characters = sum(source["characters"] for source in meta["eval_sources"].values())
    return nats / np.log(2) / characters, nats / len(held)


def run_trial(trial, work_root, threads):
    """跑一个试验，返回一条结果；失败的也返回，带上最后一行输出。"""
    work_dir = work_root / trial["name"]
    shutil.rmtree(work_dir, ignore_errors=True)
    command = ["a100_train.py", "--preset", "demo", "--work_dir", str(work_dir), *shlex.split(trial["flags"])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    start = time.time()
    process = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                             capture_output=True, text=True)
    result = {"name": trial["name"], "flags": trial["flags"], "seconds": round(time.time() - start, 1)}
    if process.returncode:
        return result | {"error": (process.stderr.strip().splitlines() or ["?"])[-1]}
    rows = [json.loads(line) for line in (work_dir / "train_log.jsonl").read_text("utf-8").splitlines()]
    evals = [row for row in rows if "eval_loss" in row]
    config = json.loads((work_dir / "config.json").read_text("utf-8"))
    bits, nats = bigram_bits_per_char(work_dir / "packed")
    shutil.rmtree(work_dir)
    tokens = config["total_steps"] * config["effective_batch_size"] * config["block_size"]
    return result | {
        "parameters": config["parameters"], "tokens": tokens, "steps": config["total_steps"],
        "train_seconds": [row for row in rows if "elapsed_seconds" in row][-1]["elapsed_seconds"],
        "eval_loss": evals[-1]["eval_loss"], "bits_per_char": evals[-1]["eval_bits_per_char"],
        "characters_per_token": round(config["characters_per_token"], 3),
        "unigram_nats": config["unigram_entropy"],
        "bigram_bits_per_char": round(bits, 4), "bigram_nats": round(nats, 4)}


def write_table():
    rows = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    lines = ["# 演示配方的搜索", "",
             "命令：`python benchmarks/demo_recipe.py trials.jsonl --jobs 2`，"
             "每个试验即 `python a100_train.py --preset demo 加表中的参数`。",
             "按每字比特从低到高；“二元模型”是同一分词器下看过全部训练文本的插值 bigram（标尺）。",
             f"机器：{rows[-1]['machine']}。日期：{rows[-1]['date']}。每个试验 1 个线程，同时有别的程序，训练秒只供参考。",
             "", *NOTES, "",
             "| 试验 | 参数量 | token | 步 | 字/token | 损失 nat | **每字比特** | 二元模型 | 训练秒 | 参数 |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
    for row in sorted(rows, key=lambda row: row.get("bits_per_char", 99)):
        if "error" in row:
            lines.append(f"| {row['name']} | 失败：{row['error'][:80]} | | | | | | | | `{row['flags']}` |")
        else:
            lines.append(f"| {row['name']} | {row['parameters']:,} | {row['tokens']:,} | {row['steps']} | "
                         f"{row['characters_per_token']} | {row['eval_loss']:.3f} | "
                         f"**{row['bits_per_char']:.3f}** | {row['bigram_bits_per_char']:.3f} | "
                         f"{row['train_seconds']:.0f} | `{row['flags']}` |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path, nargs="?", help="JSON lines，每行一个试验")
    parser.add_argument("--jobs", type=int, default=1, help="同时跑几个")
    parser.add_argument("--threads", type=int, default=1, help="每个试验几个线程")
    parser.add_argument("--work_root", type=Path, default=Path("demo-recipe"), help="试验的工作目录放在哪里")
    parser.add_argument("--table", action="store_true", help="只重写表")
    args = parser.parse_args()
    if args.trials and not args.table:
        RESULTS.parent.mkdir(exist_ok=True)
        old = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
        done = {json.loads(line)["name"] for line in old}
        trials = [json.loads(line) for line in args.trials.read_text("utf-8").splitlines() if line.strip()]
        machine = (f"{platform.machine()}，{os.cpu_count()} 核，torch {torch.__version__}，"
                   f"transformers {transformers.__version__}")
        with ThreadPoolExecutor(args.jobs) as pool:
            waiting = [trial for trial in trials if trial["name"] not in done]
            jobs = [pool.submit(run_trial, trial, args.work_root.resolve(), args.threads)
                    for trial in waiting]
            for result in (job.result() for job in jobs):
                result |= {"machine": machine, "date": time.strftime("%Y-%m-%d")}
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
                print(result["name"], result.get("bits_per_char"), result.get("error", ""), flush=True)
    write_table()


if __name__ == "__main__":
    main()
