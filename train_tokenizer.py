#!/usr/bin/env python3
"""第 2 步：训练分词器（tokenizer），把文字切成模型认得的 32,000 种词块（token）。

读 <corpus_dir>：第 1 步写的 train-*.parquet 用来训练，eval-*.parquet 用来自检。
写 <output_dir>：tokenizer.json（AutoTokenizer 直接加载）、sentencepiece.model（打包时用）、report.json（自检结果）。

    python train_tokenizer.py
    python train_tokenizer.py --preset demo --corpus_dir demo/corpus --output_dir demo/tokenizer    # 4,500 词块

32,000 词块、20 万行，2 核 CPU 上量到 43 秒，内存 987 MB（sentencepiece 0.2.3，2026-11-24）。
出处 results/data_prep.json full.分词器.seconds=43 full.分词器.peak_rss_mb=987
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import filelock
import pyarrow.parquet as pq
import sentencepiece as spm
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# ==== 1. 设置 ====
# 模型只认编号，词表（vocabulary）给每个词块一个：我们在北京学习， → 我们｜在北京｜学习｜， → 四个编号。
#
# 切多大？UTF-8 的 256 种字节什么都写得出，可一个汉字要 3 个 token。常见的字和词各算一块，演示（4,500 块）里
# 每个 token 就有 1.31 个字。token 越少，同样的算力读的文字越多。但每块在模型里占一行参数：
# 32,000 × 768 = 24,576,000，是完整模型的三成，而且少见的词块练不好，所以词表也不能太大。
# 用自己的语料训练，是因为 GPT-2 原来的 50,257 块几乎全是英文。
# 出处 results/tokenizer.json demo.characters_per_token.ours=1.31

VOCAB_SIZE = {  # 各个 --preset 有多少个词块
    "full": 32_000,
    "demo": 4_500,
}
# 编号 0–3：补齐、不认识、开头、文档结束；4–259 是 256 种字节；从 260 开始才是字和词
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
SPACE = "\u2581"  # 词块里把空格写作 ▁
MAX_LINES = 200_000  # 用多少行训练；语料写出时已打乱，开头这些行就是均匀的抽样
COVERAGE = 0.9999  # 常见的字各有词块，占到全文 99.99 % 为止，其余的字拆成字节

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"


def parse_arguments():
    parser = argparse.ArgumentParser(description="第 2 步：训练分词器", allow_abbrev=False)
    add = parser.add_argument
    add("--corpus_dir", type=Path, default=HOME / "corpus", help="第 1 步的输出，默认 %(default)s")
    add("--output_dir", type=Path, default=HOME / "tokenizer", help="写到哪里，默认 %(default)s")
    add("--preset", choices=VOCAB_SIZE, default="full", help="没写 --vocab_size 时，用谁的词块数")
    add("--vocab_size", type=int, help="词块数，300 到 65,536")
    add("--rebuild", action=argparse.BooleanOptionalAction, default=True, help="旧的过时了就重做")
    return parser.parse_args()


def choose_vocab_size(args):
    vocab_size = args.vocab_size
    if vocab_size is None:
        vocab_size = VOCAB_SIZE[args.preset]
    if not 300 <= vocab_size <= 65_536:  # 特殊的和字节占 260，至少留 40 给字；编号要装得进 uint16
        sys.exit(f"错误：--vocab_size 要在 300 到 65,536 之间，得到 {vocab_size}")
    return vocab_size


# ==== 2. 读语料 ====


def read_lines(corpus_dir, split):
    """逐行给出 train 或 eval 的文字，空行不要。长行切成 1,000 字符一段：SentencePiece 会跳过太长的行。"""
    for path in sorted(corpus_dir.glob(f"{split}-*.parquet")):
        try:
            file = pq.ParquetFile(path, pre_buffer=False)  # 边读边用，内存里只有 1,000 篇
            for batch in file.iter_batches(1000, columns=["text"]):
                for text in batch["text"].to_pylist():
                    yield from filter(str.strip, re.findall(r".{1,1000}", text))
        except (ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            sys.exit(f"错误：{path} 已损坏（{reason}）；删掉 {corpus_dir} 后重跑 prepare_corpus.py")


# ==== 3. 训练：SentencePiece 的 Unigram（Kudo 2018）====
# 每个词块有一个概率；一种切法的概率是各块的乘积，取最大的切法。演示的词表里（对数概率）：
# 中国 −6.46；中 −5.75 ＋ 国 −6.99 ＝ −12.74。差 6.27，e^6.27 ≈ 530 倍，所以“中国”不切开。概率和词表这样得来：
#   ① 候选：语料里最常见的 10 × vocab_size 个子串，和所有单字；
#   ② 用现在的概率切语料，数每块用了几次，次数 ÷ 总数就是新概率，做两遍；
#   ③ 没有它、语料的概率也降得最少的四分之一，删掉；回到 ②，直到剩 vocab_size 个。单字不删。
# （数字算自演示的分词器：sp.get_score(sp.piece_to_id("中国")) 是 −6.46。）
# 词表里没有的字拆成字节（byte fallback）：龘 → <0xE9> <0xBE> <0x98>。任何文字都编得出，用不到 <unk>（不认识）。


def limit_characters(lines, vocab_size):
    """小词表里单字至多占一半，其余拆成字节，给词留位置（演示：2,116 个单字、2,124 个词）。返回（行，覆盖率）。

    覆盖率（coverage）是有自己词块的字占全文的多少。做法是在少见的字处把行断开，SentencePiece 就看不到少见的字。
    """
    counts = Counter("".join(lines))
    common = dict(counts.most_common((vocab_size - 260) // 2))
    coverage = sum(common.values()) / counts.total()
    if coverage >= COVERAGE:
        return lines, COVERAGE
    runs_of_common = "[" + re.escape("".join(common)) + "]+"
    return re.findall(runs_of_common, "\n".join(lines)), coverage


def train_sentencepiece(lines, vocab_size):
    """返回模型文件的内容。规范化（normalization）全部关掉（identity），才能一字不差。

    SentencePiece 默认先把全角“，”换成半角“,”，词表里就没有“，”；转换时漏了这一步，“，！？：；（）”都成了 <unk>。
    公开参考正是这样，它发布的 115 段续写里没有一个“，”；照做，演示的验证集里 8.6 % 的 token 是 <unk>。
    出处 results/tokenizer.json broken.unk_rate=8.6%
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=COVERAGE,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,  # 不在行首添一个空格
            remove_extra_whitespaces=False,  # 不把几个空格并成一个
            required_chars=SPACE,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="<pad>",
            seed_sentencepiece_size=10 * vocab_size,
            max_sentence_length=4001,  # 字节；1,000 个字符至多 4,000 字节，所以没有一行会被跳过
            num_threads=2,  # 固定下来，结果就不随机器的核数变
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.findall(r"set it to a value <= (\d+)", str(error)) or ["未知"]
        sys.exit(
            f"错误：语料太小，凑不出 {vocab_size:,} 个词块（最多 {limit[0]}）；减小 --vocab_size，或多加些语料"
        )
    return model.getvalue()


