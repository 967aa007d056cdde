#!/usr/bin/env python3
"""训练前的体检：花几小时的显卡钱以前，先用一分钟看看会不会白花。什么也不改。

每行以 正常、注意、不行 开头，接着是查到了什么、该怎么办。没有“不行”时退出码 0，否则 1。

    python doctor.py --price_per_hour 3.45       # 完整训练前：查一遍，真训练两秒，估算时间和花费（元）
    python doctor.py --preset demo --offline     # 演示前：不查网络
    python doctor.py --memory_table              # 各种显存放得下多大的微批量
"""

import argparse
import http.client
import importlib.metadata
import importlib.util
import math
import os
import platform
import queue
import re
import shutil
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

try:
    import psutil  # 随 accelerate 一起装上
    import torch
    import transformers
    from packaging.requirements import Requirement

    from plot_loss import run
except ModuleNotFoundError as error:
    sys.exit(f"错误：没有装 {error.name}；先 pip install -r requirements.txt")

OK = "正常"
NOTE = "注意"
BAD = "不行"

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"

# 模型与批量同 a100_train.py 的同名预设。完整训练的步数按公开参考：读两遍，共 11,838 步（一遍约 5.8 亿 token）。
# memory_gb、disk_gb 是往大里估的内存和磁盘。磁盘上有下载的文件、整理好的语料、打包好的 token、
# 三个检查点（每个参数 12 字节：权重 4，优化器 8）和最终的模型。
PRESETS = {
    "full": {
        "vocab_size": 32_000,
        "n_layer": 8,
        "n_embd": 768,
        "n_head": 12,
        "block_size": 1024,
        "batch_size": 48,
        "effective_batch_size": 96,
        "steps": 11_838,
        "memory_gb": 8,
        "disk_gb": 14,
    },
    "demo": {
        "vocab_size": 4_500,
        "n_layer": 2,
        "n_embd": 128,
        "n_head": 4,
        "block_size": 64,
        "batch_size": 32,
        "effective_batch_size": 32,
        "steps": 1_350,
        "memory_gb": 2,
        "disk_gb": 0.1,
    },
}

# requirements.txt 里的这几个只在换一条路下载时才用，缺了先不算错。
DOWNLOAD_ONLY = {"modelscope-hub", "PySocks", "socksio"}

# 三个来源放着同一个数据集（521 MB 的维基百科），拿它的开头来试能不能下载、有多快。
WIKI = "wikipedia-cn-20230720-filtered"
ENDPOINT = os.environ.get("HF_ENDPOINT", "https://hf-mirror.com").rstrip("/")
HUB = f"https://huggingface.co/datasets/pleisto/{WIKI}/resolve/main/{WIKI}.json"
MIRROR = f"{ENDPOINT}/datasets/pleisto/{WIKI}/resolve/main/{WIKI}.json"
MODELSCOPE = f"https://www.modelscope.cn/datasets/AI-ModelScope/{WIKI}/resolve/master/{WIKI}.json"

# 显卡做矩阵乘的峰值，单位 TFLOP/s（每秒一万亿次浮点运算），照各显卡公布的规格：bf16 或 fp16 相乘、
# fp32 累加，不算稀疏（sparsity）。同名的几种，特别的写在前面：查表时先遇到先用。
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


# ==== 1. 显卡 ====


def compiler_is_complete():
    """torch.compile 要在这台机器上现编译。缺下面任何一样，训练到第一步就会停下，所以先看一看。"""
    if shutil.which("g++") is None:
        return False
    # 显卡上的代码由 Triton 编译；只用 CPU 时不需要它。
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return False
    # 要编译的 C 文件用到 Python.h。它在 python3-dev 这个包里，Ubuntu 自带的 Python 往往没有装。
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return os.path.isfile(header)


