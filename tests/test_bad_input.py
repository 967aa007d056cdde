"""坏输入表：每一种使用者能犯的错，都只得到一行中文、非零退出码，已有的文件一个字节不变。

大多数情形在本进程里直接调用 main()，快；SUBPROCESS 里的几个再当成真的命令跑一遍。
"""

import gzip
import hashlib
import importlib
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORDS = ("今天 天气 很好 ，我们 去 公园 散步 。人工智能 是 一门 学科 ，研究 怎样 让 机器 思考 。中国的 历史 很长 ！ 教育 的 目的 "
         "科学 学习 老师 同学 北京 上海 春天 花开 山水 风景 朋友").split()
TINY = ("--preset demo --work_dir run --device cpu --optim adamw_torch --no-compile --n_layer 1 --n_embd 8 "
        "--n_head 2 --block_size 32 --batch_size 2 --effective_batch_size 2 --max_steps 4 --logging_steps 1 "
        "--eval_steps 2").split()
PREPARE, TOKENIZER, TRAIN, PLOT = "prepare_corpus", "train_tokenizer", "a100_train", "plot_loss"


@dataclass
class Case:
    """一种坏输入。setup 在工作目录里造出坏东西；expect 是错误行里必须出现的字样。"""
    name: str
    script: str
    arguments: str | list
    expect: tuple
    setup: object = None
    base: str = ""                          # 先抄一份好的：corpus、tokenizer、packed 或 trained
    monkey: object = None                   # 收 (monkeypatch, 模块)：装作没有显卡、没有编译器……
    may_create: tuple = field(default=())   # 允许多出来的文件（都在这些文件夹里）

    def command(self):
        return self.arguments.split() if isinstance(self.arguments, str) else self.arguments


# ==== 1. 造东西 ====

def sentences(count, seed=0):
    """一些互不相同的短文。"""
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.randint(10, 30))) for _ in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def text(name, content):
    """返回一个 setup：写一个文件；content 是 str 或 bytes。"""
    def setup(work):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return setup


def both(*setups):
    def setup(work):
        for one in setups:
            one(work)
    return setup


def edit(name, change):
    """返回一个 setup：把已有文件的内容（bytes）换成 change(内容)。"""
    def setup(work):
        path = work / name
        path.write_bytes(change(path.read_bytes()))
    return setup


def half(data):
    return data[:len(data) // 2]


def garbage(data):
    """同样长的乱码：大小检查看不出来。"""
    return random.Random(0).randbytes(len(data))


def remove(name):
    def setup(work):
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return setup


def folder(name):
    return lambda work: (work / name).mkdir(parents=True)


def lines(count=60):
    return "".join(json.dumps({"text": line},
                   ensure_ascii=False) + "\n" for line in sentences(count)).encode()


def parquet_bytes(column="text", values=None):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: values if values is not None else sentences(500)}), sink)
    return sink.getvalue().to_pybytes()


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def corpus_of(documents):
    """返回一个 setup：一份合法但古怪的语料 run/corpus。"""
    def setup(work):
        write_jsonl(work / "odd.jsonl", [{"text": document} for document in documents])
        code = call(PREPARE, ["--corpus", str(work / "odd.jsonl"), "--output_dir", str(work / "run/corpus"),
                              "--skip_cleaning", "all"])
        assert code in (0, None)
    return setup


def no_cuda(monkeypatch, module):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def without(*packages):
    def monkey(monkeypatch, module):
        no_cuda(monkeypatch, module)
        real = module.installed
        monkeypatch.setattr(module, "installed", lambda package: package not in packages and real(package))
    return monkey


def no_compiler(monkeypatch, module):
    no_cuda(monkeypatch, module)
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)


# ==== 2. 运行与检查 ====

def call(script, arguments):
    """在本进程里运行一个脚本，返回退出码。"""
    module = importlib.import_module(script)
    argv, sys.argv = sys.argv, [script + ".py", *arguments]
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        module.run(module.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = argv
        for which, handler in handlers.items():
            signal.signal(which, handler)


def call_subprocess(script, arguments, cwd, env=None):
    result = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *arguments], cwd=cwd,
    capture_output=True,
                            text=True, encoding="utf-8", env={**os.environ, **(env or {})}, timeout=120)
    return result.returncode, result.stdout, result.stderr


def snapshot(work):
    """{相对路径: 内容的哈希}，锁文件除外；文件夹也记下。"""
    found = {}
    for path in sorted(work.rglob("*")):
        if path.name.endswith(".lock"):
            continue
        digest = hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "文件夹"
        found[str(path.relative_to(work))] = digest
    return found


def check_error(code, out, err, expect):
    """退出码 1 或 2；stderr 恰好一行，以“错误”开头，有中文，有出错的值。"""
    assert "Traceback" not in out + err, err
    stderr = [line for line in err.splitlines() if line.strip()]
    assert code in (1, 2), (code, out, err)
    assert len(stderr) == 1 and stderr[0].startswith("错误"), err
    assert len(re.findall(r"[\u4e00-\u9fff]", stderr[0])) >= 6, err
    for word in expect:
        assert word in stderr[0], (word, stderr[0])


def check_untouched(before, after, may_create=()):
    for path, digest in before.items():
        assert after.get(path) == digest, f"{path} 变了或没了"
    for path in after.keys() - before.keys():
        assert not re.search(r"(^|/)\.[^/]*(tmp|old|staging)", path), f"留下了半成品 {path}"
        assert path.startswith(may_create) if may_create else after[path] == "文件夹", f"多出来 {path}"


# ==== 3. 好的底子，整个会话只做一次 ====

