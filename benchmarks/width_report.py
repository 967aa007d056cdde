#!/usr/bin/env python3
"""由 results/recipe/scaling/ 的日志写 results/recipe/README.md 和 scaling.png：最优学习率随宽度、批量、步数的变化，外推，真实大小的曲线。

    python benchmarks/width_report.py

最优：在 log2(学习率) 上给最低点附近的几个点配一条抛物线，取顶点；范围是给每个点加上种子那样大的噪声、重配 1,000 次得到的
16%–84%。顶点落在扫过的范围之外时只说“不小于”或“不大于”。
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from common import ROOT, read_lines, write_atomic
from width import QUEUE

RESULTS = ROOT / "results" / "recipe"
TARGET = dict(width=768, batch=98_304, steps=11_838)  # 完整训练；步数是公开参考的
FIELDS = ("width", "layers", "vocab", "batch", "steps", "schedule", "warmup", "beta2", "vectors", "precision")
DRAWS = 1000  # 重配的次数
WINDOW = 0.12  # 每字比特：离最低点再远，抛物线就不像了
PUBLISHED = [(524_288, 3.6e-3, "modded-nanogpt\n124M, 词向量共享")]  # (token/步, AdamW 部分的学习率, 出处)


# ==== 1. 读日志 ====


def load(folder):
    """每个试验一个 dict：第一行的设置，加上 rows（逐次验证）和 bits（最后的每字比特，发散的是 inf）。"""
    runs = []
    for path in sorted(folder.glob("*.jsonl")):
        header, *rows = read_lines(path)
        runs.append(header | {"rows": rows, "bits": rows[-1].get("bits_per_char", math.inf)})
    return runs


def curves(runs, swept):
    """{其余设置: {swept 的值: [各种子的每字比特]}}；swept 是 rate 或 muon。"""
    result = {}
    other = "muon" if swept == "rate" else "rate"
    for run in runs:
        key = tuple((name, run[name]) for name in (*FIELDS, other))
        result.setdefault(key, {}).setdefault(run[swept], []).append(run["bits"])
    return {key: dict(sorted(curve.items())) for key, curve in result.items()}


def seed_noise(runs):
    """同样设置、不同种子的每字比特的标准差（各组合并）；共同的起落先减去：比较学习率时种子是同一个。"""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in (*FIELDS, "muon")), {}).setdefault(run["rate"], {})[
            run["seed"]
        ] = run["bits"]
    squares = []
    for curve in groups.values():
        pairs = [points[43] - points[42] for points in curve.values() if {42, 43} <= points.keys()]
        if len(pairs) > 1:
            squares.append((np.var(pairs, ddof=1) / 2, len(pairs) - 1))
    return math.sqrt(sum(v * n for v, n in squares) / sum(n for _, n in squares)) if squares else 0.01


# ==== 2. 最优学习率和它的误差 ====


def vertex(x, y):
    """给不比最低点高出 WINDOW 的点（至少是最低点和它的邻居）配抛物线，返回顶点的 x；开口不向上就返回最低的点。"""
    lowest = int(np.argmin(y))
    middle = min(max(lowest, 1), len(y) - 2)
    near = (y <= y[lowest] + WINDOW) | (abs(np.arange(len(y)) - middle) <= 1)
    a, b, _ = np.polyfit(x[near] - x[lowest], y[near], 2)
    return float(np.clip(x[lowest] - b / (2 * a) if a > 0 else x[lowest], x[0] - 1, x[-1] + 1))


def fit_optimum(rates, bits, noise, seed=0):
    """返回 {"best", "low", "high", "edge"}：最优学习率、16%–84% 范围，edge 是 "<"、">"（顶点在扫过的之外）、"?"（点太少）或 ""。"""
    pairs = sorted((math.log2(rate), value) for rate, value in zip(rates, bits, strict=True))
    x, y = map(np.array, zip(*(pair for pair in pairs if math.isfinite(pair[1])), strict=True))
    if len(x) < 3:
        best = 2 ** x[np.argmin(y)]
        return {"best": best, "low": best / 2, "high": best * 2, "edge": "?"}
    top = vertex(x, y)
    edge = ""
    if top <= x[0]:
        edge = "<"
    elif top >= x[-1]:
        edge = ">"
    rng = np.random.default_rng(seed)
    draws = [vertex(x, y + noise * rng.standard_normal(len(y))) for _ in range(DRAWS)]
    low, high = np.percentile(draws, [16, 84])
    return {"best": 2**top, "low": 2**low, "high": 2**high, "edge": edge}


def fit_laws(optima, variables):
    """log2(最优) = 常数 + Σ 指数 × log2(变量)，加权最小二乘。optima：[(设置 dict, fit_optimum 的结果)]。

    返回 (系数, 协方差)；权重来自各个最优的范围，至少 ±0.15 个 log2，免得一条碰巧很尖的曲线说了算。
    """
    rows = [[1, *(math.log2(settings[name]) for name in variables)] for settings, _ in optima]
    sigma = [max(0.15, math.log2(o["high"] / o["low"]) / 2) for _, o in optima]
    design = np.array(rows) / np.array(sigma)[:, None]
    target = np.array([math.log2(o["best"]) for _, o in optima]) / sigma
    covariance = np.linalg.inv(design.T @ design)
    return covariance @ design.T @ target, covariance


# ==== 3. 表 ====


def describe(settings):
    """一条曲线的设置，写成一句话；与缺省相同的不写。"""
    s = dict(settings)
    text = f"{s['width']} 维 × {s['layers']} 层，{s['batch']:,} token/步，{s['steps']} 步"
    extra = [
        (s["vocab"] != 8000, f"词表 {s['vocab']:,}"),
        (s.get("muon") == 0, "只用 AdamW"),
        (s["precision"] != "bf16", s["precision"]),
        (s["vectors"] != 1, f"LayerNorm、偏置 × {s['vectors']:g}"),
    ]
    return "，".join([text, *(words for true, words in extra if true)])


def show(optimum):
    if optimum["edge"]:
        return {"<": "≤ ", ">": "≥ ", "?": "点太少，低的是 "}[optimum["edge"]] + f"{optimum['best']:.1e}"
    return f"**{optimum['best']:.1e}**（{optimum['low']:.1e}–{optimum['high']:.1e}）"


def optimum_table(runs, swept, noise):
    """一条曲线一行：各学习率的每字比特和最优。返回 (表的几行, [(设置, 最优)])；不到三个值的曲线只列不配。"""
    lines = []
    optima = []
    for key, curve in sorted(curves(runs, swept).items()):
        settings = dict(key)
        if (
            len(curve) < 2
            or (settings["layers"], settings["vocab"]) == (8, 32_000)
            or (swept == "muon" and 0 in curve)
        ):
            continue
        means = {rate: float(np.mean(bits)) for rate, bits in curve.items()}
        best = fit_optimum(means, means.values(), noise)
        cells = "，".join(
            f"{rate:g}：{value:.3f}" if math.isfinite(value) else f"{rate:g}：发散"
            for rate, value in means.items()
        )
        seeds = max(map(len, curve.values()))
        fixed = f"；矩阵 {settings['muon']:g}" if swept == "rate" and settings["muon"] else ""
        fixed = f"；AdamW 部分 {settings['rate']:g}" if swept == "muon" else fixed
        cells += f"（至多 {seeds} 个种子的平均）" if seeds > 1 else ""
        lines.append(f"| {describe(key)}{fixed} | {cells} | {show(best)} |")
        optima.append((settings, best))
    return lines, optima


def full_table(runs):
    """真实大小：每个配方一行，各验证点的每字比特。"""
    full = sorted((r for r in runs if r["parameters"] > 8e7), key=lambda r: (r["steps"], r["bits"]))
    lines = []
    for run in full:
        points = "，".join(
            f"{row['tokens'] / 1000:.0f}k：{row['bits_per_char']:.3f}"
            for row in run["rows"]
            if "bits_per_char" in row
        )
        lines.append(
            f"| {recipe_name(run)} | {run['seed']} | {run['steps']} | **{run['bits']:.3f}** | "
            f"{run['rows'][-1].get('eval_loss', math.nan):.3f} | {points} |"
        )
    return lines


def recipe_name(run):
    if run["muon"]:
        return f"Muon {run['muon']:g} + AdamW {run['rate']:g}，线性"
    published = "（公开参考）" if run["rate"] == 3e-4 else ""
    return f"AdamW {run['rate']:g}，" + (
        f"余弦、预热 17 %、β2 0.999{published}" if run["schedule"] == "cosine" else "线性"
    )


def select(optima, **fixed):
    """挑出设置与 fixed 相同、不在边上、其余都是缺省（Muon、bf16、词表 8,000）的最优。"""
    fixed = dict(layers=2, vocab=8000, precision="bf16", vectors=1.0, schedule="linear", muon=0.02) | fixed
    return [(s, o) for s, o in optima if not o["edge"] and all(s.get(k) == v for k, v in fixed.items())]


def laws(optima):
    """宽度、批量、长度各自的指数（每种只让一个变），和三个合起来的外推。"""
    base = dict(width=192, batch=2048, steps=160)
    parts = {name: select(optima, **{k: v for k, v in base.items() if k != name}) for name in base}
    found = {name: fit_laws(points, [name]) for name, points in parts.items() if len(points) > 1}
    return parts, found


def shift(runs, noise, **changed):
    """从 192 维的基准换到 changed（层数或词表）时，log2(最优) 移动多少：(移动, 标准差)。

    对照只有两三个点，配不出抛物线，所以借用基准的曲率，只让顶点移动。没有对照返回 None。
    """
    every = {key: curve for key, curve in curves(runs, "rate").items() if dict(key)["muon"]}
    base = dict(width=192, layers=2, vocab=8000, batch=2048, steps=160, precision="bf16", vectors=1.0)

    def points(wanted):
        found = [c for key, c in every.items() if all(dict(key)[k] == v for k, v in wanted.items())]
        pairs = [(math.log2(rate), np.mean(bits)) for rate, bits in (found[0] if found else {}).items()]
        return tuple(map(np.array, zip(*pairs, strict=True))) if pairs else (np.array([]), np.array([]))

    x, y = points(base)
    x_control, y_control = points(base | changed)
    if len(x) < 3 or len(x_control) < 2:
        return None
    a, b, _ = np.polyfit(x, y, 2)
    slope = np.polyfit(x_control, y_control - a * x_control**2, 1)[0]
    sigma = noise / (2 * a * math.sqrt(((x_control - x_control.mean()) ** 2).sum()))
    return float(b - slope) / (2 * a), sigma


def predictions(runs, optima, noise):
    """一步步从 768 维 × 2 层量到的最优换算到完整训练：[(说法, 倍数, 最优, 低, 高)]，范围是一个标准差。"""
    _, found = laws(optima)
    start = select(optima, width=768, batch=2048, steps=160)
    if not start or "batch" not in found:
        return []
    optimum = start[0][1]
    center = math.log2(optimum["best"])
    variance = (math.log2(optimum["high"] / optimum["low"]) / 2) ** 2
    rows = [("768 维 × 2 层，词表 8,000，2,048 token/步，160 步（量到的）", 1.0, center, variance)]
    growth = {name: math.log2(TARGET[name] / start[0][0][name]) for name in ("batch", "steps")}
    moves = [("8 层", shift(runs, noise, layers=8)), ("词表 32,000", shift(runs, noise, vocab=32_000))]
    for name, text in (("batch", f"{TARGET['batch']:,} token/步"), ("steps", f"{TARGET['steps']:,} 步")):
        if name in found:
            coefficients, covariance = found[name]
            exponent = coefficients[1]
            error = math.sqrt(covariance[1, 1])
            moves.append((text, (exponent * growth[name], error * growth[name])))
    for text, move in moves:
        if move:
            center += move[0]
            variance += move[1] ** 2
            rows.append((f"换成 {text}", 2 ** move[0], center, variance))
    return [(text, factor, *(2 ** (c + k * v**0.5) for k in (0, -1, 1))) for text, factor, c, v in rows]


def write_table(folder):
    runs = load(folder / "scaling")
    noise = seed_noise(runs)
    first = runs[0]
    lines, optima = optimum_table(runs, "rate", noise)
    parts, found = laws(optima)
    names = {"width": "宽度", "batch": "批量", "steps": "步数"}
    exponents = [
        f"| {names[name]} | {law[0][1]:+.2f} ± {law[1][1, 1] ** 0.5:.2f} | {len(parts[name])} 个最优 |"
        for name, law in found.items()
    ]
    guesses = [
        f"| {name} | {factor:.2f} | {best:.1e} | {low:.1e}–{high:.1e} |"
        for name, factor, best, low, high in predictions(runs, optima, noise)
    ]
    muon_lines, _ = optimum_table(runs, "muon", noise)
    notes = folder / "notes.md"
    done = {run["name"] for run in runs}
    left = [trial.name for trial in QUEUE if trial.name not in done]
    write_atomic(
        folder / "README.md",
        "\n".join(
            [
                "# 真实宽度上的学习率",
                "",
                "命令：`python benchmarks/width.py --corpus …`（训练）、`python benchmarks/width_report.py`（表和图）。每个试验的日志在 "
                "[scaling/](scaling/)；更早的小模型搜索（267 万参数，调度、预热、β2 等）在 [small/](small/README.md)。",
                f"机器：{first['machine']}，每个试验 {first['threads']} 个线程；{first['versions']}；{first['date']}。"
                "bf16 autocast（AMX），上下文 256，词表 8,000（真实大小：32,000）。",
                f"扫学习率的每字比特，种子误差（比较同一种子的两个学习率时）：标准差 {noise:.3f}。",
                "",
                *([notes.read_text("utf-8")] if notes.exists() else []),
                "![最优学习率随宽度、批量的变化，和真实大小的曲线](scaling.png)",
                "",
                "## AdamW 部分的学习率",
                "",
                "| 设置 | 学习率：每字比特 | 最优（16%–84%） |",
                "|---|---|---|",
                *lines,
                "",
                "## 指数：最优 ∝ 变量的几次方",
                "",
                "| 变量 | 指数 | 根据 |",
                "|---|---|---|",
                *exponents,
                "",
                f"## 换算到完整训练：{TARGET['width']} 维 × 8 层，词表 32,000，{TARGET['batch']:,} token/步",
                "",
                "层数和词表的倍数在 192 维上量（借用基准的曲率，只让顶点移动）；每一步都乘在上一行上。",
                "",
                "| 一步步 | 倍数 | 到这里的最优 | 范围（一个标准差） |",
                "|---|---:|---:|---|",
                *guesses,
                "",
                "## Muon 的学习率（矩阵）",
                "",
                "| 设置 | 学习率：每字比特 | 最优 |",
                "|---|---|---|",
                *muon_lines,
                "",
                "## 真实大小：8 层 × 768 维，词表 32,000，2,048 token/步",
                "",
                "81,477,120 参数：上下文 256，比完整训练的 82,066,944 少 768 个位置向量。",
                "",
                "| 配方 | 种子 | 步 | **每字比特** | 损失 nat | token：每字比特 |",
                "|---|---|---|---|---|---|",
                *full_table(runs),
                "",
                f"队列里还没有跑的：{'、'.join(left) or '无'}。",
            ]
        )
        + "\n",
    )
    return runs, optima, noise


# ==== 4. 图 ====


def draw_curves(axis, runs, name, noise):
    """每字比特对学习率，name（width 或 batch）每个值一条；最优画竖线。"""
    _, optima = optimum_table(runs, "rate", noise)
    base = {k: v for k, v in dict(width=192, batch=2048, steps=160).items() if k != name}
    every = curves(runs, "rate")
    for color, (settings, optimum) in enumerate(select_all(optima, **base)):
        (curve,) = [c for key, c in every.items() if dict(key) == settings]
        means = {rate: np.mean(bits) for rate, bits in curve.items() if math.isfinite(np.mean(bits))}
        lowest = min(means.values())
        axis.plot(
            means.keys(),
            [value - lowest for value in means.values()],
            "o-",
            color=f"C{color}",
            label=f"{settings[name]:,}（{lowest:.2f}）",
        )
        if not optimum["edge"]:
            axis.axvspan(optimum["low"], optimum["high"], color=f"C{color}", alpha=0.15, lw=0)
    ticks = [1e-3 * 2**i for i in range(7)]
    axis.set(xscale="log", xlabel="AdamW 部分的学习率", ylabel="每字比特，减去各自最低的", ylim=(-0.01, 0.2))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(title={"width": "宽度（最低）", "batch": "token/步（最低）"}[name])


def select_all(optima, **fixed):
    """同 select()，但最低点在边上的也要。"""
    edges = {id(o): o["edge"] for _, o in optima}
    kept = select([(s, o | {"edge": "", "id": id(o)}) for s, o in optima], **fixed)
    return [(s, o | {"edge": edges[o["id"]]}) for s, o in kept]


def draw_law(axis, runs, optima, noise):
    """最优对批量：量到的点（颜色是宽度），外推到完整训练的范围，公开的值。"""
    steps_seen = sorted({s["steps"] for s, _ in select(optima)})
    for s, o in select(optima):
        shift = 1 + 0.08 * steps_seen.index(s["steps"])  # 错开一点，免得压在一起
        axis.errorbar(
            s["batch"] * shift,
            o["best"],
            [[o["best"] - o["low"]], [o["high"] - o["best"]]],
            fmt="o^D"[steps_seen.index(s["steps"])],
            capsize=3,
            color=f"C{(192, 384, 768).index(s['width'])}",
            label=f"{s['width']} 维，{s['steps']:,} 步",
        )
    for i, (name, _, best, low, high) in enumerate(predictions(runs, optima, noise)[-2:]):
        axis.errorbar(
            TARGET["batch"] * 1.15**i,
            best,
            [[best - low], [high - best]],
            fmt="s",
            capsize=3,
            color=("black", "silver")[i],
            label=f"换算到完整训练，{name}",
        )
    for batch, rate, source in PUBLISHED:
        axis.plot(batch, rate, "*", ms=12, color="C3", label=f"公开：{source}")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="token/步", ylabel="最优学习率")


def draw(runs, optima, noise, path):
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    plt.rcParams["font.sans-serif"] = [
        n for n in ("Noto Sans CJK SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC") if n in known
    ] + ["DejaVu Sans"]
    plt.rcParams["axes.unicode_minus"] = False
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    draw_curves(axes[0, 0], runs, "width", noise)
    draw_curves(axes[0, 1], runs, "batch", noise)
    draw_law(axes[1, 0], runs, optima, noise)
    for run in sorted((r for r in runs if r["parameters"] > 8e7), key=lambda r: -r["bits"]):
        rows = [row for row in run["rows"] if "bits_per_char" in row]
        axes[1, 1].plot(
            [row["tokens"] for row in rows],
            [row["bits_per_char"] for row in rows],
            "o-",
            ms=3,
            label=f"{recipe_name(run)}（种子 {run['seed']}）",
        )
    axes[1, 1].set(xlabel="训练 token", ylabel="每字比特（验证）", ylim=(4.6, 6.0))
    axes[1, 1].legend(fontsize=7, loc="upper right")
    for axis, title in zip(
        axes.flat,
        (
            "2 层，2,048 token/步，160 步",
            "192 维 × 2 层，160 步",
            "最优学习率对批量",
            "真实大小：8 层 × 768 维，词表 32,000，2,048 token/步",
        ),
        strict=True,
    ):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="里面有 scaling/ 的文件夹")
    args = parser.parse_args()
    runs, optima, noise = write_table(args.results)
    draw(runs, optima, noise, args.results / "scaling.png")


if __name__ == "__main__":
    main()
