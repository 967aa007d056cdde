#!/usr/bin/env python3
"""演示的训练速度，和同样大小的普通 PyTorch 循环放在一起量：Trainer、日志、验证各多花多少。

    python benchmarks/cpu_step.py                    # 结果写到 results/cpu_step.json 和 .md

三个选手，同样的初始权重、同一列数据块、同一个优化器，每人每次跑一小段，轮流来，机器忙闲对三个都一样：
    Trainer   a100_train.py 原样（GPT2Trainer，带进度、日志、坏数检查）
    循环      同一个模型，手写的循环：前向、反向、裁剪、更新
    普通      自己写的 GPT-2（不用 transformers）加手写的循环
三个的损失应当几乎一样，否则就不是在比同一件事。每组另起一个进程：留不留住释放的内存（keep_freed_memory）是整个进程的事。
另有一段完整的训练，量验证、续写、存盘占多少；一段剖析，列出最耗时的算子和函数。
"""

import argparse
import cProfile
import io
import json
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from common import ROOT, prepare, provenance, read_lines, write_atomic

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
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.ModuleDict({"c_attn": Linear(width, 3 * width), "c_proj": Linear(width, width)})
        self.mlp = torch.nn.ModuleDict({"c_fc": Linear(width, 4 * width), "c_proj": Linear(4 * width, width)})

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))                  # (B, 头, T, 头的维数)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class PlainGPT2(torch.nn.Module):
    """输出层与词向量共用一个矩阵。forward 返回损失。"""

    def __init__(self, vocab_size, n_layer, n_embd, n_head, block_size):
        super().__init__()
        self.transformer = torch.nn.ModuleDict({
            "wte": torch.nn.Embedding(vocab_size, n_embd), "wpe": torch.nn.Embedding(block_size, n_embd),
            "h": torch.nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer)),
            "ln_f": torch.nn.LayerNorm(n_embd)})

    def forward(self, input_ids, labels):
        parts = self.transformer
        x = parts["wte"](input_ids) + parts["wpe"](torch.arange(input_ids.size(1), device=input_ids.device))
        for block in parts["h"]:
            x = block(x)
        logits = parts["ln_f"](x) @ parts["wte"].weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# ==== 2. 三个选手 ====

class HandLoop:
    """手写的训练循环；学习率曲线与 Trainer 的相同（transformers 的余弦）。"""

    def __init__(self, model, optimizer, steps, warmup, dataset, batch_size):
        self.model, self.optimizer, self.dataset, self.batch_size = model, optimizer, dataset, batch_size
        self.schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        self.step, self.losses = 0, []

    def run(self, steps):
        for _ in range(steps):
            first = self.step * self.batch_size
            batch = self.dataset.__getitems__(range(first, first + self.batch_size))
            result = self.model(**batch)
            loss = result["loss"] if isinstance(result, dict) else result
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.losses.append(float(loss.detach()))