@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """{"corpus", "tokenizer", "packed", "trained"} -> 一个文件夹，各比前一个多一步。"""
    root = tmp_path_factory.mktemp("good")
    here = os.getcwd()
    stages = {}
    try:
        for name in ("corpus", "tokenizer", "packed", "trained"):
            work = root / name
            if stages:
                shutil.copytree(list(stages.values())[-1], work)
            else:
                work.mkdir()
                write_jsonl(work / "in.jsonl", [{"text": line} for line in sentences(400)])
            os.chdir(work)
            if name == "corpus":
                code = call(PREPARE, ["--corpus", "in.jsonl", "--output_dir", "run/corpus"])
            elif name == "tokenizer":
                code = call(TOKENIZER,
                "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 330".split())
            elif name == "packed":
                code = call(TRAIN, "--preset demo --work_dir run --prepare_only".split())
            else:
                train = importlib.import_module(TRAIN)
                plot, train.plot_curve = train.plot_curve, lambda *a: None
                code = call(TRAIN, TINY)
                train.plot_curve = plot
                for lost in ("final_model", "checkpoints/checkpoint-4"):         # 装作训练到第 2 步就断电了
                    shutil.rmtree(work / "run" / lost)
            assert code in (0, None), name
            stages[name] = work
    finally:
        os.chdir(here)
    return stages


@pytest.fixture
def work(tmp_path, monkeypatch):
    folder = tmp_path / "w"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture
def small_disk(work):
    """small_disk(大小) 在 work/disk 挂一个很小的内存盘；没有权限就跳过。"""
    def mount(size):
        disk = work / "disk"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)],
        capture_output=True)
        if done.returncode:
            pytest.skip("挂不了内存盘（要 root），没法让磁盘写满")
        return disk
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("要 Linux 的 root 才能挂内存盘，没法让磁盘写满")
    yield mount
    subprocess.run(["umount", "-l", str(work / "disk")], capture_output=True)


# ==== 4. 坏输入表 ====

