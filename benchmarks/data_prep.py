#!/usr/bin/env python3
"""数据准备有多快、占多少内存：本项目，和 transformers 的 run_clm 那套 datasets.map 做法，同样的文本，一次跑完。

    python benchmarks/data_prep.py --text 语料.jsonl 问答.jsonl --tokenizer gpt2-chinese/tokenizer
    python benchmarks/data_prep.py --text … --tokenizer … --full      # 再加一次真实大小：1.26 M 篇、2.4 GB

--text 的真实文本按句子重新组合，长成几倍大（每篇的句数照原来的分布，句子随机换掉，所以几乎没有重复的文档）。
每一步都是单独的进程；内存是整个进程树的 RSS 之和的峰值，每 0.1 秒看一次。结果写到 results/data_prep.json 和 .md。
"""

import argparse
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import psutil
from common import ROOT, cpu_name

BLOCK_SIZE = 1024
FULL_DOCUMENTS = 254_547 + 1_006_218
FULL_BYTES = 2_400_000_000


# ==== 把文本长大 ====


def read_documents(paths):
    documents = []
    for path in paths:
        for line in open(path, encoding="utf-8"):
            row = json.loads(line)
            text = row.get("text") or row.get("completion")
            documents.append(text or f"{row['INSTRUCTION']}\n{row['RESPONSE']}")
    return documents


def grow(documents, path, size, number, seed):
    """写一个 jsonl：约 size 字节的文本，number 篇（None：篇长照原来的分布）。返回 (字节数, 篇数)。"""
    rng = random.Random(seed)
    sentences = [s for text in documents for s in re.findall(r"[^。！？\n]*[。！？\n]+|[^。！？\n]+$", text)]
    average = sum(len(s.encode()) for s in sentences) / len(sentences)
    lengths = [max(1, len(re.findall(r"[。！？\n]+", text))) for text in documents]
    scale = size / number / average / (sum(lengths) / len(lengths)) if number else 1.0
    written = count = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size if number is None else count < number:
            n = max(1, round(rng.choice(lengths) * scale))
            text = "".join(rng.choices(sentences, k=n)).strip()
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            count += 1
    return written, count


# ==== 量时间、内存、磁盘 ====


class Watch(threading.Thread):
    """每 0.1 秒把一个进程和它的子孙的 RSS、写过的字节加起来，记住最大值。"""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peak = 0
        self.written = {}
        self.stop = threading.Event()

    def run(self):
        while not self.stop.wait(0.1):
            total = 0
            try:
                for process in [self.root, *self.root.children(recursive=True)]:
                    try:
                        total += process.memory_info().rss
                        self.written[process.pid] = process.io_counters().write_chars
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.peak = max(self.peak, total)


def timed(command, environment=None):
    """运行一条命令，返回 {seconds, peak_rss_mb, written_mb}；失败就停下。"""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )
    watch = Watch(process.pid)
    watch.start()
    out, err = process.communicate()
    seconds = time.perf_counter() - start
    watch.stop.set()
    watch.join()
    if process.returncode:
        sys.exit(f"失败：{' '.join(map(str, command))}\n{out[-2000:]}\n{err[-2000:]}")
    return {
        "seconds": round(seconds, 2),
        "peak_rss_mb": round(watch.peak / 1e6),
        "written_mb": round(sum(watch.written.values()) / 1e6),
    }, out


def folder_mb(folder):
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


# ==== 两种做法 ====


def ours(text, tokenizer, work_dir, processes):
    """prepare_corpus.py，再由 a100_train.py --prepare_only 的打包部分编码。返回两行结果。"""
    corpus, out = timed(
        [sys.executable, ROOT / "prepare_corpus.py", "--corpus", text, "--output_dir", work_dir / "corpus"]
    )
    report = json.loads((work_dir / "corpus/report.json").read_text("utf-8"))
    shutil.copytree(tokenizer, work_dir / "tokenizer")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os; os.cpu_count = lambda: {processes}\n"
        f"import a100_train; from pathlib import Path; from types import SimpleNamespace\n"
        f"a100_train.pack(SimpleNamespace(work_dir=Path({str(work_dir)!r}), data_fingerprint=['', '']))"
    )
    pack, _ = timed([sys.executable, "-c", code])
    meta = json.loads((work_dir / "packed/meta.json").read_text("utf-8"))
    documents = sum(source["documents"] for source in report["sources"].values())
    tokens = meta["train_tokens"]
    eval_tokens = sum(place["end"] - place["start"] for place in meta["eval_sources"].values())
    return [
        {
            "pipeline": "本项目：清洗、去重、切分",
            "processes": 1,
            **corpus,
            "disk_mb": folder_mb(work_dir / "corpus"),
            "documents": documents,
        },
        {
            "pipeline": "本项目：编码、打包",
            "processes": processes,
            **pack,
            "disk_mb": folder_mb(work_dir / "packed"),
            "tokens": tokens + eval_tokens,
            "tokens_lost": tokens % BLOCK_SIZE,
            "bytes_per_token": round((work_dir / "packed/train.bin").stat().st_size / tokens, 3),
        },
    ]