# ==== 4. 转成 Hugging Face 的快速分词器：同样的词块和概率 ====


def convert(model):
    """SentencePiece 的模型 → AutoTokenizer 能加载的分词器，两者编出的编号相同。"""
    sp = spm.SentencePieceProcessor(model_proto=model)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(len(sp))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # 文字里恰好写着 </s> 或 <0x41> 时，从 < 后面切开，免得当成特殊记号或字节
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>|/?s>|unk>|pad>)"), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


# ==== 5. 自检：难句和没见过的文字都要一字不差，否则什么也不写 ====

HARD_LINES = [
    "，。！？：；（）《》“”‘’、……——·～ＡＢＣ１２３",
    "Hello, GPT-2! naïve café, 3.14159 x 10^-6 = 50%",
    "😀👨‍👩‍👧‍👦🇨🇳",
    "龘靐齉𠮷𠀀〇",
    "a\tb\t\tc",
    "第一行\n第二行\n\n第四行\r\n",
    "  前 后  各 两 个 空 格  ",
    "          ",
    "</s> <s> <unk> <pad> <0x41> <0xE4> <|endoftext|>",
    "<0x0A></s></s><",
    "한국어 日本語 العربية",
    "\x00\x07\u200b\ufeff\u3000\u2028",
    "e\u0301 与 é",
    "https://example.com/?q=语言模型&n=1",
]