P = "--output_dir run/corpus --corpus "
CASES = [
    # ---- 第 1 步：来源 ----
    Case("missing_file", PREPARE, P + "nothing.jsonl", ("nothing.jsonl", "找不到", "wiki")),
    Case("missing_glob", PREPARE, P + "no/*.txt", ("no/*.txt", "找不到")),
    Case("empty_name", PREPARE, ["--output_dir", "run/corpus", "--corpus", ""], ("找不到语料",),
         text("mine.txt", "别读我\n")),
    Case("empty_path_after_name", PREPARE, P + "小说=", ("找不到语料",), text("mine.txt", "别读我\n")),
    Case("unknown_home", PREPARE, P + "~no_such_user_here/a.txt", ("~no_such_user_here", "找不到")),
    Case("empty_file", PREPARE, P + "a.jsonl", ("语料是空的", "0 行"), text("a.jsonl", "")),
    Case("empty_folder", PREPARE, P + "in", ("in", "没有可读的语料", ".jsonl"), folder("in")),
    Case("folder_without_text", PREPARE, P + "in", ("in", "没有可读的语料"), text("in/a.docx", b"PK")),
    Case("unsupported_extension", PREPARE, P + "a.docx", ("a.docx", ".jsonl"), text("a.docx", b"PK")),
    Case("only_whitespace", PREPARE, P + "a.jsonl", ("语料是空的", "3 行"),
         text("a.jsonl", '{"text": "  "}\n{"text": "\\u3000"}\n{"text": null}\n')),
    Case("single_document", PREPARE, P + "a.jsonl", ("只有 1 篇", "至少要 2 篇"),
         text("a.jsonl", '{"text": "只有这一篇"}\n')),
    Case("all_duplicates", PREPARE, P + "a.jsonl", ("只有 1 篇",),
         text("a.jsonl", '{"text": "全都一样"}\n' * 9)),
    Case("all_too_short", PREPARE, P + "a.jsonl", ("语料是空的", "太短的文档 9", "--skip_cleaning"),
         text("a.jsonl", '{"text": "短"}\n' * 9)),
    Case("emoji_only_corpus", PREPARE, P + "a.jsonl", ("语料是空的", "大半不是文字的文档 5", "--skip_cleaning"),
         text("a.jsonl", '{"text": "😀😃😄👍"}\n' * 5)),
    Case("unknown_cleaning_step", PREPARE, P + "demo --skip_cleaning htm", ("htm", "没有这个选项")),
    Case("source_unknown", PREPARE, P + "demo --source github", ("github", "没有这个选项")),
    Case("processes_zero", PREPARE, P + "demo --processes 0", ("0",)),
    Case("normalize_unknown", PREPARE, P + "demo --normalize nfkc", ("nfkc", "没有这个选项")),
    Case("download_unknown", "download_corpus", "baike", ("baike", "没有这个选项")),
    Case("no_text_column", PREPARE, P + "a.jsonl", ("第 2 行", "标题、正文", "--text_column"),
         text("a.jsonl", '{"text": "好"}\n{"标题": "一", "正文": "二"}\n')),
    Case("no_such_text_column", PREPARE, P + "a.jsonl --text_column 正闻", ("正文", "--text_column", "正闻"),
         text("a.jsonl", '{"标题": "好", "正文": "二"}\n')),
    Case("text_not_string", PREPARE, P + "a.jsonl", ("第 1 行", "不是字符串", "12345"),
         text("a.jsonl", '{"text": 12345}\n')),
    Case("text_column_list", PREPARE, P + "a.jsonl", ("第 1 行", "不是字符串"),
         text("a.jsonl", '{"text": ["一"]}\n')),
    Case("undecodable", PREPARE, P + "a.txt", ("a.txt", "编码", "UTF-8"),
         text("a.txt", b"\xff\x00\x81 \xfa\xff\xff\n" * 40)),
    Case("one_bad_byte", PREPARE, P + "a.txt", ("a.txt", "UTF-8"),
         text("a.txt", "好的中文".encode() * 50 + b"\xff" + "好的中文".encode() * 50)),
    Case("one_bad_byte_like_gbk", PREPARE, P + "a.txt", ("a.txt", "UTF-8", "第 603 字节"),
         text("a.txt", "好的中文".encode() * 50 + "好".encode() + b"\x81\x81\x81" + "好的中文".encode() * 50)),
    Case("one_bad_byte_far", PREPARE, P + "a.txt", ("a.txt", "utf-8"),
         text("a.txt", "好的中文\n".encode() * 100_000 + b"\xff" + "好的中文\n".encode() * 50)),
    Case("odd_utf16", PREPARE, P + "a.txt", ("a.txt", "utf-16"),
         text("a.txt", "好的".encode("utf-16") * 9 + b"x")),
    Case("broken_json_line", PREPARE, P + "a.jsonl", ("a.jsonl", "第 2 行", "不是 JSON"),
         text("a.jsonl", '{"text": "好"}\n{"text": "坏\n{"text": "好"}\n')),
    Case("truncated_array", PREPARE, P + "a.json", ("a.json", "JSON"),
         text("a.json", '[{"text": "一"}, {"text": "二')),
    Case("array_without_end", PREPARE, P + "a.json", ("a.json", "JSON"), text("a.json", '[{"text": "一"}, ')),
    Case("array_of_lists", PREPARE, P + "a.json", ("a.json", "第 1 项"),
         text("a.json", '[["一", "二"], ["三", "四"]]')),
    Case("two_arrays", PREPARE, P + "a.json", ("a.json", "数组结束以后"), text("a.json", '["一", "二"]\n["三", "四"]')),
    Case("number_json", PREPARE, P + "a.json", ("a.json", "42"), text("a.json", "42")),
    Case("list_of_numbers", PREPARE, P + "a.json", ("a.json", "第 1 项", "7"), text("a.json", "[7, 8, 9]")),
    Case("huge_number", PREPARE, P + "a.jsonl", ("a.jsonl", "第 1 行"),
         text("a.jsonl", '{"text": ' + "9" * 5000 + "}\n")),
    Case("deep_json", PREPARE, P + "a.jsonl", ("a.jsonl", "第 1 行"), text("a.jsonl", "[" * 200_000 + "\n")),
    Case("corrupted_gz", PREPARE, P + "a.jsonl.gz", ("a.jsonl.gz", "损坏"),
         text("a.jsonl.gz", gzip.compress(lines())[:60] + b"\x55" * 300)),
    Case("not_gz", PREPARE, P + "a.jsonl.gz", ("a.jsonl.gz", "损坏"), text("a.jsonl.gz", lines())),
    Case("truncated_gz", PREPARE, P + "a.txt.gz", ("a.txt.gz", "损坏"),
         text("a.txt.gz", half(gzip.compress(lines())))),
    Case("truncated_xz", PREPARE, P + "a.jsonl.xz", ("a.jsonl.xz", "损坏"),
         text("a.jsonl.xz", half(lzma.compress(lines())))),
    Case("garbage_zst", PREPARE, P + "a.jsonl.zst", ("a.jsonl.zst", "损坏"),
         text("a.jsonl.zst", garbage(b"0" * 999))),
    Case("truncated_zst", PREPARE, P + "a.jsonl.zst", ("a.jsonl.zst", "损坏"),
         text("a.jsonl.zst", half(zstd(lines())))),
    Case("truncated_parquet", PREPARE, P + "a.parquet", ("a.parquet", "损坏"),
         text("a.parquet", half(parquet_bytes()))),
    Case("garbage_parquet", PREPARE, P + "a.parquet", ("a.parquet", "损坏"),
         text("a.parquet", garbage(b"0" * 999))),
    Case("damaged_parquet", PREPARE, P + "a.parquet", ("a.parquet", "损坏"),
         text("a.parquet", (lambda data: data[:40] + b"\x99" * 200 + data[240:])(parquet_bytes()))),
    Case("empty_parquet", PREPARE, P + "a.parquet", ("a.parquet", "损坏"), text("a.parquet", b"")),
    Case("parquet_numbers", PREPARE, P + "a.parquet", ("a.parquet", "不是字符串"),
         text("a.parquet", parquet_bytes("text", [1, 2, 3]))),
    Case("csv_no_column", PREPARE, P + "a.csv", ("a.csv", "第 2 行", "甲、乙"), text("a.csv", "甲,乙\n1,2\n")),
    Case("unknown_option_prepare", PREPARE, "--corpsu demo", ("--corpsu", "不认识的参数", "--help")),
    Case("missing_value_prepare", PREPARE, "--output_dir", ("--output_dir", "跟一个值")),
    Case("unknown_preset_prepare", PREPARE, "--preset big", ("big", "full", "demo")),
    # ---- 第 1 步：输出 ----
    Case("foreign_folder", PREPARE, P + "in.jsonl", ("run/corpus", "不覆盖", "--output_dir"),
         text("run/corpus/thesis.md", "三年的心血"), "corpus_input"),
    Case("output_is_file", PREPARE, "--output_dir in.jsonl --corpus in.jsonl", ("in.jsonl", "不覆盖"), None,
         "corpus"),
    Case("output_below_file", PREPARE, "--output_dir in.jsonl/a/b --corpus in.jsonl", ("in.jsonl", "读写文件失败"),
         None, "corpus"),
    Case("output_in_proc", PREPARE, "--output_dir /proc/corpus --corpus in.jsonl",
         ("/proc/corpus", "--output_dir"), None,
         "corpus"),
    Case("bad_file_keeps_old_corpus", PREPARE, P + "a.jsonl", ("a.jsonl", "第 1 行"), text("a.jsonl", "{\n"),
         "corpus"),
    Case("no_rebuild", PREPARE, P + "in.jsonl --no-rebuild", ("来源或设置变了", "--work_dir"),
         text("in.jsonl", lines(9)), "corpus"),
    # ---- 第 2 步 ----
    Case("no_corpus", TOKENIZER, "--corpus_dir nowhere", ("nowhere", "prepare_corpus.py")),
    Case("corpus_report_broken", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer",
         ("run/corpus", "prepare_corpus.py"), edit("run/corpus/report.json", half), "corpus"),
    Case("corpus_report_other_json", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer",
         ("run/corpus", "prepare_corpus.py"), text("run/corpus/report.json", '{"files": {}}'), "corpus"),
    Case("shard_deleted", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer",
         ("run/corpus", "prepare_corpus.py"), remove("run/corpus/train-00000.parquet"), "corpus"),
    Case("shard_truncated", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer",
         ("run/corpus", "prepare_corpus.py"), edit("run/corpus/train-00000.parquet", half), "corpus"),
    Case("shard_garbage", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer",
         ("train-00000.parquet", "损坏", "prepare_corpus.py"), edit("run/corpus/train-00000.parquet", garbage),
          "corpus"),
    Case("shard_bit_rot", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer",
         ("train-00000.parquet", "损坏", "prepare_corpus.py"),
         edit("run/corpus/train-00000.parquet", lambda data: data[:40] + b"\x99" * 400 + data[440:]),
         "corpus"),
    Case("vocab_too_large", TOKENIZER,
         "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 60000",
         ("60,000", "--vocab_size"), None, "corpus"),
    Case("vocab_beyond_uint16", TOKENIZER, "--vocab_size 65537", ("--vocab_size", "65537", "65536")),
    Case("vocab_too_small", TOKENIZER, "--vocab_size 299", ("--vocab_size", "299", "300")),
    Case("vocab_zero", TOKENIZER, "--vocab_size 0", ("--vocab_size", "300")),
    Case("vocab_negative", TOKENIZER, "--vocab_size -5", ("--vocab_size", "-5")),
    Case("vocab_word", TOKENIZER, "--vocab_size 三万", ("--vocab_size", "三万", "整数")),
    Case("vocab_float", TOKENIZER, "--vocab_size 3.5", ("--vocab_size", "3.5", "整数")),
    Case("coverage_above_one", TOKENIZER, "--character_coverage 1.5", ("--character_coverage", "1.5")),
    Case("coverage_nan", TOKENIZER, "--character_coverage nan", ("--character_coverage", "nan")),
    Case("emoji_only", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 3000",
         ("3,000", "语料"), corpus_of(["😀", "😀😃", "😃😄😀", "👍"])),
    Case("one_character", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 3000",
         ("3,000", "语料"), corpus_of(["一" * i for i in range(1, 9)])),
    Case("one_character_smallest", TOKENIZER,
         "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 300",
         ("300", "语料"), corpus_of(["一" * i for i in range(1, 9)])),
    Case("too_many_characters", TOKENIZER,
         "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 400",
         ("400", "太小", "--vocab_size"), corpus_of([chr(i) * 2 for i in range(0x4E00, 0x5200)])),
    Case("tokenizer_foreign_folder", TOKENIZER, "--corpus_dir run/corpus --output_dir mine", ("mine", "不覆盖"),
         text("mine/thesis.md", "三年的心血"), "corpus"),
    Case("tokenizer_no_rebuild", TOKENIZER,
         "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 320 --no-rebuild", ("--work_dir",),
         None,
         "tokenizer"),
    # ---- 第 3 步：参数 ----
    Case("rate_word", TRAIN, "--learning_rate fast", ("--learning_rate", "fast")),
    Case("rate_negative", TRAIN, "--learning_rate -0.1", ("--learning_rate", "-0.1")),
    Case("rate_zero", TRAIN, "--learning_rate 0", ("--learning_rate",)),
    Case("rate_nan", TRAIN, "--learning_rate nan", ("--learning_rate", "nan")),
    Case("rate_inf", TRAIN, "--learning_rate inf", ("--learning_rate", "inf")),
    Case("heads", TRAIN, "--preset demo --n_embd 100 --n_head 3", ("100", "3", "整除")),
    Case("batch", TRAIN, "--preset demo --batch_size 3 --effective_batch_size 16", ("3", "16", "约数")),
    Case("batch_zero", TRAIN, "--batch_size 0", ("--batch_size", "0")),
    Case("layers_negative", TRAIN, "--n_layer -1", ("--n_layer", "-1")),
    Case("warmup", TRAIN, "--warmup_ratio 1.5", ("--warmup_ratio", "1.5")),
    Case("seed", TRAIN, "--seed -1", ("--seed", "-1")),
    Case("unknown_option", TRAIN, "--learning_rat 1", ("--learning_rat", "不认识的参数")),
    Case("unknown_preset", TRAIN, "--preset a100", ("a100", "full")),
    Case("missing_value", TRAIN, "--work-dir", ("--work_dir", "跟一个值")),
    Case("missing_values", TRAIN, "--corpus", ("--corpus", "跟一个值")),
    Case("switch_with_value", TRAIN, "--compile=yes", ("--compile", "不接受取值")),
    Case("dashes", TRAIN, "--learning-rate=abc", ("--learning_rate", "abc")),
    Case("stray_argument", TRAIN, "run1", ("run1", "不认识的参数")),
    # ---- 第 3 步：设备 ----
    Case("full_without_cuda", TRAIN, "--work_dir run", ("CUDA", "--preset demo"), monkey=no_cuda),
    Case("cuda_absent", TRAIN, "--preset demo --device cuda", ("--device cuda",), monkey=no_cuda),
    Case("flash_on_cpu", TRAIN, "--preset demo --attn flash_attention_2", ("flash_attention_2", "sdpa"),
         monkey=no_cuda),
    Case("bf16_on_cpu", TRAIN, "--preset demo --precision bf16", ("bf16", "fp32"), monkey=no_cuda),
    Case("fp16_on_cpu", TRAIN, "--preset demo --precision fp16", ("fp16", "fp32"), monkey=no_cuda),
    Case("tf32_on_cpu", TRAIN, "--preset demo --tf32", ("--tf32", "去掉"), monkey=no_cuda),
    Case("liger_on_cpu", TRAIN, "--preset demo --liger", ("--liger", "去掉"), monkey=no_cuda),
    Case("no_bitsandbytes", TRAIN, "--preset demo --optim adamw_bnb_8bit", ("bitsandbytes", "pip install"),
         monkey=without("bitsandbytes")),
    Case("no_compiler", TRAIN, "--preset demo --compile", ("--compile", "g++"), monkey=no_compiler),
    Case("no_wandb", TRAIN, "--preset demo --report_to wandb", ("wandb", "pip install"),
         monkey=without("wandb")),
    # ---- 第 3 步：工作目录 ----
    Case("work_dir_is_file", TRAIN, "--preset demo --work_dir in.jsonl", ("in.jsonl", "读写文件失败"), None,
         "corpus"),
    Case("work_dir_below_file", TRAIN, "--preset demo --work_dir in.jsonl/run", ("in.jsonl", "读写文件失败"), None,
         "corpus"),
    Case("block_larger_than_corpus", TRAIN, [*TINY, "--block_size", "100000"], ("100000", "改小"), None,
         "packed"),
    Case("block_shorter_than_prompt", TRAIN, [*TINY, "--block_size", "2"], ("--block_size", "2"), None,
         "packed"),
    Case("vocab_beyond_uint16_train", TRAIN, [*TINY, "--vocab_size", "100000"], ("--vocab_size", "100000"),
         None,
         "packed"),
    Case("packed_foreign", TRAIN, [*TINY], ("run/packed", "不覆盖"), text("run/packed/thesis.md", "三年的心血"),
         "tokenizer"),
    Case("garbage_model_same_size", TRAIN, [*TINY], ("sentencepiece.model", "train_tokenizer.py"),
         edit("run/tokenizer/sentencepiece.model", garbage), "packed"),
    Case("train_missing_corpus", TRAIN, [*TINY, "--corpus", "gone.jsonl"], ("gone.jsonl", "找不到"), None,
         "trained"),
    Case("fresh_keeps_checkpoints_until_sure", TRAIN, [*TINY, "--fresh", "--corpus", "gone.jsonl"],
         ("gone.jsonl", "找不到"), None, "trained"),
    Case("config_broken", TRAIN, [*TINY], ("config.json", "--fresh"), edit("run/config.json", half),
         "trained"),
    Case("config_list", TRAIN, [*TINY], ("config.json", "--fresh"), text("run/config.json", "[1]"),
         "trained"),
    Case("config_missing", TRAIN, [*TINY], ("config.json", "--fresh"), remove("run/config.json"), "trained"),
    Case("other_recipe", TRAIN, [*TINY, "--n_layer", "2"], ("n_layer", "1", "2", "--fresh"), None, "trained"),
    Case("other_corpus", TRAIN, [*TINY, "--corpus", "other.jsonl"], ("来源或设置变了", "--fresh"),
         text("other.jsonl", lines()), "trained"),
    Case("rate_explodes", TRAIN, [*TINY, "--learning_rate", "1e18"], ("损失", "--learning_rate"), None,
         "packed",
         may_create=("run/",)),
    # ---- 第 4 步 ----
    Case("plot_missing", PLOT, "nowhere", ("nowhere", "找不到")),
    Case("plot_empty_folder", PLOT, "run", ("run", "找不到日志"), folder("run")),
    Case("plot_empty_log", PLOT, "run", ("train_log.jsonl", "还没有"), text("run/train_log.jsonl", "")),
    Case("plot_no_loss", PLOT, "run", ("train_log.jsonl", "还没有"),
         text("run/train_log.jsonl", '{"step": 1}\n')),
    Case("plot_broken_json", PLOT, "run", ("train_log.jsonl", "损坏"),
         text("run/train_log.jsonl", '{"st\n{"a": 1}\n')),
    Case("plot_garbage", PLOT, "run", ("train_log.jsonl", "损坏"),
         text("run/train_log.jsonl", garbage(b"0" * 9999))),
    Case("plot_numbers", PLOT, "a.json", ("a.json", "损坏"), text("a.json", "42")),
    Case("plot_deep", PLOT, "a.json", ("a.json", "损坏"), text("a.json", "[" * 200_000)),
    Case("plot_words", PLOT, "run", ("train_log.jsonl", "损坏"),
         text("run/train_log.jsonl", '{"step": "一", "loss": 1}\n')),
    Case("plot_null_step", PLOT, "run", ("train_log.jsonl", "损坏"),
         text("run/train_log.jsonl", '{"step": null, "loss": 1}\n')),
    Case("plot_bad_state", PLOT, "a.json", ("a.json", "还没有"), text("a.json", '{"log_history": {"a": 1}}')),
    Case("plot_log_is_folder", PLOT, "run", ("train_log.jsonl", "读写文件失败"), folder("run/train_log.jsonl")),
    Case("plot_output_is_folder", PLOT, "run --output run", ("run", ".png"),
         text("run/train_log.jsonl", '{"step": 1, "loss": 2}\n')),
    Case("plot_output_below_file", PLOT, "run --output run/train_log.jsonl/a.png",
         ("train_log.jsonl", "读写文件失败"),
         text("run/train_log.jsonl", '{"step": 1, "loss": 2}\n')),
    Case("plot_language", PLOT, "--language fr", ("fr", "zh")),
]


