#!/usr/bin/env python3
"""第 2 步：在语料上训练分词器（tokenizer），把文字切成模型认得的 32,000 种“词块”（token）。

读什么：<corpus_dir>/train-*.parquet（只用训练集）；自检用 eval-*.parquet。
留下什么：<output_dir>/ 里的 tokenizer.json 和 tokenizer_config.json（AutoTokenizer.from_pretrained 直接加载）、
    sentencepiece.model（打包时用它，快得多）、report.json（自检结果）。

    python train_tokenizer.py                                                     # 32,000 词块
    python train_tokenizer.py --preset demo --corpus_dir demo/corpus --output_dir demo/tokenizer

方法是 SentencePiece 的 Unigram：先列出大量候选词块，再反复删掉“删了也不太影响整体概率”的，直到剩下 32,000 个。
词表里没有的字拆成 UTF-8 字节（byte fallback），所以任何文字都不会变成 <unk>，编码再解码一字不差。
"""

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece as spm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FORMAT = 1                                    # tokenizer/ 的格式版本
PRESETS = {"full": {"vocab_size": 32_000}, "demo": {"vocab_size": 4_500}}
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]   # 编号 0、1、2、3
SMALLEST = len(SPECIAL) + 256 + 40            # 特殊记号 + 256 个字节，再留几十个给最常用的字
LINE_LIMIT = 1000                             # 字符；SentencePiece 会悄悄跳过超过 4,192 字节的行，所以先切短
# 自检用的难句：全角标点、表情、生僻字、制表符、连续空格、英文、数字、长得像特殊记号的普通文字
HARD_LINES = [
    "，。！？：；（）《》“”‘’、……——·～", "ＡＢＣ１２３全角", "Hello, GPT-2! naïve café", "3.14159 x 10^-6 = 50%",
    "😀👨‍👩‍👧‍👦🇨🇳", "龘靐齉𠮷𠀀〇", "a\tb\t\tc", "第一行\n第二行\n\n第四行\r\n", "  前 后  各 两 个 空 格  ",
    "          ", "</s> <s> <unk> <pad> <0x41> <0xE4>", "<0x0A></s></s><", "<|endoftext|>", "한국어 日本語 العربية",
    "\x00\x07\u200b\ufeff\u3000\u2028", "e\u0301 与 é", "https://example.com/?q=语言模型&n=1",
]


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


def number(kind, low, high=1e18):
    """给 argparse 的 type=：返回一个函数，它只收 low 到 high 之间的 kind（int 或 float）。"""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"要一个{'整数' if kind is int else '数'}，得到 {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"要在 {low:g} 到 {high:g} 之间，得到 {text}")
        return value
    return parse


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


def replace_directory(staging, final):
    """把写好的 staging 文件夹一步换成 final。先落盘，后改名。"""
    for path in sorted(staging.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())          # 先落盘再改名：断电也不会留下一个空壳
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def open_output_directory(final, marker="report.json", keep_staging=False):
    """锁住输出文件夹，建一个暂存文件夹；返回 (锁, 暂存文件夹)。keep_staging：上次中断留下的半成品还有用。

    final 里没有 marker 文件，就不是我们生成的，拒绝覆盖；另一个进程正在写同一处也拒绝。
    """
    if final.exists() and not (final / marker).exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} 已存在，但不是本脚本生成的，不覆盖；换一个 --output_dir")
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"另一个进程正在写 {final}；等它结束，或换一个 --output_dir") from None
    staging = final.with_name(f".{final.name}.tmp")
    if not keep_staging:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    return lock, staging


# ==== 1. 读语料 ====

def iter_tables(corpus_dir, split, path=None):
    """逐块给出 pyarrow 的表（列 text、source），一块约 16 MB；split 是 train 或 eval，path 指定只读哪一个文件。"""
    paths = [path] if path else sorted(Path(corpus_dir).glob(f"{split}-*.parquet"))
    if not paths:
        raise UserError(f"找不到 {corpus_dir}/{split}-*.parquet，请先运行 python prepare_corpus.py")
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            for i in range(file.num_row_groups):
                yield file.read_row_group(i, columns=["text", "source"])
        except (pa.ArrowException, KeyError, OSError) as error:
            if getattr(error, "errno", None):            # 真的读不了（没有权限……），不是内容坏了
                raise
            raise UserError(f"{path} 已损坏（{error}）；删掉 {corpus_dir} 后重跑 prepare_corpus.py") from None


def iter_corpus(corpus_dir, split):
    """逐篇给出 (text, source)；split 是 train 或 eval。一次只有一块在内存里。"""
    for table in iter_tables(corpus_dir, split):
        yield from zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True)


