#!/usr/bin/env python3
"""第 4 步：画损失曲线（loss curve）。读训练目录里的 train_log.jsonl 和 config.json，写一张 PNG，约一秒。

    python plot_loss.py                                   # 画 gpt2-chinese/；训练完会自己画一张
    python plot_loss.py run_a run_b --output compare.png  # 比较两次训练；分词器不同就用每字比特

怎么看：浅色是每次日志的训练损失，深色是它的平均，圆点是验证集（没有拿来训练的文字）。横线是两把尺子：ln V 是对 V 个词块
一无所知、均匀瞎猜的损失，训练从这里开始；“只看词频”是只知道每个词块多常见，低于它才算学到了上下文。圆点不再下降而训练损失
还在降，是开始背书了（过拟合）。灰色的带是同样设置、同样语料的几次训练走过的地方，落在里面就是正常。
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import filelock
import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure

REFERENCE = Path(__file__).parent / "results" / "reference_curves.json"
FONTS = (r"Noto ?Sans ?(CJK|SC)|Han ?Sans|PingFang|Hiragino Sans GB|Heiti|YaHei|msyh|SimHei|WenQuanYi|wqy|"
         r"Droid ?Sans ?Fallback|Arial Unicode MS")  # 常见中文字体的名字或文件名
LABELS = {
    "zh": dict(step="步", loss="损失（nat / token）", bits="每字比特（bits per character）", train="训练损失",
               eval="验证损失", uniform="均匀瞎猜 ln V", unigram="只看词频", epoch="一遍语料结束",
               band="参考：同样设置的训练", title="从零训练中文 GPT-2"),
    "en": dict(step="step", loss="loss (nats / token)", bits="bits per character", train="training loss",
               eval="held-out loss", uniform="uniform guess ln V", unigram="word frequencies only",
               epoch="end of an epoch", band="reference: same settings", title="Training a Chinese GPT-2"),
}

# ==== 1. 读日志 ====

def read_run(path):
    """{"folder", "train" 和 "eval": [(步, 损失, 每字比特)], "factor": 1 nat/token 是多少每字比特}"""
    log = path / "train_log.jsonl" if path.is_dir() else path
    if not log.is_file():
        sys.exit(f"错误：找不到日志 {log}；给训练目录，或里面的 train_log.jsonl")
    train, held_out = [], []
    try:
        for line in log.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:  # 末行可能写到一半
            row = json.loads(line or "{}")
            loss, bits = row.get("loss", row.get("eval_loss", math.nan)), row.get("eval_bits_per_char")
            if math.isfinite(row.get("step", 0) + loss + (bits or 0)):  # 发散的训练会记下 NaN，画不出来
                (train if "loss" in row else held_out).append((row["step"], loss, bits))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        sys.exit(f"错误：{log} 不是训练日志，或已损坏；给训练目录，或里面的 train_log.jsonl")
    if not train and not held_out:
        sys.exit(f"错误：{log} 里还没有一个能画的损失值；等训练打印第一行日志后再画")
    factor = next((bits / loss for _, loss, bits in held_out if bits and loss), None)
    return {"folder": log.resolve().parent, "train": train, "eval": held_out, "factor": factor}

def find_reference(config, steps):
    """REFERENCE 里设置相同、语料相同（差 1 % 以内）的一条；steps 是日志的各步。"""
    known = config | {"logging_steps": steps[2] - steps[1]}  # 几步平均一次，起伏就不同
    for curve in json.loads(REFERENCE.read_text(encoding="utf-8")):
        same = all(known.get(key) == value for key, value in curve["settings"].items())
        if same and all(abs(known[key] / value - 1) < 0.01 for key, value in curve["corpus"].items()):
            return curve

def smooth(losses):
    """以每点为中心取平均，不会落在后面。窗口在两头变窄；开头降得快，至多平均到步数的四分之一以外。"""
    i, total = np.arange(len(losses)), np.cumsum([0, *losses])
    half = np.minimum(np.minimum(i // 4, i[::-1]), max(1, len(losses) // 40))
    return (total[i + half + 1] - total[i - half]) / (2 * half + 1)

# ==== 2. 画图 ====

def use_chinese_font():
    """有中文字体就用上，返回 "zh"；一个也没有就返回 "en"，用英文标注，不会出现方框。"""
    fonts = font_manager.fontManager
    if not any(re.search(FONTS, font.name) for font in fonts.ttflist):  # 后装的不在 matplotlib 的缓存里
        for path in filter(re.compile(FONTS, re.I).search, font_manager.findSystemFonts()):
            fonts.addfont(path)
    name = next((font.name for font in fonts.ttflist if re.search(FONTS, font.name)), None)
    if name:
        rcParams["font.sans-serif"] = [name, *rcParams["font.sans-serif"]]
        rcParams["axes.unicode_minus"] = False  # 有的中文字体没有 U+2212 这个减号
    return "zh" if name else "en"

def draw_references(axes, run, labels):
    """两把尺子、每一遍的边界、同样设置的几次训练。config.json 里缺什么，就少画什么。"""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError):
        config = json.loads((run["folder"] / "config.json").read_text(encoding="utf-8"))
        lines = {"uniform": math.log(config["vocab_size"]), "unigram": config["unigram_entropy"]}
        for key, value in lines.items():
            axes.axhline(value, color="gray", linestyle=":", linewidth=1)
            axes.annotate(f"{labels[key]} = {value:.2f}", (1, value), (-4, 3), axes.get_yaxis_transform(),
                          "offset points", ha="right", fontsize=9, color="dimgray")
        steps, per_epoch = [point[0] for point in run["train"]], config["steps_per_epoch"]
        for i in range(1, min(20, int(steps[-1] / per_epoch)) + 1):
            axes.axvline(i * per_epoch, color="gray", ls="--", lw=0.8, label=labels["epoch"] * (i == 1))
        curve = find_reference(config, steps)
        x = np.divide(curve["tokens"], config["effective_batch_size"] * config["block_size"])
        low, high = np.array(curve["loss"]) + [[-1], [1]] * np.array(curve["spread"])  # 约 95 % 的日志在其中
        axes.fill_between(x, low, high, color="gray", alpha=0.25, linewidth=0, label=labels["band"])

def draw(runs, language):
    """一张图。几次训练的分词器不同时，token 长短不同，nat / token 不能比：纵轴改用每字比特。"""
    labels, factors = LABELS[language], [run["factor"] for run in runs]
    by_bits = all(factors) and max(factors) > min(factors) * 1.001
    axes = Figure(figsize=(10, 6), dpi=130, layout="tight").add_subplot()
    axes.set(xlabel=labels["step"], ylabel=labels["bits" if by_bits else "loss"], title=labels["title"])
    for i, run in enumerate(runs):
        name = run["folder"].name if language == "zh" or run["folder"].name.isascii() else f"run {i + 1}"
        color, scale, name = f"C{i}", factors[i] if by_bits else 1, f"{name} " if len(runs) > 1 else ""
        if run["train"]:
            steps, losses, _ = zip(*run["train"], strict=True)
            axes.plot(steps, np.multiply(losses, scale), color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(losses) * scale, color=color, linewidth=1.8, label=name + labels["train"])
        if run["eval"]:
            steps, losses, bits = zip(*run["eval"], strict=True)
            last = f" {losses[-1]:.2f}" + (f" ({bits[-1]:.2f} bits/char)" if bits[-1] else "")
            axes.plot(steps, np.multiply(losses, scale), "o", color=color, markeredgecolor="white", zorder=5,
                      label=name + labels["eval"] + last)
    if len(runs) == 1:
        draw_references(axes, runs[0], labels)
    if factors[0] and not by_bits:
        axes.secondary_yaxis("right", functions=(lambda y: y * factors[0], lambda y: y / factors[0])
                             ).set_ylabel(labels["bits"])
    axes.margins(x=0.02, y=0.12)  # 上面留出图例的位置
    axes.grid(alpha=0.2)
    axes.legend(loc="upper center", frameon=False, ncols=2 if len(runs) == 1 else 1)
    return axes.figure

def main():
    parser = argparse.ArgumentParser(description="第 4 步：画损失曲线", allow_abbrev=False)
    folder = Path("/root/autodl-tmp/gpt2-chinese" if os.path.isdir("/root/autodl-tmp") else "gpt2-chinese")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", default=[folder], help="训练目录或日志")
    parser.add_argument("--output", type=Path, default=Path("loss_curve.png"), help="图片写到哪里")
    parser.add_argument("--language", choices=["auto", "zh", "en"], default="auto", help="标注的语言")
    args = parser.parse_args()
    if args.output.is_dir():
        sys.exit(f"错误：--output {args.output} 是文件夹；给一个 .png 文件名")
    language = use_chinese_font()
    if args.language == "zh" and language == "en":
        sys.exit("错误：没有找到中文字体；装一个（如 apt-get install fonts-wqy-microhei），或用 --language en")
    figure = draw([read_run(path) for path in args.runs], "en" if args.language == "en" else language)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")  # 两个进程同时画，也不相撞
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(args.output)  # 训练中反复重画：看图的人不会看到半张
    finally:
        temporary.unlink(missing_ok=True)
    print(f"写好 {args.output}")

# ==== 3. 防错（初学可以跳过）====

def run(main):
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        what = "另一个进程正在写" if isinstance(error, filelock.Timeout) else "读写失败"
        sys.exit(f"错误：{what}（{error}）；等它结束，或清出空间、检查权限，再跑同一条命令")

if __name__ == "__main__":
    run(main)
