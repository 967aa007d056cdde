#!/usr/bin/env python3
"""一台机器不够时：同样的清洗、去重、切分，由 datatrove 分成许多任务，在本机、Slurm 或 Ray 上跑。

读什么：与 prepare_corpus.py 一样的 --corpus（本地或共享文件系统上的文件；一个文件由一个任务读，所以文件要不少于任务）。
留下什么：<output_dir>/corpus/train-*.parquet、eval-*.parquet，文档与 prepare_corpus.py 做出来的一样（tests/test_scale.py）。

    pip install "datatrove>=0.10,<0.11"
    python scale/pipeline.py --corpus 网页/*.jsonl --output_dir /共享/语料 --tasks 8 --workers 2
    python scale/pipeline.py --corpus 网页/*.jsonl --output_dir /共享/语料 --tasks 500 \\
                             --executor slurm --partition cpu

清洗和切分的规则从 prepare_corpus.py 导入，去重、任务、日志、断点都是 datatrove 的。四个阶段，每个阶段 --tasks 个任务：
    1 clean   读、清洗，写 cleaned/；每篇一个 64 位签名
    2 find    按签名的范围分给各任务，找出重复的（留次序最靠前的一篇）
    3 count   去掉重复的，数每个来源的篇数和最小的哈希：定出验证集
    4 write   去掉重复的，按哈希分成 train 和 eval
任务被杀了，再跑同一条命令：做完的任务不重做（<output_dir>/logs/ 里有记录）。
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.writers.parquet import ParquetWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare_corpus

# load_dataset 按它找两个切分；来源和许可由使用者补上
SCHEMA = pa.schema({"text": pa.string(), "source": pa.string()})
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train-*.parquet}
  - {split: validation, path: eval-*.parquet}
---

# 中文预训练语料

由 scale/pipeline.py 清洗、去重、切分；列：text、source。公开之前，请写明来源和许可。
"""


# ==== 流水线的每一步 ====


def content(document: Document) -> bytes:
    return document.text.encode("utf-8")


def priority(document: Document) -> int:
    """重复的文档里留来源靠前的：第一个文件的优先级最高。datatrove 的优先级是 1 到 65,535。"""
    return 65_535 - document.metadata["file"]


def text_and_source(self, document):
    """写 parquet 的一行。"""
    return {"text": document.text, "source": document.metadata["source"]}


class ReadAndClean(PipelineStep):
    """读分到的文件，清洗；规则就是 prepare_corpus.py 的。"""

    type = "📖 - READER"
    name = "清洗"

    def __init__(self, files):
        super().__init__()
        self.files = files

    def run(self, data=None, rank=0, world_size=1):
        for number in range(rank, len(self.files), world_size):
            source, path = self.files[number]
            for text, changes in prepare_corpus.read_file(Path(path), prepare_corpus.SHAPES):
                if text is not None:
                    text, changes = prepare_corpus.clean(text)
                for step, times, _ in changes:
                    self.stat_update(step, value=times)
                if text:
                    document = Document(text, path, metadata={"source": source, "file": number})
                    self.update_doc_stats(document)
                    yield document