def start(case, work, good):
    if case.base in good:
        shutil.copytree(good[case.base], work, dirs_exist_ok=True)
    elif case.base:
        shutil.copy(good["corpus"] / "in.jsonl", work)
    if case.setup:
        case.setup(work)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case, work, good, monkeypatch, capfd):
    start(case, work, good)
    module = importlib.import_module(case.script)
    if case.script == TRAIN:
        monkeypatch.setattr(module, "plot_curve", lambda *a: None)
    if case.monkey:
        case.monkey(monkeypatch, module)
    before = snapshot(work)
    capfd.readouterr()
    code = call(case.script, case.command())
    out, err = capfd.readouterr()
    check_error(code, out, err, case.expect)
    check_untouched(before, snapshot(work), case.may_create)


SUBPROCESS = ["missing_file", "broken_json_line", "truncated_xz", "one_bad_byte", "unknown_option_prepare",
              "output_below_file", "plot_garbage", "no_corpus", "heads"]


@pytest.mark.parametrize("name", SUBPROCESS)
def test_bad_input_as_command(name, work, good):
    """同样的情形，当成真的命令再跑一遍。"""
    case = next(case for case in CASES if case.name == name)
    start(case, work, good)
    before = snapshot(work)
    check_error(*call_subprocess(case.script, case.command(), work), case.expect)
    check_untouched(before, snapshot(work), case.may_create)


