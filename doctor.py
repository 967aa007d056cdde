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
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
import transformers
from packaging.requirements import Requirement

from plot_loss import run, use_chinese_font

OK, NOTE, BAD = "正常", "注意", "不行"
# 模型与批量同 a100_train.py；完整训练按公开参考的 11,838 步（两遍，一遍约 5.8 亿 token，合 9 亿字，估计值）算。
# disk_gb 偏大：每字下载 3 字节、语料 4、打包 4，再加三个检查点（每参数 12 字节：权重 4、优化器 8）和最终模型
PRESETS = {
    "full": dict(vocab_size=32_000, n_layer=8, n_embd=768, n_head=12, block_size=1024, batch_size=48,
                 effective_batch_size=96, steps=11_838, memory_gb=8, disk_gb=14),
    "demo": dict(vocab_size=4_500, n_layer=2, n_embd=128, n_head=4, block_size=64, batch_size=32,
                 effective_batch_size=32, steps=1350, memory_gb=2, disk_gb=0.1),
}
REQUIRED = {"torch", "transformers", "accelerate", "sentencepiece", "pyarrow", "matplotlib", "filelock"}
HUB, MIRROR, MODELSCOPE = "https://huggingface.co", "https://hf-mirror.com", "https://www.modelscope.cn"
WIKI = "wikipedia-cn-20230720-filtered"      # 拿这个数据集（521 MB）的开头测下载速度
# 稠密矩阵乘的峰值（TFLOP/s，bf16；T4、V100 是 fp16），来自各显卡的官方规格
PEAK_TFLOPS = {"A100": 312, "A800": 312, "H100": 989, "H800": 989, "H200": 989, "H20": 148, "4090": 165,
               "3090": 71, "L40S": 362, "L4": 121, "A10": 125, "T4": 65, "V100": 125}


# ==== 1. 看一看：显卡、版本、磁盘、内存、网络。每个函数逐个给出（级别，说明）====

def examine_devices(preset):
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu, compiler = torch.cuda.get_device_properties(index), find_spec("triton") and shutil.which("g++")
        ampere = gpu.major >= 8         # 不问 is_bf16_supported()：T4 上靠模拟也说 True，却慢得没法用
        yield (OK if compiler and gpu.major >= 7 else NOTE), (
            f"显卡 {index}：{gpu.name}，{gpu.total_memory / 2**30:.0f} GB，计算能力 {gpu.major}.{gpu.minor}"
            f"{'' if gpu.major >= 7 else '（太旧，新的 torch 不支持，换一张）'}；{'bf16' if ampere else '没有 bf16，用 fp16'}；"
            f"torch 自带{' FlashAttention' if ampere else '省显存的注意力'}，不必装 flash-attn；"
            f"torch.compile {'可用' if compiler else '不会用：缺 triton 或 g++'}")
    if count > 1:
        yield NOTE, f"{count} 张显卡都用上：torchrun --standalone --nproc_per_node={count} a100_train.py"
    if not count:
        level = BAD if preset == "full" else OK
        yield level, f"没有 CUDA 显卡，用 CPU（{os.cpu_count()} 核）：只够跑 --preset demo，完整训练要租显卡"


def examine_versions(path):
    """已装的版本与 path 里的范围：合格的并成一行，其余一个一行。"""
    good = [f"python {sys.version.split()[0]}", f"CUDA {torch.version.cuda or '无'}"]
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield BAD, f"有 NVIDIA 驱动，torch 却用不了显卡（{good[1]}）；升级驱动，或从 pytorch.org 装合适的 torch"
    lines = path.read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line.partition("#")[0]) for line in lines if re.match(r"\w", line)]
    for wanted in (each for each in requirements if not each.marker or each.marker.evaluate()):
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        newer = found and any(s.operator == "<" and not s.contains(found, True) for s in wanted.specifier)
        if found and wanted.specifier.contains(found, prereleases=True):
            good.append(f"{wanted.name} {found}")
        else:
            yield (BAD if wanted.name in REQUIRED and not newer else NOTE), (
                f"{wanted.name} {found or '没有装'}，要 {wanted.specifier}{'（更新的没试过）' if newer else ''}："
                f"pip install '{wanted.name}{wanted.specifier}'")
    yield OK, f"版本：{'，'.join(good)}"


