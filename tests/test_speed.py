"""加速设置的选择：每种计算能力、有没有 flash-attn、哪个 torch，选什么，打印什么；办不到的，一行说清。"""

import importlib.util
import sys

import pytest
import torch

import a100_train


def chosen(monkeypatch, *argv, capability=None, packages=(), version="2.13.0", compiler=True):
    """在一台假装的机器上（capability 是 None 就没有显卡）choose_speed 的结果。"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch, "__version__", version)
    names = {*packages, *["triton"] * compiler}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, _=None: name if name in names else None)
    monkeypatch.setattr(a100_train.shutil, "which", lambda name: "/usr/bin/g++" if compiler else None)
    monkeypatch.setattr(sys, "argv", ["a100_train.py", *map(str, argv)])
    s = a100_train.read_settings()
    a100_train.choose_speed(s)
    return s


def refused(monkeypatch, *argv, **machine):
    with pytest.raises(SystemExit) as stop:
        chosen(monkeypatch, *argv, **machine)
    assert str(stop.value.code).startswith("错误：") and "\n" not in stop.value.code
    return stop.value.code


RATES = a100_train.LEARNING_RATES
# 计算能力：(precision, attn, compile, tf32)。7.0 V100、7.5 T4、8.0 A100、8.9 4090、9.0 H100
OLD = ("fp16", "sdpa", False, False)
NEW = ("bf16", "sdpa", True, True)
CASES = [((7, 0), OLD), ((7, 5), OLD), ((8, 0), NEW), ((8, 9), NEW), ((9, 0), NEW)]


@pytest.mark.parametrize("version", ["2.13.0", "2.10.0+cu128"])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("capability", "expected"), CASES)
def test_each_capability(monkeypatch, capsys, capability, expected, flash, version):
    s = chosen(monkeypatch, capability=capability, packages=["flash_attn"] * flash, version=version)
    precision, attn, compiled, tf32 = expected
    if flash and expected == NEW:
        attn = "flash_attention_2"
    if version.startswith("2.10"):
        compiled = False  # 2.10 的 compile 在 A100 上出过 NaN
    assert (s.device, s.optim, s.liger, s.learning_rate) == ("cuda", "muon", False, RATES["full"][0])
    assert (s.precision, s.attn, s.compile, s.tf32) == (precision, attn, compiled, tf32)
    out = capsys.readouterr().out
    assert str(capability) in out and version in out
    assert ("没有" in out) == (not flash), "装了 flash-attn 就不能说没有"


def test_what_was_asked_for_is_kept(monkeypatch):
    s = chosen(
        monkeypatch,
        "--precision",
        "fp32",
        "--no-compile",
        "--no-tf32",
        "--attn",
        "eager",
        "--optim",
        "adamw_bnb_8bit",
        capability=(8, 0),
        packages=["flash_attn", "bitsandbytes"],
    )
    assert (s.precision, s.compile, s.tf32, s.attn) == ("fp32", False, False, "eager")
    assert s.optim == "adamw_bnb_8bit"
    assert s.learning_rate == RATES["full"][1]  # 只用 AdamW 时的默认值
    s = chosen(monkeypatch, "--precision", "fp32", capability=(8, 0), packages=["flash_attn"])
    assert s.attn == "sdpa"  # flash-attn 只算 2 字节的数
    s = chosen(monkeypatch, "--compile", capability=(8, 0), version="2.10.1")
    assert s.compile is True  # 明说了就听
    s = chosen(monkeypatch, "--learning_rate", "0.5", "--optim", "adamw_torch", capability=(8, 0))
    assert s.learning_rate == 0.5


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    assert chosen(monkeypatch, capability=(8, 0), compiler=False).compile is False


def test_cpu(monkeypatch):
    s = chosen(monkeypatch, "--preset", "demo", packages=["flash_attn"])
    assert (s.device, s.precision, s.attn, s.compile, s.tf32) == ("cpu", "fp32", "sdpa", False, False)
    assert (s.optim, s.learning_rate) == ("muon", RATES["demo"][0])
    s = chosen(monkeypatch, "--preset", "demo", "--device", "cpu", capability=(8, 0))
    assert (s.device, s.precision, s.tf32) == ("cpu", "fp32", False)  # 有显卡也可以不用
    assert chosen(monkeypatch, "--preset", "demo", "--optim", "adamw_torch").learning_rate == RATES["demo"][1]


def test_mps_is_accepted(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    s = chosen(monkeypatch, "--preset", "demo", "--device", "mps")
    assert (s.device, s.precision, s.attn) == ("mps", "fp32", "sdpa")


@pytest.mark.parametrize(
    ("argv", "machine"),
    [
        (["--device", "cuda"], {}),
        (["--device", "mps"], {}),
        (["--attn", "flash_attention_2"], {}),
        (["--precision", "bf16"], {}),
        (["--precision", "fp16"], {}),
        (["--tf32"], {}),
        (["--liger"], dict(packages=["liger_kernel"])),
        (["--compile"], dict(compiler=False)),
        (["--optim", "adamw_bnb_8bit"], {}),
        (["--report_to", "wandb"], {}),
        (["--precision", "bf16"], dict(capability=(7, 5))),
        (["--tf32"], dict(capability=(7, 5))),
        (["--attn", "flash_attention_2"], dict(capability=(7, 5), packages=["flash_attn"])),
        (["--attn", "flash_attention_2"], dict(capability=(8, 0))),
        (
            ["--attn", "flash_attention_2", "--precision", "fp32"],
            dict(capability=(8, 0), packages=["flash_attn"]),
        ),
        (["--liger"], dict(capability=(8, 0))),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(sorted(value.items())),
)
def test_what_is_absent_is_refused(monkeypatch, argv, machine):
    """明说了却办不到的：一行，有选项的名字；不悄悄换成别的。"""
    if argv[-1] == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = refused(monkeypatch, "--preset", "demo", *argv, **machine)
    assert argv[0] in message and "办不到" in message


def test_full_training_on_a_cpu_must_be_asked_for(monkeypatch):
    assert "--preset demo" in refused(monkeypatch)
    for argv in (["--device", "cpu"], ["--prepare_only"], ["--max_steps", "3"]):
        assert chosen(monkeypatch, *argv).device == "cpu"
