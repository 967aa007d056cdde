#!/usr/bin/env python3
"""README 里的数字从哪里来：核对，或换成 results/ 里现在的。

README.md 的每一段（空行分开）里有小数、或带单位的数时，段里要有一个注释说明来历，否则是错误：
    <!-- 出处 文件 路径=印出的数 路径=印出的数; 文件 …… -->    与文件里的数相差不超过印出的末位
    <!-- 算 …… -->  <!-- 资料：…… -->                         由文中的式子算出；别处的说法
    段里写着“未测”
路径里的步数是 .jsonl 的 step，空格写作 ␣。<!-- 续写 步 开头 --> 前面是一段续写，来自 results/demo/samples.jsonl；
<!-- 日志 步 --> 前面是一行日志，照 a100_train.py 的格式由 results/demo/ 里的数写出。

    python docs/readme_numbers.py              # 核对
    python docs/readme_numbers.py --update     # 重新量过演示以后：<!-- demo:begin --> 到 <!-- demo:end --> 里的数和续写换成新的
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"\d\.\d|\d ?(?:秒|分钟|小时|GB|MB|元|倍|%|k token|token/s)")
EXCUSES = ("<!-- 出处", "<!-- 算", "<!-- 资料", "未测")
SAMPLE = re.compile(r"\| ([^|<]*?) <!-- 续写 (\d+) (\S+) -->")
LOG_LINE = re.compile(r"`[^`]*` <!-- 日志 (\d+) -->")
SAMPLE_LENGTH = 48                           # 表格里只放开头这么多字


def read(name):
    path = ROOT / name
    if path.suffix == ".jsonl":              # 同一步的训练行和验证行合在一起
        rows = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(str(row.get("step", "settings")), {}).update(row)
        return rows
    if path.suffix == ".py":                 # SETTINGS 表里的默认值
        return dict(re.findall(r'^    \("(\w+)", ([\d.]+),', path.read_text(encoding="utf-8"), re.M))
    data = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "ablation-cpu.json":     # “比不改”的倍数
        data["ratio"] = {key.removeprefix("default/"): row["tokens_per_second"] / row["unchanged"]
                         for key, row in data["rows"].items() if key.startswith("default/") and row.get("unchanged")}
    return data


def look_up(name, path):
    value = read(name)
    for key in path.replace("␣", " ").split(".", 1 if path.startswith("ratio.") else -1):
        value = value[int(key) if isinstance(value, list) else key]
    return value if isinstance(value, str) and not re.fullmatch(r"[\d.]+", value) else float(value)


def log_line(step):
    config, row = read("results/demo/config.json"), read("results/demo/train_log.jsonl")[step]
    total, speed = config["total_steps"], row["tokens_per_second"]
    seconds = (total - int(step)) * config["effective_batch_size"] * config["block_size"] / speed
    return (f"`步 {step}/{total} | loss {row['loss']:.2f} | lr {row['learning_rate']:.1e} | {speed / 1000:.3g}k tok/s | "
            f"MFU {speed * config['flops_per_token'] / 312e12:.0%} | 剩余 {seconds / 60:.1f} 分钟` <!-- 日志 {step} -->")


def marks(text):
    """逐个给出 (文件, 路径, 印出的数)。"""
    for comment in re.findall(r"<!-- 出处 (.*?) -->", text, re.S):
        for part in comment.split(";"):
            name, *pairs = part.split()
            for pair in pairs:
                yield (name, *pair.rsplit("=", 1))


def printed_as(value, like):
    """把 value 写成 like 的样子：同样的小数位，有没有千分位，是不是百分数；文字原样。"""
    if isinstance(value, str):
        return value.replace(" ", "␣")
    percent = like.endswith("%")
    decimals = len(like.rstrip("%").partition(".")[2])
    text = f"{value * (100 if percent else 1):,.{decimals}f}"
    return (text if "," in like or abs(value) < 1000 else text.replace(",", "")) + "%" * percent


def blocks(text):
    """空行分开的段，不算代码块；注释紧跟在空行后面的，归前一段。"""
    text = re.sub(r"^```.*?^```\n", "", re.sub(r"^ *```.*?^ *```\n", "", text, flags=re.S | re.M), flags=re.S | re.M)
    text = re.sub(r"\n\n(<!-- (?:出处|算|资料))", r"\n\1", text)
    return [block for block in text.split("\n\n") if not block.startswith("    ")]


def problems(text):
    found = []
    for block in blocks(text):
        shown = re.sub(r"<!--.*?-->|\]\([^)]*\)|`[^`]*`", "", block, flags=re.S)
        if NUMBER.search(shown) and not any(excuse in block for excuse in EXCUSES):
            found.append(f"没有来历的数：{shown.strip()[:80]}")
        plain = shown.replace(" %", "%")
        for name, path, printed in marks(block):
            if printed_as(look_up(name, path), printed) != printed:
                found.append(f"{name} {path} 是 {look_up(name, path)}，README 写 {printed}")
            if not re.search(rf"(?<![\d.,]){re.escape(printed.replace('␣', ' '))}(?![\d])", plain):
                found.append(f"{name} {path}={printed} 没有印在那一段里：{plain.strip()[:60]}")
    for line in LOG_LINE.finditer(text):
        if line[0] != log_line(line[1]):
            found.append(f"日志应当是 {log_line(line[1])}，README 写 {line[0]}")
    samples = [json.loads(line) for line in
               (ROOT / "results/demo/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for shown, step, prompt in SAMPLE.findall(text):
        if not any(str(row["step"]) == step and row["text"].startswith(shown) for row in samples):
            found.append(f"第 {step} 步 {prompt} 的续写不是日志里的：{shown}")
    return found


def updated(text):
    """demo 标记之间的数和续写换成 results/demo/ 里的。"""
    samples = {(row["step"], row["prompt"]): " ".join(row["text"].replace("|", "｜").split()) for row in map(
        json.loads, (ROOT / "results/demo/samples.jsonl").read_text(encoding="utf-8").splitlines())}

    def one(match):
        block = match[0]
        for name, path, old in sorted(set(marks(block)), key=lambda mark: -len(mark[1])):
            new = printed_as(look_up(name, path), old)
            block = block.replace(f"{path}={old}", f"{path}=\0{new}")
            if old != new:                   # 先做记号，免得换成的新数又被当成旧的
                shown = re.escape(old.replace("␣", " "))
                block = re.sub(rf"(?<![\d.,=\0]){shown}(?![\d])", f"\0{new.replace('␣', ' ')}", block)
        block = LOG_LINE.sub(lambda found: log_line(found[1]), block.replace("\0", ""))
        return SAMPLE.sub(lambda found: f"| {samples[int(found[2]), found[3]][:SAMPLE_LENGTH]} "
                                        f"<!-- 续写 {found[2]} {found[3]} -->", block)

    return re.sub(r"<!-- demo:begin -->.*?<!-- demo:end -->", one, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description="README 的数字", allow_abbrev=False)
    parser.add_argument("--update", action="store_true", help="演示的数换成 results/demo/ 里的")
    args = parser.parse_args()
    path = ROOT / "README.md"
    if args.update:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
    found = problems(path.read_text(encoding="utf-8"))
    if found:
        sys.exit("错误：\n" + "\n".join(found))
    print("README 的数字都与 results/ 一致")


if __name__ == "__main__":
    main()