def make_optimizer(name, model, args):
    if name == "muon":
        groups = a100_train.muon_groups(model, args.learning_rate, args.muon_learning_rate, args.weight_decay)
        return a100_train.Muon(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


class TakeTurns(transformers.TrainerCallback):
    """Trainer 每走 window 步，停表，让另外两个各走同样多步，再接着计时。"""

    def __init__(self, window, others):
        self.window, self.others, self.started = window, others, None
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
            if self.started:                  # 第一段是预热，三个都不算
                self.seconds[name].append(time.perf_counter() - start)
        self.started = time.perf_counter()


def build(base, work_dir, optimizer, steps, eval_steps=10**6):
    """照 a100_train.py 的样子建好 Trainer；返回 (args, config, trainer)。"""
    for name in ("corpus", "tokenizer", "packed"):
        if not (work_dir / name).exists():
            shutil.copytree(base / name, work_dir / name)
    sys.argv = ["a100_train.py", "--preset", "demo", "--device", "cpu", "--optim", optimizer, "--fresh",
                "--max_steps", str(steps), "--eval_steps", str(eval_steps), "--work_dir", str(work_dir)]
    args, explicit = a100_train.parse_arguments()
    a100_train.check_arguments(args)
    meta, config, checkpoint = a100_train.make_plan(args, explicit)
    trainer = a100_train.build_trainer(args, meta, config, checkpoint, args.batch_size)
    if eval_steps > steps:                                   # 验证和存盘另算，这里只量每一步
        trainer.args.eval_on_start = False
        trainer.evaluate, trainer._save_checkpoint = lambda *_, **__: {}, lambda *_, **__: None
    trainer.add_callback(a100_train.Progress(trainer, a100_train.StopRequest(None)))
    return args, config, trainer


def compare(base, optimizer, windows, window, keep_memory):
    """返回 {选手: {"tokens_per_second", "seconds"（每一段）, "loss"}}。"""
    if keep_memory:
        a100_train.keep_freed_memory()
    steps = (windows + 1) * window
    with tempfile.TemporaryDirectory() as folder:
        args, config, trainer = build(base, Path(folder) / "work", optimizer, steps)
        same = a100_train.build_model(config["vocab_size"], args.n_layer, args.n_embd, args.n_head,
                                      args.block_size, "sdpa", False, args.seed)
        plain = PlainGPT2(config["vocab_size"], args.n_layer, args.n_embd, args.n_head, args.block_size)
        weights = {name: value for name, value in same.state_dict().items() if name != "lm_head.weight"}
        plain.load_state_dict(weights)
        warmup = round(steps * args.warmup_ratio)
        others = {name: HandLoop(model, make_optimizer(optimizer, model, args), steps, warmup,
                                 trainer.train_dataset, args.batch_size)
                  for name, model in (("loop", same), ("plain", plain))}
        turns = TakeTurns(window, others)
        trainer.add_callback(turns)
        trainer.train()
        rows = read_lines(Path(folder) / "work" / "train_log.jsonl")
    losses = {"trainer": [row["loss"] for row in rows if "loss" in row][-1]}      # 日志每 10 步平均一次
    losses |= {name: statistics.mean(loop.losses[-args.logging_steps:]) for name, loop in others.items()}
    tokens = window * config["effective_batch_size"] * config["block_size"]
    return {name: {"tokens_per_second": round(tokens / statistics.median(seconds), 1),
                   "seconds": [round(s, 4) for s in seconds], "loss": round(losses[name], 4)}
            for name, seconds in turns.seconds.items()}


class Stopwatch:
    """包住一个函数，累计它用了多少秒。"""

    def __init__(self, function):
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds, self.calls = self.seconds + time.perf_counter() - start, self.calls + 1


def overheads(base, steps):
    """照演示的间隔验证、续写、存盘，完整训练 steps 步；返回各占多少秒。"""
    a100_train.keep_freed_memory()
    preset = a100_train.PRESETS["demo"]
    with tempfile.TemporaryDirectory() as folder:
        _, config, trainer = build(base, Path(folder) / "work", "muon", steps, preset["eval_steps"])
        parts = {"验证": Stopwatch(a100_train.evaluate), "续写": Stopwatch(a100_train.generate_samples),
                 "等画图": Stopwatch(a100_train.plot_curve)}
        a100_train.evaluate, a100_train.generate_samples, a100_train.plot_curve = parts.values()
        parts["存盘"] = trainer._save_checkpoint = Stopwatch(trainer._save_checkpoint)
        parts["写日志"] = Stopwatch(trainer.log)
        trainer.log = parts["写日志"]
        start = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - start
        if trainer.plot is not None:
            trainer.plot.wait()
    return {"steps": steps, "total_seconds": round(total, 2),
            "tokens_per_second": round(steps * trainer.tokens_per_step / total, 1),
            "parts": {name: {"seconds": round(watch.seconds, 2), "calls": watch.calls}
                      for name, watch in parts.items()}}


# ==== 3. 剖析 ====

class Switch(transformers.TrainerCallback):
    """第 5 步打开算子剖析，第 steps 步换成函数剖析。"""

    def __init__(self, steps, operators, functions):
        self.steps, self.operators, self.functions = steps, operators, functions

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.operators.start()
        if state.global_step == self.steps:
            self.operators.stop()
            self.functions.enable()


def profile(base, steps):
    """Trainer 跑两个 steps 步：先用 torch.profiler，再用 cProfile。返回 {"operators", "functions"} 两张文字表。"""
    a100_train.keep_freed_memory()
    operators = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    functions = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        _, _, trainer = build(base, Path(folder) / "work", "muon", 2 * steps)
        trainer.add_callback(Switch(steps, operators, functions))
        trainer.train()
        functions.disable()
    lines = [f"{'算子':<44}{'自身毫秒/步':>8}{'占比':>8}{'次/步':>8}"]
    events = sorted(operators.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total, counted = sum(event.self_cpu_time_total for event in events), steps - 5
    for event in events[:20]:
        own = event.self_cpu_time_total
        lines.append(f"{event.key[:42]:<44}{own / counted / 1000:>10.2f}{own / total:>10.1%}"
                     f"{event.count / counted:>8.0f}")
    text = io.StringIO()
    pstats.Stats(functions, stream=text).strip_dirs().sort_stats("tottime").print_stats(20)
    return {"operators": lines, "functions": [line.rstrip() for line in text.getvalue().split("\n")
                                              if line.strip() and not line.startswith("   Ordered")]}


# ==== 4. 结果 ====

NAMES = {"trainer": "Trainer（a100_train.py）", "loop": "同一个模型 + 手写循环", "plain": "普通 GPT-2 + 手写循环"}
GROUPS = {"muon": "Muon", "adamw_torch_fused": "AdamW（fused）", "muon-malloc": "Muon，不留住内存",
          "adamw_torch_fused-malloc": "AdamW（fused），不留住内存"}


def comparison_lines(groups):
    lines = ["| 优化器 | 选手 | token/s（中位数） | 比普通循环 | 最后 10 步的损失 |", "|---|---|---:|---:|---:|"]
    for group, runs in groups.items():
        for name, run in runs.items():
            # 比值按同一轮的三段比，再取中位数：机器的快慢变化对三个都一样
            pairs = zip(runs["plain"]["seconds"], run["seconds"], strict=True)
            ratio = statistics.median(plain / mine for plain, mine in pairs)
            lines.append(f"| {GROUPS[group]} | {NAMES[name]} | {run['tokens_per_second']:,.0f} | "
                         f"{ratio:.3f} | {run['loss']:.4f} |")
    return lines


def write_results(folder, document):
    write_atomic(folder / "cpu_step.json", json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    whole = document["overheads"]
    parts = [f"| {name} | {part['calls']} | {part['seconds']:.2f} | "
             f"{part['seconds'] / whole['total_seconds']:.1%} |"
             for name, part in whole["parts"].items()]
    notes = folder / "cpu_step_notes.md"
    write_atomic(folder / "cpu_step.md", "\n".join([
        "# 演示的每一步：Trainer 与普通 PyTorch 循环", "",
        f"命令：`{document['command']}`。日期 {document['date']}。",
        f"机器：{document['machine']}，{document['threads']} 个线程；{document['versions']}。", "",
        f"演示的模型和批量（每步 2,048 token），每个选手 {document['windows']} 段，每段 {document['window']} 步，"
        "轮流跑；预热的一段不算。", "",
        *([notes.read_text("utf-8")] if notes.exists() else []),
        *comparison_lines(document["groups"]), "",
        "## 验证、续写、存盘、画图", "",
        f"照演示的间隔完整训练 {whole['steps']} 步，共 {whole['total_seconds']:.1f} 秒"
        f"（{whole['tokens_per_second']:,.0f} token/s，一切都算在内）。画图在后台另一个进程里。", "",
        "| 部分 | 次数 | 秒 | 占总时间 |", "|---|---:|---:|---:|", *parts, "",
        "## 最耗时的算子（torch.profiler）", "", "```", *document["profile"]["operators"], "```", "",
        "## 最耗时的函数（cProfile，按自身时间）", "", "```", *document["profile"]["functions"], "```", ""]))


def in_new_process(task, output):
    """在新进程里做一件事，结果从 output（JSON）读回来。"""
    command = [sys.executable, __file__, *sys.argv[1:], "--task", task, "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text("utf-8"))


def do_task(task, base, windows, window):
    if task == "overheads":
        return overheads(base, 2 * a100_train.PRESETS["demo"]["eval_steps"])
    if task == "profile":
        return profile(base, 40)
    optimizer, _, malloc = task.partition("-")
    return compare(base, optimizer, windows, window, keep_memory=not malloc)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=15, help="每个选手计时多少段")
    parser.add_argument("--window", type=int, default=10, help="每段多少步")
    parser.add_argument("--base", type=Path, default=Path("cpu-step-work"), help="准备好的数据放在哪里")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="结果写到哪个文件夹")
    parser.add_argument("--task", help="只在本进程里做这一件事（内部用）")
    parser.add_argument("--output", type=Path, help="--task 的结果写到这里")
    args = parser.parse_args()
    base = args.base.resolve()
    if args.task:
        result = do_task(args.task, base, args.windows, args.window)
        return write_atomic(args.output, json.dumps(result, ensure_ascii=False))
    prepare(base, ["--preset", "demo"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "task.json"
        document = {"command": "python benchmarks/cpu_step.py", **provenance(),
                    "threads": torch.get_num_threads(), "windows": args.windows, "window": args.window,
                    "groups": {group: in_new_process(group, output) for group in GROUPS},
                    "overheads": in_new_process("overheads", output),
                    "profile": in_new_process("profile", output)}
    write_results(args.results, document)
    print("\n".join(comparison_lines(document["groups"])))


if __name__ == "__main__":
    main()
