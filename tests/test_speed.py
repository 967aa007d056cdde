"""加速设置的选择：每种计算能力、有没有 flash-attn、编译器全不全、哪个 torch，选什么；微批量；办不到的，一行说清。"""

import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, defaults

import a100_train


def machine(monkeypatch, tmp_path, capability=None, packages=(), version="2.13.0", missing=()):
    """假装一台机器：capability 是 None 就没有显卡；packages 是装着的；missing 是编译器里缺的。"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch, "__version__", version)
    names = {*packages, *({"triton"} - set(missing))}
    monkeypatch.setattr(a100_train, "find_spec", lambda name: name if name in names else None)
    monkeypatch.setattr(
        a100_train.shutil, "which", lambda name: None if name in missing else f"/usr/bin/{name}"
    )
    monkeypatch.setattr(a100_train.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").unlink(missing_ok=True)
    if "Python.h" not in missing:
        (tmp_path / "Python.h").touch()
    # None：import flash_attn 报 ImportError，与没有装一样
    monkeypatch.setitem(
        sys.modules, "flash_attn", ModuleType("flash_attn") if "flash_attn" in packages else None
    )


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """chosen(参数……, 机器的样子……)：选出来的设置。"""

    def choose(*argv, **kind):
        machine(monkeypatch, tmp_path, **kind)
        monkeypatch.setattr(sys, "argv", ["a100_train.py", *map(str, argv)])
        s = a100_train.read_settings()
        a100_train.choose_device(s)
        a100_train.choose_speed(s)
        a100_train.choose_packages(s)
        return s

    return choose


@pytest.fixture
def refused(chosen):
    def refuse(*argv, **kind):
        with pytest.raises(SystemExit) as stop:
            chosen(*argv, **kind)
        assert str(stop.value.code).startswith("错误：") and "\n" not in stop.value.code
        return stop.value.code

    return refuse


MUON = a100_train.LEARNING_RATE["muon"]
ADAMW = a100_train.LEARNING_RATE["adamw"]
# 计算能力：(precision, attn, compile)。7.0 V100、7.5 T4、8.0 A100、8.9 4090、9.0 H100
OLD = ("fp16", "sdpa", False)
NEW = ("bf16", "sdpa", True)
CASES = [((7, 0), OLD), ((7, 5), OLD), ((8, 0), NEW), ((8, 9), NEW), ((9, 0), NEW)]


@pytest.mark.parametrize("version", ["2.13.0", "2.10.0+cu128"])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("capability", "expected"), CASES)
def test_each_capability(chosen, capability, expected, flash, version):
    s = chosen(capability=capability, packages=["flash_attn"] * flash, version=version)
    precision, attn, compiled = expected
    if flash and expected == NEW:
        attn = "flash_attention_2"
    if version.startswith("2.10"):
        compiled = False  # 2.10 的 compile 在 A100 上出过 NaN
    assert (s.device, s.optim, s.learning_rate) == ("cuda", "muon", MUON["full"])
    assert (s.precision, s.attn, s.compile) == (precision, attn, compiled)
    assert s.tf32 is False, "矩阵乘已经是 2 字节的，用不上"
    assert s.asked_precision is s.asked_attn is s.asked_compile is None, "要的和用的分开记"


def test_what_was_asked_for_is_kept(chosen):
    s = chosen(
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
    assert s.learning_rate == ADAMW["full"]  # 只用 AdamW 时的默认值
    s = chosen("--precision", "fp32", capability=(8, 0), packages=["flash_attn"])
    assert s.attn == "sdpa"  # flash-attn 只算 2 字节的数
    s = chosen("--compile", capability=(8, 0), version="2.10.1")
    assert s.compile is True  # 明说了就听
    s = chosen("--learning_rate", "0.5", "--optim", "adamw_torch", capability=(8, 0))
    assert s.learning_rate == s.asked_learning_rate == 0.5
    s = chosen("--precision", "auto", "--attn", "auto", capability=(8, 0))
    assert (s.precision, s.attn) == ("bf16", "sdpa")  # 从前的写法也认


def test_tf32_is_for_fp32_only(chosen):
    assert chosen("--precision", "fp32", capability=(8, 0)).tf32 is True
    assert chosen("--precision", "fp32", "--no-tf32", capability=(8, 0)).tf32 is False
    assert chosen("--precision", "fp32", capability=(7, 5)).tf32 is False


@pytest.mark.parametrize("missing", ["g++", "triton", "Python.h"])
def test_without_a_whole_compiler_nothing_is_compiled(chosen, refused, missing):
    """缺一样就不编译：没有 Python.h（Ubuntu 不装 python3-dev）时，triton 在第一步才死。"""
    assert chosen(capability=(8, 0), missing=[missing]).compile is False
    assert "--compile" in refused("--compile", capability=(8, 0), missing=[missing])
    if missing == "triton":  # CPU 上不要它
        assert chosen("--preset", "demo", "--compile", missing=[missing]).compile is True


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_flash_attn_that_cannot_be_imported_is_not_used(chosen, refused, monkeypatch, tmp_path, error):
    """装着的 flash-attn 是为别的 torch 编译的：导入就报错，用自带的；明说要它的，一行说办不到。"""
    package = tmp_path / "packages/flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error.__name__}('undefined symbol')\n", "utf-8")
    monkeypatch.syspath_prepend(package.parent)
    keep = a100_train.flash_attn_imports

    def imports():
        sys.modules.pop("flash_attn", None)  # machine() 放进去的
        return keep()

    monkeypatch.setattr(a100_train, "flash_attn_imports", imports)
    assert chosen(capability=(8, 0), packages=["flash_attn"]).attn == "sdpa"
    assert "--attn" in refused("--attn", "flash_attention_2", capability=(8, 0), packages=["flash_attn"])


def test_cpu(chosen):
    s = chosen("--preset", "demo", packages=["flash_attn"])
    assert (s.device, s.device_name, s.precision, s.attn) == ("cpu", "cpu", "fp32", "sdpa")
    assert (s.compile, s.tf32, s.optim, s.learning_rate) == (False, False, "muon", MUON["demo"])
    s = chosen("--preset", "demo", "--device", "cpu", capability=(8, 0))
    assert (s.device, s.device_name, s.precision, s.tf32) == ("cpu", "cpu", "fp32", False)  # 有显卡也可以不用
    assert chosen("--preset", "demo", "--optim", "adamw_torch").learning_rate == ADAMW["demo"]


def test_mps_is_accepted(chosen, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    s = chosen("--preset", "demo", "--device", "mps")
    assert (s.device, s.precision, s.attn) == ("mps", "fp32", "sdpa")
    assert chosen("--preset", "demo").device == "cpu"


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        (["--device", "cuda"], {}),
        (["--device", "mps"], {}),
        (["--attn", "flash_attention_2"], {}),
        (["--precision", "bf16"], {}),
        (["--precision", "fp16"], {}),
        (["--tf32"], {}),
        (["--compile"], dict(missing=["g++"])),
        (["--optim", "adamw_bnb_8bit"], {}),
        (["--report_to", "wandb"], {}),
        (["--precision", "bf16"], dict(capability=(7, 5))),
        (["--tf32"], dict(capability=(7, 5))),
        (["--tf32"], dict(capability=(8, 0))),
        (["--attn", "flash_attention_2"], dict(capability=(7, 5), packages=["flash_attn"])),
        (["--attn", "flash_attention_2"], dict(capability=(8, 0))),
        (
            ["--attn", "flash_attention_2", "--precision", "fp32"],
            dict(capability=(8, 0), packages=["flash_attn"]),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(sorted(value.items())),
)
def test_what_is_absent_is_refused(refused, monkeypatch, argv, kind):
    """明说了却办不到的：一行，有选项的名字；不悄悄换成别的。"""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = refused("--preset", "demo", *argv, **kind)
    assert argv[0] in message and "办不到" in message


# ==== 微批量 ====


@pytest.mark.parametrize(
    ("card", "preset", "world", "changes", "size"),
    [
        (15.8e9, "full", 1, {}, 16),  # T4
        (42e9, "full", 1, {}, 48),  # A100
        (85e9, "full", 1, {}, 48),  # 至多 48
        (15.8e9, "full", 2, {}, 16),  # Kaggle 的两张 T4
        (42e9, "full", 4, {}, 24),  # 96 块四张卡分，一张 24
        (8.3e9, "full", 1, {}, 8),
        (3e9, "full", 1, {}, 1),
        (42e9, "full", 1, {"n_embd": 1536, "n_layer": 24}, 12),
        (None, "demo", 1, {}, 32),
        (None, "demo", 2, {}, 16),
    ],
)
def test_micro_batch_fits_the_card(monkeypatch, card, preset, world, changes, size):
    """能整除有效批量的、放得下的最大一个；card 是显存，None 是 CPU。"""
    s = defaults(preset)
    for name in changes:
        setattr(s, name, changes[name])
    s.device = "cuda" if card else "cpu"
    s.parameters = (s.vocab_size + s.block_size + 2) * s.n_embd + s.n_layer * (
        12 * s.n_embd**2 + 13 * s.n_embd
    )
    properties = SimpleNamespace(total_memory=card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(a100_train, "WORLD_SIZE", world)
    assert a100_train.choose_batch_size(s) == size
    assert s.effective_batch_size % (size * world) == 0


# ==== TF32 真的关上 ====


@pytest.mark.parametrize(("tf32", "expected"), [(False, "highest"), (True, "high")])
def test_tf32_is_set_after_the_trainer_is_built(work_dir, tmp_path, monkeypatch, tf32, expected):
    """accelerate 见要编译，就自己打开 TF32；--precision fp32 --no-tf32 要真的关上，所以在 Trainer 建好以后设。"""
    s = defaults("demo")
    s.work_dir, s.device, s.device_name = work_dir, "cuda", "NVIDIA A100-SXM4-40GB"
    s.precision, s.attn, s.optim, s.report_to = "fp32", "sdpa", "adamw_torch", "none"
    s.compile, s.tf32, s.total_steps, s.batch_size = True, tf32, 4, 32
    meta = a100_train.read_report(work_dir / "packed", "meta.json")
    s.vocab_size = meta["vocab_size"]
    s.eval_sources = meta["eval_sources"]
    original = a100_train.transformers.Trainer
    before = torch.get_float32_matmul_precision()

    def trainer_on_a_gpu(*args, **kwargs):
        made = original(*args, **kwargs)
        assert made.args.torch_compile
        torch.set_float32_matmul_precision("high" if not tf32 else "highest")  # accelerate 在显卡上做的
        return made

    monkeypatch.setattr(a100_train.transformers, "Trainer", trainer_on_a_gpu)
    try:
        a100_train.build_trainer(s, a100_train.transformers.TrainerCallback())
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


# ==== 显卡的个数 ====

FAKE_TORCH = """
import json, os
names = ["CUDA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"]
print(json.dumps([os.environ.get(name) for name in names]))
raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, ["0", "1", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "1", "1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["", "1", "1"]),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ["0", "1", "1"]),
        ({"WORLD_SIZE": "2", "RANK": "1"}, [None, None, None]),  # torchrun：一样也不动
        ({"WORLD_SIZE": "2", "RANK": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, ["0,1", None, None]),
    ],
)
def test_one_process_sees_one_card_before_torch_is_imported(tmp_path, given, seen):
    """假的 torch、accelerate……一被导入，就打印那几个环境变量，然后退出：那时它们就要设好了。"""
    for name in ("torch", "accelerate", "transformers", "safetensors"):
        (tmp_path / f"{name}.py").write_text(FAKE_TORCH, "utf-8")
    names = ("CUDA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "RANK", "WORLD_SIZE")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import a100_train"
    done = subprocess.run([sys.executable, "-c", code], env=variables | given, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(seen).replace("'", '"').replace(
        "None", "null"
    ), done


@pytest.mark.parametrize(("world", "said"), [(1, True), (2, True), (3, False)])
def test_unused_cards_are_named(tmp_path, monkeypatch, capsys, world, said):
    """机器上三张卡，只用了一两张：给出都用上的那条命令。"""
    for card in range(3):
        (tmp_path / "gpus" / str(card)).mkdir(parents=True)
    path = a100_train.Path
    monkeypatch.setattr(
        a100_train, "Path", lambda p: tmp_path / "gpus" if p == "/proc/driver/nvidia/gpus" else path(p)
    )
    monkeypatch.setattr(a100_train, "WORLD_SIZE", world)
    s = SimpleNamespace(work_dir=tmp_path, parameters=1, snapshots=True, device="cuda")
    a100_train.prepare_process(s, None)
    assert ("torchrun --nproc_per_node=3 a100_train.py" in capsys.readouterr().out) == said


def test_full_training_on_a_cpu_must_be_asked_for(monkeypatch, tmp_path):
    """没有显卡，又没有说明：一行说清有哪几条路；说明了就往下走。"""
    machine(monkeypatch, tmp_path)
    monkeypatch.setattr(a100_train, "newest_checkpoint", lambda _: sys.exit("往下走了"))
    for argv, words in (
        ([], "--preset demo"),
        (["--device", "cpu"], "往下走了"),
        (["--prepare_only"], "往下走了"),
        (["--max_steps", "3"], "往下走了"),
    ):
        monkeypatch.setattr(sys, "argv", ["a100_train.py", *argv])
        with pytest.raises(SystemExit) as stop:
            a100_train.main()
        assert words in stop.value.code, argv