def torch_has_code_for(capability, architectures):
    """这个 torch 里，有没有计算能力为 capability（例如 (8, 6)）的显卡能跑的代码。

    architectures 是 torch.cuda.get_arch_list()，例如 ["sm_80", "sm_90", "compute_120"]。
    """
    if torch.version.hip:  # AMD 的显卡：编号的规则不同，这里不查
        return True
    for architecture in architectures:
        kind, number = architecture.split("_")
        number = int(number.rstrip("af"))  # sm_90a、sm_120f 也按 90、120 算
        built_for = (number // 10, number % 10)
        # sm_ 是机器码：大版本相同、小版本不比它旧的卡都能跑，例如 sm_80 的代码在 8.6、8.9 的卡上也行。
        if kind == "sm" and built_for[0] == capability[0] and built_for <= capability:
            return True
        # compute_ 是中间代码（PTX）：遇到更新的卡，驱动会当场把它编译成机器码。
        if kind == "compute" and built_for <= capability:
            return True
    return False


def fitting_torch(capability):
    """该装哪一种 torch。照 PyTorch 2.11 到 2.14 的安装包支持表（2026 年 11 月查），真的显卡上未测。"""
    command = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl"
    if capability < (7, 0):
        return f"这么旧的卡没有张量核心（tensor core），慢，最好换一张；一定要用：{command}/cu126"
    if capability < (7, 5):
        return f"torch 2.11 起，只有 CUDA 12.6 的安装包还有：{command}/cu126"
    # RTX 50 系列（12.0）、GB10（12.1）等。
    return f"要 CUDA 12.8 或更新的安装包（先把显卡驱动升级到最新）：{command}/cu130"


def examine_card(index):
    """第 index 张显卡：（级别，说明）。"""
    card = torch.cuda.get_device_properties(index)
    capability = (card.major, card.minor)
    text = (
        f"显卡 {index}：{card.name}，{card.total_memory / 2**30:.0f} GB，计算能力 {card.major}.{card.minor}；"
    )
    if not torch_has_code_for(capability, torch.cuda.get_arch_list()):
        return BAD, f"{text}torch {torch.__version__} 里没有它的代码；{fitting_torch(capability)}"
    # 不问 torch.cuda.is_bf16_supported()：T4 上靠模拟，它也回答 True，却慢得没法用。
    if capability >= (8, 0):
        text += "bf16；torch 自带 FlashAttention，不必装 flash-attn；"
    else:
        text += "没有 bf16，用 fp16；torch 自带省显存的注意力，不必装 flash-attn；"
    if compiler_is_complete():
        return OK, f"{text}torch.compile 可用"
    return NOTE, f"{text}torch.compile 不会用：缺 g++、triton 或 Python.h（apt-get install g++ python3-dev）"


def examine_devices(preset):
    """每张显卡一行；几张卡，再加一行怎样都用上；没有卡，也说一行。"""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        yield examine_card(index)
    if count > 1:
        command = f"torchrun --standalone --nproc_per_node={count} a100_train.py"
        yield NOTE, f"有 {count} 张显卡，直接运行 a100_train.py 只用一张；都用上：{command}"
    if count == 0:
        level = BAD if preset == "full" else OK
        yield level, "没有 CUDA 显卡，用 CPU：只够跑演示，完整训练要租显卡"


# ==== 2. 版本、磁盘、内存、网络。每个函数逐个给出（级别，说明）====


def installed_version(package):
    """装着的版本；没有装就是空字符串。"""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def examine_mismatch(wanted, found):
    """一个没有装、或版本不在范围里的包：（级别，说明）。"""
    level = NOTE if wanted.name in DOWNLOAD_ONLY else BAD
    for limit in wanted.specifier:
        if found and limit.operator == "<" and not limit.contains(found):
            level = NOTE  # 比试过的都新：多半能用
    text = f"{wanted.name} {found or '没有装'}，要 {wanted.specifier}"
    return level, f"{text}：pip install '{wanted}'"


def examine_versions(path):
    """拿装着的版本对照 path（requirements.txt）：合格的并成一行，其余一个一行。"""
    cuda = torch.version.cuda or "无"
    good = [f"python {platform.python_version()}", f"CUDA {cuda}"]
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        text = f"有 NVIDIA 驱动，torch 却用不了显卡（CUDA {cuda}）"
        yield BAD, f"{text}；升级驱动，或从 pytorch.org 装合适的 torch"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not re.match(r"\w", line):  # 空行、注释、pip 的选项
            continue
        wanted = Requirement(line.split("#")[0])
        if wanted.marker and not wanted.marker.evaluate():  # 写着只给别的系统装
            continue
        found = installed_version(wanted.name)
        if found and wanted.specifier.contains(found, prereleases=True):
            good.append(f"{wanted.name} {found}")
        else:
            yield examine_mismatch(wanted, found)
    yield OK, f"版本：{'，'.join(good)}"


def examine_disk(folder, disk_gb):
    """folder（可以还不存在）所在的盘够不够、能不能写。"""
    place = folder.resolve()
    while not os.path.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    level = OK if free > disk_gb else BAD
    text = f"{folder} 所在的盘剩 {free:.1f} GB，大约要 {disk_gb} GB"
    yield level, f"{text}；不够就清出空间，或换一块盘（--work_dir）"
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".doctor-") as file:  # 关上就没了
            file.write(b"doctor")
    except OSError as error:
        yield BAD, f"{place} 写不进去（{error.strerror}）；检查是不是文件夹、权限和配额，或换一个 --work_dir"


