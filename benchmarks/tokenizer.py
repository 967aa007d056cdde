#!/usr/bin/env python3
"""同样的文字要多少 token：我们的分词器，与逐字、逐字节、GPT-2 原来的 BPE 相比；再看漏掉规范化的后果。

    python a100_train.py --preset demo
    pip download openai-whisper==20250625 --no-deps --no-binary :all:     # 里面的 assets/gpt2.tiktoken 是 GPT-2 的词表
    tar xzf openai_whisper-20250625.tar.gz
    python benchmarks/tokenizer.py --gpt2 openai_whisper-20250625/whisper/assets/gpt2.tiktoken demo=gpt2-chinese

每个 名字=目录 里要有 corpus/ 和 tokenizer/；只量验证集（没有拿来训练分词器的文字）。写 results/tokenizer.json。
"""

import argparse
import base64
import io
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import regex
import sentencepiece as spm
from common import ROOT, provenance
from tokenizers import Tokenizer, models, pre_tokenizers

SPLIT = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")  # GPT-2 的
COMMAS = "，！？：；（）"
SENTENCE = "人工智能正在改变世界，你觉得呢？"


def read_texts(folder, part):
    return [
        text
        for path in sorted((folder / "corpus").glob(f"{part}-*.parquet"))
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist()
    ]


def gpt2_counter(path):
    """返回一个函数：文字 -> GPT-2 的 BPE 要多少 token。词表文件每行是 base64 的字节和它的次序。"""
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines() if line)
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in rows}

    @cache
    def count(word):
        parts = [bytes([byte]) for byte in word.encode("utf-8")]
        while len(parts) > 1:  # 每次合并次序最靠前的一对
            pairs = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] == 1 << 30:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return len(parts)

    return lambda text: sum(count(word) for word in SPLIT.findall(text))


def without_normalizer(train, held_out, vocab_size):
    """公开参考的错：SentencePiece 训练时做了 NFKC（“，”变成“,”），用的时候却不做。返回 <unk> 占 token 的比例等。"""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(line[:1000] for text in train for line in text.split("\n") if line),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        character_coverage=0.9999,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
        num_threads=2,
    )
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [line for text in held_out for line in text.split("\n") if line]
    unknown = [sum(i == 1 for i in row.ids) for row in tokenizer.encode_batch(lines)]
    tokens = sum(len(row.ids) for row in tokenizer.encode_batch(lines))
    return {
        "unk_rate": round(sum(unknown) / tokens, 4),
        "lines_intact": round(sum(not n for n in unknown) / len(lines), 4),
        "unknown_marks": [mark for mark in COMMAS if 1 in tokenizer.encode(mark).ids],
    }


def measure(folder, count_gpt2):
    texts = read_texts(folder, "eval")
    ours = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "sentencepiece.model"))
    characters = sum(map(len, texts))
    tokens = {
        "ours": sum(map(len, ours.encode(texts))),
        "characters": characters,
        "bytes": sum(len(text.encode("utf-8")) for text in texts),
        "gpt2": sum(map(count_gpt2, texts)),
    }
    return {
        "vocab_size": ours.get_piece_size(),
        "documents": len(texts),
        "tokens": tokens,
        "sentence": {"ours": ours.encode(SENTENCE, out_type=str), "gpt2": count_gpt2(SENTENCE)},
        "characters_per_token": {name: round(characters / number, 4) for name, number in tokens.items()},
    }


def main():
    parser = argparse.ArgumentParser(description="分词器的对比", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="名字=目录")
    parser.add_argument("--gpt2", type=Path, required=True, help="gpt2.tiktoken 的路径")
    parser.add_argument("--broken", metavar="名字", help="再照公开参考的错法训练一次，用这个名字的语料")
    args = parser.parse_args()
    count_gpt2 = gpt2_counter(args.gpt2)
    result = {}
    folders = {name: Path(folder) for name, _, folder in (run.partition("=") for run in args.runs)}
    for name, folder in folders.items():
        result[name] = measure(folder, count_gpt2)
    if args.broken:
        folder = folders[args.broken]
        result["broken"] = without_normalizer(
            read_texts(folder, "train"),
            read_texts(folder, "eval"),
            max(8000, result[args.broken]["vocab_size"]),
        )
    result |= provenance()
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (ROOT / "results" / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
