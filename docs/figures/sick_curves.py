#!/usr/bin/env python3
"""生病的损失曲线：故意弄坏的几次真的训练，各弄坏一处，画在健康的旁边。

    python docs/figures/sick_curves.py                 # 训练（演示大小，每步 8 块），写 results/sick_curves/，再画图
    python docs/figures/sick_curves.py --draw_only     # 只由日志重画 docs/figures/sick_curves.png

跑过的（同样的步数）不再跑。每次训练都是 a100_train.py 自己的 main()，只按 SICK 里写的改一处。
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
LOGS = ROOT / "results" / "sick_curves"
PICTURE = Path(__file__).with_name("sick_curves.png")
BLOCKS = 8  # 每步 8 × 64 = 512 token
SMALL = 12_000  # 背书的两次只用这么多个训练 token，240 步读十遍
SICK = {  # 名字: (标题, 命令行, 改的是什么)
    "healthy": ("健康", [], ""),
    "high": ("学习率太高", ["--learning_rate", "0.8", "--muon_learning_rate", "1.0"], ""),
    "low": ("学习率太低", ["--learning_rate", "1.6e-4", "--muon_learning_rate", "2e-4"], ""),
    "no-warmup": ("没有预热", [], "no_warmup"),
    "shuffled": ("目标打乱了", [], "shuffled"),
    "small": ("文字太少：背书", [], "small"),
}
PANELS = [
    ("high", "eval_loss", "学习率太高"),
    ("low", "eval_loss", "学习率太低"),
    ("no-warmup", "eval_loss", "没有预热"),
    ("shuffled", "eval_loss", "目标打乱了"),
    ("small", "eval_held_out_loss", "文字太少：背书"),
    ("small", "eval_seen_loss", "同一次训练，用训练的文字验证"),
]


def edit_packed(folder):
    """改打包好的数据：只留开头一段训练文字；验证集分成没见过的（held_out）和这一段自己（seen）。"""
    train = folder / "train.bin"
    held_out = folder / "eval.bin"
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    seen = train.read_bytes()[: 2 * SMALL]
    end = held_out.stat().st_size // 2
    characters = sum(part["characters"] for part in meta["eval_sources"].values())
    train.write_bytes(seen)
    held_out.write_bytes(held_out.read_bytes() + seen)
    meta["eval_sources"] = {
        "held_out": {"start": 0, "end": end, "characters": characters},
        "seen": {"start": end, "end": end + SMALL, "characters": round(1.29 * SMALL)},
    }
    meta["train_tokens"] = SMALL
    meta["files"] = {name: (folder / name).stat().st_size for name in meta["files"]}
    path.write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def train_here(change, arguments):
    """在本进程里训练；代码里要改的在这里改。"""
    import torch

    import a100_train

    if "no_warmup" in change:
        a100_train.WARMUP = 0.0
    if "shuffled" in change:  # 模型还是看前文，要它猜的却是别处的 token
        original = a100_train.GPT2LMHeadModel.forward
        generator = torch.Generator().manual_seed(0)

        def shuffled(self, input_ids=None, labels=None, **kwargs):
            if labels is not None and self.training:
                order = torch.randperm(labels.numel(), generator=generator)
                labels = labels.flatten()[order].view_as(labels)
            return original(self, input_ids, labels, **kwargs)

        a100_train.GPT2LMHeadModel.forward = shuffled
    sys.argv = ["a100_train.py", *arguments]
    a100_train.run(a100_train.main)


def start(name, base, steps, work):
    """起一个子进程跑一次训练；返回（进程，工作目录）。"""
    _, arguments, change = SICK[name]
    folder = work / name
    for part in ("corpus", "tokenizer", "packed"):
        shutil.copytree(base / part, folder / part)
    if change == "small":
        edit_packed(folder / "packed")
    command = [
        sys.executable,
        __file__,
        "--train",
        change,
        "--preset",
        "demo",
        "--device",
        "cpu",
        "--no-snapshots",
        "--batch_size",
        str(BLOCKS),
        "--effective_batch_size",
        str(BLOCKS),
        "--max_steps",
        str(steps),
        "--eval_steps",
        str(max(1, steps // 6)),
        "--logging_steps",
        str(max(1, steps // 60)),
        "--work_dir",
        str(folder),
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), folder


def train_all(steps, jobs, names):
    from common import provenance

    LOGS.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in names if not (LOGS / f"{name}.jsonl").exists()]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "a100_train.py"),
                "--preset",
                "demo",
                "--prepare_only",
                "--device",
                "cpu",
                "--work_dir",
                str(work / "base"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        while wanted:
            some = wanted[:jobs]
            wanted = wanted[jobs:]
            for name, (process, folder) in {
                name: start(name, work / "base", steps, work) for name in some
            }.items():
                process.wait()  # 学习率太高的会发散、自己停下，日志也要
                if (folder / "train_log.jsonl").exists():
                    shutil.copy(folder / "train_log.jsonl", LOGS / f"{name}.jsonl")
                    print(f"{name}：退出码 {process.returncode}")
    about = provenance() | {
        "command": "python docs/figures/sick_curves.py",
        "steps": steps,
        "blocks_per_step": BLOCKS,
        "small_tokens": SMALL,
        "runs": {
            name: {"arguments": " ".join(arguments), "change": change}
            for name, (_, arguments, change) in SICK.items()
        },
    }
    (LOGS / "about.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def draw():
    from matplotlib.figure import Figure

    import plot_loss

    chinese = plot_loss.use_chinese_font() == "zh"
    figure = Figure(figsize=(11, 6.5), dpi=130, layout="tight")
    runs = {
        name: [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in SICK
    }
    for place, (name, dots, title) in enumerate(PANELS, 1):
        axes = figure.add_subplot(2, 3, place)
        for run, color, key in (runs["healthy"], "0.6", "eval_loss"), (runs[name], "C3", dots):
            losses = [(row["step"], row["loss"]) for row in run if "loss" in row]
            axes.plot(*zip(*losses, strict=True), color=color, linewidth=1.2)
            points = [(row["step"], row[key]) for row in run if key in row]
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=4)
        values = [value for _, value in losses + points]
        axes.set(
            ylim=(min(4, min(values) - 0.5), max(11, min(35, max(values) + 0.5))),
            title=title if chinese else f"{name} ({dots})",
        )
        axes.grid(alpha=0.2)
    figure.supxlabel(
        "步；线是训练损失，点是验证损失（nat）；灰的是健康的"
        if chinese
        else "step; lines: training, dots: evaluation (nats); gray: healthy"
    )
    figure.savefig(PICTURE)
    print(f"写好 {PICTURE}")


def main():
    if sys.argv[1:2] == ["--train"]:
        return train_here(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="生病的损失曲线", allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=240, help="每次训练的步数")
    parser.add_argument("--jobs", type=int, default=2, help="同时跑几个，每个一个线程")
    parser.add_argument("--only", nargs="+", choices=list(SICK), default=list(SICK), help="只跑这几个")
    parser.add_argument("--draw_only", action="store_true", help="不训练，只画图")
    args = parser.parse_args()
    if not args.draw_only:
        train_all(args.steps, args.jobs, args.only)
    draw()
    return None


if __name__ == "__main__":
    main()
