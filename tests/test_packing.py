"""打包与取块：一个 token 不多、一个不少，次序只由种子决定，缓存过时就重做并说明。"""

import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SEED, VOCAB_SIZE

import a100_train

EOS = 3


def meta_of(work_dir):
    return json.loads((work_dir / "packed/meta.json").read_text("utf-8"))


def documents_in(tokens, sp):
    """按 </s> 切开再解码。每篇末尾都要有 </s>，包括最后一篇。"""
    ends = np.flatnonzero(tokens == EOS)
    assert ends[-1] == len(tokens) - 1
    return [sp.decode(part[:-1].tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def corpus_of(work_dir, split):
    return list(a100_train.iter_corpus(work_dir / "corpus", split))


# ==== 打包 ====

def test_train_file_holds_exactly_the_training_documents(work_dir, sp):
    tokens = np.fromfile(work_dir / "packed/train.bin", dtype=np.uint16)
    texts = [text for text, _ in corpus_of(work_dir, "train")]
    packed = documents_in(tokens, sp)
    assert Counter(packed) == Counter(texts)
    assert packed != texts, "文档要打乱"
    assert meta_of(work_dir)["train_tokens"] == len(tokens)
    assert tokens.max() < VOCAB_SIZE
    assert not {0, 1, 2} & set(tokens.tolist()), "没有 <pad>、<unk>、<s>"


def test_shuffle_mixes_the_sources(work_dir, sp):
    """全局打乱：前一半里两个来源都不少。"""
    source = dict(corpus_of(work_dir, "train"))
    packed = documents_in(np.fromfile(work_dir / "packed/train.bin", dtype=np.uint16), sp)
    first_half = Counter(source[text] for text in packed[:len(packed) // 2])
    assert min(first_half["news"], first_half["reviews"]) > 0.4 * len(packed) / 2


def test_eval_file_holds_each_source(work_dir, sp):
    """验证集按来源排在一起；位置、字符数都对。"""
    tokens = np.fromfile(work_dir / "packed/eval.bin", dtype=np.uint16)
    sources = meta_of(work_dir)["eval_sources"]
    assert set(sources) == {"news", "reviews"}
    position = 0
    for name, place in sources.items():
        assert place["start"] == position
        position = place["end"]
        texts = [text for text, source in corpus_of(work_dir, "eval") if source == name]
        assert documents_in(tokens[place["start"]:place["end"]], sp) == texts
        assert place["characters"] == sum(map(len, texts))
    assert position == len(tokens)


def test_train_and_eval_share_no_document(work_dir, sp):
    train, held_out = (set(documents_in(np.fromfile(work_dir / f"packed/{split}.bin", dtype=np.uint16), sp))
                       for split in ("train", "eval"))
    assert len(held_out) >= 100 and not train & held_out


def test_unigram_entropy(work_dir):
    """等于直接算的 -Σ p ln p（</s> 也算一个 token），在 0 和 ln V 之间。"""
    counts = Counter(np.fromfile(work_dir / "packed/train.bin", dtype=np.uint16).tolist())
    total = sum(counts.values())
    direct = -sum(n / total * math.log(n / total) for n in counts.values())
    assert meta_of(work_dir)["unigram_entropy"] == pytest.approx(direct, rel=1e-9)
    assert 3 < direct < math.log(VOCAB_SIZE)


def write_corpus(folder, shards):
    """写一个小语料：每个分片是一列文本。"""
    folder.mkdir()
    for i, texts in enumerate(shards):
        table = pa.table({"text": texts, "source": ["x"] * len(texts)})
        pq.write_table(table, folder / f"train-{i:05d}.parquet", row_group_size=3)
    return folder


def pack_small(folder, sp, seed=SEED):
    return a100_train.pack_train(folder / "corpus", sp, folder, "语料", "分词器", seed, 1)


def test_counts_of_long_documents_and_several_shards(work_dir, tmp_path, sp):
    """长文档、几个分片、几个行组：计数对，每篇恰好一次。"""
    long = "".join(text for text, _ in corpus_of(work_dir, "train")[:150])
    texts = [long, *(f"第 {i} 篇" for i in range(20))]
    write_corpus(tmp_path / "corpus", [texts[:8], texts[8:9], texts[9:]])
    counts = pack_small(tmp_path, sp)
    tokens = np.fromfile(tmp_path / "train.bin", dtype=np.uint16)
    assert len(tokens) > 5000
    assert counts.tolist() == np.bincount(tokens, minlength=VOCAB_SIZE).tolist()
    assert Counter(documents_in(tokens, sp)) == Counter(texts)


@pytest.mark.parametrize("damage", [None, "truncate", "flip", "no_note"])
def test_finished_shards_are_reused_only_when_their_hash_agrees(tmp_path, sp, monkeypatch, damage):
    """打包中断后：做完的分片沿用，坏了一个字节的重做；结果一样。"""
    write_corpus(tmp_path / "corpus", [[f"{shard} 的第 {i} 篇" for i in range(7)] for shard in "甲乙丙"])
    pack_small(tmp_path, sp)
    expected = (tmp_path / "train.bin").read_bytes()
    path = tmp_path / "train-00001.tokens"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-2])
    elif damage == "flip":
        data[3] ^= 1
        path.write_bytes(data)
    elif damage == "no_note":
        path.with_suffix(".json").unlink()
    encoded, encode = [], a100_train.encode
    monkeypatch.setattr(a100_train, "encode", lambda sp, texts, threads: encoded.extend(texts) or encode(
        sp, texts, threads))
    pack_small(tmp_path, sp)
    assert encoded == ([] if damage is None else [f"乙 的第 {i} 篇" for i in range(7)])
    assert (tmp_path / "train.bin").read_bytes() == expected


def test_pages_join_back_and_encode_the_same(sp, real_texts):
    """长文切成页再编码，编号与整篇编码一样。"""
    novel = "\n".join(text for texts in real_texts.values() for text in texts[:300])
    pages = a100_train.cut(novel, 8000)
    assert len(pages) > 5 and "".join(pages) == novel
    assert max(map(len, pages)) <= 8000
    # 逐行比：长串里浮点误差会让分数几乎相同的两种切法互换，所以不要求 100 %，但千行里至多一行
    newline = sp.piece_to_id("<0x0A>")
    lines = [[]]
    for token in (token for page in sp.encode(pages) for token in page):
        lines[-1].append(token)
        if token == newline:
            lines.append([])
    expected = sp.encode(novel.splitlines(keepends=True))
    assert sum(a != b for a, b in zip(lines, expected, strict=True)) <= len(expected) // 500
    short = "\n".join(text for text in real_texts["news"][:80] if len(text) < 200)    # 不到 SentencePiece 漂移的长度
    pages = a100_train.cut(short, 200)
    assert len(pages) > 5
    assert [token for page in sp.encode(pages) for token in page] == sp.encode(short)


@pytest.mark.parametrize(
    "text",
    [
        "字" * 30_000,
        "a\n" * 20_000,
        "行\r\n" * 5000,
        "甲" * 8000,
        "甲" * 8001,
        "\n" * 9000,
        "甲" * 7999 + "\n" + "乙" * 9000 + "\n丙",
        "",
    ],
)
def test_pages_of_odd_texts_join_back(text):
    pages = a100_train.cut(text, 8000)
    assert "".join(pages) == text and max(map(len, pages)) <= 8000


def test_encode_returns_one_array_per_document(sp):
    """长短混在一起也不串篇。"""
    texts = ["短。", "很长的一篇，有很多行\n" * 2000, "", "又短。"]
    arrays = list(a100_train.encode(sp, texts, 2))
    assert [sp.decode(ids[:-1].tolist()) for ids in arrays] == texts
    assert all(ids[-1] == EOS and ids.dtype == np.uint16 for ids in arrays)


# ==== 缓存 ====

def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "packed").iterdir()}