def examine_memory(memory_gb):
    """内存够不够。"""
    available = psutil.virtual_memory().available
    container_limit = Path("/sys/fs/cgroup/memory.max")  # 租来的机器多半是容器，上限比整台机器的内存小
    if os.path.isfile(container_limit):
        limit = container_limit.read_text(encoding="utf-8").strip()
        if limit != "max":
            available = min(available, int(limit))
    level = OK if available > memory_gb * 2**30 else NOTE
    text = f"内存可用 {available / 2**30:.1f} GB，大约要 {memory_gb} GB"
    yield level, f"{text}；不够就关掉别的程序，或换内存大的机器"


class RememberRedirects(urllib.request.HTTPRedirectHandler):
    """网站叫我们转到（redirect）别处去下载时，照常跟着走，并记下转到了哪台主机。"""

    def __init__(self):
        self.host = ""

    def redirect_request(self, request, file, code, message, headers, new_url):
        self.host = urlsplit(new_url).hostname
        return super().redirect_request(request, file, code, message, headers, new_url)


def download_start(url, redirects, answers):
    """下载 url 的前 2 MB，把（级别，说明）放进队列 answers。"""
    try:
        with urllib.request.build_opener(redirects).open(url, timeout=10) as response:
            start = time.perf_counter()
            data = response.read(2_000_000)
            speed = len(data) / (time.perf_counter() - start) / 1e6
    except (OSError, ValueError, http.client.HTTPException) as error:
        answers.put((NOTE, f"没有下载成（{getattr(error, 'reason', type(error).__name__)}）"))
        return
    if data.startswith((b"{", b"[")):
        answers.put((OK, f"每秒 {speed:.1f} MB（wiki 数据集 521 MB）"))
    else:
        answers.put((NOTE, "给的不是数据文件，可能是登录或验证的网页"))


def examine_source(name, url, next_way, seconds):
    """真的从一个来源下载数据集的开头：（级别，说明）。下载不成就说下一条路。"""
    redirects = RememberRedirects()
    answers = queue.Queue()
    # 放在线程里做：查域名、慢慢地下载都会拖很久，而 urllib 的 timeout 管不到。
    threading.Thread(target=download_start, args=(url, redirects, answers), daemon=True).start()
    try:
        level, text = answers.get(timeout=seconds)
    except queue.Empty:
        level = NOTE
        text = f"{seconds:g} 秒里没有下载到 2 MB，太慢或没有应答"
    if redirects.host:
        text += f"，转到 {redirects.host} 去下载"
        if redirects.host.endswith(("huggingface.co", "hf.co")) and url != HUB:
            level = NOTE
            text += "，又回到了 Hub：连不上 Hub 的网络里，它没有用"
    if level == NOTE:
        text += f"；下一条路：{next_way}"
    return level, f"网络 {name}：{text}"  # 不印网址：HF_ENDPOINT 里可能有密码


def examine_network(seconds=4):
    """prepare_corpus.py 默认依次试的三个来源，各一行。"""
    yield examine_source(
        "Hub", HUB, "镜像，默认会自己换过去；只用它：export HF_ENDPOINT=https://hf-mirror.com", seconds
    )
    yield examine_source(
        "镜像",
        MIRROR,
        "ModelScope，默认会自己换过去（要 modelscope-hub）；只用它：--source modelscope",
        seconds,
    )
    yield examine_source(
        "ModelScope",
        MODELSCOPE,
        f"用浏览器从 modelscope.cn/datasets/AI-ModelScope/{WIKI} 下载，再 --corpus wiki=文件",
        seconds,
    )


