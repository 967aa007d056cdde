#!/usr/bin/env python3
"""第 4 步：画损失曲线。

读什么：训练目录（里面的 train_log.jsonl 和 config.json），或一个 train_log.jsonl，或 Trainer 的 trainer_state.json；
    给几个就画在一张图里比较。
留下什么：一张 PNG。浅色是每次日志的训练损失，深色是平滑后的，圆点是验证集，竖虚线是每一遍的边界；
    两条参考线：ln V（均匀瞎猜）和只看词频的熵（学会词频就能到这里），低于后者才算学到了上下文。

    python plot_loss.py                                   # 画 gpt2-chinese/
    python plot_loss.py demo --output demo.png
    python plot_loss.py run_a run_b --output compare.png  # 词表不同的两次训练，用每字比特比较
"""

import argparse
import json
import math
import re
import signal
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")              # 没有屏幕也能画
import matplotlib.pyplot as plt
from matplotlib import font_manager

# 常见的中文字体；一个都没有就用英文标注，不会出现方框
FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
         "PingFang SC", "Hiragino Sans GB", "Heiti SC", "STHeiti", "Microsoft YaHei", "SimHei",
         "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"]
LABELS = {
    "zh": {"step": "步", "loss": "损失（nat / token）", "bits": "每字比特（bits per character）", "train": "训练损失",
           "eval": "验证损失", "uniform": "均匀瞎猜 ln V", "unigram": "只看词频", "epoch": "第 {} 遍结束",
           "title": "从零训练中文 GPT-2"},
    "en": {"step": "step", "loss": "loss (nats / token)", "bits": "bits per character",
           "train": "training loss", "eval": "held-out loss", "uniform": "uniform guess ln V",
           "unigram": "word frequencies only",
           "epoch": "end of epoch {}", "title": "Training a Chinese GPT-2 from scratch"},
}


# ==== 0. 控制台与出错（各脚本里一字不差，由 tests/test_consistency.py 看守）====

class UserError(Exception):
    """使用者自己能改正的错误：只打印一行中文，退出码 1，没有 traceback。"""