class ReadCleaned(PipelineStep):
    """读回同一个任务在阶段 1 写的文件，次序不变。"""

    type = "📖 - READER"
    name = "读清洗过的"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank=0, world_size=1):
        for path in sorted(Path(self.folder).glob(f"{rank:05d}.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(1000):
                for row in batch.to_pylist():
                    yield Document(row["text"], "", metadata={"source": row["source"]})


class CountHashes(PipelineStep):
    """每个来源的篇数，和最小的一些哈希；写成一个 JSON。"""

    type = "📊 - STATS"
    name = "数哈希"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data, rank=0, world_size=1):
        counts = {}
        smallest = {}
        for document in data:
            source = document.metadata["source"]
            counts[source] = counts.get(source, 0) + 1
            hashes = smallest.setdefault(source, [])
            hashes.append(prepare_corpus.hash64(document.text))
            if len(hashes) > 2 * prepare_corpus.EVAL_MAXIMUM:
                smallest[source] = sorted(hashes)[: prepare_corpus.EVAL_MAXIMUM]
        smallest = {
            source: sorted(hashes)[: prepare_corpus.EVAL_MAXIMUM] for source, hashes in smallest.items()
        }
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        (Path(self.folder) / f"{rank:05d}.json").write_text(json.dumps([counts, smallest]), "utf-8")


class Split(PipelineStep):
    """按阶段 3 的哈希定出每个来源的界线，标上 train 或 eval。"""

    type = "🔻 - FILTER"
    name = "切分"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def limits(self):
        counts = {}
        smallest = {}
        for path in sorted(Path(self.folder).glob("*.json")):
            part_counts, part_smallest = json.loads(path.read_text("utf-8"))
            for source, count in part_counts.items():
                counts[source] = counts.get(source, 0) + count
                smallest.setdefault(source, []).extend(part_smallest[source])
        ordered = {
            source: np.array(sorted(hashes)[: prepare_corpus.EVAL_MAXIMUM], dtype=np.uint64)
            for source, hashes in smallest.items()
        }
        return {
            source: int(prepare_corpus.held_out_limit(counts[source], ordered[source])) for source in counts
        }

    def run(self, data, rank=0, world_size=1):
        limits = self.limits()
        for document in data:
            held_out = prepare_corpus.hash64(document.text) <= limits[document.metadata["source"]]
            document.metadata["split"] = "eval" if held_out else "train"
            self.stat_update(document.metadata["split"])
            yield document


# ==== 四个阶段 ====


def stages(files, output_dir, tasks):
    """[(阶段名, 流水线)]。"""
    folder = Path(output_dir)
    config = ExactDedupConfig(content_getter=content, document_priority=priority)
    cleaned, signatures, duplicates, hashes = (
        str(folder / name) for name in ("cleaned", "signatures", "duplicates", "hashes")
    )

    def deduplicated():
        return [ReadCleaned(cleaned), ExactDedupFilter(duplicates, config)]

    # max_file_size=-1：一个任务一个文件，文件名就是任务号
    writer = dict(compression="zstd", adapter=text_and_source, schema=SCHEMA, max_file_size=-1)
    return [
        (
            "clean",
            [
                ReadAndClean(files),
                ParquetWriter(cleaned, **writer),
                ExactDedupSignature(signatures, config, finder_workers=tasks),
            ],
        ),
        ("find", [ExactFindDedups(signatures, duplicates, config)]),
        ("count", [*deduplicated(), CountHashes(hashes)]),
        (
            "write",
            [
                *deduplicated(),
                Split(hashes),
                ParquetWriter(str(folder / "corpus"), "${split}-${rank}.parquet", **writer),
            ],
        ),
    ]


def make_executor(kind, name, pipeline, tasks, workers, logs, depends, partition, hours):
    """一个阶段的执行器；Slurm 和 Ray 的只在用到时导入。"""
    logs = str(Path(logs) / name)
    if kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            pipeline,
            tasks,
            time=f"{hours}:00:00",
            partition=partition,
            workers=workers,
            job_name=name,
            logging_dir=logs,
            depends=depends,
        )
    if kind == "ray":
        if not importlib.util.find_spec("ray"):
            sys.exit("错误：指定了 --executor ray，但没有装 ray；pip install ray")
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs, depends=depends)
    return LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs, depends=depends)


def check_settings(output_dir, files, args):
    """同一个输出文件夹只做一种设置：datatrove 只看任务号，换了语料或参数也会把旧任务当成做完了。"""
    stats = [[name, path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for name, path in files]
    key = json.dumps([prepare_corpus.FORMAT, stats, args.tasks])
    path = output_dir / "settings.json"
    if path.exists() and path.read_text("utf-8") != key:
        sys.exit(f"错误：{output_dir} 是用别的语料或设置（包括 --tasks）做的；换一个 --output_dir，或删掉它")
    path.write_text(key, "utf-8")


def main():
    parser = argparse.ArgumentParser(description="用 datatrove 分布式地整理语料", allow_abbrev=False)
    parser.add_argument(
        "--corpus", nargs="+", required=True, metavar="SOURCE", help="[名字=]路径，见 prepare_corpus.py"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="写到哪里；多台机器时要是共享的")
    parser.add_argument("--tasks", type=int, default=1, help="分成几个任务")
    parser.add_argument("--workers", type=int, default=-1, help="同时跑几个任务；-1 是全部")
    parser.add_argument("--executor", choices=["local", "slurm", "ray"], default="local", help="在哪里跑")
    parser.add_argument("--partition", help="Slurm 的分区")
    parser.add_argument("--hours", type=int, default=24, help="Slurm 每个任务最多几小时")
    args = parser.parse_args()
    if args.executor == "slurm" and not args.partition:
        sys.exit("错误：--executor slurm 要用 --partition 指明分区")
    if not 1 <= args.tasks <= 60_000:
        sys.exit(f"错误：--tasks 要在 1 到 60,000 之间，得到 {args.tasks}")
    sources = prepare_corpus.find_sources(args.corpus)
    builtin = [name for name, paths in sources.items() if not paths]
    if builtin:
        sys.exit(f"错误：{'、'.join(builtin)} 是内置来源，这里只读文件；先下载，再写 --corpus 名字=文件")
    files = [(name, str(path.resolve())) for name, paths in sources.items() for path in paths]
    if len(files) >= 65_535:
        sys.exit(f"错误：有 {len(files)} 个文件，至多 65,534 个；先合并小文件")
    executor = None
    for name, pipeline in stages(files, args.output_dir, args.tasks):
        executor = make_executor(
            args.executor,
            name,
            pipeline,
            args.tasks,
            args.workers,
            args.output_dir / "logs",
            executor,
            args.partition,
            args.hours,
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(args.output_dir, files, args)
    lock = filelock.FileLock(args.output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        sys.exit(f"错误：另一个进程正在写 {args.output_dir}；等它结束，或换一个 --output_dir")
    executor.run()
    (args.output_dir / "corpus").mkdir(exist_ok=True)
    (args.output_dir / "corpus" / "README.md").write_text(CARD, "utf-8")
    print(f"{'提交了' if args.executor == 'slurm' else '写好'} {args.output_dir / 'corpus'}")


if __name__ == "__main__":
    prepare_corpus.run(main)