def examine_disk(folder, disk_gb):
    """folder（可以还不存在）所在的盘够不够、能不能写。"""
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    yield (OK if free > disk_gb else BAD), (
        f"{folder} 所在的盘剩 {free:.1f} GB，大约要 {disk_gb} GB；不够就清出空间，或换一块盘（--work_dir）")
    try:
        with tempfile.TemporaryFile(dir=place, prefix=".doctor-") as file:       # 关上就没了
            file.write(bytes(1 << 20))
    except OSError as error:
        yield BAD, f"{place} 写不进去（{error.strerror}）；检查是不是文件夹、权限和配额，或换一个 --work_dir"


def examine_host(memory_gb):
    """内存和中文字体。"""
    available, cgroup = psutil.virtual_memory().available, Path("/sys/fs/cgroup/memory.max")
    if cgroup.exists() and (limit := cgroup.read_text(encoding="utf-8").strip()).isdigit():
        available = min(available, int(limit))               # 容器的上限比机器的小
    yield (OK if available > memory_gb * 2**30 else NOTE), (
        f"内存可用 {available / 2**30:.1f} GB，大约要 {memory_gb} GB；不够就关掉别的程序，或换内存大的机器")
    yield (OK, "有中文字体，曲线图用中文标注") if use_chinese_font() == "zh" else (
        NOTE, "没有中文字体，曲线图用英文；要中文：apt-get install fonts-wqy-microhei")


def download(url, seconds, result):
    """从 url 读最多 4 MB 或 seconds 秒，往 result 里放（级别，说明）。"""
    start, size = time.perf_counter(), 0
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            while size < 4e6 and time.perf_counter() - start < seconds and (data := response.read1(65536)):
                size += len(data)
        speed = size / (time.perf_counter() - start) / 1e6
        result.append((NOTE if speed < 0.5 else OK, f"每秒 {speed:.2f} MB（wiki 数据集 521 MB）"))
    except (OSError, ValueError, http.client.HTTPException) as error:
        result.append((NOTE, f"没有下载成（{getattr(error, 'reason', type(error).__name__)}）"))


def examine_network(seconds=4):
    """Hub、镜像、ModelScope 各一行；正在用的是 HF_ENDPOINT 指的那个。"""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    for base in dict.fromkeys((HUB, MIRROR, endpoint, MODELSCOPE)):
        owner, branch = ("AI-ModelScope", "master") if base == MODELSCOPE else ("pleisto", "main")
        url, result = f"{base}/datasets/{owner}/{WIKI}/resolve/{branch}/{WIKI}.json", []
        thread = threading.Thread(target=download, args=(url, seconds, result), daemon=True)
        thread.start()
        thread.join(seconds + 1)                    # 解析域名会卡住，urllib 的 timeout 管不到
        level, text = result[0] if result else (NOTE, f"{seconds:g} 秒没有应答")
        if level != OK and base == endpoint:
            text += (f"；正在用的是它，换一路：export HF_ENDPOINT={MIRROR if endpoint == HUB else HUB}，"
                     f"或从 ModelScope 下载后用 --corpus wiki=文件")
        yield level, f"网络 {re.sub(r'.*//|.*@|/.*', '', base)}：{text}"       # 只印主机名：网址里可能有密码
    if endpoint != HUB and not os.environ.get("HF_HUB_DISABLE_XET"):
        yield NOTE, "Xet 下载会绕开 HF_ENDPOINT；再设一个：export HF_HUB_DISABLE_XET=1"


# ==== 2. 真的训练两秒：速度、MFU、花费 ====