# ==== 5. 磁盘写满、只读、锁 ====

def test_disk_full_while_building(work, small_disk, capfd):
    """语料写到一半磁盘满：旧语料还在，没有半成品。"""
    disk = small_disk("2m")
    write_jsonl(work / "small.jsonl", [{"text": line} for line in sentences(30)])
    assert call(PREPARE, ["--corpus", "small.jsonl", "--output_dir", "disk/corpus"]) in (0, None)
    rng = random.Random(0)
    write_jsonl(work / "big.jsonl",
    [{"text": "".join(chr(rng.randrange(0x4E00, 0x9F00)) for _ in range(1000))}
                                     for _ in range(3000)])
    before = snapshot(disk)
    capfd.readouterr()
    code = call(PREPARE, ["--corpus", "big.jsonl", "--output_dir", "disk/corpus"])
    out, err = capfd.readouterr()
    check_error(code, out, err, ("磁盘写满了", "清出空间"))
    check_untouched(before, snapshot(disk))


def fill(disk, leave):
    """写一个大文件，让内存盘只剩 leave 字节。"""
    free = shutil.disk_usage(disk).free - leave
    (disk / "ballast").write_bytes(b"\0" * max(0, free))


def test_disk_full_while_training_tokenizer(work, good, small_disk, capfd):
    disk = small_disk("2m")
    shutil.copytree(good["corpus"], disk, dirs_exist_ok=True)
    fill(disk, 8192)
    before = snapshot(disk)
    capfd.readouterr()
    code = call(TOKENIZER,
    "--corpus_dir disk/run/corpus --output_dir disk/run/tokenizer --vocab_size 330".split())
    out, err = capfd.readouterr()
    check_error(code, out, err, ("磁盘写满了", "清出空间"))
    check_untouched(before, snapshot(disk))