def self_check(model, hf, corpus_dir):
    """用验证集和难句检查两种实现，不通过就退出。返回写进 report.json 的数。"""
    sp = spm.SentencePieceProcessor(model_proto=model)
    held_out = list(read_lines(corpus_dir, "eval"))
    lines = held_out + HARD_LINES
    sp_ids = sp.encode(lines)
    sp_lines = sp.decode(sp_ids)
    hf_ids = hf(lines)["input_ids"]
    hf_lines = hf.batch_decode(hf_ids, skip_special_tokens=True)  # 有 <unk> 就会少字，也查得出
    for line, sp_line, hf_line in zip(lines, sp_lines, hf_lines, strict=True):
        if sp_line != line or hf_line != line:
            sys.exit(
                f"错误：自检不通过，没有写任何文件：{line!r:.60} 编码再解码，"
                f"SentencePiece 成了 {sp_line!r:.60}，快速分词器成了 {hf_line!r:.60}"
            )

    report = {"hard_lines": len(HARD_LINES), "unk_rate": 0.0, "round_trip_rate": 1.0}
    agreeing = sum(a == b for a, b in zip(sp_ids, hf_ids, strict=True))
    report["ids_agree_rate"] = round(agreeing / len(lines), 6)
    # 其余的只看验证集，难句不算
    report["held_out_lines"] = len(held_out)
    characters = sum(map(len, held_out))
    report["characters"] = characters
    tokens = list(chain(*sp_ids[: len(held_out)]))
    token_count = len(tokens)
    report["tokens"] = token_count
    report["characters_per_token"] = round(characters / token_count, 4)
    byte_tokens = sum(map(sp.is_byte, tokens))
    report["byte_token_rate"] = round(byte_tokens / token_count, 6)
    report["examples"] = [hf.convert_ids_to_tokens(row[:40]) for row in hf_ids[:3]]
    return report


# ==== 6. 主程序 ====


def main():
    args = parse_arguments()
    vocab_size = choose_vocab_size(args)
    print("\n第 2 步，共 4 步：训练分词器")
    corpus_hash = read_report(args.corpus_dir).get("corpus_hash")
    if not corpus_hash:
        sys.exit(f"错误：找不到完整的语料 {args.corpus_dir}；请先运行 python prepare_corpus.py")
    fingerprint = f"{corpus_hash} {vocab_size} {COVERAGE} {MAX_LINES}"  # 语料和设置没变，它就没变
    if read_report(args.output_dir).get("key") == fingerprint:
        print(f"语料和设置没有变，沿用 {args.output_dir}")
        return
    if args.output_dir.exists() and not args.rebuild:
        sys.exit(
            f"错误：语料或设置变了，而 {args.output_dir} 已有训练在用；换一个 --work_dir，或加 --fresh 从头开始"
        )

    # 出处 results/data_prep.json full.分词器.seconds=43
    print(
        f"从语料里学出 {vocab_size:,} 个词块（常见的字和词），以后每篇文字都写成它们的编号。"
        "SentencePiece 训练时不报进度：32,000 个词块、20 万行，2 核 CPU 上量到 43 秒。"
    )
    with new_folder(args.output_dir) as staging:
        lines = list(islice(read_lines(args.corpus_dir, "train"), MAX_LINES))
        lines, coverage = limit_characters(lines, vocab_size)
        model = train_sentencepiece(lines, vocab_size)
        hf = convert(model)
        report = self_check(model, hf, args.corpus_dir)
        report |= {
            "format": 1,
            "key": fingerprint,
            "corpus_hash": corpus_hash,
            "vocab_size": vocab_size,
            "character_coverage": coverage,
        }
        (staging / "sentencepiece.model").write_bytes(model)
        hf.save_pretrained(staging)
        report["files"] = {path.name: path.stat().st_size for path in staging.iterdir()}
        (staging / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    print(f"例：{'｜'.join(report['examples'][0])}")
    print(
        f"写好 {args.output_dir}：验证集 {report['held_out_lines']:,} 行编码再解码都一字不差，"
        f"每个 token 平均 {report['characters_per_token']:.2f} 个字。"
    )


# ==== 7. 防错与落盘（初学可以跳过；几个脚本里一字不差）====


def read_report(folder, name="report.json"):
    """读一份报告。没有、读不懂，或它列出的文件缺了、大小变了，返回 {}：这个文件夹没有做完。"""
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return report if sizes == report["files"] else {}


@contextmanager
def new_folder(final):
    """在旁边的文件夹里写，写完才改名为 final。中途出错或被杀，原来的 final 还在。"""
    if final.exists() and not (final / "report.json").exists():
        if final.is_file() or any(final.iterdir()):
            sys.exit(f"错误：{final} 已存在，但不是本脚本写的，不覆盖；换一个文件夹")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.tmp")
    old = final.with_name(f".{final.name}.old")
    with filelock.FileLock(final.with_name(f".{final.name}.lock"), timeout=0):
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            if final.exists():
                final.rename(old)
            staging.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