def peak_flops(device):
    """设备每秒浮点运算次数的峰值，和它的来历。表里没有的设备就实测一次大矩阵乘。"""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for key, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b", name):
            return tflops * 1e12, "官方规格"
    size, dtype = (8192, torch.float16) if device == "cuda" else (1024, torch.float32)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(20):                      # 取最快的一次：别的程序只会让它变慢
        start = time.perf_counter()
        (a @ a)[0, 0].item()                 # .item() 等 GPU 算完
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, "实测矩阵乘"


def flops_per_token(parameters, n_layer, n_embd, block_size):
    """训练一个 token 的浮点运算次数：6N + 12·L·d·T（PaLM 论文附录 B；N 不含位置向量）。"""
    return 6 * (parameters - block_size * n_embd) + 12 * n_layer * n_embd * block_size


def new_model(vocab_size, n_layer, n_embd, n_head, block_size, **_):
    """与 a100_train.py 同样的 GPT-2。"""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=block_size,
        bos_token_id=2, eos_token_id=3, activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def micro_step(model, tokens, dtype):
    """一个微批量的前向和反向；tokens 形状 (B, T+1)。返回（秒，损失）。"""
    start = time.perf_counter()
    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype is not None):
        hidden = model.transformer(tokens[:, :-1], use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    loss = loss.item()                       # .item() 等 GPU 算完
    return time.perf_counter() - start, loss


def measure(model, values, device, dtype, seconds):
    """用随机数据训练，放不下就把微批量减半。返回（微批量，一个微批量的秒数，更新参数的秒数，开头的损失）。"""
    batch_size, times = values["batch_size"], []
    tokens = torch.randint(4, values["vocab_size"], (batch_size, values["block_size"] + 1), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    _, loss = micro_step(model, tokens[:1], dtype)
    optimizer.step()                         # 头一次要分配优化器状态，不计时
    while sum(times) < seconds:
        try:
            times.append(micro_step(model, tokens[:batch_size], dtype)[0])
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size, times = batch_size // 2, []
            torch.cuda.empty_cache()
    start = time.perf_counter()
    optimizer.step()
    next(model.parameters()).sum().item()
    return batch_size, sorted(times)[len(times) // 2], time.perf_counter() - start, loss


def examine_speed(preset, price_per_hour, seconds=2):
    """真训练几步，换算成全程的小时数和钱（price_per_hour 元/小时）。"""
    values, device = PRESETS[preset], "cuda" if torch.cuda.is_available() else "cpu"
    if preset == "full" and device == "cpu":
        values = values | {"batch_size": 1}      # 完整模型的一个微批量在 CPU 上要几分钟
    ampere = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if ampere else torch.float16 if device == "cuda" else None
    try:
        model = new_model(**values).to(device)
        batch_size, micro, update, loss = measure(model, values, device, dtype, seconds)
    except RuntimeError as error:                # 显存不够，或 torch 不认这张卡
        yield BAD, f"试跑失败（{str(error).strip().splitlines()[0][:80]}）；关掉占显存的程序，或换一张卡"
        return
    tokens = values["effective_batch_size"] * values["block_size"]
    speed = tokens / (micro * values["effective_batch_size"] / batch_size + update)
    (peak, source), parameters = peak_flops(device), model.num_parameters()
    flops = flops_per_token(parameters, values["n_layer"], values["n_embd"], values["block_size"])
    guess = math.log(values["vocab_size"])       # 没训练过的模型等于瞎猜
    good = abs(loss - guess) < 1                 # NaN 也不算 good
    yield (OK if good else BAD), (
        f"试跑 {parameters:,} 参数，微批量 {batch_size}，{str(dtype or torch.float32)[6:]}：每秒 {speed:,.0f} token，"
        f"MFU {speed * flops / peak:.0%}（峰值 {peak / 1e12:.2f} TFLOP/s，{source}），"
        f"开头损失 {loss:.2f}（瞎猜是 {guess:.2f}）{'' if good else '，差得太多：硬件或 torch 有问题，先别训练'}")
    hours = values["steps"] * tokens / speed / 3600
    cost = f"，每小时 {price_per_hour:g} 元共 {hours * price_per_hour:.2f} 元" if price_per_hour else ""
    yield (OK if hours < 48 else NOTE), (
        f"全程 {values['steps']:,} 步 × {tokens:,} token，约 {hours:.1f} 小时（{hours * 60:.0f} 分钟）{cost}"
        f"（一张卡，AdamW，没开 torch.compile，不含下载、打包、验证）")


# ==== 3. 显存花在哪里：按公式算，未测（SDPA，不用 torch.compile）====

def memory_needed(batch_size, optimizer="muon", precision="bf16", vocab_size=32_000, n_layer=8, n_embd=768,
                  block_size=1024):
    """训练要的显存，逐项的字节数；batch_size 是微批量，下面的 d 是 n_embd。"""
    embeddings, matrices = (vocab_size + block_size) * n_embd, 12 * n_layer * n_embd**2
    parameters = embeddings + matrices + (13 * n_layer + 2) * n_embd         # 默认共 82,066,944
    # AdamW 每参数记两个 fp32；8 位的每个 1 字节，但词向量和位置向量仍是 fp32；Muon 对矩阵只记一个 fp32 动量
    states = {"adamw_torch_fused": 8 * parameters, "muon": 8 * parameters - 4 * matrices,
              "adamw_bnb_8bit": 8 * embeddings + 2 * (parameters - embeddings)}
    half = precision != "fp32"
    # 每层每 token 给反向存下 36·d 字节：两处残差（fp32）8d；半精度的归一化 4d、qkv 6d、注意力 2d、MLP 16d（fp32 都翻倍）
    return {"weights": (6 if half else 4) * parameters,      # fp32，和 autocast 的半精度副本
            "gradients": 4 * parameters, "optimizer": states[optimizer],
            "activations": batch_size * block_size * n_layer * n_embd * (36 if half else 64),
            "logits": batch_size * block_size * 12 * vocab_size,     # 三份 fp32：log_softmax、它的梯度、上游的梯度
            "context": 2**30}       # CUDA 上下文、碎片


def print_memory_table():
    """每种显存放得下的最大微批量：有效批量 96 的约数里最大的。"""
    print("完整模型（82.1 M 参数，上下文 1,024，bf16 或 fp16）放得下的最大微批量；按公式算，未测\n"
          "显存     8 位 AdamW       Muon（默认）     32 位 AdamW")
    for size in (8, 16, 24, 40, 80):
        row = f"{size:>2} GB"
        for optimizer in ("adamw_bnb_8bit", "muon", "adamw_torch_fused"):
            need = {b: sum(memory_needed(b, optimizer).values()) / 2**30 for b in range(1, 97) if 96 % b == 0}
            fits = max(b for b in need if need[b] < size)
            row += f"{fits:>6}（{need[fits]:.1f} GB）"
        print(row)


# ==== 4. 主程序 ====

def main():
    parser = argparse.ArgumentParser(description="训练前的体检", allow_abbrev=False)
    folder = Path("/root/autodl-tmp/gpt2-chinese" if os.path.isdir("/root/autodl-tmp") else "gpt2-chinese")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="full 完整训练，demo 演示")
    parser.add_argument("--work_dir", type=Path, default=folder, help="准备放训练输出的文件夹")
    parser.add_argument("--price_per_hour", type=float, default=0.0, help="显卡每小时多少元，用来估算花费")
    parser.add_argument("--offline", action="store_true", help="不查网络")
    parser.add_argument("--memory_table", action="store_true", help="只打印：各种显存放得下的微批量")
    args = parser.parse_args()
    if not 0 <= args.price_per_hour < math.inf:
        sys.exit(f"错误：--price_per_hour 要不小于 0，得到 {args.price_per_hour}")
    if args.memory_table:
        return print_memory_table()
    values, levels = PRESETS[args.preset], []
    for level, text in chain(
            examine_devices(args.preset), examine_versions(Path(__file__).with_name("requirements.txt")),
            examine_disk(args.work_dir, values["disk_gb"]), examine_host(values["memory_gb"]),
            () if args.offline else examine_network(), examine_speed(args.preset, args.price_per_hour)):
        print(f"{level}  {text}")
        levels.append(level)
    if BAD in levels:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
