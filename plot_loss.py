#!/usr/bin/env python3
"""第 4 步：画损失曲线（loss curve）。

读：训练目录（里面的 train_log.jsonl 和 config.json），或一个日志文件（也认 Trainer 的 trainer_state.json）；给几个就一起比较。
写：一张 PNG，约一秒。训练时每次评估后会自己画一张，放在训练目录里。

    python plot_loss.py                                   # 画 gpt2-chinese/
    python plot_loss.py demo --output demo.png
    python plot_loss.py run_a run_b --output compare.png  # 分词器不同的两次训练，用每字比特比较

怎么看：浅色是每次日志的训练损失，深色是它的平均，圆点是验证集（没有拿来训练的文字）。两条横线是尺子：ln V 是对 V 个词块一无
所知、均匀瞎猜的损失，训练从这里开始；“只看词频”是知道每个词块多常见、但不看上下文，低于它才算学到了语言。圆点不再下降、训练
损失还在降，就是开始背书了（过拟合）。灰色的带：同样设置、同样语料的几次训练走过的地方，落在里面就是正常。
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import filelock
import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

# 常见的中文字体（名字或文件名）；一个也没有就用英文标注，不会出现方框
FONTS = (r"Noto ?Sans ?(CJK|SC)|(Source ?)?Han ?Sans|PingFang|Hiragino Sans GB|Heiti|YaHei|msyh|SimHei|"
         r"WenQuanYi|wqy|Droid ?Sans ?Fallback|Arial Unicode MS")
LABELS = {
    "zh": {"step": "步", "loss": "损失（nat / token）", "bits": "每字比特（bits per character）", "train": "训练损失",
           "eval": "验证损失", "uniform": "均匀瞎猜 ln V", "unigram": "只看词频", "epoch": "第 {} 遍结束",
           "band": "参考：同样设置的 {} 次训练", "title": "从零训练中文 GPT-2"},
    "en": {"step": "step", "loss": "loss (nats / token)", "bits": "bits per character", "train": "training loss",
           "eval": "held-out loss", "uniform": "uniform guess ln V", "unigram": "word frequencies only",
           "epoch": "end of epoch {}", "band": "reference: {} runs with these settings",
           "title": "Training a Chinese GPT-2 from scratch"},
}


# ==== 1. 读日志 ====

def read_run(path):
    """读一次训练：{"name", "config", "train": [(步, 损失)], "eval": [(步, 损失, 每字比特或 None)]}。"""
    log = path / "train_log.jsonl" if path.is_dir() else path
    if path.is_dir() and not log.exists():
        log = path / "trainer_state.json"
    if not log.exists():
        sys.exit(f"错误：找不到日志 {log}；给训练目录、train_log.jsonl 或 trainer_state.json")
    text = log.read_text(encoding="utf-8", errors="replace")
    try:
        lines = text[:text.rfind("\n") + 1].splitlines()         # 最后一行可能正写到一半，丢掉
        rows = json.loads(text)["log_history"] if log.suffix == ".json" else [json.loads(x) for x in lines if x.strip()]
        # 发散的训练会记下 NaN 和无穷，画不出来，略过；不是数的会让 isfinite 报 TypeError
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        train = [point for point in train if all(map(math.isfinite, point))]
        held_out = [(row["step"], row["eval_loss"], row.get("eval_bits_per_char")) for row in rows if "eval_loss" in row]
        held_out = [point for point in held_out if all(math.isfinite(x or 0) for x in point)]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        sys.exit(f"错误：{log} 不是训练日志，或已损坏；给 train_log.jsonl 或 trainer_state.json")
    if not train and not held_out:
        sys.exit(f"错误：{log} 里还没有一个能画的损失值；等训练打印第一行日志后再画")
    try:
        config = dict(json.loads((log.parent / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        config = {}
    return {"name": log.resolve().parent.name, "config": config, "train": train, "eval": held_out}


def read_reference(run):
    """results/reference_curves.json 里与 run 设置相同、语料相同（差 1 % 以内）的一条；没有就是 None。"""
    try:
        steps = [step for step, _ in run["train"]]
        known = run["config"] | {"logging_steps": steps[2] - steps[1]}       # 起伏与几步平均一次有关
        curves = Path(__file__).parent / "results" / "reference_curves.json"
        for curve in json.loads(curves.read_text(encoding="utf-8")):
            same = all(known.get(key) == value for key, value in curve["settings"].items())
            if same and all(abs(known[key] / value - 1) < 0.01 for key, value in curve["corpus"].items()):
                return curve
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def number(run, key):
    """config.json 里的一个正数；没有或不是数，就是 None。"""
    value = run["config"].get(key)
    return value if isinstance(value, (int, float)) and 0 < value < math.inf else None


def bits_factor(run):
    """每字比特 ÷ (nat/token)，即 1 / (ln 2 × 每 token 字符数)；日志里没有就是 None。"""
    return next((bits / loss for _, loss, bits in run["eval"] if bits and loss), None)


def smooth(losses):
    """以每点为中心取平均，不会像滑动平均那样落在后面；两头窗口变窄，开头降得快，窗口也只随步数慢慢变宽。"""
    i, total = np.arange(len(losses)), np.cumsum([0, *losses])
    half = np.minimum(np.minimum(i // 4, i[::-1]), max(1, len(losses) // 40))
    return (total[i + half + 1] - total[i - half]) / (2 * half + 1)


# ==== 2. 画图 ====

def use_chinese_font():
    """有中文字体就用上，返回 "zh"；否则返回 "en"。"""
    name = next((font.name for font in font_manager.fontManager.ttflist if re.search(FONTS, font.name)), None)
    if name is None:       # 字体是后装的，matplotlib 的缓存里没有：到系统里再找一遍
        path = next((path for path in font_manager.findSystemFonts() if re.search(FONTS, path, re.I)), None)
        if path is None:
            return "en"
        font_manager.fontManager.addfont(path)
        name = font_manager.FontProperties(fname=path).get_name()
    matplotlib.rcParams["font.sans-serif"] = [name, *matplotlib.rcParams["font.sans-serif"]]
    matplotlib.rcParams["axes.unicode_minus"] = False       # 有的中文字体没有 U+2212 这个减号
    return "zh"


def draw_run(axes, run, scale, i, labels, prefix):
    """画一次训练：浅色原始值、深色平均、验证点，末尾的数。scale 把 nat 换成纵轴的单位。"""
    if run["train"]:
        steps, losses = zip(*run["train"], strict=True)
        axes.plot(steps, np.multiply(losses, scale), color=f"C{i}", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses) * scale, color=f"C{i}", linewidth=1.8, label=prefix + labels["train"])
    if run["eval"]:
        steps, losses, all_bits = zip(*run["eval"], strict=True)
        axes.plot(steps, np.multiply(losses, scale), "o", color=f"C{i}", markersize=5, markeredgecolor="white",
                  label=prefix + labels["eval"], zorder=5)
        text = f"{losses[-1]:.2f}" + (f" ({all_bits[-1]:.2f} bits/char)" if all_bits[-1] else "")
        axes.annotate(text, (steps[-1], losses[-1] * scale), (-6, 24 + 14 * i), textcoords="offset points",
                      ha="right", color=f"C{i}", fontsize=10,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})


def draw_references(axes, run, labels):
    """ln V、词频的熵、每一遍的边界、同样设置的几次训练。"""
    vocab_size = number(run, "vocab_size")
    for key, value in (("uniform", vocab_size and math.log(vocab_size)), ("unigram", number(run, "unigram_entropy"))):
        if value:
            axes.axhline(value, color="gray", linestyle=":", linewidth=1)
            axes.annotate(f"{labels[key]} = {value:.2f}", (1, value), (-4, 3), fontsize=9, color="dimgray", ha="right",
                          xycoords=("axes fraction", "data"), textcoords="offset points")
    last, per_epoch = max(point[0] for point in run["train"] + run["eval"]), number(run, "steps_per_epoch")
    for epoch in range(1, int(last / per_epoch + 1e-6) + 1 if per_epoch and last / per_epoch <= 20 else 1):
        axes.axvline(epoch * per_epoch, color="gray", linestyle="--", linewidth=0.8)
        axes.annotate(labels["epoch"].format(epoch), (epoch * per_epoch, 0.42), (-3, 0), rotation=90, fontsize=8,
                      color="dimgray", xycoords=("data", "axes fraction"), textcoords="offset points", ha="right")
    if curve := read_reference(run):
        steps = np.divide(curve["tokens"], run["config"]["effective_batch_size"] * run["config"]["block_size"])
        loss, spread = np.array(curve["loss"]), np.array(curve["spread"])      # 约 95 % 的日志落在 ± spread 里
        axes.fill_between(steps, loss - spread, loss + spread, color="gray", alpha=0.25, linewidth=0,
                          label=labels["band"].format(len(curve["seeds"])))


def draw(runs, language):
    """一张图。几次训练的分词器不同时，一个 token 的长短不同，不能比 nat / token：纵轴改用每字比特。"""
    labels, factors = LABELS[language], [bits_factor(run) for run in runs]
    by_bits = all(factors) and max(factors) > min(factors) * 1.001
    figure = Figure(figsize=(10, 6), dpi=130)
    axes = figure.add_subplot()
    for i, (run, factor) in enumerate(zip(runs, factors, strict=True)):
        prefix = "" if len(runs) == 1 else f"{run['name']} " if language == "zh" or run["name"].isascii() else f"run {i + 1} "
        draw_run(axes, run, factor if by_bits else 1, i, labels, prefix)
    if len(runs) == 1:
        draw_references(axes, runs[0], labels)
    if factors[0] and not by_bits:
        second = axes.secondary_yaxis("right", functions=(lambda y: y * factors[0], lambda y: y / factors[0]))
        second.set_ylabel(labels["bits"])
    axes.set(xlabel=labels["step"], ylabel=labels["bits" if by_bits else "loss"], title=labels["title"])
    axes.margins(x=0.02, y=0.12)         # 上面留出图例的位置
    axes.grid(alpha=0.2)
    axes.legend(loc="upper center", frameon=False, ncols=3 if len(runs) == 1 else 1)
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description="第 4 步：画损失曲线", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", default=[Path(default_dir)], help="训练目录或日志")
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
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}.tmp")     # 同时画两张也不相撞
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(args.output)             # 训练中反复重画：看图的人不会看到半张
    finally:
        temporary.unlink(missing_ok=True)
    print(f"写好 {args.output}")


# ==== 3. 防错（初学可以跳过）====

def run(main):
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行；没有料到的错误照样给出 traceback。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        busy, full = isinstance(error, filelock.Timeout), error.errno == 28
        reason = "另一个进程正在写这里" if busy else "磁盘写满了" if full else "读写文件失败"
        sys.exit(f"错误：{reason}（{error}）；{'清出空间' if full else '等它结束，或检查路径和权限'}，再跑同一条命令")


if __name__ == "__main__":
    run(main)
