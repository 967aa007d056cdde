"""打包与取块：一个 token 不多、一个不少，次序只由种子决定，缓存过时就重做。"""

import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import VOCAB_SIZE, call

import a100_train

EOS = 3


def tokens_of(work_dir, split):
    return np.fromfile(work_dir / f"packed/{split}.bin", dtype=np.uint16)


def meta_of(work_dir):
    return json.loads((work_dir / "packed/meta.json").read_text("utf-8"))


def documents_in(tokens, sp):
    """按 </s> 切开再解码。每篇末尾都要有 </s>，包括最后一篇。"""
    ends = np.flatnonzero(tokens == EOS)
    assert ends[-1] == len(tokens) - 1
    return [sp.decode(part[:-1].tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def corpus_of(work_dir, split):
    """语料里的 [(文本, 来源)]，按文件里的次序，不经过 a100_train。"""
    tables = [pq.read_table(path) for path in sorted((work_dir / "corpus").glob(f"{split}-*.parquet"))]
    return [(row["text"], row["source"]) for row in pa.concat_tables(tables).to_pylist()]


# ==== 打包 ====


def test_train_file_holds_exactly_the_training_documents(work_dir, sp):
    """每篇恰好一次，次序不变，每篇后面一个 </s>；解码回来一字不差（无损）。"""
    tokens = tokens_of(work_dir, "train")
    texts = [text for text, _ in corpus_of(work_dir, "train")]
    assert len(texts) > 2500 and documents_in(tokens, sp) == texts
    assert (tokens == EOS).sum() == len(texts)
    assert meta_of(work_dir)["train_tokens"] == len(tokens) and tokens.max() < VOCAB_SIZE
    assert not {0, 1, 2} & set(tokens.tolist()), "没有 <pad>、<unk>、<s>"


def test_packed_ids_are_those_of_the_tokenizer(work_dir, sp):
    """train.bin 的前 200 篇与不切页、逐篇编码的编号相同：切页不改变编号。"""
    tokens = tokens_of(work_dir, "train")
    texts = [text for text, _ in corpus_of(work_dir, "train")[:200]]
    expected = [token for text in texts for token in [*sp.encode(text), EOS]]
    assert tokens[: len(expected)].tolist() == expected


def test_eval_file_holds_each_source(work_dir, sp):
    """验证集按来源排在一起；位置、字符数都对；与训练集没有相同的一篇。"""
    tokens = tokens_of(work_dir, "eval")
    sources = meta_of(work_dir)["eval_sources"]
    position = 0
    assert set(sources) == {"news", "reviews"}
    for name, place in sources.items():
        assert place["start"] == position
        position = place["end"]
        texts = [text for text, source in corpus_of(work_dir, "eval") if source == name]
        assert documents_in(tokens[place["start"] : place["end"]], sp) == texts
        assert place["characters"] == sum(map(len, texts))
    assert position == len(tokens)
    assert not set(documents_in(tokens, sp)) & set(documents_in(tokens_of(work_dir, "train"), sp))


def test_unigram_entropy(work_dir):
    """等于直接算的 -Σ p ln p（</s> 也算一个 token）。"""
    counts = Counter(tokens_of(work_dir, "train").tolist())
    total = sum(counts.values())
    direct = -sum(n / total * math.log(n / total) for n in counts.values())
    assert meta_of(work_dir)["unigram_entropy"] == pytest.approx(direct, rel=1e-9)
    assert 3 < direct < math.log(VOCAB_SIZE)


ODD = [
    "短。",
    "很长的一篇，有很多行\n" * 2000,
    "",
    "字" * 30_000,
    "a\n" * 20_000,
    "行\r\n" * 5000,
    "甲" * 8000,
    "\n" * 9000,
    "甲" * 7999 + "\n" + "乙" * 9000 + "\n丙",
    "𠮷😀\u2028 \x85\t",
    "又短。",
]


@pytest.mark.parametrize("i", range(len(ODD)))
def test_odd_documents_come_back(sp, i):
    """长的、空的、只有换行的、生僻的：一字不差地回来，末尾一个 </s>，夹在两篇中间也不串。"""
    tokens = a100_train.encode(sp, ["前", ODD[i], "后"])
    assert tokens.dtype == np.uint16
    assert documents_in(tokens, sp) == ["前", ODD[i], "后"]


def test_long_documents_are_encoded_like_their_lines(sp, real_texts):
    """几万字的一篇，与逐行编码的编号几乎都相同（换行自成一个词块），解码一字不差。"""
    novel = "\n".join(text for texts in real_texts.values() for text in texts[:300])
    assert len(novel) > 5 * 8000
    lines = [[]]
    newline = sp.piece_to_id("<0x0A>")
    for token in a100_train.encode(sp, [novel])[:-1].tolist():
        lines[-1].append(token)
        if token == newline:
            lines.append([])
    expected = sp.encode(novel.splitlines(keepends=True))
    # 串长了，SentencePiece 的分数有浮点误差，几乎一样好的两种切法会互换：一百行里至多一行
    assert sum(a != b for a, b in zip(lines, expected, strict=True)) <= len(expected) // 100
    assert documents_in(a100_train.encode(sp, [novel]), sp) == [novel]


# ==== 缓存 ====


def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "packed").iterdir()}


