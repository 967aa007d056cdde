#!/usr/bin/env python3
"""README 里的数字从哪里来：核对，或换成 results/ 里现在的。

README.md 和 README.en.md 的每一段（空行分开）里有小数、或带单位的数时，段里要有一个注释说明来历，否则是错误：
    <!-- 出处 文件 路径=印出的数 路径=印出的数; 文件 …… -->    与文件里的数相差不超过印出的末位
    <!-- 算 …… -->  <!-- 资料：…… -->                         由文中的式子算出；别处的说法
    段里写着“未测”
路径里的步数是 .jsonl 的 step，空格写作 ␣；文件里没有、由它算出的数（比、平均、合计）在 ADDED 里。
<!-- 续写 步 开头 --> 前面是一段续写，来自 results/demo/samples.jsonl；<!-- 日志 步 --> 前面是一行日志，照 a100_train.py
的格式由 results/demo/ 里的数写出。

    python docs/readme_numbers.py              # 核对
    python docs/readme_numbers.py --update     # 重新量过以后：有出处的数、续写、日志都换成新的（句子要人再读一遍）
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"\d\.\d|\d ?(?:秒|分钟|小时|GB|MB|元|倍|%|k token|token/s)")
EXCUSES = ("<!-- 出处", "<!-- 算", "<!-- 资料", "未测")
SAMPLE = re.compile(r"\| ([^|<]*?) <!-- 续写 (\d+) (\S+) -->")
LOG_LINE = re.compile(r"`[^`]*` <!-- 日志 (\d+) -->")
SAMPLE_LENGTH = 48  # 表格里只放开头这么多字


def read(name):
    path = ROOT / name
    if path.suffix == ".jsonl":  # 同一步的训练行和验证行合在一起
        rows = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.setdefault(str(row.get("step", "settings")), {}).update(row)
        return rows
    if path.suffix == ".py":
        # 各选项的默认值：表里的一行 ("名字", 数, …)，或一句 add("--名字", …, default=数)
        text = path.read_text(encoding="utf-8")
        table = re.findall(r'^    \("(\w+)", ([\d.]+),', text, re.M)
        return dict(table + re.findall(r'"--(\w+)"[^)]*?\bdefault=([\d.]+)', text))
    if path.suffix == ".log":  # 整理语料时打印的计数：名字，后面是各来源的数；这里取合计
        text = path.read_text(encoding="utf-8").partition("\n写好 ")[0]
        return {
            name: sum(float(number.replace(",", "")) for number in numbers.split())
            for name, numbers in re.findall(r"\b([a-z_]+) +([\d][\d,. ]*)", text)
        } | console_sums(text)
    data = json.loads(path.read_text(encoding="utf-8"))
    return data | ADDED[path.name](data) if path.name in ADDED else data


def console_sums(text):
    """一个来源一行的（“news：rows 19,485，…”）：同一个名字的各行相加。"""
    sums = {}
    for line in re.findall(r"^\w+：(?=.*\brows ).*$", text, re.M):
        for name, number in re.findall(r"\b([a-z_]+) ([\d,]+)", line):
            sums[name] = sums.get(name, 0) + float(number.replace(",", ""))
    return sums


def ablation_ratios(data):
    """“比不改”的倍数。"""
    return {
        "ratio": {
            key.removeprefix("default/"): row["tokens_per_second"] / row["unchanged"]
            for key, row in data["rows"].items()
            if key.startswith("default/") and row.get("unchanged")
        }
    }


def demo_conversion(config):
    """演示最后的损失换成每 token 的比特、猜中的概率；平均一个 token 几个字（算上 </s>）；读几遍。"""
    loss = read("results/demo/train_log.jsonl")[str(config["total_steps"])]["eval_loss"]
    sources = config["eval_sources"].values()
    tokens = sum(source["end"] - source["start"] for source in sources)
    return {
        "bits_per_token": loss / math.log(2),
        "probability": math.exp(-loss),
        "characters_per_token": sum(source["characters"] for source in sources) / tokens,
        "times_uniform": config["vocab_size"] * math.exp(-loss),
        "epochs": config["total_steps"] / config["steps_per_epoch"],
    }


def repetition_means(data):
    """每个设置几个种子的平均。"""
    rows = data["rows"]
    return {
        "mean": {
            name: {
                key: statistics.mean(row[key] for row in rows if row["setting"] == name)
                for key in ("distinct_2", "repeated_4")
            }
            for name in {row["setting"] for row in rows}
        }
    }


def full_size_rows(data):
    """“真实大小”的三行，不靠行号；minutes 是合计。"""
    rows = {
        word: row
        for word in ("清洗", "分词器", "打包")
        for row in data["rows"]
        if row["scale"] == "真实大小" and row["pipeline"].startswith("本项目") and word in row["pipeline"]
    }
    return {"full": rows | {"minutes": sum(row["seconds"] for row in rows.values()) / 60}}


def space_medians(data):
    return {"median": {key: statistics.median(row[key] for row in data["rows"]) for key in data["rows"][0]}}


ADDED = {
    "ablation-cpu.json": ablation_ratios,
    "config.json": demo_conversion,
    "repetition.json": repetition_means,
    "data_prep.json": full_size_rows,
    "space_speed.json": space_medians,
}


def look_up(name, path):
    """路径的一节是键或下标；键里可以有点，取配得上的最长的。"""
    value = read(name)
    rest = path.replace("␣", " ")
    while rest:
        if isinstance(value, list):
            value = {str(place): item for place, item in enumerate(value)}
        keys = list(value)
        fitting = [key for key in keys if f"{rest}.".startswith(f"{key}.")]
        if not fitting:
            sys.exit(
                f"错误：{name} 里没有 {path}（找不到 {rest}）；改 README 里的出处，或 docs/readme_numbers.py 的 ADDED"
            )
        key = max(fitting, key=len)
        value = value[key]
        rest = rest[len(key) + 1 :]
    if isinstance(value, str) and not re.fullmatch(r"[\d.]+", value):
        return value
    return float(value)


def log_line(step):
    config = read("results/demo/config.json")
    row = read("results/demo/train_log.jsonl")[step]
    total = config["total_steps"]
    speed = row["tokens_per_second"]
    seconds = (total - int(step)) * config["effective_batch_size"] * config["block_size"] / speed
    return (
        f"`步 {step}/{total} | loss {row['loss']:.2f} | lr {row['learning_rate']:.1e} | {speed / 1000:.3g}k tok/s | "
        f"剩余 {seconds / 60:.1f} 分钟` <!-- 日志 {step} -->"
    )


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
    if like.endswith("%"):
        return printed_as(100 * value, like[:-1]) + "%"
    decimals = len(like.partition(".")[2])
    text = f"{value:,.{decimals}f}"
    if "," not in like and abs(value) >= 1000:
        text = text.replace(",", "")
    return text


def blocks(text):
    """空行分开的段，不算代码块；注释紧跟在空行后面的，归前一段。"""
    text = re.sub(r"^ *```.*?^ *```\n", "", text, flags=re.S | re.M)
    text = re.sub(r"\n\n(<!-- (?:出处|算|资料))", r"\n\1", text)
    return [block for block in text.split("\n\n") if not block.startswith("    ")]


def wrong_marks(block, shown):
    """出处里的数与 results/ 不同，或没有印在 shown 里。"""
    plain = shown.replace(" %", "%")
    for name, path, printed in marks(block):
        if printed_as(look_up(name, path), printed) != printed:
            yield f"{name} {path} 是 {look_up(name, path)}，这里写 {printed}"
        if not re.search(rf"(?<![\d.,]){re.escape(printed.replace('␣', ' '))}(?![\d])", plain):
            yield f"{name} {path}={printed} 没有印在那一段里：{plain.strip()[:60]}"


def script_problems(text):
    """脚本里的出处是注释或 docstring 里的一行：出处 文件 路径=数。数要印在同一段（前后没有空行）里。"""
    text = re.sub(r"^ *(?:# )?出处 (.+)$", r"<!-- 出处 \1 -->", text, flags=re.M)
    found = []
    for block in text.split("\n\n"):
        found += wrong_marks(block, re.sub(r"<!--.*?-->", "", block))
    return found


def problems(text):
    found = []
    for block in blocks(text):
        shown = re.sub(r"<!--.*?-->|\]\([^)]*\)|`[^`]*`", "", block, flags=re.S)
        if NUMBER.search(shown) and not any(excuse in block for excuse in EXCUSES):
            found.append(f"没有来历的数：{shown.strip()[:80]}")
        found += wrong_marks(block, shown)
    for line in LOG_LINE.finditer(text):
        if line[0] != log_line(line[1]):
            found.append(f"日志应当是 {log_line(line[1])}，README 写 {line[0]}")
    samples = [
        json.loads(line)
        for line in (ROOT / "results/demo/samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for shown, step, prompt in SAMPLE.findall(text):
        if not any(str(row["step"]) == step and row["text"].startswith(shown) for row in samples):
            found.append(f"第 {step} 步 {prompt} 的续写不是日志里的：{shown}")
    return found


def updated(text):
    """有出处的数、续写和日志换成 results/ 里现在的；一段一段来，别处同样的数不动。"""
    samples = {
        (row["step"], row["prompt"]): " ".join(row["text"].replace("|", "｜").split())
        for row in map(
            json.loads, (ROOT / "results/demo/samples.jsonl").read_text(encoding="utf-8").splitlines()
        )
    }

    def one(block):
        for name, path, old in sorted(set(marks(block)), key=lambda mark: -len(mark[1])):
            new = printed_as(look_up(name, path), old)
            if old != new:  # 先做记号，免得换成的新数又被当成旧的
                block = block.replace(f"{path}={old}", f"{path}=\0{new}")
                shown = re.escape(old.replace("␣", " ")).replace("%", " ?%")
                block = re.sub(rf"(?<![\d.,=\0]){shown}(?![\d])", f"\0{new.replace('␣', ' ')}", block)
        block = LOG_LINE.sub(lambda found: log_line(found[1]), block.replace("\0", ""))
        return SAMPLE.sub(
            lambda found: (
                f"| {samples[int(found[2]), found[3]][:SAMPLE_LENGTH]} <!-- 续写 {found[2]} {found[3]} -->"
            ),
            block,
        )

    return "\n\n".join(map(one, text.split("\n\n")))


def main():
    parser = argparse.ArgumentParser(description="README 的数字", allow_abbrev=False)
    parser.add_argument("--update", action="store_true", help="有出处的数、续写和日志换成 results/ 里现在的")
    args = parser.parse_args()
    found = []
    for path in (ROOT / "README.md", ROOT / "README.en.md"):
        if args.update:
            path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
        found += problems(path.read_text(encoding="utf-8"))
    for path in ROOT.glob("*.py"):
        found += script_problems(path.read_text(encoding="utf-8"))
    if found:
        sys.exit("错误：\n" + "\n".join(found))
    print("README 和脚本里有出处的数字都与 results/ 一致")


if __name__ == "__main__":
    main()
