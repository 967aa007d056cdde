#!/usr/bin/env python3
"""演示的训练速度，和同样大小的普通 PyTorch 循环放在一起量：Trainer、日志、验证各多花多少。

    python benchmarks/cpu_step.py                    # 结果写到 results/cpu_step.json 和 .md
    python benchmarks/cpu_step.py --profile          # 另外写 results/cpu_step_profile.md：最耗时的算子和函数

三个选手，同样的初始权重、同一列数据块、同一个优化器，每人每次跑一小段，轮流来，机器忙闲对三个都一样：
    Trainer   a100_train.py 原样（GPT2Trainer，带进度、日志、检查）
    循环      同一个模型，手写的循环：前向、反向、裁剪、更新
    普通      自己写的 GPT-2（不用 transformers）加手写的循环
三个的损失应当几乎一样，否则就不是在比同一件事。验证、续写、存盘的时间从一次完整的演示算（results/demo）。
"""

import argparse
import cProfile
import io
import json
import os
import pstats
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from common import ROOT, prepare, provenance, read_lines, write_atomic

sys.path.insert(0, str(ROOT))

import a100_train  # noqa: E402


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
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
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


def build(base, work_dir, optimizer, steps, options=()):
    """照 a100_train.py 的样子建好 Trainer；返回 (args, config, trainer)。"""
    for name in ("corpus", "tokenizer", "packed"):
        if not (work_dir / name).exists():
            shutil.copytree(base / name, work_dir / name)
    sys.argv = ["a100_train.py", "--preset", "demo", "--device", "cpu", "--optim", optimizer, "--fresh",
                "--max_steps", str(steps), "--eval_steps", "1000000", "--work_dir", str(work_dir), *options]
    args, explicit = a100_train.parse_arguments()
    a100_train.check_arguments(args)
    meta, config, checkpoint = a100_train.make_plan(args, explicit)
    trainer = a100_train.build_trainer(args, meta, config, checkpoint, args.batch_size)
    trainer.args.eval_on_start = False
    trainer.evaluate = lambda *_, **__: {}
    trainer._save_checkpoint = lambda *_, **__: None        # 验证和存盘另算，这里只量每一步
    trainer.add_callback(a100_train.Progress(trainer, a100_train.StopRequest(None)))
    return args, config, trainer


def compare(base, optimizer, windows, window, options=()):
    """返回 {选手: {"tokens_per_second", "seconds"（每一段）, "loss"}}。"""
    steps = (windows + 1) * window
    with tempfile.TemporaryDirectory() as folder:
        args, config, trainer = build(base, Path(folder) / "work", optimizer, steps, options)
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


# ==== 3. 剖析 ====

def profile(base, optimizer, steps):
    """Trainer 跑 steps 步：torch.profiler 的算子表和 cProfile 的函数表（前几步预热不算）。返回两段文字。"""
    from torch.profiler import ProfilerActivity
    with tempfile.TemporaryDirectory() as folder:
        _, _, trainer = build(base, Path(folder) / "work", optimizer, 2 * steps)
        torch_profiler, python_profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU]), cProfile.Profile()

        class Switch(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 5:
                    torch_profiler.start()
                if state.global_step == steps:
                    torch_profiler.stop()
                    python_profiler.enable()
        trainer.add_callback(Switch())
        trainer.train()
        python_profiler.disable()
    operators = torch_profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20,
                                                    max_name_column_width=40)
    text = io.StringIO()
    pstats.Stats(python_profiler, stream=text).sort_stats("tottime").print_stats(25)
    functions = text.getvalue().split("\n")
    short = [line.replace(os.path.dirname(transformers.__file__), "transformers").replace(str(ROOT), ".")
             for line in functions if line.strip()]
    return operators, "\n".join(short)


# ==== 4. 结果 ====

def demo_overhead():
    """一次完整的演示里（results/demo），验证、续写、存盘占训练时间的多少：由 console.log 里的两个时刻算。"""
    rows = read_lines(ROOT / "results" / "demo" / "train_log.jsonl")
    return [row for row in rows if "elapsed_seconds" in row][-1]["elapsed_seconds"]


def write_results(folder, results, command, windows, window):
    result = {"command": command, **provenance(), "threads": torch.get_num_threads(),
              "windows": windows, "steps_per_window": window, "results": results}
    write_atomic(folder / "cpu_step.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=15, help="每个选手计时多少段")
    parser.add_argument("--window", type=int, default=10, help="每段多少步")
    parser.add_argument("--base", type=Path, default=Path("cpu-step-work"), help="准备好的数据放在哪里")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="结果写到哪个文件夹")
    parser.add_argument("--profile", action="store_true", help="也写剖析表")
    args = parser.parse_args()
    command = f"python benchmarks/cpu_step.py {' '.join(sys.argv[1:])}".strip()
    prepare(args.base.resolve(), ["--preset", "demo"])
    results = {name: compare(args.base.resolve(), name, args.windows, args.window)
               for name in ("muon", "adamw_torch_fused")}
    for name, runs in results.items():
        print(name, {key: (run["tokens_per_second"], run["loss"]) for key, run in runs.items()})
    write_results(args.results, results, command, args.windows, args.window)
    if args.profile:
        operators, functions = profile(args.base.resolve(), "muon", 40)
        print(operators, functions)


if __name__ == "__main__":
    main()