# ==== 3. 真的训练两秒：速度、MFU、花费 ====


def peak_flops(name):
    """名叫 name 的显卡每秒浮点运算次数的峰值；表里没有的，返回 None。"""
    if "Laptop" in name or "MIG" in name:  # 笔记本里的、切成几份的，名字相同，慢得多
        return None
    for card, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{card}\b", name):  # \b 是词的边界：找 A10 不会找到 A100
            return tflops * 1e12
    return None


def flops_per_token(parameters, values):
    """训练一个 token 的浮点运算次数：6N + 12·L·d·T（PaLM 论文附录 B）。"""
    # 位置向量 T·d 个参数只是加上去，不做矩阵乘，不算在 N 里
    positions = values["block_size"] * values["n_embd"]
    return 6 * (parameters - positions) + 12 * values["n_layer"] * positions


def new_model(values):
    """与 a100_train.py 同样的 GPT-2。"""
    config = transformers.GPT2Config(
        vocab_size=values["vocab_size"],
        n_layer=values["n_layer"],
        n_embd=values["n_embd"],
        n_head=values["n_head"],
        n_positions=values["block_size"],
        bos_token_id=2,
        eos_token_id=3,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # 预测下一个 token；不写这一行，transformers 会为它没有认出类型而警告
    return model


def training_step(model, optimizer, tokens, dtype):
    """训练一步：前向、反向、更新参数。tokens 形状 (B, T)。返回（秒，损失）。"""
    start = time.perf_counter()
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.item()  # 显卡是排着队算的，.item() 等前面的都算完，才看表
    return time.perf_counter() - start, loss


def measure(model, values, device, dtype, seconds):
    """用随机的 token 训练 seconds 秒；显存放不下，就把微批量减半。返回（微批量，一步的秒数，开头的损失）。"""
    batch_size = values["batch_size"]
    tokens = torch.randint(4, values["vocab_size"], (batch_size, values["block_size"]), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    _, first_loss = training_step(model, optimizer, tokens[:1], dtype)  # 头一步要分配内存，时间不算
    times = []
    while sum(times) < seconds:
        try:
            elapsed, _ = training_step(model, optimizer, tokens[:batch_size], dtype)
            times.append(elapsed)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = batch_size // 2
            times = []
            torch.cuda.empty_cache()
    return batch_size, statistics.median(times), first_loss


def share_of_peak(flops_per_second, device):
    """MFU（model FLOPs utilization）：模型每秒真正要算的次数，占峰值的百分之几。"""
    peak = None
    if device == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return "不知道这个设备的峰值，MFU 不算"
    return f"MFU {flops_per_second / peak:.0%}（峰值 {peak / 1e12:g} TFLOP/s）"


def examine_loss(loss, vocab_size):
    """没有训练过的模型等于瞎猜，损失是 ln V；差得多就是算错了。"""
    guess = math.log(vocab_size)
    text = f"试跑开头的损失 {loss:.2f}，瞎猜是 {guess:.2f}"
    if abs(loss - guess) < 1:
        return OK, text
    return BAD, f"{text}，差得太多：硬件或 torch 有问题，先别训练"  # NaN 也走到这里


def examine_speed(preset, price_per_hour, seconds=2):
    """真训练几步，换算成全程的小时数和钱（price_per_hour 元/小时）。"""
    values = dict(PRESETS[preset])
    device = "cpu"
    dtype = torch.float32
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if not torch_has_code_for(capability, torch.cuda.get_arch_list()):
            return  # 显卡那一行已经说了该装哪一种 torch
        device = "cuda"
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    elif preset == "full":
        values["batch_size"] = 1  # 完整模型的 48 块在 CPU 上要几分钟
    try:
        model = new_model(values).to(device)
        batch_size, step_seconds, loss = measure(model, values, device, dtype, seconds)
    except RuntimeError as error:  # 显存不够，或显卡、驱动有毛病
        first_line = str(error).split("\n")[0]
        yield BAD, f"试跑失败（{first_line}）；关掉占显存的程序，或换一张卡"
        return
    yield examine_loss(loss, values["vocab_size"])
    parameters = model.num_parameters()
    speed = batch_size * values["block_size"] / step_seconds
    flops_per_second = speed * flops_per_token(parameters, values)
    text = f"试跑 {parameters:,} 参数，微批量 {batch_size}，{dtype}：每秒 {speed:,.0f} token"
    yield OK, f"{text}，{share_of_peak(flops_per_second, device)}"
    tokens = values["steps"] * values["effective_batch_size"] * values["block_size"]
    hours = tokens / speed / 3600
    cost = ""
    if price_per_hour:
        cost = f"，每小时 {price_per_hour:g} 元共 {hours * price_per_hour:.2f} 元"
    text = (
        f"全程 {values['steps']:,} 步，{tokens:,} token，约 {hours:.1f} 小时（{hours * 60:.0f} 分钟）{cost}"
    )
    yield OK, f"{text}（一张卡，AdamW，每个微批量更新一次，没开 torch.compile，不含下载、打包、验证）"


# ==== 4. 显存花在哪里：按公式算，未测（SDPA，不用 torch.compile）====


def memory_needed(
    batch_size, optimizer="muon", precision="bf16", vocab_size=32_000, n_layer=8, n_embd=768, block_size=1024
):
    """训练要的显存，逐项的字节数；batch_size 是微批量，下面的 d 是 n_embd。"""
    embeddings = (vocab_size + block_size) * n_embd
    matrices = 12 * n_layer * n_embd**2
    parameters = embeddings + matrices + (13 * n_layer + 2) * n_embd  # 默认共 82,066,944
    states = 8 * parameters  # AdamW 每个参数记两个 fp32，8 字节
    if optimizer == "muon":
        states -= 4 * matrices  # Muon 对矩阵只记一个 fp32 动量
    if optimizer == "adamw_bnb_8bit":
        states = 8 * embeddings + 2 * (parameters - embeddings)  # 词向量和位置向量仍是 fp32，其余各 1 字节
    weight_bytes = 6  # fp32 的权重 4 字节，autocast 的半精度副本 2 字节
    # 每层每个 token 给反向存下 36·d 字节：两处残差（fp32）8d；半精度的归一化 4d、qkv 6d、注意力 2d、MLP 16d。
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


def largest_micro_batch(memory_gb, optimizer):
    """放得进 memory_gb 的最大微批量，和它要几 GB。微批量要整除有效批量 96。"""
    answer = None
    for size in range(1, 97):
        need = sum(memory_needed(size, optimizer).values()) / 2**30
        if 96 % size == 0 and need < memory_gb:
            answer = f"{size:>6}（{need:.1f} GB）"
    return answer


def print_memory_table():
    print("完整模型（82.1 M 参数，上下文 1,024，bf16 或 fp16）放得下的最大微批量；按公式算，未测")
    print("显存     8 位 AdamW       Muon（默认）     32 位 AdamW")
    for memory_gb in (8, 16, 24, 40, 80):
        row = f"{memory_gb:>2} GB"
        for optimizer in ("adamw_bnb_8bit", "muon", "adamw_torch_fused"):
            row += largest_micro_batch(memory_gb, optimizer)
        print(row)


# ==== 5. 主程序 ====


def parse_args():
    parser = argparse.ArgumentParser(description="训练前的体检", allow_abbrev=False)
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="full 完整训练，demo 演示")
    parser.add_argument(
        "--work_dir", type=Path, default=HOME, help="准备放训练输出的文件夹；默认 %(default)s"
    )
    parser.add_argument("--price_per_hour", type=float, default=0.0, help="显卡每小时多少元，用来估算花费")
    parser.add_argument("--offline", action="store_true", help="不查网络")
    parser.add_argument("--memory_table", action="store_true", help="只打印：各种显存放得下的微批量")
    args = parser.parse_args()
    if args.price_per_hour < 0:
        sys.exit(f"错误：--price_per_hour 要不小于 0，得到 {args.price_per_hour}")
    return args


def main():
    args = parse_args()
    if args.memory_table:
        print_memory_table()
        return
    values = PRESETS[args.preset]
    checks = [
        examine_devices(args.preset),
        examine_versions(Path(__file__).with_name("requirements.txt")),
        examine_disk(args.work_dir, values["disk_gb"]),
        examine_memory(values["memory_gb"]),
        examine_speed(args.preset, args.price_per_hour),
    ]
    if not args.offline:
        checks.append(examine_network())
    failed = False
    for check in checks:
        for level, text in check:
            print(f"{level}  {text}")
            if level == BAD:
                failed = True
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
