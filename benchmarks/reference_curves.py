#!/usr/bin/env python3
"""把几次同样设置、不同种子的训练，合成 results/reference_curves.json 里的一条参考曲线。

    python a100_train.py --preset demo --seed 42 --work_dir demo-42        # 43、44 同样
    python benchmarks/reference_curves.py demo-42 demo-43 demo-44 --name demo

plot_loss.py 画一次训练时，设置和数据与某一条相同，就画上它的灰色带子。曲线上每一点是各种子、前后各一次日志的平均；
spread 是单次日志与这个平均之差的两倍标准差（约 95 % 落在里面）。速度取第一个文件夹的中位数，记在它的设备名下。
同样设置的旧的一条会被换掉。各次的日志（只留步、损失、速度）抄到 results/reference/名字-s种子.jsonl。
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from common import ROOT, provenance, read_lines, write_atomic

# 与它们都相同才能比损失；种子不在内。语料按大小和词频的熵来认，差 1 % 以内算同一份
SETTINGS = (
    "n_layer",
    "n_embd",
    "n_head",
    "block_size",
    "effective_batch_size",
    "max_steps",
    "learning_rate",
    "muon_learning_rate",
    "optim",
    "vocab_size",
    "total_steps",
)
CORPUS = ("n_blocks", "unigram_entropy")


def read_run(folder):
    """返回 (config.json, 日志的各行, 几步一行)；第 1 步单独的那一行不要，它不是几步的平均。"""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rows = [row for row in read_lines(folder / "train_log.jsonl") if "loss" in row]
    every = rows[2]["step"] - rows[1]["step"]
    return config, [row for row in rows if row["step"] % every == 0], every


def build_curve(folders, name):
    """几个训练文件夹 -> 一条参考曲线。"""
    runs = [read_run(folder) for folder in folders]
    config, first, every = runs[0]
    settings = {key: config[key] for key in SETTINGS} | {"logging_steps": every}
    for folder, (other, rows, _) in zip(folders, runs, strict=True):
        if any(other[key] != config[key] for key in SETTINGS) or len(rows) != len(first):
            raise SystemExit(f"错误：{folder} 的设置与 {folders[0]} 不同，不能合成一条曲线")
    losses = np.array([[row["loss"] for row in rows] for _, rows, _ in runs])  # (种子, 日志)
    mean = losses.mean(0)
    smooth = np.concatenate([mean[:1], (mean[:-2] + mean[1:-1] + mean[2:]) / 3, mean[-1:]])
    off = np.abs(losses - smooth)
    # 单点只有几个种子，两倍标准差抖得厉害：取前后五次日志一起算
    spread = [2 * float(np.sqrt((off[:, max(0, i - 5) : i + 6] ** 2).mean())) for i in range(len(smooth))]
    per_step = config["effective_batch_size"] * config["block_size"]
    speed = statistics.median(row["tokens_per_second"] for row in first[len(first) // 5 :])
    return {
        "settings": settings,
        "corpus": {key: round(config[key], 4) for key in CORPUS},
        "name": name,
        "seeds": [other["seed"] for other, _, _ in runs],
        **provenance(),
        "tokens": [row["step"] * per_step for row in first],
        "loss": [round(float(x), 3) for x in smooth],
        "spread": [round(x, 3) for x in spread],
        "tokens_per_second": {config["device_name"]: round(speed, 1)},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="训练的工作目录，第一个的速度作数")
    parser.add_argument("--name", required=True, help="这条曲线叫什么，如 demo")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "reference_curves.json")
    args = parser.parse_args()
    curve = build_curve(args.folders, args.name)
    for config, rows, _ in map(read_run, args.folders):
        lines = [
            json.dumps(
                {
                    "step": row["step"],
                    "loss": round(row["loss"], 4),
                    "tokens_per_second": row["tokens_per_second"],
                }
            )
            for row in rows
        ]
        path = args.output.parent / "reference" / f"{args.name}-s{config['seed']}.jsonl"
        write_atomic(path, "\n".join(lines) + "\n")
    old = json.loads(args.output.read_text("utf-8")) if args.output.exists() else []
    curves = [other for other in old if other["settings"] != curve["settings"]] + [curve]
    write_atomic(args.output, "[" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in curves) + "]\n")


if __name__ == "__main__":
    main()