BASELINE = """
import sys, datasets
from itertools import chain
from transformers import AutoTokenizer
text, tokenizer, cache, processes, block_size = sys.argv[1:4] + [int(x) for x in sys.argv[4:]]
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
raw = datasets.load_dataset("json", data_files=text, split="train", cache_dir=cache)

def tokenize(rows):
    return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in
                          tokenizer(rows["text"], add_special_tokens=False)["input_ids"]]}

def group(rows):
    flat = list(chain(*rows["input_ids"]))
    total = len(flat) // block_size * block_size
    return {"input_ids": [flat[i:i + block_size] for i in range(0, total, block_size)]}

tokens = raw.map(tokenize, batched=True, num_proc=processes, remove_columns=raw.column_names)
blocks = tokens.map(group, batched=True, num_proc=processes)
print(len(blocks))
"""


def baseline(text, tokenizer, work_dir, processes, tokens):
    """run_clm 的做法：load_dataset、map(分词)、map(拼成块)。没有清洗和去重。"""
    cache = work_dir / "cache"
    result, out = timed(
        [sys.executable, "-c", BASELINE, text, tokenizer, cache, processes, BLOCK_SIZE],
        {"HF_HOME": str(work_dir / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    kept = int(out.split()[-1]) * BLOCK_SIZE
    return [
        {
            "pipeline": "run_clm 的做法：分词、拼块",
            "processes": processes,
            **result,
            "disk_mb": folder_mb(cache),
            "tokens": kept,
            "tokens_lost": tokens - kept,
        }
    ]


# ==== 主程序 ====


def machine():
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu_name()}，{os.cpu_count()} 核，{memory:.0f} GB 内存"


def write_results(rows, args, output):
    versions = {
        name: importlib.metadata.version(name)
        for name in ("datasets", "transformers", "sentencepiece", "pyarrow", "numpy")
    }
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]  # 路径只留文件名
    result = {
        "command": "python benchmarks/data_prep.py " + " ".join(words),
        "date": str(date.today()),
        "machine": machine(),
        "versions": versions,
        "rows": rows,
    }
    output.with_suffix(".json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    lines = [
        "# 数据准备：速度、内存、磁盘",
        "",
        f"`{result['command']}`，{result['date']}，{machine()}；"
        + "，".join(f"{name} {version}" for name, version in versions.items())
        + "。",
        "",
        "文本由真实文本的句子重新组合而成。MB 是 UTF-8 文本的字节数 ÷ 10⁶；内存是整个进程树的 RSS 峰值之和"
        "（含解释器和库；打包进程里 torch 和 transformers 约占一半）；“写盘”是各进程写过的字节（连进程之间传的一起算），“留下”是最后占的磁盘。"
        "“丢失”是拼块时丢掉的 token。",
        "",
        "| 文本 | 做法 | 进程 | 秒 | MB/s | 内存 MB | 写盘 MB | 留下 MB | token | 丢失 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [
            f"{row['scale']}：{row['text_mb']:,.0f} MB，{row['input_documents']:,} 篇",
            row["pipeline"],
            row["processes"],
            f"{row['seconds']:.1f}",
            f"{row['text_mb'] / row['seconds']:.1f}",
            f"{row['peak_rss_mb']:,}",
            f"{row['written_mb']:,}",
            f"{row['disk_mb']:,}",
            f"{row.get('tokens', 0):,}" if "tokens" in row else "",
            f"{row.get('tokens_lost', 0):,}" if "tokens" in row else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="真实文本，jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="train_tokenizer.py 的输出")
    parser.add_argument("--scales", type=int, nargs="*", default=[1, 4, 16], help="长到几倍")
    parser.add_argument("--full", action="store_true", help="再做一次真实大小（只做本项目，和分词器训练）")
    parser.add_argument(
        "--folder", type=Path, default=Path("data-prep-bench"), help="临时文件放哪里，完了删掉"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results/data_prep", help="结果")
    args = parser.parse_args()
    documents = read_documents(args.text)
    one = sum(len(text.encode()) for text in documents)
    plan = [(f"{scale}x", one * scale, None) for scale in args.scales]
    plan += [("真实大小", FULL_BYTES, FULL_DOCUMENTS)] if args.full else []
    rows = []
    cores = os.cpu_count()
    for scale, size, number in plan:
        shutil.rmtree(args.folder, ignore_errors=True)
        args.folder.mkdir(parents=True)
        text = args.folder / "text.jsonl"
        written, count = grow(documents, text, size, number, seed=0)
        where = {"scale": scale, "text_mb": written / 1e6, "input_documents": count}
        for processes in sorted({1, cores}) if scale == "1x" else [cores]:
            found = ours(text, args.tokenizer, args.folder / f"ours{processes}", processes)
            if processes == cores and scale == "真实大小":
                trained, _ = timed(
                    [
                        sys.executable,
                        ROOT / "train_tokenizer.py",
                        "--corpus_dir",
                        args.folder / f"ours{processes}/corpus",
                        "--output_dir",
                        args.folder / "tokenizer",
                    ]
                )
                found.append(
                    {
                        "pipeline": "本项目：训练分词器（32,000 词块）",
                        "processes": processes,
                        **trained,
                        "disk_mb": folder_mb(args.folder / "tokenizer"),
                    }
                )
            elif processes == cores:
                found += baseline(
                    text, args.tokenizer, args.folder / "baseline", processes, found[1]["tokens"]
                )
            rows += [where | row for row in found]
            print(*rows[-len(found) :], sep="\n", flush=True)
            write_results(rows, args, args.output)
    shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