@pytest.mark.parametrize("checked", [True, False])
def test_disk_full_while_packing(checked, work, good, small_disk, monkeypatch, capfd):
    """事先就看得出磁盘不够；看漏了、写到一半才满，也一样。"""
    if not checked:
        monkeypatch.setattr(importlib.import_module(TRAIN), "check_disk", lambda *a: None)
    disk = small_disk("2m")
    shutil.copytree(good["packed"], disk, dirs_exist_ok=True)
    fill(disk, 8192)
    before = snapshot(disk)
    capfd.readouterr()
    code = call(TRAIN, "--preset demo --work_dir disk/run --prepare_only --seed 7".split())
    out, err = capfd.readouterr()
    check_error(code, out, err, ("disk/run" if checked else "磁盘写满了", "清出空间"))
    check_untouched(before, snapshot(disk))


@pytest.mark.parametrize("leave", [20_000, 50_000, 80_000])
def test_disk_full_while_saving(leave, work, good, small_disk, monkeypatch, capfd):
    """存检查点时磁盘满：旧检查点还在，没有半成品。每次留的空间不同，让不同的文件写不下。"""
    disk = small_disk("8m")
    shutil.copytree(good["trained"], disk, dirs_exist_ok=True)
    train = importlib.import_module(TRAIN)
    monkeypatch.setattr(train, "plot_curve", lambda *a: None)
    monkeypatch.setattr(train, "check_disk", lambda *a: None)          # 事先的检查看漏了：别的程序后来占满了磁盘
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(work / "tb"))
    fill(disk, leave)
    before = {name: snapshot(disk / "run" / name) for name in ("checkpoints", "packed", "tokenizer",
    "corpus")}
    capfd.readouterr()
    code = call(TRAIN, [*TINY, "--work_dir", "disk/run"])
    out, err = capfd.readouterr()
    check_error(code, out, err, ("磁盘写满了", "disk/run", "清出空间"))
    assert before == {name: snapshot(disk / "run" / name) for name in before}
    assert train.newest_checkpoint(disk / "run/checkpoints").name == "checkpoint-2"
    assert not [path for path in snapshot(disk) if path.endswith((".tmp", ".old", ".staging"))]


def test_disk_full_while_plotting(work, small_disk, capfd):
    disk = small_disk("64k")
    text("run/train_log.jsonl", "".join(f'{{"step": {i}, "loss": {9 / i}}}\n' for i in range(1, 300)))(work)
    fill(disk, 8192)
    before = snapshot(disk)
    code = call(PLOT, ["run", "--output", "disk/a.png"])
    out, err = capfd.readouterr()
    check_error(code, out, err, ("磁盘写满了",))
    check_untouched(before, snapshot(disk))


