#!/usr/bin/env python3
"""第 4 步：画损失曲线（loss curve）。读训练目录里的 train_log.jsonl 和 config.json，写一张 PNG，几秒钟。

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
import sys
from contextlib import suppress
from pathlib import Path

import filelock
import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure

# ==== 1. 设置 ====

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"
REFERENCE = Path(__file__).parent / "results" / "reference_curves.json"  # 我们自己的几次训练
# 常见中文字体的名字或文件名
FONTS = (
    r"(?i)Noto ?Sans ?(CJK|SC)|Han ?Sans|PingFang|Hiragino Sans GB|Heiti|YaHei|msyh|SimHei|WenQuanYi|wqy|"
    r"Droid ?Sans ?Fallback|Arial Unicode MS"
)
LABELS = {
    "zh": {
        "step": "步",
        "loss": "损失（nat / token）",
        "bits": "每字比特（bits per character）",
        "train": "训练损失",
        "eval": "验证损失",
        "uniform": "均匀瞎猜 ln V",
        "unigram": "只看词频",
        "epoch": "一遍语料结束",
        "band": "参考：同样设置的训练",
        "title": "从零训练中文 GPT-2",
    },
    "en": {
        "step": "step",
        "loss": "loss (nats / token)",
        "bits": "bits per character",
        "train": "training loss",
        "eval": "held-out loss",
        "uniform": "uniform guess ln V",
        "unigram": "word frequencies only",
        "epoch": "end of an epoch",
        "band": "reference: same settings",
        "title": "Training a Chinese GPT-2",
    },
}


def parse_arguments():
    parser = argparse.ArgumentParser(description="第 4 步：画损失曲线", allow_abbrev=False)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", default=[HOME], help="训练目录或日志")
    add("--output", type=Path, default="loss_curve.png", help="图片写到哪里")
    add("--language", choices=["auto", "zh", "en"], default="auto", help="标注的语言")
    return parser.parse_args()


# ==== 2. 读日志 ====


def read_curve(rows, name):
    """日志的各行 → 2 行的数组：各点的步，和那里的 name（损失或每字比特）。"""
    points = []
    for row in rows:
        value = row.get(name, math.nan)  # 验证的行没有 loss，训练的行没有 eval_loss
        if math.isfinite(value):  # 发散的训练会记下 NaN，画不出来
            points.append((row["step"], value))
    return np.array(points, float).reshape(-1, 2).T  # 一个点也没有，就是两个空的


def read_run(path):
    """返回一次训练的文件夹、训练损失、验证损失，和 factor：1 nat/token 是多少每字比特（不知道是 None）。"""
    log = path / "train_log.jsonl" if path.is_dir() else path
    if not log.is_file():
        sys.exit(f"错误：找不到日志 {log}；给训练目录，或里面的 train_log.jsonl")
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        rows = [json.loads(line) for line in lines[:-1] if line]  # 训练还在写，最后一行可能只有一半
        train = read_curve(rows, "loss")
        held_out = read_curve(rows, "eval_loss")
        bits = read_curve(rows, "eval_bits_per_char")
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.exit(f"错误：{log} 不是训练日志，或已损坏；给训练目录，或里面的 train_log.jsonl")
    if train.size + held_out.size == 0:
        sys.exit(f"错误：{log} 里还没有一个能画的损失值；等训练打印第一行日志后再画")
    factor = None
    if bits.size:
        factor = bits[1, -1] / held_out[1, -1]
    return {"folder": log.resolve().parent, "train": train, "eval": held_out, "factor": factor}


def find_reference(config):
    """REFERENCE 里设置相同、语料相同（差 1 % 以内）的一条曲线；没有，是 None。"""
    for curve in json.loads(REFERENCE.read_text(encoding="utf-8")):
        corpus = curve["corpus"].items()
        same_corpus = all(math.isclose(config[key], value, rel_tol=0.01) for key, value in corpus)
        if same_corpus and curve["settings"].items() <= config.items():
            return curve
    return None


def smooth(losses):
    """每个点换成它和前后各 half 个点的平均。前后一样多，平均才不会落在后面。

    half 至多是全部的四十分之一。末尾没有那么多点，就少取；开头的损失降得快，第 i 个点前后至多各取 i/4 个。
    """
    widest = max(1, len(losses) // 40)
    averages = []
    for i in range(len(losses)):
        half = min(widest, i // 4, len(losses) - 1 - i)
        averages.append(losses[i - half : i + half + 1].mean())
    return np.array(averages)


# ==== 3. 字体 ====


def find_chinese_font():
    """matplotlib 认识而且读得了的一个中文字体；没有，是 None。"""
    for font in font_manager.fontManager.ttflist:
        if re.search(FONTS, font.name) and os.access(font.fname, os.R_OK):
            return font.name
    return None


def use_chinese_font():
    """有中文字体就用上，返回 "zh"；一个也没有就返回 "en"，用英文标注，不会出现方框。"""
    name = find_chinese_font()
    if name is None:  # 可能是后装的，不在 matplotlib 的缓存里：到系统的文件夹里找
        for path in font_manager.findSystemFonts():
            if re.search(FONTS, path):
                with suppress(OSError, RuntimeError):  # 没有权限读，或字体坏了：看下一个
                    font_manager.fontManager.addfont(path)
        name = find_chinese_font()
    if name is None:
        return "en"
    rcParams["font.family"] = [name, "sans-serif"]
    return "zh"


# ==== 4. 画图 ====


def draw_references(axes, run, labels):
    config = json.loads((run["folder"] / "config.json").read_text(encoding="utf-8"))
    # 两把尺子：均匀瞎猜的损失，和只看词频的损失
    rulers = {"uniform": math.log(config["vocab_size"]), "unigram": config["unigram_entropy"]}
    for name, value in rulers.items():
        axes.axhline(value, color="gray", linestyle=":", linewidth=1)
        axes.text(
            0.995,  # 横坐标按图的宽度算，1 是最右边；纵坐标就是损失
            value,
            f"{labels[name]} = {value:.2f}",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=9,
            color="dimgray",
        )
    # 每读完一遍语料，一条竖线；太多就只画前 20 条
    steps, _ = run["train"]
    steps_per_epoch = config["steps_per_epoch"]
    epochs = int(steps[-1] / steps_per_epoch)
    for epoch in range(1, min(epochs, 20) + 1):
        line = axes.axvline(epoch * steps_per_epoch, color="gray", linestyle="--", linewidth=0.8)
        if epoch == 1:
            line.set_label(labels["epoch"])
    # 同样设置的几次训练走过的带子，约 95 % 的日志在其中
    curve = find_reference(config)
    if curve:
        x = np.divide(curve["tokens"], config["effective_batch_size"] * config["block_size"])
        low = np.subtract(curve["loss"], curve["spread"])
        high = np.add(curve["loss"], curve["spread"])
        axes.fill_between(x, low, high, color="gray", alpha=0.25, linewidth=0, label=labels["band"])


def draw_run(axes, run, color, scale, prefix, labels):
    """一次训练的曲线和圆点；scale 是纵轴的单位，1 是 nat / token。"""
    steps, losses = run["train"]
    axes.plot(steps, losses * scale, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(losses) * scale, color=color, linewidth=1.8, label=prefix + labels["train"])
    steps, losses = run["eval"]
    if steps.size:
        label = f"{prefix}{labels['eval']} {losses[-1]:.2f}"
        if run["factor"]:
            label += f" ({losses[-1] * run['factor']:.2f} bits/char)"
        axes.plot(steps, losses * scale, "o", color=color, markeredgecolor="white", zorder=5, label=label)


def draw(runs, language):
    """一张图。几次训练的分词器不同时，token 长短不同，nat / token 不能比：纵轴改用每字比特。"""
    labels = LABELS[language]
    factors = [run["factor"] for run in runs]
    by_bits = all(factors) and max(factors) > min(factors) * 1.001
    unit = "bits" if by_bits else "loss"
    axes = Figure(figsize=(10, 6), dpi=130, layout="tight").add_subplot()
    axes.set(xlabel=labels["step"], ylabel=labels[unit], title=labels["title"])
    for i, run in enumerate(runs):
        prefix = ""
        if len(runs) > 1:
            prefix = run["folder"].name + " "
        if language == "en" and not prefix.isascii():
            prefix = f"run {i + 1} "
        draw_run(axes, run, f"C{i}", run["factor"] if by_bits else 1, prefix, labels)
    if len(runs) == 1:
        with suppress(OSError, ValueError, TypeError, LookupError):  # config.json 里缺什么，就少画什么
            draw_references(axes, runs[0], labels)
    factor = factors[0]
    if factor and not by_bits:
        right = axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel(labels["bits"])
    axes.margins(x=0.02, y=0.12)  # 上面留出图例的位置
    axes.grid(alpha=0.2)
    axes.legend(loc="upper center", frameon=False, ncols=2)
    return axes.figure


# ==== 5. 主程序 ====


def main():
    args = parse_arguments()
    print("\n第 4 步，共 4 步：画损失曲线\n浅色是训练损失，深色是它的平均，圆点是验证损失。")
    if args.output.is_dir():
        sys.exit(f"错误：--output {args.output} 是文件夹；给一个 .png 文件名")
    language = use_chinese_font()
    if args.language == "zh" and language == "en":
        sys.exit(
            "错误：没有找到中文字体；装一个（如 apt-get install fonts-wqy-microhei），或用 --language en"
        )
    if args.language == "en":
        language = "en"
    runs = [read_run(path) for path in args.runs]
    figure = draw(runs, language)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, format="png")
    print(f"写好 {args.output}；怎么看这张图，写在 plot_loss.py 的开头。")


# ==== 6. 防错（初学可以跳过；几个脚本里一字不差）====


def run(main):
    """运行 main()。Ctrl-C、磁盘满、没有权限、别的进程正在写，都只说一行。"""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("停下了；同一条命令再跑一次，做好的不重做", file=sys.stderr)
        sys.exit(130)
    except filelock.Timeout as error:
        sys.exit(f"错误：另一个进程正在写（{error}）；等它结束，再跑同一条命令")
    except OSError as error:
        sys.exit(f"错误：读写失败（{error}）；清出空间、检查权限，再跑同一条命令")


if __name__ == "__main__":
    run(main)