def prepare(folder):
    call(a100_train, "--work_dir", folder, "--device", "cpu", "--prepare_only")


def test_cache_is_reused(copied, capsys):
    before = files_of(copied)
    prepare(copied)
    assert "沿用" in capsys.readouterr().out and files_of(copied) == before


@pytest.mark.parametrize("name", ["train.bin", "eval.bin", "meta.json"])
def test_damaged_cache_is_rebuilt(copied, work_dir, name):
    path = copied / "packed" / name
    path.write_bytes(path.read_bytes()[:-2])
    prepare(copied)
    for packed in (work_dir / "packed").iterdir():
        assert (copied / "packed" / packed.name).read_bytes() == packed.read_bytes()


@pytest.mark.parametrize(("folder", "key"), [("corpus", "corpus_hash"), ("tokenizer", "key")])
def test_changed_inputs_are_repacked(copied, folder, key):
    for name in {folder, "tokenizer"}:  # 语料变了，分词器的说明也跟着变，否则会重新训练它
        path = copied / name / "report.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {key: "另一份"}), "utf-8")
    before = files_of(copied)
    prepare(copied)
    after = files_of(copied)
    assert "另一份" in meta_of(copied)["key"] and all(after[name][1] > before[name][1] for name in before)
    assert after["train.bin"][0] == before["train.bin"][0]


def test_killed_while_packing_is_packed_again(copied, monkeypatch):
    """写到一半被打断：留下的不算数，同一条命令重新打包。"""
    (copied / "packed/meta.json").unlink()
    before = files_of(copied)
    calls = []
    encode = a100_train.encode

    def interrupted(sp, texts):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return encode(sp, texts)

    monkeypatch.setattr(a100_train, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(copied)
    assert not (copied / "packed/meta.json").exists()
    monkeypatch.undo()
    prepare(copied)
    assert {name: content for name, (content, _) in before.items()}.items() <= {
        name: content for name, (content, _) in files_of(copied).items()
    }.items()


# ==== 取块 ====


@pytest.fixture
def numbers(tmp_path):
    """0、1、2……共 1,003 个 token 的文件：每块是什么一眼看出。"""
    np.arange(1003, dtype=np.uint16).tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


def stream(path, length=400, seed=0, block_size=10):
    return a100_train.BlockStream(path, block_size, length, seed)


def blocks(dataset, batch_size, n, start=0):
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, range(start, n)), batch_size)
    parts = list(loader)
    return {key: torch.cat([part[key] for part in parts]) for key in ("input_ids", "labels")}


def test_every_block_once_per_epoch(numbers):
    """1,003 个 token 是 100 块；只丢末尾不满一块的 3 个。每一遍里每块恰好一次，各遍的次序不同。"""
    dataset = stream(numbers)
    assert len(dataset) == 400
    ids = blocks(dataset, 7, 300)["input_ids"]
    epochs = ids[:, 0].view(3, 100).tolist()
    for starts in epochs:
        assert sorted(starts) == list(range(0, 1000, 10)) and starts != sorted(starts)
    assert epochs[0] != epochs[1]
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
    assert batch["labels"][last, -1].tolist() == [-100] and (batch["labels"] == -100).sum() == 1


def test_order_depends_on_the_seed_only(numbers):
    """与一次取几块、从哪里取起都无关：接着训练时直接从中间取。"""
    expected = blocks(stream(numbers), 1, 250)
    for batch_size in (2, 16, 250):
        got = blocks(stream(numbers), batch_size, 250)
        assert all(torch.equal(got[key], expected[key]) for key in got)
    assert torch.equal(blocks(stream(numbers), 8, 250, start=170)["labels"], expected["labels"][170:])
    assert not torch.equal(blocks(stream(numbers, seed=1), 8, 250)["labels"], expected["labels"])


def test_real_blocks_join_back_to_the_file(work_dir):
    """真实的 train.bin：一遍的块按起点排好，拼起来就是文件本身。"""
    tokens = tokens_of(work_dir, "train")
    n = len(tokens) // 64
    dataset = stream(work_dir / "packed/train.bin", length=n, block_size=64)
    ids = blocks(dataset, 256, n)["input_ids"].numpy()
    assert np.array_equal(ids[np.argsort(dataset.order)].reshape(-1), tokens[: n * 64])