@pytest.mark.parametrize(("script", "arguments"), [
    (PREPARE, "--corpus in.jsonl --output_dir disk/corpus"),
    (TOKENIZER, "--corpus_dir run/corpus --output_dir disk/tokenizer --vocab_size 330"),
    (TRAIN, "--preset demo --device cpu --work_dir disk/run"), (PLOT, "run --output disk/a.png")])
def test_read_only(script, arguments, work, good, small_disk, capfd):
    disk = small_disk("1m")
    if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
        pytest.skip("不能把内存盘改成只读")
    shutil.copytree(good["corpus"], work, dirs_exist_ok=True)
    text("run/train_log.jsonl", '{"step": 1, "loss": 2}\n')(work)
    before = snapshot(work)
    capfd.readouterr()
    code = call(script, arguments.split())
    out, err = capfd.readouterr()
    check_error(code, out, err, ("disk", "读写文件失败"))
    check_untouched(before, snapshot(work))


def test_unreadable(work, monkeypatch, capfd):
    """读不了的文件：root 也读不了 /proc/self/mem 的开头。"""
    if not Path("/proc/self/mem").exists():
        pytest.skip("没有 /proc")
    (work / "a.txt").symlink_to("/proc/self/mem")
    code = call(PREPARE, ["--corpus", "a.txt", "--output_dir", "run/corpus"])
    out, err = capfd.readouterr()
    check_error(code, out, err, ("a.txt",))


@pytest.mark.parametrize(("script", "arguments", "lock"), [
    (PREPARE, "--corpus in.jsonl --output_dir run/new", "run/.new.lock"),
    (TOKENIZER, "--corpus_dir run/corpus --output_dir run/new --vocab_size 330", "run/.new.lock"),
    (TRAIN, "--preset demo --device cpu --work_dir run", "run/.lock")])
def test_two_runs(script, arguments, lock, work, good, capfd):
    shutil.copytree(good["corpus"], work, dirs_exist_ok=True)
    before = snapshot(work)
    with filelock.FileLock(lock):
        capfd.readouterr()
        code = call(script, arguments.split())
    out, err = capfd.readouterr()
    check_error(code, out, err, ("run", "另一个", "换一个"))
    check_untouched(before, snapshot(work))


def test_hub_unreachable(work):
    """哪里都连不上：一行里说清镜像、ModelScope、本地文件三条路，语料文件夹没有动。"""
    dead = "http://127.0.0.1:9"
    result = call_subprocess(
        PREPARE, ["--corpus", "wiki", "--output_dir", "run/corpus", "--source", "mirror"], work,
        {"HF_ENDPOINT": dead, "MODELSCOPE_ENDPOINT": dead, "HF_HUB_OFFLINE": "1"})
    check_error(*result, ("pleisto/wikipedia-cn-20230720-filtered", "hf-mirror.com", "ModelScope",
                          "--corpus wiki=文件"))
    assert not (work / "run/corpus").exists()


# ==== 6. 看着坏、其实能用，或者能自己修好 ====

def works(capfd, script, arguments):
    """必须成功，stderr 上没有错误；返回 stdout。"""
    capfd.readouterr()
    code = call(script, arguments)
    out, err = capfd.readouterr()
    assert code in (0, None), (out, err)
    assert "错误" not in err and "Traceback" not in err, err
    return out


