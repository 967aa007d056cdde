#!/usr/bin/env python3
"""第 2 步：训练分词器（tokenizer），把文字切成模型认得的 32,000 种词块（token）。

读 <corpus_dir>：第 1 步写的 train-*.parquet 用来训练，eval-*.parquet 用来自检。
写 <output_dir>：tokenizer.json（AutoTokenizer 直接加载）、sentencepiece.model（打包时用）、report.json（自检结果）。

    python train_tokenizer.py
    python train_tokenizer.py --preset demo --corpus_dir demo/corpus --output_dir demo/tokenizer    # 4,500 词块

2 核 CPU、sentencepiece 0.2.3（2026-11）：32,000 词块、20 万行 125–150 秒，内存 0.55 GB；演示约半分钟。
"""

import argparse
import io
import json
import os
import re
import shutil
import signal
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

# ==== 1. 词块：模型读写的单位 ====
# 模型只认编号，词表（vocabulary）给每个词块一个：我们在北京学习， → 我们｜在北京｜学习｜， → 四个编号。
# 切多大？UTF-8 的 256 种字节什么都写得出，可一个汉字要 3 个 token；常见的字和词各算一块，演示（4,500 块）里每个 token 有
# 1.31 个字。token 越少，同样的算力读的文字越多。但每块在模型里占一行参数：32,000 × 768 = 24,576,000，是完整模型的三成，
# 少见的还练不好。所以用自己的语料训练：GPT-2 原来的 50,257 块几乎全是英文。

VOCAB_SIZE = {"full": 32_000, "demo": 4_500}
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]  # 编号 0–3：补齐、不认识、开头、文档结束；4–259 是 256 种字节
SPACE = "\u2581"  # 词块里把空格写作 ▁
MAX_LINES, COVERAGE = 200_000, 0.9999  # 用多少行；常见的字各有词块，占到全文 99.99 % 为止

# ==== 2. 读语料 ====

def read_lines(corpus_dir, split):
    """逐行给出 train 或 eval 的文字，空行不要；切到 1,000 字符以内，SentencePiece 会跳过太长的行。"""
    for path in sorted(corpus_dir.glob(f"{split}-*.parquet")):
        try:
            for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(1000, columns=["text"]):
                for text in batch["text"].to_pylist():
                    yield from filter(str.strip, re.findall(r".{1,1000}", text))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).partition("\n")[0]
            sys.exit(f"错误：{path} 已损坏（{reason}）；删掉 {corpus_dir} 后重跑 prepare_corpus.py")

# ==== 3. 训练：SentencePiece 的 Unigram（Kudo 2018）====
# 每个词块有一个概率；一种切法的概率是各块的乘积，取最大的切法。演示的词表里（对数概率）：
# 中国 −6.46；中 −5.75 ＋ 国 −6.99 ＝ −12.74。差 6.27，e^6.27 ≈ 530 倍，所以“中国”不切开。概率和词表这样得来：
#   ① 候选：语料里最常见的 10 × vocab_size 个子串，和所有单字；
#   ② 用现在的概率切语料，数每块用了几次，次数 ÷ 总数就是新概率，做两遍；
#   ③ 没有它、语料的概率也降得最少的四分之一，删掉；回到 ②，直到剩 vocab_size 个。单字不删。
# 词表里没有的字拆成字节（byte fallback）：龘 → <0xE9> <0xBE> <0x98>。任何文字都编得出，用不到 <unk>（不认识）。