def test_cache_is_reused(copied, capsys):
    before = files_of(copied)
    meta = a100_train.pack(copied, SEED)
    assert "沿用" in capsys.readouterr().out
    assert files_of(copied) == before and meta == meta_of(copied)


def test_truncated_cache_is_rebuilt(copied, capsys):
    path = copied / "packed/train.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    a100_train.pack(copied, SEED)
    assert "重新打包" in capsys.readouterr().out
    assert path.read_bytes() == data


def test_changed_tokenizer_is_repacked(copied, capsys, sp):
    import train_tokenizer
    lines = train_tokenizer.sample_lines(copied / "corpus", 2000, 0)
    lines, _ = train_tokenizer.limit_characters(lines, 700, 0.9999)
    (copied / "tokenizer/sentencepiece.model").write_bytes(
        train_tokenizer.train_sentencepiece(lines, 700, 0.9999, 1))
    capsys.readouterr()
    assert a100_train.pack(copied, SEED)["vocab_size"] == 700
    assert "重新打包" in capsys.readouterr().out


def test_changed_corpus_is_repacked(copied, capsys):
    report = json.loads((copied / "corpus/report.json").read_text("utf-8"))
    (copied / "corpus/report.json").write_text(json.dumps(report | {"corpus_hash": "另一份"}), "utf-8")
    assert a100_train.pack(copied, SEED)["corpus_hash"] == "另一份"
    assert "重新打包" in capsys.readouterr().out