def corpus_texts(folder):
    return [row["text"] for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_huge_line(name, work, capfd):
    """50 MB 的一行：能读，一字不差（.txt 会切成段，接起来还是原文）。"""
    line = "".join(sentences(2000))
    line = line * (50_000_000 // len(line.encode()) + 1)
    (work / name).write_text(line if name == "a.txt" else json.dumps({"text": line},
     ensure_ascii=False) + '\n"第二篇的"\n', "utf-8")
    start = time.perf_counter()
    works(capfd, PREPARE, ["--corpus", name, "--output_dir", "run/corpus"])
    assert time.perf_counter() - start < 60
    texts = corpus_texts(work / "run/corpus")
    if name == "a.jsonl":
        assert sorted(texts, key=len) == ["第二篇的", line]
    else:
        assert len(texts) > 50 and all(piece in line for piece in texts[:20])


def test_lone_surrogates(work, capfd):
    text("a.jsonl", '{"text": "好\\ud800的"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\\udc00"}\n')(work)
    works(capfd, PREPARE, ["--corpus", "a.jsonl", "--output_dir", "run/corpus", "--skip_cleaning", "all"])
    assert sorted(corpus_texts(work / "run/corpus")) == sorted(["好\ufffd的", "😀", "\ufffd"])


def test_nul_csv(work, capfd):
    """csv 里的 NUL：Python 3.11 起能读；3.10 的 csv 模块读不了，要有一行错误。"""
    text("a.csv", "text,x\n好\0的,1\n第二行,2\n")(work)
    code = call(PREPARE, ["--corpus", "a.csv", "--output_dir", "run/corpus", "--skip_cleaning", "all"])
    out, err = capfd.readouterr()
    if code in (0, None):
        assert sorted(corpus_texts(work / "run/corpus")) == sorted(["好\0的", "第二行"])
    else:
        check_error(code, out, err, ("a.csv",))


REPAIRS = [
    ("report_broken", PREPARE, P + "in.jsonl", "corpus", edit("run/corpus/report.json", half),
     "重做语料：run/corpus 不完整"),
    ("shard_gone", PREPARE, P + "in.jsonl", "corpus", remove("run/corpus/train-00000.parquet"), "重做语料"),
    ("shard_short", PREPARE, P + "in.jsonl", "corpus", edit("run/corpus/train-00000.parquet", half), "大小不对"),
    ("empty_output", PREPARE, P + "in.jsonl", "corpus", both(remove("run/corpus"), folder("run/corpus")),
     "写好 run/corpus"),
    ("tokenizer_emptied", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 330",
     "tokenizer",
     both(remove("run/tokenizer"), folder("run/tokenizer")), "重做分词器：run/tokenizer 不完整"),
    ("model_short", TOKENIZER, "--corpus_dir run/corpus --output_dir run/tokenizer --vocab_size 330",
     "tokenizer",
     edit("run/tokenizer/sentencepiece.model", half), "重做分词器：run/tokenizer 不完整"),
    ("packed_short", TRAIN, "--preset demo --work_dir run --prepare_only", "packed",
     edit("run/packed/train.bin", half), "重新打包：packed/ 不完整"),
    ("meta_broken", TRAIN, "--preset demo --work_dir run --prepare_only", "packed",
     edit("run/packed/meta.json", half), "重新打包：packed/ 不完整"),
    ("other_seed", TRAIN, "--preset demo --work_dir run --prepare_only --seed 7", "packed", None,
     "重新打包：语料、分词器或随机种子变了"),
    ("other_tokenizer", TRAIN, "--preset demo --work_dir run --prepare_only --vocab_size 340", "packed", None,
     "重新打包：语料、分词器或随机种子变了"),
    ("other_corpus", TRAIN,
     "--preset demo --work_dir run --prepare_only --vocab_size 330 --corpus more.jsonl", "packed",
     lambda work: write_jsonl(work / "more.jsonl", [{"text": line} for line in sentences(500, seed=5)]),
     "重新打包：语料、分词器或随机种子变了"),
]


@pytest.mark.parametrize(("name", "script", "arguments", "base", "setup", "expect"), REPAIRS,
ids=[r[0] for r in REPAIRS])
def test_repairs(name, script, arguments, base, setup, expect, work, good, capfd):
    """过时的、写了一半的输出会重做，并说清为什么；第二次就沿用。"""
    shutil.copytree(good[base], work, dirs_exist_ok=True)
    if setup:
        setup(work)
    assert expect in works(capfd, script, arguments.split())
    assert not [path for path in snapshot(work) if path.endswith((".tmp", ".old"))]
    assert "沿用" in works(capfd, script, arguments.split())


BROKEN_CHECKPOINTS = {
    "empty": folder("run/checkpoints/checkpoint-7"),
    "truncated_model": edit("run/checkpoints/checkpoint-2/model.safetensors", half),
    "truncated_optimizer": edit("run/checkpoints/checkpoint-2/optimizer.pt", half),
    "garbage_optimizer": edit("run/checkpoints/checkpoint-2/optimizer.pt", garbage),
    "garbage_state": edit("run/checkpoints/checkpoint-2/trainer_state.json", garbage),
    "two_newer_garbage": both(folder("run/checkpoints/checkpoint-98"),
    folder("run/checkpoints/checkpoint-99")),
    "foreign_names": both(text("run/checkpoints/checkpoint-2.zip", b"PK"),
    folder("run/checkpoints/checkpoint-best")),
    "log_garbage": text("run/train_log.jsonl", garbage(b"0" * 999)),
    "log_numbers": text("run/train_log.jsonl", "1\n2\n"),
    "staging_left": text("run/checkpoints/.staging/checkpoint-3/x", "半成品"),
}


@pytest.mark.parametrize("name", BROKEN_CHECKPOINTS)
def test_broken_checkpoints(name, work, good, monkeypatch, capfd):
    """坏的检查点跳过并说明；训练接着做完，最后留下一个完整的检查点和 final_model。"""
    shutil.copytree(good["trained"], work, dirs_exist_ok=True)
    BROKEN_CHECKPOINTS[name](work)
    train = importlib.import_module(TRAIN)
    monkeypatch.setattr(train, "plot_curve", lambda *a: None)
    out = works(capfd, TRAIN, TINY)
    assert "完成" in out
    if name not in ("foreign_names", "log_garbage", "log_numbers", "staging_left"):
        assert "跳过不完整的检查点" in out
    for step in (2, 4):
        assert train.checkpoint_problem(work / f"run/checkpoints/checkpoint-{step}") is None


def test_fresh_prepare_only(work, good, capfd):
    """--fresh 只在真的要开始训练时才丢掉检查点。"""
    shutil.copytree(good["trained"], work, dirs_exist_ok=True)
    before = snapshot(work)
    works(capfd, TRAIN, "--preset demo --work_dir run --prepare_only --fresh".split())
    assert before == snapshot(work)


def test_garbage_checkpoints_are_not_kept(work, good, monkeypatch, capfd):
    """只有坏检查点时从头训练；新存的好检查点不能因为坏的步数更大就被清掉。"""
    shutil.copytree(good["packed"], work, dirs_exist_ok=True)
    for step in (2, 98, 99):
        text(f"run/checkpoints/checkpoint-{step}/model.safetensors", b"garbage")(work)
    train = importlib.import_module(TRAIN)
    monkeypatch.setattr(train, "plot_curve", lambda *a: None)
    assert "跳过不完整的检查点" in works(capfd, TRAIN, TINY)
    for step in (2, 4):
        assert train.checkpoint_problem(work / f"run/checkpoints/checkpoint-{step}") is None


def test_plot_odd_numbers(work, capfd):
    """损失里有 NaN、无穷，config.json 是乱的：照样画。"""
    text("run/train_log.jsonl",
    '{"step": 1, "loss": NaN}\n{"step": 2, "loss": Infinity}\n{"step": 3, "loss": 5.0}\n'
         '{"step": 3, "eval_loss": NaN, "eval_bits_per_char": NaN}\n')(work)
    for config in ('{"vocab_size": "三万", "steps_per_epoch": 0, "unigram_entropy": [1]}', "[1]", "{"):
        (work / "run/config.json").write_text(config, "utf-8")
        assert "写好" in works(capfd, PLOT, ["run"])
