#!/usr/bin/env python3
"""1 个进程和 2 个进程的速度之比：同样的模型和有效批量，CPU 上轮流各跑几次。

    python benchmarks/processes.py                        # 结果写到 results/processes.md 和 .json

每个进程一个线程。每次只取日志后半段的中位数（开头在预热）；1 个和 2 个轮流跑，机器上别的程序对两边的影响差不多。
绝对速度只属于那台机器，表里只看比值。
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, provenance, read_lines, write_atomic

TRAINING = [
    "--device",
    "cpu",
    "--corpus",
    "demo",
    "--vocab_size",
    "3000",
    "--n_layer",
    "2",
    "--n_embd",
    "256",
    "--n_head",
    "4",
    "--block_size",
    "128",
    "--batch_size",
    "4",
    "--effective_batch_size",
    "8",
    "--max_steps",
    "30",
    "--logging_steps",
    "1",
    "--eval_steps",
    "1000",
    "--no-snapshots",
]


def tokens_per_second(processes, work_dir):
    """从头训练一次，返回后半段每秒 token 数的中位数。"""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(ROOT / "a100_train.py"),
        *TRAINING,
        "--work_dir",
        str(work_dir),
        "--fresh",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = read_lines(work_dir / "train_log.jsonl")
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return statistics.median(speeds[len(speeds) // 2 :])


def measure(repetitions):
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(1, repetitions + 1):
            for processes in (1, 2):
                load = os.getloadavg()[0]
                speed = tokens_per_second(processes, Path(folder) / "work")
                runs.append(
                    {
                        "repetition": repetition,
                        "processes": processes,
                        "tokens_per_second": speed,
                        "load_before": round(load, 2),
                    }
                )
                print(runs[-1], flush=True)
    return runs


def write_results(folder, runs):
    speed = {(run["repetition"], run["processes"]): run["tokens_per_second"] for run in runs}
    repetitions = max(run["repetition"] for run in runs)
    ratios = [round(speed[i, 2] / speed[i, 1], 3) for i in range(1, repetitions + 1)]
    ratio = statistics.median(ratios)
    command = f"python benchmarks/processes.py {' '.join(sys.argv[1:])}".strip()
    result = {
        "command": command,
        "training": f"a100_train.py {' '.join(TRAINING)}",
        **provenance(),
        "runs": runs,
        "ratios": ratios,
        "median_ratio": ratio,
        "efficiency": round(ratio / 2, 3),
    }
    write_atomic(folder / "processes.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    loads = {(run["repetition"], run["processes"]): run["load_before"] for run in runs}
    rows = "\n".join(
        f"| {i} | {ratios[i - 1]:.2f} | {loads[i, 1]} | {loads[i, 2]} |" for i in range(1, repetitions + 1)
    )
    write_atomic(
        folder / "processes.md",
        f"""# 1 个进程和 2 个进程的速度之比

日期 {result["date"]}。机器：{result["machine"]}。{result["versions"]}。每个进程一个线程（OMP_NUM_THREADS=1），进程间用 gloo。

    {command}

每次训练：`{result["training"]}`，2 个进程时由 `torchrun --nproc_per_node=2` 启动；有效批量相同。

| 次 | 2 个进程 / 1 个进程（token/秒之比） | 1 个进程开始前的系统负载 | 2 个进程开始前的系统负载 |
|---:|---:|---:|---:|
{rows}

**中位数 {ratio:.2f} 倍，即每个进程的效率 {ratio / 2:.0%}。** 负载是最近一分钟的平均，含前一次训练自己；明显大于 2（核数）
就是有别的程序在抢，那时只看比值。这不是显卡的数字。
""",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3, help="各跑几次")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="结果写到哪个文件夹")
    args = parser.parse_args()
    write_results(args.output, measure(args.repetitions))


if __name__ == "__main__":
    main()