def test_changed_seed_is_repacked_in_another_order(copied, capsys, sp):
    before = np.fromfile(copied / "packed/train.bin", dtype=np.uint16)
    a100_train.pack(copied, SEED + 1)
    assert "重新打包" in capsys.readouterr().out
    after = np.fromfile(copied / "packed/train.bin", dtype=np.uint16)
    assert len(before) == len(after) and not np.array_equal(before, after)
    assert Counter(documents_in(before, sp)) == Counter(documents_in(after, sp))


def test_failure_while_packing_leaves_the_old_cache(copied, monkeypatch):
    """写到一半磁盘满：旧的还在，不留半成品。"""
    before = files_of(copied)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(a100_train, "pack_eval", full)
    try:
        a100_train.pack(copied, SEED + 1)
    except OSError:
        pass
    else:
        raise AssertionError("应当报错")
    assert files_of(copied) == before and not (copied / ".packed.tmp").exists()


# ==== 取块 ====

@pytest.fixture
def numbers(tmp_path):
    """0、1、2……共 1,003 个 token 的文件：每块是什么一眼看出。"""
    np.arange(1003, dtype=np.uint16).tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


def stream(path, length=400, seed=0, block_size=10):
    return a100_train.BlockStream(path, block_size, length, seed)


def blocks(dataset, batch_size, n):
    parts = [dataset.__getitems__(list(range(i, min(i + batch_size, n)))) for i in range(0, n, batch_size)]
    return {key: torch.cat([part[key] for part in parts]) for key in ("input_ids", "labels")}


def test_every_block_once_per_epoch(numbers):
    """1,003 个 token 是 100 块；只丢末尾不满一块的 3 个。每一遍里每块恰好一次。"""
    dataset = stream(numbers)
    assert dataset.n_blocks == 100 and len(dataset) == 400
    ids = blocks(dataset, 7, 300)["input_ids"]
    for epoch in range(3):
        starts = ids[epoch * 100:(epoch + 1) * 100, 0].tolist()
        assert sorted(starts) == list(range(0, 1000, 10))
        assert starts != sorted(starts)
    assert torch.equal(ids, ids[:, :1] + torch.arange(10))


def test_labels_are_the_next_tokens_across_block_borders(numbers):
    batch = blocks(stream(numbers), 8, 100)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (100, 10)
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)


def test_last_label_without_a_successor_is_ignored(tmp_path):
    """文件正好是整块：最后一个 token 没有下一个，记 -100，不计损失。"""
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    batch = blocks(stream(tmp_path / "train.bin"), 10, 10)
    last = batch["input_ids"][:, 0] == 90
    assert batch["labels"][last, -1].tolist() == [-100]
    assert (batch["labels"] == -100).sum() == 1


def test_order_does_not_depend_on_batch_size(numbers):
    expected = blocks(stream(numbers), 1, 250)
    for batch_size in (2, 16, 250):
        got = blocks(stream(numbers), batch_size, 250)
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_order_depends_on_seed_and_epoch(numbers):
    first = blocks(stream(numbers), 50, 200)["input_ids"][:, 0].tolist()
    assert first == blocks(stream(numbers), 50, 200)["input_ids"][:, 0].tolist()
    assert first != blocks(stream(numbers, seed=1), 50, 200)["input_ids"][:, 0].tolist()
    assert first[:100] != first[100:]


def test_order_can_start_anywhere(numbers):
    """从检查点接着训练：直接从第 170 块取，与从头取到那里一样。"""
    whole = blocks(stream(numbers), 10, 300)["input_ids"]
    assert torch.equal(stream(numbers).__getitems__(list(range(170, 300)))["input_ids"], whole[170:])


def test_workers_give_the_same_batches(numbers):
    """DataLoader 用子进程读，次序不变。"""
    loaders = [torch.utils.data.DataLoader(stream(numbers, length=40), batch_size=8, num_workers=workers,
                                           collate_fn=a100_train.pass_batch) for workers in (0, 2)]
    batches = [torch.cat([batch["input_ids"] for batch in loader]) for loader in loaders]
    assert torch.equal(*batches) and len(batches[0]) == 40


def test_real_blocks_join_back_to_the_file(work_dir):
    """真实的 train.bin：一遍的块按起点排好，拼起来就是文件本身。"""
    dataset = stream(work_dir / "packed/train.bin", block_size=64)
    tokens = np.fromfile(work_dir / "packed/train.bin", dtype=np.uint16)
    n = dataset.n_blocks
    assert 0 <= len(tokens) - n * 64 < 64
    order = np.argsort([dataset.block_index(i) for i in range(n)])
    ids = blocks(dataset, 256, n)["input_ids"].numpy()
    assert np.array_equal(ids[order].reshape(-1), tokens[:n * 64])