def read_report(folder, name="report.json"):
    """读一个生成的文件夹的 report.json（或 meta.json）；没有或坏了返回 {}。"""
    try:
        report = json.loads((Path(folder) / name).read_text("utf-8"))
        complete = all((Path(folder) / file).stat().st_size == size for file, size in report["files"].items())
        return report if complete and report["corpus_hash"] else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def short_lines(text):
    """一篇文档 -> 训练分词器用的短行。"""
    for line in text.split("\n"):
        for start in range(0, len(line), LINE_LIMIT):
            if line[start:start + LINE_LIMIT].strip():
                yield line[start:start + LINE_LIMIT]


def sample_lines(corpus_dir, limit, seed):
    """从训练集均匀抽最多 limit 行（蓄水池抽样：只读一遍，内存里只有 limit 行）。"""
    rng, sample, seen = random.Random(seed), [], 0
    for text, _ in iter_corpus(corpus_dir, "train"):
        for line in short_lines(text):
            seen += 1
            if len(sample) < limit:
                sample.append(line)
            elif (place := rng.randrange(seen)) < limit:
                sample[place] = line
    if not sample:
        raise UserError(f"{corpus_dir} 的训练集里没有文字")
    print(f"抽取 {len(sample):,} / {seen:,} 行训练分词器")
    return sample


# ==== 2. 训练 SentencePiece ====

def limit_characters(lines, vocab_size, coverage):
    """决定哪些字在词表里有自己的位置，其余的拆成字节（仍然无损）。返回 (训练用的行, 实际的字符覆盖率)。

    coverage 是“训练文本里多少比例的字符有自己的位置”。词表小时，单字至多占一半，另一半留给词：
    全给单字的话，每个 token 只有一个字，同样的算力看到的文字更少（results/demo_recipe.md）。
    """
    characters = Counter()
    for line in lines:
        characters.update(line)
    room, total = (vocab_size - len(SPECIAL) - 256) // 2, sum(characters.values())
    common = characters.most_common(room)
    covered = sum(count for _, count in common) / total
    if len(characters) <= room or covered >= coverage:
        return lines, coverage
    print(f"语料有 {len(characters):,} 种字符，词表 {vocab_size:,} 装不下：字符覆盖率从 {coverage} 降到 {covered:.4f}，"
          f"其余罕见字拆成字节")
    rare = re.compile("[" + "".join(map(re.escape, characters.keys() - dict(common).keys())) + "]+")
    return [piece for line in lines for piece in rare.split(line) if piece], covered


def train_sentencepiece(lines, vocab_size, coverage, threads):
    """训练 Unigram 模型，返回序列化的 bytes。各项参数都为了无损：不做任何规范化。"""
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=vocab_size,
            character_coverage=coverage, byte_fallback=True,
            normalization_rule_name="identity",      # 默认的 nmt_nfkc 会把全角，变成半角,
            add_dummy_prefix=False,                  # 不在开头加空格
            remove_extra_whitespaces=False,          # 不合并连续空格
            required_chars="\u2581",                   # 空格总要有自己的词块，语料里没有空格也一样
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>",
            seed_sentencepiece_size=min(1_000_000, 10 * vocab_size),     # 候选词块；默认 100 万，小词表用不着
            max_sentence_length=LINE_LIMIT * 4 + 1, num_threads=threads, minloglevel=2)
    except RuntimeError as error:
        if found := re.search(r"set it to a value <= (\d+)", str(error)):
            advice = f"请用 --vocab_size {found[1]} 或更小的数" if int(found[1]) >= SMALLEST else "请多加些语料"
            raise UserError(f"语料太小，凑不出 {vocab_size:,} 个词块，最多 {int(found[1]):,} 个；{advice}") from None
        if found := re.search(r"(\d+) vs (\d+)", str(error)):
            raise UserError(f"词表 {vocab_size:,} 小于必需的字符数 {int(found[2]):,}；请增大 --vocab_size") from None
        raise UserError(f"SentencePiece 训练失败：{error}") from None
    return model.getvalue()


# ==== 3. 转成 Hugging Face 的快速分词器 ====

def convert(model_bytes):
    """SentencePiece 模型 -> PreTrainedTokenizerFast，两者切分一致，且无损。"""
    sp = spm.SentencePieceProcessor(model_proto=model_bytes)
    # 从模型里读词块：.vocab 文件遇到制表符和换行会错位
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    # 文本里出现字面的 </s>、<0x41> 时，从 < 后面切开，免得被当成词表里的特殊记号
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>|/?s>|unk>|pad>)"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, split_special_tokens=True)


# ==== 4. 自检 ====

