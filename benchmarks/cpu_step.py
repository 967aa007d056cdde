#!/usr/bin/env python3
"""演示的训练速度，和同样大小的普通 PyTorch 循环放在一起量：Trainer 和 transformers 的模型各多花多少。

    python benchmarks/cpu_step.py                    # 结果写到 results/cpu_step.json 和 .md

三个选手，同样的初始权重、同一列数据块、同一个优化器，每人每次跑一小段，轮流来，机器忙闲对三个都一样：
    Trainer   a100_train.py 原样（带日志和停止信号），只关掉验证和存盘
    循环      同一个模型，手写的循环：前向、反向、裁剪、更新
    普通      自己写的 GPT-2（不用 transformers）加手写的循环
三个的损失应当几乎一样，否则就不是在比同一件事。每组另起一个进程：留不留住释放的内存（a100_train.py 的 main() 里那两行
mallopt）是整个进程的事。
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from common import ROOT, link_data, prepare, provenance, read_lines, write_atomic

sys.path.insert(0, str(ROOT))

import a100_train

# ==== 1. 普通的 GPT-2 ====


class Linear(torch.nn.Module):
    """权重按 (输入, 输出) 存，与 transformers 的 GPT-2 一样，所以初始权重和 Muon 的分组可以直接用。"""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(inputs, outputs))
        self.bias = torch.nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], -1)


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1 = torch.nn.LayerNorm(width)
        self.ln_2 = torch.nn.LayerNorm(width)
        self.attn = torch.nn.ModuleDict({"c_attn": Linear(width, 3 * width), "c_proj": Linear(width, width)})
        self.mlp = torch.nn.ModuleDict({"c_fc": Linear(width, 4 * width), "c_proj": Linear(4 * width, width)})

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, 头, T, 头的维数)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class PlainGPT2(torch.nn.Module):
    """输出层与词向量共用一个矩阵。forward 返回损失。"""

    def __init__(self, vocab_size, n_layer, n_embd, n_head, block_size):
        super().__init__()
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(vocab_size, n_embd),
                "wpe": torch.nn.Embedding(block_size, n_embd),
                "h": torch.nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer)),
                "ln_f": torch.nn.LayerNorm(n_embd),
            }
        )

    def forward(self, input_ids, labels):
        parts = self.transformer
        x = parts["wte"](input_ids) + parts["wpe"](torch.arange(input_ids.size(1), device=input_ids.device))
        for block in parts["h"]:
            x = block(x)
        logits = parts["ln_f"](x) @ parts["wte"].weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# ==== 2. 三个选手 ====


class HandLoop:
    """手写的训练循环；学习率曲线与 a100_train.py 相同。"""

    def __init__(self, model, optimizer, steps, dataset, batch_size):
        self.model = model
        self.optimizer = optimizer
        self.dataset = dataset
        self.batch_size = batch_size
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: a100_train.learning_rate_scale(step, steps)
        )
        self.step = 0
        self.losses = []

    def run(self, steps):
        for _ in range(steps):
            first = self.step * self.batch_size
            rows = [self.dataset[i] for i in range(first, first + self.batch_size)]
            batch = torch.utils.data.default_collate(rows)
            result = self.model(**batch)
            loss = result["loss"] if isinstance(result, dict) else result
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.losses.append(float(loss.detach()))


class TakeTurns(transformers.TrainerCallback):
    """Trainer 每走 window 步，停表，让另外两个各走同样多步，再接着计时。"""

    def __init__(self, window, others):
        self.window = window
        self.others = others
        self.started = None
        self.seconds = {"trainer": [], **{name: [] for name in others}}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.window:
            return
        now = time.perf_counter()
        if self.started:
            self.seconds["trainer"].append(now - self.started)
        for name, loop in self.others.items():
            start = time.perf_counter()
            loop.run(self.window)
            if self.started:  # 第一段是预热，三个都不算
                self.seconds[name].append(time.perf_counter() - start)
        self.started = time.perf_counter()


def build(base, work_dir, optimizer, steps, window):
    """照 a100_train.py 的样子建好 Trainer，但不验证、不存盘；返回 (s, trainer)。"""
    link_data(base, work_dir)
    sys.argv = [
        "a100_train.py",
        "--preset",
        "demo",
        "--device",
        "cpu",
        "--optim",
        optimizer,
        "--max_steps",
        str(steps),
        "--logging_steps",
        str(window),
        "--no-snapshots",
        "--work_dir",
        str(work_dir),
    ]
    s = a100_train.read_settings()
    a100_train.choose_device(s)
    a100_train.choose_speed(s)
    a100_train.choose_packages(s)
    a100_train.derive(s)
    trainer = a100_train.build_trainer(s, a100_train.StopRequest(s))
    trainer.args.save_strategy = "no"
    (observer,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, a100_train.Observer))
    observer.evaluate = lambda state, model: None
    return s, trainer


def compare(base, optimizer, windows, window):
    """返回 {选手: {"tokens_per_second", "seconds"（每一段）, "loss"}}。"""
    steps = (windows + 1) * window
    with tempfile.TemporaryDirectory() as folder:
        s, trainer = build(base, Path(folder) / "work", optimizer, steps, window)
        same = a100_train.build_model(s)
        plain = PlainGPT2(s.vocab_size, s.n_layer, s.n_embd, s.n_head, s.block_size)
        plain.load_state_dict({name: p for name, p in same.state_dict().items() if name != "lm_head.weight"})
        others = {
            name: HandLoop(
                model, a100_train.build_optimizer(model, s), steps, trainer.train_dataset, s.batch_size
            )
            for name, model in (("loop", same), ("plain", plain))
        }
        turns = TakeTurns(window, others)
        trainer.add_callback(turns)
        trainer.train()
        rows = read_lines(s.work_dir / "train_log.jsonl")
    losses = {"trainer": [row["loss"] for row in rows if "loss" in row][-1]}  # 日志每 window 步平均一次
    losses |= {name: statistics.mean(loop.losses[-window:]) for name, loop in others.items()}
    return {
        name: {
            "tokens_per_second": round(window * s.tokens_per_step / statistics.median(seconds), 1),
            "seconds": [round(each, 4) for each in seconds],
            "loss": round(losses[name], 4),
        }
        for name, seconds in turns.seconds.items()
    }


# ==== 3. 结果 ====

NAMES = {
    "trainer": "Trainer（a100_train.py）",
    "loop": "同一个模型 + 手写循环",
    "plain": "普通 GPT-2 + 手写循环",
}
GROUPS = {
    "muon": "Muon",
    "adamw_torch_fused": "AdamW（fused）",
    "muon-malloc": "Muon，不留住内存",
    "adamw_torch_fused-malloc": "AdamW（fused），不留住内存",
}


def comparison_lines(groups):
    lines = [
        "| 优化器 | 选手 | token/s（中位数） | 比普通循环 | 最后一段的损失 |",
        "|---|---|---:|---:|---:|",
    ]
    for group, runs in groups.items():
        for name, run in runs.items():
            # 比值按同一轮的三段比，再取中位数：机器的快慢变化对三个都一样
            pairs = zip(runs["plain"]["seconds"], run["seconds"], strict=True)
            ratio = statistics.median(plain / mine for plain, mine in pairs)
            lines.append(
                f"| {GROUPS[group]} | {NAMES[name]} | {run['tokens_per_second']:,.0f} | "
                f"{ratio:.3f} | {run['loss']:.4f} |"
            )
    return lines


def write_results(folder, document):
    write_atomic(folder / "cpu_step.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    write_atomic(
        folder / "cpu_step.md",
        "\n".join(
            [
                "# 演示的每一步：Trainer 与普通 PyTorch 循环",
                "",
                f"命令：`{document['command']}`。日期 {document['date']}。",
                f"机器：{document['machine']}，{document['threads']} 个线程；{document['versions']}。",
                "",
                f"演示的模型和批量（每步 2,048 token），每个选手 {document['windows']} 段，每段 {document['window']} 步，"
                "轮流跑；预热的一段不算。",
                "",
                *comparison_lines(document["groups"]),
                "",
            ]
        ),
    )


def in_new_process(group, output):
    """在新进程里量一组，结果从 output（JSON）读回来。"""
    command = [sys.executable, __file__, *sys.argv[1:], "--group", group, "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text("utf-8"))


def measure_group(group, base, windows, window):
    optimizer, _, malloc = group.partition("-")
    if not malloc and sys.platform == "linux":  # 与 a100_train.py 的 main() 相同
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 1 << 30)
    return compare(base, optimizer, windows, window)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=15, help="每个选手计时多少段")
    parser.add_argument("--window", type=int, default=10, help="每段多少步")
    parser.add_argument("--base", type=Path, default=Path("cpu-step-work"), help="准备好的数据放在哪里")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="结果写到哪个文件夹")
    parser.add_argument("--group", choices=list(GROUPS), help="只在本进程里量这一组（内部用）")
    parser.add_argument("--output", type=Path, help="--group 的结果写到这里")
    args = parser.parse_args()
    base = args.base.resolve()
    if args.group:
        result = measure_group(args.group, base, args.windows, args.window)
        return write_atomic(args.output, json.dumps(result, ensure_ascii=False))
    prepare(base, ["--preset", "demo"])
    with tempfile.TemporaryDirectory() as folder:
        document = {
            "command": "python benchmarks/cpu_step.py",
            **provenance(),
            "threads": torch.get_num_threads(),
            "windows": args.windows,
            "window": args.window,
            "groups": {group: in_new_process(group, Path(folder) / "group.json") for group in GROUPS},
        }
    write_results(args.results, document)
    print("\n".join(comparison_lines(document["groups"])))
    return None


if __name__ == "__main__":
    main()