class ArgumentParser(argparse.ArgumentParser):
    """argparse，但报错是一行中文，而且 --work-dir 和 --work_dir 都认。"""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        dashes = re.compile(r"^--[\w-]+")
        args = [dashes.sub(lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in args]
        args = [re.sub(r"^--no_(?=\w)", "--no-", a) for a in args]
        return super().parse_args(args, namespace)

    def error(self, message):
        for english, chinese in (("ignored explicit argument", "不接受取值"), ("argument ", "参数 "),
                                 ("unrecognized arguments:", "不认识的参数："),
                                 ("expected one argument", "后面要跟一个值"),
                                 ("expected at least one argument", "后面至少要跟一个值"),
                                 ("invalid choice:", "没有这个选项："), ("choose from", "可选")):
            message = message.replace(english, chinese)
        print(f"错误：{message}（--help 列出全部参数）", file=sys.stderr)
        sys.exit(2)


def run(main):
    """运行 main()，把使用者能造成的错误变成一行中文和非零退出码。"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # 让 finally 里的清理有机会执行
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except OSError as error:
        full = error.errno == 28 or "No space left" in str(error)
        where = f"{error.filename}：" if error.filename else ""
        message = f"磁盘写满了：{where}清出空间后重跑同一条命令" if full else f"读写文件失败：{error}；检查路径和权限"
    except KeyboardInterrupt:
        print("已按 Ctrl-C 停下，未完成的部分不算数；重跑同一条命令即可", file=sys.stderr)
        sys.exit(130)
    print("错误：" + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


# ==== 1. 读日志 ====

def read_run(path):
    """读一次训练，返回 {"name", "train": [(step, loss)], "eval": [(step, loss, 每字比特或 None)], "config"}。"""
    folder = path if path.is_dir() else path.parent
    log = path / "train_log.jsonl" if path.is_dir() else path
    if path.is_dir() and not log.exists():
        log = path / "trainer_state.json"
    if not log.exists():
        raise UserError(f"找不到日志 {log}；给训练目录、train_log.jsonl 或 trainer_state.json")
    text = log.read_text("utf-8", errors="replace")
    try:
        if log.suffix == ".json":
            rows = json.loads(text)["log_history"]
        else:
            # 最后一行可能正写到一半，丢掉
            rows = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines() if line.strip()]
        # 发散的训练会记下 NaN 和无穷，画不出来，略过；不是数的会在 isfinite 里报 TypeError
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        train = [point for point in train if all(map(math.isfinite, point))]
        held_out = [(row["step"], row["eval_loss"], row.get("eval_bits_per_char"))
                    for row in rows if "eval_loss" in row]
        held_out = [(step, loss, bits) for step, loss, bits in held_out if math.isfinite(loss + (bits or 0))]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{log} 不是训练日志，或已损坏；给 train_log.jsonl 或 trainer_state.json") from None
    if not train and not held_out:
        raise UserError(f"{log} 里还没有一个能画的损失值；等训练打印第一行日志后再画")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config = {key: value for key, value in config.items()
                  if isinstance(value, (int, float)) and value > 0}
    except (OSError, ValueError, AttributeError):
        config = {}
    return {"name": folder.resolve().name, "train": train, "eval": held_out, "config": config}


def bits_factor(run):
    """每字比特 / (nat/token)，即 1 / (ln 2 × 每 token 字符数)；日志里没有就返回 None。"""
    for _, loss, bits in run["eval"]:
        if bits and loss:
            return bits / loss
    return None


def smooth(points, span):
    """指数滑动平均，带起点校正（Adam 论文 2014 的 1 - β^t），不会被第一个点拖住。"""
    beta, average, result = 1 - 1 / span, 0.0, []
    for i, (step, loss) in enumerate(points, 1):
        average = beta * average + (1 - beta) * loss
        result.append((step, average / (1 - beta**i)))
    return result


# ==== 2. 画图 ====

def use_chinese_font():
    """有中文字体就用上，返回 "zh"；否则返回 "en"。"""
    known = {font.name for font in font_manager.fontManager.ttflist}
    name = next((font for font in FONTS if font in known), None)
    if name is None:       # 字体是后装的，matplotlib 的缓存里没有：到系统里再找一遍
        for path in font_manager.findSystemFonts():
            if re.search(r"cjk|wqy|simhei|msyh|hansans|NotoSansSC", path, re.I):
                font_manager.fontManager.addfont(path)
                name = font_manager.FontProperties(fname=path).get_name()
                break
    if name is None:
        return "en"
    plt.rcParams["font.sans-serif"] = [name, *plt.rcParams["font.sans-serif"]]
    plt.rcParams["axes.unicode_minus"] = False          # 有的中文字体没有 U+2212 这个减号
    return "zh"


def draw_run(axes, run, scale, color, labels, prefix):
    """画一次训练：浅色原始值、深色平滑、验证点。scale 把 nat 换成纵轴的单位。"""
    if run["train"]:
        steps, losses = zip(*run["train"], strict=True)
        axes.plot(steps, [loss * scale for loss in losses], color=color, alpha=0.25, linewidth=0.8)
        steps, losses = zip(*smooth(run["train"], max(2, len(steps) // 40)), strict=True)
        axes.plot(steps, [loss * scale for loss in losses], color=color, linewidth=1.8,
                  label=prefix + labels["train"])
    if run["eval"]:
        steps, losses, _ = zip(*run["eval"], strict=True)
        axes.plot(steps, [loss * scale for loss in losses], "o", color=color, markersize=5,
                  markeredgecolor="white", label=prefix + labels["eval"], zorder=5)


def draw_references(axes, run, scale, labels):
    """ln V、词频的熵、每一遍的边界。文字放在线的右端上方，那里离曲线最远。"""
    config, last = run["config"], max(point[0] for point in run["train"] + run["eval"])
    for key, value in (("uniform", config.get("vocab_size") and math.log(config["vocab_size"])),
                       ("unigram", config.get("unigram_entropy"))):
        if value:
            axes.axhline(value * scale, color="gray", linestyle=":", linewidth=1)
            axes.annotate(f"{labels[key]} = {value * scale:.2f}", (1, value * scale), (-4, 3), fontsize=9,
                          color="dimgray", xycoords=("axes fraction", "data"), textcoords="offset points",
                          ha="right")
    per_epoch = config.get("steps_per_epoch")
    if per_epoch and last / per_epoch <= 20:
        for epoch in range(1, int(last / per_epoch + 1e-6) + 1):
            axes.axvline(epoch * per_epoch, color="gray", linestyle="--", linewidth=0.8)
            axes.annotate(labels["epoch"].format(epoch), (epoch * per_epoch, 0.42), (-3, 0), rotation=90,
                          fontsize=8, color="dimgray", xycoords=("data", "axes fraction"),
                          textcoords="offset points", ha="right")


def draw(runs, output, language):
    """画一张图并写到 output。几次训练的分词器不同时，纵轴用每字比特，否则用 nat/token。"""
    labels = LABELS[language]
    factors = [bits_factor(run) for run in runs]
    by_bits = all(factors) and max(factors) > min(factors) * 1.001
    figure, axes = plt.subplots(figsize=(10, 6), dpi=130)
    for i, (run, factor) in enumerate(zip(runs, factors, strict=True)):
        prefix = f"{run['name']} " if len(runs) > 1 else ""
        scale = factor if by_bits else 1
        draw_run(axes, run, scale, f"C{i}", labels, prefix)
        if run["eval"]:
            step, loss, bits = run["eval"][-1]
            text = f"{loss:.2f}" + (f"（{bits:.2f} bits/char）" if bits and language == "zh" else
                                    f" ({bits:.2f} bits/char)" if bits else "")
            axes.annotate(text, (step, loss * scale), (-6, 24 + 14 * i), textcoords="offset points",
                          ha="right", color=f"C{i}", fontsize=10,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    if len(runs) == 1:
        draw_references(axes, runs[0], 1, labels)
    if factors[0] and not by_bits:
        second = axes.secondary_yaxis("right", functions=(lambda y: y * factors[0], lambda y: y / factors[0]))
        second.set_ylabel(labels["bits"])
    axes.set(xlabel=labels["step"], ylabel=labels["bits" if by_bits else "loss"], title=labels["title"])
    axes.margins(x=0.02, y=0.12)         # 上面留出图例的位置
    axes.grid(alpha=0.2)
    axes.legend(loc="upper center", frameon=False, ncols=2 if len(runs) == 1 else 1)
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(output)             # 训练中反复重画：看图的人不会看到半张
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def main():
    parser = ArgumentParser(description="第 4 步：画损失曲线", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN_DIR|LOG",
                        help=f"训练目录或日志（默认 {default_dir}）")
    parser.add_argument("--output", type=Path, default=Path("loss_curve.png"), help="图片写到哪里")
    parser.add_argument("--language", choices=["auto", "zh", "en"], default="auto", help="标注的语言")
    args = parser.parse_args()
    if args.output.is_dir():
        raise UserError(f"--output {args.output} 是文件夹；给一个 .png 文件名")
    language = use_chinese_font()
    if args.language == "zh" and language == "en":
        raise UserError("没有找到中文字体；装一个（如 apt-get install fonts-wqy-microhei），或用 --language en")
    runs = [read_run(path) for path in args.runs or [Path(default_dir)]]
    for i, run_ in enumerate(runs, 1):
        if language == "en" and not run_["name"].isascii():
            run_["name"] = f"run {i}"             # 没有中文字体，中文的目录名会画成方框
    draw(runs, args.output, "en" if args.language == "en" else language)
    print(f"写好 {args.output}（{'、'.join(run['name'] for run in runs)}）")


if __name__ == "__main__":
    run(main)