def self_check(sp, fast, corpus_dir):
    """在验证集和难句上检查：没有 <unk>，编码再解码一字不差。不通过就报错，什么也不写。返回报告。"""
    held_out = [line for text, _ in iter_corpus(corpus_dir, "eval") for line in short_lines(text)]
    lines = HARD_LINES + held_out
    sp_ids, fast_ids = sp.encode(lines), fast(lines, add_special_tokens=False)["input_ids"]
    decoded_sp, decoded_fast = sp.decode(sp_ids), fast.batch_decode(fast_ids)
    for line, a, b, text_a, text_b in zip(lines, sp_ids, fast_ids, decoded_sp, decoded_fast, strict=True):
        if sp.unk_id() in a or sp.unk_id() in b:
            raise UserError(f"自检不通过，没有写任何文件：这一行编码出 <unk>：{line[:60]!r}")
        if line != text_a or line != text_b:
            raise UserError(f"自检不通过，没有写任何文件：编码再解码变了：{line[:60]!r} -> {text_b[:60]!r}")
    tokens = sum(map(len, sp_ids[len(HARD_LINES):]))
    characters = sum(map(len, held_out))
    byte_tokens = sum(sp.is_byte(i) for ids in sp_ids[len(HARD_LINES):] for i in ids)
    agree = sum(a == b for a, b in zip(sp_ids, fast_ids, strict=True))
    return {"held_out_lines": len(held_out), "hard_lines": len(HARD_LINES), "characters": characters,
            "tokens": tokens, "characters_per_token": round(characters / tokens, 4), "unk_rate": 0.0,
            "round_trip_rate": 1.0, "byte_token_rate": round(byte_tokens / tokens, 6),
            "ids_agree_rate": round(agree / len(lines), 6),
            "examples": [fast.convert_ids_to_tokens(ids[:40]) for ids in fast_ids[len(HARD_LINES):][:3]]}


def print_check(report):
    print(f"自检（验证集 {report['held_out_lines']:,} 行 + 难句 {report['hard_lines']} 行）："
          f"每 token {report['characters_per_token']:.2f} 个字符，<unk> 0，编码再解码一字不差 100 %，"
          f"字节 token {report['byte_token_rate']:.2%}，两种实现编号一致 {report['ids_agree_rate']:.3%} 的行")
    for example in report["examples"]:
        print("  切分示例：" + "｜".join(example))


# ==== 5. 主程序 ====

def main():
    parser = ArgumentParser(description="第 2 步：训练分词器", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    parser.add_argument("--corpus_dir", type=Path, default=Path(default_dir) / "corpus", help="第 1 步的输出")
    parser.add_argument("--output_dir", type=Path, default=Path(default_dir) / "tokenizer", help="写到哪里")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="没写 --vocab_size 时用多大的词表")
    parser.add_argument("--vocab_size", type=number(int, SMALLEST, 65_536), help="词块数；uint16 装得下 65,536")
    parser.add_argument("--character_coverage", type=number(float, 0.98, 1.0), default=0.9999, help="字符覆盖率")
    parser.add_argument("--max_lines", type=number(int, 1), default=200_000, help="最多用多少行训练")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=42, help="抽样的随机种子")
    parser.add_argument("--threads", type=number(int, 1, 1024), default=os.cpu_count(), help="线程数")
    parser.add_argument("--rebuild", action=argparse.BooleanOptionalAction, default=True,
                        help="已有分词器过时了就重做；--no-rebuild 则报错停下")
    args = parser.parse_args()
    vocab_size = args.vocab_size or PRESETS[args.preset]["vocab_size"]

    corpus = read_report(args.corpus_dir)
    if not corpus:
        raise UserError(f"找不到完整的语料 {args.corpus_dir}，请先运行 python prepare_corpus.py")
    settings = [FORMAT, corpus["corpus_hash"], vocab_size, args.character_coverage, args.max_lines, args.seed]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    if args.output_dir.exists():
        old = read_report(args.output_dir)
        if old.get("key") == key:
            print(f"语料和设置没有变，沿用 {args.output_dir}")
            return
        reason = "语料或设置变了" if old else f"{args.output_dir} 不完整"
        if not args.rebuild:
            raise UserError(f"{reason}，而这里已有训练；换一个 --work_dir，或加 --fresh 从头开始")
        print(f"重做分词器：{reason}")
    lock, staging = open_output_directory(args.output_dir)
    with lock:
        try:
            lines = sample_lines(args.corpus_dir, args.max_lines, args.seed)
            lines, coverage = limit_characters(lines, vocab_size, args.character_coverage)
            model = train_sentencepiece(lines, vocab_size, args.character_coverage, args.threads)
            (staging / "sentencepiece.model").write_bytes(model)
            fast = convert(model)
            check = self_check(spm.SentencePieceProcessor(model_proto=model), fast, args.corpus_dir)
            print_check(check)
            fast.save_pretrained(staging)
            files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
            report = {"format": FORMAT, "key": key, "corpus_hash": corpus["corpus_hash"],
                      "vocab_size": vocab_size, "character_coverage": coverage, **check, "files": files}
            (staging / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
            replace_directory(staging, args.output_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    print(f"写好 {args.output_dir}")


if __name__ == "__main__":
    run(main)
