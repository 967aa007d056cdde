#!/usr/bin/env python3
"""在演示上做实验：先猜，再跑，再比。问题、量到的表和原因在 docs/experiments.md。

    python benchmarks/experiments.py                        # 有哪些实验
    python benchmarks/experiments.py layers                 # 做一个：各变体训练一次，几分钟
    python benchmarks/experiments.py layers --seeds 42 43 44    # 三个种子：看得出差别有没有大过运气
    python benchmarks/experiments.py layers --step_times    # 重新量一步的 CPU 时间，同样的时间是多少步由它定
    python benchmarks/experiments.py --table                # 只由日志重写表

一个变体就是用另外的选项运行一次 a100_train.py。日志在 results/experiments/实验-变体-s种子.jsonl：第一行是命令、机器、日期和
版本，其后是那次训练的 train_log.jsonl。已经有日志的不再跑，所以中断了再来一次，就接着做。
只看损失，不看时间：机器忙不忙，结果都一样。
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from common import ROOT, link_data, prepare, provenance, read_lines, train, write_atomic

sys.path.insert(0, str(ROOT))
import a100_train

RESULTS = ROOT / "results" / "experiments"
GUIDE = ROOT / "docs" / "experiments.md"

# ==== 1. 实验 ====

# 演示训练 1,350 步；这里 400 步，一个实验就只要几分钟。400 × 32 块 × 64 token = 819,200 token，是语料的三分之一。
STEPS = 400
BASE = f"--preset demo --device cpu --no-snapshots --logging_steps 50 --max_steps {STEPS}"
TITLES = {
    "learning_rate": "学习率减半、加倍",
    "optimizer": "AdamW 代替 Muon",
    "layers": "1、2、4 层，用同样的时间",
    "context": "上下文 16、64、256，读同样多的 token",
    "vocabulary": "词表 600、4,500、12,000，读同样多的文字",
    "epochs": "十分之一的文字，读十遍",
    "batch": "批量 8、32、128，读同样多的 token",
    "positions": "不要位置向量",
    "recipe": "更好的演示：用同样的时间",
}
# 实验 -> 变体 -> (中文名, 选项)。选项接在 BASE 后面；“补丁:”开头的交给 patched_train.py。演示本身叫 base，各实验共用。
BASELINE = ("演示", "")
EXPERIMENTS = {
    "learning_rate": {
        "eighth": ("学习率 ÷ 8", "--learning_rate 0.002 --muon_learning_rate 0.0025"),
        "half": ("学习率 ÷ 2", "--learning_rate 0.008 --muon_learning_rate 0.01"),
        "base": BASELINE,
        "double": ("学习率 × 2", "--learning_rate 0.032 --muon_learning_rate 0.04"),
        "eightfold": ("学习率 × 8", "--learning_rate 0.128 --muon_learning_rate 0.16"),
    },
    "optimizer": {
        "base": ("Muon（演示）", ""),
        "adamw-15e-4": ("AdamW，1.5e-3", "--optim adamw_torch --learning_rate 0.0015"),
        "adamw": ("AdamW，3e-3（它的默认值）", "--optim adamw_torch"),
        "adamw-6e-3": ("AdamW，6e-3", "--optim adamw_torch --learning_rate 0.006"),
    },
    "layers": {
        "1": ("1 层", "--n_layer 1 --max_steps {steps}"),
        "base": ("2 层（演示）", ""),
        "4": ("4 层", "--n_layer 4 --max_steps {steps}"),
    },
    "context": {
        "16": ("上下文 16", "--block_size 16 --batch_size 128 --effective_batch_size 128"),
        "base": ("上下文 64（演示）", ""),
        "256": ("上下文 256", "--block_size 256 --batch_size 8 --effective_batch_size 8"),
    },
    "vocabulary": {
        "600": ("词表 600", "--vocab_size 600 --max_steps {steps}"),
        "base": ("词表 4,500（演示）", ""),
        "12000": ("词表 12,000", "--vocab_size 12000 --max_steps {steps}"),
    },
    "epochs": {
        "base": ("文字读一遍（演示）", ""),
        "ten": ("十分之一的文字，读十遍", "补丁:blocks=tenth"),
    },
    "batch": {
        "8": ("批量 8", f"--batch_size 8 --effective_batch_size 8 --max_steps {STEPS * 4}"),
        "base": ("批量 32（演示）", ""),
        "128": ("批量 128", f"--batch_size 32 --effective_batch_size 128 --max_steps {STEPS // 4}"),
    },
    "positions": {
        "base": ("有位置向量（演示）", ""),
        "none": ("没有位置向量", "补丁:positions=off"),
    },
    "recipe": {
        "base": BASELINE,
        "vectors": ("偏置和 LayerNorm 的学习率 ÷ 4", "补丁:vectors=0.25"),
        "context-128": ("上下文 128", "--block_size 128 --batch_size 16 --effective_batch_size 16"),
        "no-decay": ("没有权重衰减", "补丁:WEIGHT_DECAY=0"),
        "heads-2": ("2 个头", "--n_head 2"),
        "beta2": ("β2 = 0.99", "补丁:BETAS=[0.9,0.99]"),
        "warmup": ("预热 1 %", "补丁:WARMUP=0.01"),
        "wide": ("1 层，192 维", "--n_layer 1 --n_embd 192 --max_steps {steps}"),
    },
}


def settle(name, variant):
    """一个变体的选项，{steps} 换成算出来的步数。返回 (选项的列表, 补丁的列表)。"""
    text = EXPERIMENTS[name][variant][1]
    if "{steps}" in text:
        text = text.format(steps=steps_for(name, variant))
    options = []
    patches = []
    for word in text.split():
        if word.startswith("补丁:"):
            patches.append(word.removeprefix("补丁:"))
        else:
            options.append(word)
    return options, patches


def steps_for(name, variant):
    """让变体与演示一样多的步数：layers 按量到的一步的时间，vocabulary 按同样多的字。"""
    measured = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return round(STEPS * measured["base"] / measured[variant])


# ==== 2. 训练一个变体 ====


def all_arguments(options, seed=42):
    """BASE、变体的选项、种子；只在最后一步验证（同一个选项写了两次，算后一次的）。"""
    arguments = [*BASE.split(), *options]
    steps = [value for option, value in pairwise(arguments) if option == "--max_steps"]
    return [*arguments, "--eval_steps", steps[-1], "--seed", str(seed)]


def vocabulary_of(options):
    """选项里的词表大小；没写就是演示的 4,500。"""
    if "--vocab_size" not in options:
        return "4500"
    return options[options.index("--vocab_size") + 1]


def data_folder(work, vocabulary):
    """这个词表的语料、分词器和打包好的 token；没有就做。"""
    folder = work / f"data-{vocabulary}"
    prepare(folder, ["--preset", "demo", "--vocab_size", vocabulary])
    return folder


def commit():
    """代码的版本；不是 git 下载的，是空字符串。"""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:
        return ""


def log_path(name, variant, seed):
    """演示的日志各实验共用，所以不带实验的名字。"""
    if variant == "base":
        return RESULTS / f"base-s{seed}.jsonl"
    return RESULTS / f"{name}-{variant}-s{seed}.jsonl"


def run_variant(name, variant, seed, work):
    """训练一次，写日志；已经有日志就什么也不做。"""
    path = log_path(name, variant, seed)
    if path.exists():
        return
    options, patches = settle(name, variant)
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    link_data(data_folder(work, vocabulary_of(options)), folder)
    arguments = all_arguments(options, seed)
    print(f"{TITLES[name]}：{EXPERIMENTS[name][variant][0]}，种子 {seed}", flush=True)
    result = train(folder, arguments, patches)
    if result["error"]:
        sys.exit(f"错误：{path.stem} 没有训练完：{result['error']}")
    head = {
        "command": " ".join(["python a100_train.py", *arguments]),
        "patches": patches,
        "commit": commit(),
        "parameters": result["config"]["parameters"],
        "tokens_per_step": result["config"]["tokens_per_step"],
        **provenance(),
    }
    lines = [json.dumps(row, ensure_ascii=False) for row in [head, *result["rows"]]]
    write_atomic(path, "\n".join(lines) + "\n")
    shutil.rmtree(folder)


def run_experiment(name, seeds, work):
    """一个实验的各变体，各种子训练一次，再印出表。"""
    if name == "vocabulary":
        measure_characters(name, work)
    for seed in seeds:
        for variant in EXPERIMENTS[name]:
            run_variant(name, variant, seed, work)
    print(table(name) or "只有演示本身，没有可比的")


# ==== 3. 同样的时间、同样多的字，各是多少步 ====


def measure_step_times(name, work, rounds=25):
    """步数由时间定的各变体，一步的 CPU 秒，一个线程。轮流各做一步，取中位数：机器忽快忽慢，比例还是对的。"""
    torch.set_num_threads(1)
    folder = work / "step-times"
    shutil.rmtree(folder, ignore_errors=True)
    link_data(data_folder(work, "4500"), folder)
    config = train(folder, all_arguments(["--max_steps", "1"]))["config"]
    steps = {}
    for variant, (_, text) in EXPERIMENTS[name].items():
        if variant != "base" and "{steps}" not in text:  # 步数不由时间定的，不用量
            continue
        words = text.replace("--max_steps {steps}", "").split()
        changes = {key[2:]: int(value) for key, value in zip(words[::2], words[1::2], strict=True)}
        steps[variant] = training_steps(argparse.Namespace(**config | changes), folder)
    seconds = {variant: [] for variant in steps}
    for _ in range(rounds):
        for variant, one_step in steps.items():
            start = time.process_time()
            next(one_step)
            seconds[variant].append(time.process_time() - start)
    report = {variant: round(statistics.median(values), 5) for variant, values in seconds.items()}
    report |= {
        "what": "一步的 CPU 秒，一个线程，中位数",
        "rounds": rounds,
        "commit": commit(),
        **provenance(),
    }
    write_atomic(RESULTS / f"{name}.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")


def training_steps(settings, folder):
    """每要一次，就训练一步。"""
    model = a100_train.build_model(settings)
    groups = a100_train.parameter_groups(model, settings.learning_rate, settings.muon_learning_rate)
    optimizer = a100_train.Muon(groups)
    size = settings.effective_batch_size
    blocks = a100_train.BlockStream(folder / "packed" / "train.bin", settings.block_size, size, settings.seed)
    batch = torch.utils.data.default_collate([blocks[i] for i in range(size)])
    while True:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def measure_characters(name, work):
    """各词表每个 token 平均几个字，在验证集上数。"""
    report = {}
    for variant in EXPERIMENTS[name]:
        vocabulary = "4500" if variant == "base" else variant
        meta = json.loads((data_folder(work, vocabulary) / "packed" / "meta.json").read_text("utf-8"))
        sources = meta["eval_sources"].values()
        characters = sum(source["characters"] for source in sources)
        tokens = sum(source["end"] - source["start"] for source in sources)
        report[variant] = round(characters / tokens, 4)
    report |= {"what": "每个 token 几个字", **provenance()}
    write_atomic(RESULTS / f"{name}.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")


# ==== 4. 表 ====


def read_results(name, variant):
    """一个变体的各次训练：[(第一行, 最后一次验证, 最后记下的训练损失)]。"""
    pattern = log_path(name, variant, "*").name
    results = []
    for path in sorted(RESULTS.glob(pattern)):
        head, *rows = read_lines(path)
        evaluation = [row for row in rows if "eval_loss" in row][-1]
        train_loss = [row["loss"] for row in rows if "loss" in row][-1]
        results.append((head, evaluation, train_loss))
    return results


def compare(values, base):
    """与演示的平均相差多少；比两边各自的起伏（最高减最低）都小的，算没有差别。"""
    difference = statistics.mean(values) - statistics.mean(base)
    spread = max(max(values) - min(values), max(base) - min(base))
    if len(values) < 2 or len(base) < 2:
        return f"{difference:+.3f}（只有一个种子）"
    if abs(difference) <= spread:
        return f"没有（{difference:+.3f}，在起伏 {spread:.3f} 之内）"
    return f"{difference:+.3f}"


def table(name):
    """一个实验的 Markdown 表。没有跑过的变体不写；除了演示都没有跑过，是空字符串。"""
    base = [evaluation["eval_bits_per_char"] for _, evaluation, _ in read_results(name, "base")]
    lines = [
        "| 变体 | 种子 | 步 × 每步 token | 训练损失 | 验证损失 | **每字比特**（最低–最高） | 与演示的差别 |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    heads = []
    compared = 0
    for variant, (label, _) in EXPERIMENTS[name].items():
        results = read_results(name, variant)
        if not results:
            continue
        if variant != "base":
            compared += 1
        heads += [head for head, _, _ in results]
        bits = [evaluation["eval_bits_per_char"] for _, evaluation, _ in results]
        eval_loss = statistics.mean(evaluation["eval_loss"] for _, evaluation, _ in results)
        train_loss = statistics.mean(loss for _, _, loss in results)
        steps = results[0][1]["step"]
        difference = "" if variant == "base" else compare(bits, base)
        lines.append(
            f"| {label} | {len(results)} | {steps:,} × {results[0][0]['tokens_per_step']:,} | {train_loss:.3f} | "
            f"{eval_loss:.3f} | **{statistics.mean(bits):.3f}**（{min(bits):.3f}–{max(bits):.3f}） | "
            f"{difference} |"
        )
    if compared == 0:
        return ""
    dates = sorted({head["date"] for head in heads})
    commits = sorted({head["commit"] for head in heads})
    lines += [
        "",
        f"每个数是各种子的平均。`python benchmarks/experiments.py {name} --seeds 42 43 44`；{heads[0]['machine']}，一个线程；"
        f"{heads[0]['versions']}；{'、'.join(dates)}；提交 {'、'.join(commits)}。",
    ]
    return "\n".join(lines)


def write_tables():
    """results/experiments/README.md 里全部的表，和 docs/experiments.md 里“表”与“表完”之间的。"""
    parts = [
        "# 实验的表",
        "`python benchmarks/experiments.py --table` 由这个文件夹里的日志写成；问题和原因在 docs/experiments.md。",
        "每个数是各种子的平均；与演示的差别比起伏（同一变体各种子最高减最低）小的，写“没有”。",
    ]
    for name, title in TITLES.items():
        text = table(name)
        if text:
            parts += [f"## {title}", text]
    write_atomic(RESULTS / "README.md", "\n\n".join(parts) + "\n")
    if GUIDE.exists():
        old = GUIDE.read_text("utf-8")
        new = re.sub(r"(?s)(<!-- 表 (\w+) -->).*?(<!-- 表完 -->)", fill_in, old)
        if new != old:
            write_atomic(GUIDE, new)


def fill_in(match):
    return f"{match[1]}\n\n{table(match[2])}\n\n{match[3]}"


# ==== 5. 主程序 ====


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="实验", help="、".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="随机种子，各训练一次")
    parser.add_argument("--work_dir", type=Path, default=Path("run-experiments"), help="数据放在哪里")
    parser.add_argument("--step_times", action="store_true", help="只量一步的 CPU 时间")
    parser.add_argument("--table", action="store_true", help="只由日志重写表")
    args = parser.parse_args()
    for name in args.names:
        if name not in EXPERIMENTS:
            sys.exit(f"错误：没有实验 {name}；可以是 {'、'.join(EXPERIMENTS)}")
    if args.table:
        write_tables()
        return
    if not args.names:
        for name, title in TITLES.items():
            print(f"{name:15}{title}")
        return
    for name in args.names:
        if args.step_times:
            measure_step_times(name, args.work_dir)
        else:
            run_experiment(name, args.seeds, args.work_dir)
    write_tables()


if __name__ == "__main__":
    main()
