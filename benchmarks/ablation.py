#!/usr/bin/env python3
"""加速开关的消融：从默认设置出发一次改一个，再从公开参考的设置出发一次改一个，每次真的训练几十步。

    python benchmarks/ablation.py                         # 有显卡：完整模型；没有：演示大小的模型
    python benchmarks/ablation.py --budget_minutes 20     # 到点停，下次从没量过的一行接着来
    python benchmarks/ablation.py --corpus wiki=a.jsonl   # 不能联网时换成自己的文本

机器会忽快忽慢，所以每次开始、以后每量 8 行，都把“不改”重新量一遍，各行只与最近的一次比；“不改”那一行的最慢–最快因此
也就是噪声有多大。写 results/ablation-<设备>.json（每量完一行就写一次）和 .md。每一行是一个新进程里的 a100_train.py；使用者用不着的
开关（有掩码的 sdpa、原版 forward、gelu_new……）由 patched_train.py 的补丁打开。各列：
    token/s    预热以后各段的中位数；编译和预热另列为“首段多花”
    MFU        token/s × (6N + 12·L·d·T) ÷ 峰值，峰值是本机实测的大矩阵乘（显卡 bf16，CPU fp32）；日志里是对显卡官方规格的
    峰值内存   显卡上是 torch 分配过的最大值；CPU 上是进程的峰值常驻内存，含 Python 和各个库
    验证损失   同一个种子、同样步数之后的
这台机器上办不到的行记为“未测”，附上原因，不猜。
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, link_data, prepare, provenance, train, write_atomic

CUDA = torch.cuda.is_available()
UNCHANGED = "（不改）"
CHOSEN = ("device", "precision", "attn", "optim", "compile", "tf32")
SIZES = {
    # 完整模型：与公开参考同样大小，每步 96 × 1,024 = 98,304 token
    "full": dict(flags={"--preset": "full"}, micro=[8, 16, 24, 32, 48, 96], steps=60, window=5),
    # 演示大小：只证明这个程序能跑，数字属于 CPU
    "tiny": dict(flags={"--preset": "demo", "--device": "cpu"}, micro=[4, 8, 16, 32], steps=36, window=3),
}
MASK = "attention=padding_mask"
FORWARD = "forward=transformers"
GELU = "config.activation_function="
LAYERNORM = "layernorm=liger"
WORKERS = "args.dataloader_num_workers="
# 公开参考（WilsonWang01/gpt2-chinese-pretrain 的 a100_train.py）与默认不同的地方；CPU 上没有的略去
REFERENCE = {
    "--optim": "adamw_bnb_8bit" if CUDA else "adamw_torch",
    "--learning_rate": "3e-4",
    **({"--attn": "sdpa"} if CUDA else {}),
}
REFERENCE_PATCHES = [
    "schedule=cosine",
    "WARMUP=0.17",
    "BETAS=[0.9,0.999]",
    FORWARD,
    MASK,
    GELU + "gelu_new",
    "args.logging_nan_inf_filter=true",
    WORKERS + str(min(8, os.cpu_count())),
    *([LAYERNORM] if CUDA else []),
]


def changes(base, size):
    """要量的每一行：(名字, 改的参数, 加的补丁, 去掉的补丁（按开头认）, 要什么设备：False、cuda 或 cpu)。"""
    yield UNCHANGED, {}, [], [], False
    yield "注意力 eager", {"--attn": "eager"}, [], [], False
    yield "注意力 sdpa，带 padding 掩码", {"--attn": "sdpa"}, [MASK], [], False
    yield "注意力 sdpa，只用 is_causal", {"--attn": "sdpa"}, [], [MASK], False
    yield "注意力 flash_attention_2", {"--attn": "flash_attention_2"}, [], [MASK], "cuda"
    yield "损失：原版 forward，另交出 fp32 logits", {}, [FORWARD], [], False
    yield "损失：只返回损失", {}, [], [FORWARD], False
    for kind in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        yield f"激活 {kind}", {}, [GELU + kind], [GELU], False
    for kind in ("adamw_bnb_8bit", "adamw_torch_fused", "adamw_torch", "muon"):
        yield f"优化器 {kind}", {"--optim": kind}, [], [], False
    for kind in ("bf16", "fp16", "fp32"):
        yield f"精度 {kind}", {"--precision": kind}, [], [], "cuda"
    yield "精度 bf16（CPU 上，越过检查）", {}, ["args.bf16=true"], [], "cpu"
    yield "TF32 关（fp32）", {"--no-tf32": True, "--precision": "fp32"}, [], [], "cuda"
    yield "TF32 开（fp32）", {"--tf32": True, "--precision": "fp32"}, [], [], "cuda"
    yield "重算激活", {"--gradient_checkpointing": True}, [], [], False
    yield "Liger LayerNorm", {}, [LAYERNORM], [], "cuda"
    yield "Liger LayerNorm 关", {}, [], [LAYERNORM], "cuda"
    yield "compile 关", {"--no-compile": True}, [], [], False
    yield "compile 默认模式", {"--compile": True}, [], [], False
    for mode in ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        yield f"compile {mode}", {"--compile": True}, [f"args.torch_compile_mode={mode}"], [], "cuda"
    for micro in SIZES[size]["micro"]:
        yield f"微批量 {micro}", {"--batch_size": str(micro)}, [], [], False
    if size == "full":
        yield (
            "微批量 128（有效批量 128）",
            {"--batch_size": "128", "--effective_batch_size": "128"},
            [],
            [],
            "cuda",
        )
    for workers in (0, 2, 8):
        yield f"读数据进程 {workers}", {}, [WORKERS + str(workers)] if workers else [], [WORKERS], False
    if base == "default":
        yield "词表 + 1（奇数）", {}, ["vocab_extra=1"], [], False
        yield "每次前向查 padding", {}, ["config.pad_token_id=0"], [], False
        yield "每个微批量查 NaN", {}, ["args.logging_nan_inf_filter=true"], [], False


def settings(base, size, change):
    """一行的完整设置：(a100_train.py 的参数, 补丁)。"""
    _, flags, add, remove, _ = change
    merged = SIZES[size]["flags"] | (REFERENCE if base == "reference" else {}) | flags
    kept = [p for p in REFERENCE_PATCHES if not p.startswith(tuple(remove))] if base == "reference" else []
    arguments = [part for key, value in merged.items() for part in ([key] if value is True else [key, value])]
    return arguments, kept + [p for p in add if p not in kept]


def measured_peak():
    """本机的峰值：最快的一次大矩阵乘（显卡 8,192³ bf16，CPU 2,048³ fp32）。返回 (FLOP/s, 说明)。"""
    size, dtype, device = (8192, torch.bfloat16, "cuda") if CUDA else (2048, torch.float32, "cpu")
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(30):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"实测 {size:,}³ 的 {'bf16' if CUDA else 'fp32'} 矩阵乘"


def measure(base_dir, arguments, patches, steps, window, peak):
    """训练一次，返回一行的数字；办不到的返回 {"error"}。"""
    with tempfile.TemporaryDirectory() as folder:
        work_dir = Path(folder) / "work"
        link_data(base_dir, work_dir)
        schedule = ["--max_steps", steps, "--logging_steps", window, "--eval_steps", steps, "--no-snapshots"]
        result = train(work_dir, [*arguments, *schedule], ["extras=off", *patches], timeout=900)
    if result["error"]:
        known = result["error"].startswith("错误：")  # a100_train.py 自己说办不到；否则是真的出了错
        return {"error": result["error"].removeprefix("错误："), "failed": not known}
    logs = [row for row in result["rows"] if "loss" in row]
    speeds = [row["tokens_per_second"] for row in logs[2:]]  # 第 1 步和头一段在编译和预热
    speed = statistics.median(speeds)
    config = result["config"]
    usual = logs[1]["step"] * config["tokens_per_step"] / speed
    return {
        "tokens_per_second": round(speed, 1),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "windows": len(speeds),
        "first_window_extra_seconds": round(logs[1]["elapsed_seconds"] - usual, 2),
        "mfu": round(speed * config["flops_per_token"] / peak, 4),
        "eval_loss": [row["eval_loss"] for row in result["rows"] if "eval_loss" in row][-1],
        "train_loss": round(logs[-1]["loss"], 4),
        "parameters": config["parameters"],
        "chosen": {key: config[key] for key in CHOSEN},
        "wall_seconds": result["seconds"],
        **result["report"],
    }


def table(rows, base):
    """一个出发点的 Markdown 表。"""
    mine = {key.split("/", 1)[1]: row for key, row in rows.items() if key.startswith(f"{base}/")}
    lines = [
        "| 改的一处 | token/s（最慢–最快） | 比不改 | 峰值内存 GB | MFU | 首段多花 秒 | 验证损失 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in mine.items():
        if "error" in row:
            verdict = "失败" if row.get("failed") else "未测"
            lines.append(f"| {name} | {verdict} | | | | | {row['error'].replace('|', '/')} |")
            continue
        ratio = f"{row['tokens_per_second'] / row['unchanged']:.2f}×"
        lines.append(
            f"| {name} | {row['tokens_per_second']:,.0f}"
            f"（{row['slowest']:,.0f}–{row['fastest']:,.0f}） | {ratio} | "
            f"{row['peak_memory_bytes'] / 2**30:.2f} | {row['mfu']:.1%} | "
            f"{row['first_window_extra_seconds']:.1f} | {row['eval_loss']:.4f} |"
        )
    return lines


def write_results(path, document):
    write_atomic(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    rows = document["rows"]
    lines = [
        f"# 加速开关的消融：{document['device']}",
        "",
        f"命令：`{document['command']}`。日期 {document['date']}。",
        f"机器：{document['machine']}；{document['versions']}。模型 {document['size']}，每行训练 "
        f"{document['steps']} 步，每段 {document['window']} 步。"
        f"a100_train.py 的 SHA-256 以 {document['script']} 开头。",
        f"峰值：{document['peak_source']}，{document['peak_flops'] / 1e12:.2f} TFLOP/s；"
        "MFU = token/s × (6N + 12·L·d·T) ÷ 峰值。",
        "",
    ]
    if not CUDA:
        lines += ["没有显卡：这张表只证明消融程序能用，数字属于这颗 CPU；显卡上的行全部**未测**。", ""]
    for base, title in (("default", "从默认设置出发"), ("reference", "从公开参考的设置出发")):
        if any(key.startswith(base) for key in rows):
            lines += [f"## {title}", ""]
            if base == "reference":
                lines += [
                    f"参数 `{' '.join(settings(base, document['size'], ('', {}, [], [], 0))[0])}`，补丁 "
                    f"`{' '.join(REFERENCE_PATCHES)}`。",
                    "",
                ]
            lines += [*table(rows, base), ""]
    write_atomic(path.with_suffix(".md"), "\n".join(lines))


def waiting(document, base, only):
    """还没量过（或设置变了）的行：[(键, 参数, 补丁, 要什么设备)]，“不改”和什么也没有改的不在内。"""
    found = []
    unchanged = settings(base, document["size"], (UNCHANGED, {}, [], [], False))
    for change in changes(base, document["size"]):
        key = f"{base}/{change[0]}"
        arguments, patches = settings(base, document["size"], change)
        old = document["rows"].get(key, {})
        same = (old.get("arguments"), old.get("patches")) == (" ".join(arguments), patches)
        if (arguments, patches) != unchanged and not same and re.search(only or "", key):
            found.append((key, arguments, patches, change[4]))
    return found


def measure_unchanged(document, base, base_dir):
    """把“不改”再量一遍，记进它那一行；返回这一次的 token/s。"""
    arguments, patches = settings(base, document["size"], (UNCHANGED, {}, [], [], False))
    row = measure(base_dir, arguments, patches, document["steps"], document["window"], document["peak_flops"])
    if "error" in row:
        sys.exit(f"错误：什么也不改就跑不起来：{row['error']}")
    speeds = [*document["rows"].get(f"{base}/{UNCHANGED}", {}).get("repeats", []), row["tokens_per_second"]]
    middle = statistics.median(speeds)
    row |= {
        "tokens_per_second": middle,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "repeats": speeds,
        "mfu": round(row["mfu"] * middle / speeds[-1], 4),
        "unchanged": middle,
        "arguments": " ".join(arguments),
        "patches": patches,
        "date": time.strftime("%Y-%m-%d"),
    }
    rest = {key: value for key, value in document["rows"].items() if key != f"{base}/{UNCHANGED}"}
    document["rows"] = {f"{base}/{UNCHANGED}": row} | rest
    return speeds[-1]


def run_rows(path, document, base_dir, only, deadline):
    """量完还没量过的每一行；到点返回 False。"""
    for base in ("default", "reference"):
        unchanged = None
        since = 0
        for key, arguments, patches, needs in waiting(document, base, only):
            if time.time() > deadline:
                return False
            if needs is False or needs == ("cuda" if CUDA else "cpu"):
                if unchanged is None or since == 8:
                    unchanged = measure_unchanged(document, base, base_dir)
                    since = 0
                row = measure(
                    base_dir,
                    arguments,
                    patches,
                    document["steps"],
                    document["window"],
                    document["peak_flops"],
                )
                row["unchanged"] = unchanged
                since += 1
            else:
                row = {"error": "只在 CPU 上有意义" if CUDA else "没有 CUDA 显卡"}
            document["rows"][key] = {
                "arguments": " ".join(arguments),
                "patches": patches,
                "date": time.strftime("%Y-%m-%d"),
                **row,
            }
            write_results(path, document)
            print(key, row.get("tokens_per_second", "未测：" + row.get("error", "")), flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="full" if CUDA else "tiny", help="模型大小")
    parser.add_argument("--steps", type=int, help="每行训练多少步")
    parser.add_argument("--window", type=int, help="每段多少步")
    parser.add_argument("--corpus", nargs="+", help="语料，写法见 prepare_corpus.py")
    parser.add_argument("--base", type=Path, default=Path("ablation-work"), help="准备好的数据放在哪里")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="结果写到哪个文件夹")
    parser.add_argument("--budget_minutes", type=float, default=1e9, help="多少分钟后停，下次接着来")
    parser.add_argument("--only", help="只量名字（如 default/优化器 muon）匹配这个正则的行")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.budget_minutes
    size = SIZES[args.size]
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    path = args.results / f"ablation-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
    document = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": {}}
    script = hashlib.sha256((ROOT / "a100_train.py").read_bytes()).hexdigest()[:12]
    if document.get("script") != script:  # 训练脚本改过了，旧的行不能比
        document = {"rows": {}, "script": script}
    shape = {"size": args.size, "steps": args.steps or size["steps"], "window": args.window or size["window"]}
    if any(document.get(key, value) != value for key, value in shape.items()):
        sys.exit(f"错误：{path} 是用别的大小或步数量的；换一个 --results，或删掉它")
    if "peak_flops" not in document:
        peak, source = measured_peak()
        document |= {"peak_flops": peak, "peak_source": source}
    document |= (
        shape
        | provenance()
        | {"device": device, "threads": torch.get_num_threads(), "command": "python benchmarks/ablation.py"}
    )
    prepare(
        args.base.resolve(),
        [*(["--corpus", *args.corpus] if args.corpus else []), "--preset", size["flags"]["--preset"]],
    )
    finished = run_rows(path, document, args.base.resolve(), args.only, deadline)
    print("量完了" if finished else "到时间了；同一条命令再跑一次就接着来")


if __name__ == "__main__":
    main()