def limit_characters(lines, vocab_size):
    """小词表里单字至多占一半，其余拆成字节，给词留位置（演示：2,116 个单字、2,124 个词）。返回（行，覆盖率）。"""
    characters = Counter(chain.from_iterable(lines))
    common = dict(characters.most_common((vocab_size - 260) // 2))
    covered = sum(common.values()) / sum(characters.values())
    if covered >= COVERAGE:
        return lines, COVERAGE
    rare = re.compile("[" + "".join(map(re.escape, characters.keys() - common.keys())) + "]+")
    return [piece for line in lines for piece in rare.split(line) if piece], covered

def train_sentencepiece(lines, vocab_size):
    """返回模型文件的内容。规范化（normalization）全部关掉（identity），才能一字不差。

    SentencePiece 默认先把全角“，”换成半角“,”，词表里就没有“，”；转换时漏了这一步，“，！？：；（）”都成了 <unk>。
    公开参考正是这样，它发布的 115 段续写里没有一个“，”；照做，演示的验证集里 6.9 % 的 token 是 <unk>。
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=vocab_size,
            character_coverage=COVERAGE, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False,  # 不在开头加空格，不合并空格
            required_chars=SPACE, pad_id=0, unk_id=1, bos_id=2, eos_id=3, pad_piece="<pad>", minloglevel=2,
            seed_sentencepiece_size=10 * vocab_size, max_sentence_length=4001, num_threads=2)  # 结果不随核数变
    except RuntimeError as error:
        most = re.search(r"set it to a value <= (\d+)|\Z", str(error))[1]
        sys.exit(f"错误：语料太小，凑不出 {vocab_size:,} 个词块（最多 {most}）；减小 --vocab_size，或多加些语料")
    return model.getvalue()

# ==== 4. 转成 Hugging Face 的快速分词器：同样的词块和概率 ====

def convert(model):
    sp = spm.SentencePieceProcessor(model_proto=model)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # 文字里恰好写着 </s> 或 <0x41>：从 < 后面切开，免得当成特殊记号或字节
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>|/?s>|unk>|pad>)"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, split_special_tokens=True)

# ==== 5. 自检：难句和没见过的文字都要一字不差，否则什么也不写 ====

HARD_LINES = [
    "，。！？：；（）《》“”‘’、……——·～", "ＡＢＣ１２３全角", "Hello, GPT-2! naïve café", "3.14159 x 10^-6 = 50%",
    "😀👨‍👩‍👧‍👦🇨🇳", "龘靐齉𠮷𠀀〇", "a\tb\t\tc", "第一行\n第二行\n\n第四行\r\n", "  前 后  各 两 个 空 格  ",
    "          ", "</s> <s> <unk> <pad> <0x41> <0xE4>", "<0x0A></s></s><", "<|endoftext|>", "한국어 日本語 العربية",
    "\x00\x07\u200b\ufeff\u3000\u2028", "e\u0301 与 é", "https://example.com/?q=语言模型&n=1",
]

def self_check(model, hf, corpus_dir):
    sp, hard = spm.SentencePieceProcessor(model_proto=model), len(HARD_LINES)
    lines = [*HARD_LINES, *read_lines(corpus_dir, "eval")]
    ids, hf_ids = sp.encode(lines), hf(lines, add_special_tokens=False)["input_ids"]
    for line, a, b, *back in zip(lines, ids, hf_ids, sp.decode(ids), hf.batch_decode(hf_ids), strict=True):
        if back != [line, line] or sp.unk_id() in a + b:
            sys.exit(f"错误：自检不通过，没有写任何文件：{line[:60]!r} 编码再解码成了 {back[1][:60]!r}")
    tokens, characters = list(chain(*ids[hard:])), sum(map(len, lines[hard:]))
    report = {"held_out_lines": len(lines) - hard, "hard_lines": hard, "characters": characters,
              "tokens": len(tokens), "characters_per_token": round(characters / max(1, len(tokens)), 4),
              "unk_rate": 0.0, "round_trip_rate": 1.0,
              "byte_token_rate": round(sum(map(sp.is_byte, tokens)) / max(1, len(tokens)), 6),
              "ids_agree_rate": round(sum(a == b for a, b in zip(ids, hf_ids, strict=True)) / len(lines), 6),
              "examples": [hf.convert_ids_to_tokens(row[:40]) for row in hf_ids[hard:hard + 3]]}
    print("自检：验证集 {held_out_lines:,} 行、难句 {hard_lines} 行都一字不差，没有 <unk>；每 token {characters_per_token:.2f} "
          "个字符，字节 token {byte_token_rate:.2%}，两种实现编号一致 {ids_agree_rate:.3%} 的行".format(**report))
    print("\n".join("  例：" + "｜".join(example) for example in report["examples"]))
    return report

# ==== 6. 主程序 ====

def main():
    parser = argparse.ArgumentParser(description="第 2 步：训练分词器", allow_abbrev=False)
    folder = Path("/root/autodl-tmp/gpt2-chinese" if os.path.isdir("/root/autodl-tmp") else "gpt2-chinese")
    parser.add_argument("--corpus_dir", type=Path, default=folder / "corpus", help="第 1 步的输出")
    parser.add_argument("--output_dir", type=Path, default=folder / "tokenizer", help="写到哪里")
    parser.add_argument("--preset", choices=list(VOCAB_SIZE), default="full", help="没写 --vocab_size 时")
    parser.add_argument("--vocab_size", type=int, help="词块数，300 到 65,536")
    parser.add_argument("--rebuild", action=argparse.BooleanOptionalAction, help="旧的过时就重做（默认）")
    args = parser.parse_args()
    vocab_size = VOCAB_SIZE[args.preset] if args.vocab_size is None else args.vocab_size
    if not 300 <= vocab_size <= 65_536:  # 特殊的和字节占 260，至少留 40 给字；编号要装得进 uint16
        sys.exit(f"错误：--vocab_size 要在 300 到 65,536 之间，得到 {vocab_size}")
    corpus_hash = read_report(args.corpus_dir).get("corpus_hash")
    if not corpus_hash:
        sys.exit(f"错误：找不到完整的语料 {args.corpus_dir}；请先运行 python prepare_corpus.py")
    key = f"{corpus_hash} {vocab_size} {COVERAGE} {MAX_LINES}"  # 没变就不重做
    if read_report(args.output_dir).get("key") == key:
        return print(f"语料和设置没有变，沿用 {args.output_dir}")
    if args.output_dir.exists() and args.rebuild is False:
        sys.exit(f"错误：语料或设置变了，而 {args.output_dir} 已有训练在用；换一个 --work_dir，或加 --fresh 从头开始")
    with new_folder(args.output_dir) as staging:
        # 语料写出时已打乱，开头 20 万行就是均匀的抽样
        lines = list(islice(read_lines(args.corpus_dir, "train"), MAX_LINES))
        print(f"用 {len(lines):,} 行训练 {vocab_size:,} 个词块")
        lines, coverage = limit_characters(lines, vocab_size)
        model = train_sentencepiece(lines, vocab_size)
        hf = convert(model)
        check = self_check(model, hf, args.corpus_dir)
        (staging / "sentencepiece.model").write_bytes(model)
        hf.save_pretrained(staging)
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        report = {"format": 1, "key": key, "corpus_hash": corpus_hash, "vocab_size": vocab_size,
                  "character_coverage": coverage, **check, "files": files}
        (staging / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    print(f"写好 {args.output_dir}")

# ==== 7. 防错与落盘（初学可以跳过；几个脚本里一字不差）====

def read_report(folder, name="report.json"):  # 没做完、缺文件或大小不对，是 {}
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
        return report if sizes == report["files"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

@contextmanager
def new_folder(final):
    """在旁边写，写完才改名为 final：中途出错或被杀，原来的 final 还在。"""
    if final.exists() and not (final / "report.json").exists() and (final.is_file() or any(final.iterdir())):
        sys.exit(f"错误：{final} 已存在，但不是本脚本写的，不覆盖；换一个文件夹")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
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
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        what = "另一个进程正在写" if isinstance(error, filelock.Timeout) else "读写失败"
        sys.exit(f"错误：{what}（{error}）；等它结束，或清出空间、检查权限，再跑同一条命令")

if __name__ == "__main__":
    run(main)
