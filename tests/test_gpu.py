"""只有 CUDA 上才看得出的事；没有显卡就跳过，并说明理由。"""

import argparse
import importlib.util

import pytest
import torch
from conftest import call

import a100_train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 显卡")
SHAPE = dict(vocab_size=512, n_layer=2, n_embd=128, n_head=2, block_size=128)
AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def model_on_gpu(attention="sdpa"):
    return a100_train.build_model(argparse.Namespace(**SHAPE, attn=attention, seed=0)).cuda()


def batch():
    tokens = torch.randint(4, 512, (4, 129), generator=torch.Generator().manual_seed(0)).cuda()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def loss_and_gradient(model, dtype=None):
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        loss = model(**batch())["loss"]
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.float().flatten() for p in model.parameters()])


def close(a, b, tolerance):
    """整个梯度向量的相对误差。"""
    return (a - b).norm() / a.norm() < tolerance


def test_sdpa_equals_eager():
    (loss_a, gradient_a), (loss_b, gradient_b) = map(
        loss_and_gradient, (model_on_gpu("eager"), model_on_gpu("sdpa"))
    )
    assert loss_a == pytest.approx(loss_b, abs=1e-4) and close(gradient_a, gradient_b, 1e-3)


@pytest.mark.skipif(not AMPERE, reason="这张显卡没有 bf16")
def test_sdpa_uses_a_flash_kernel():
    """只许用 FlashAttention 核：多出一个掩码就会报错。"""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        loss_and_gradient(model_on_gpu("sdpa"), torch.bfloat16)


@pytest.mark.skipif(
    not AMPERE or not importlib.util.find_spec("flash_attn"), reason="要 Ampere 以后的显卡和 flash-attn 包"
)
def test_flash_attention_2_equals_eager():
    (loss_a, gradient_a), (loss_b, gradient_b) = (
        loss_and_gradient(model_on_gpu(name), torch.bfloat16) for name in ("eager", "flash_attention_2")
    )
    assert loss_a == pytest.approx(loss_b, abs=0.02) and close(gradient_a, gradient_b, 0.05)


@pytest.mark.skipif(not AMPERE, reason="这张显卡没有 bf16")
def test_bf16_is_close_to_fp32():
    (loss_a, gradient_a), (loss_b, gradient_b) = (
        loss_and_gradient(model_on_gpu(), dtype) for dtype in (None, torch.bfloat16)
    )
    assert loss_a == pytest.approx(loss_b, abs=0.02) and close(gradient_a, gradient_b, 0.05)


@pytest.mark.skipif(not AMPERE, reason="这张显卡没有 bf16")
def test_orthogonalize_on_the_gpu():
    matrix = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = a100_train.orthogonalize(matrix.cuda()).cpu()
    expected = a100_train.orthogonalize(matrix)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="没有 triton，torch.compile 用不了")
def test_compile_equals_eager_mode():
    loss_a, gradient_a = loss_and_gradient(model_on_gpu())
    model = model_on_gpu()
    loss = torch.compile(model)(**batch())["loss"]
    loss.backward()
    assert loss_a == pytest.approx(float(loss.detach()), abs=1e-3)
    assert close(gradient_a, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-2)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="没有装 bitsandbytes")
def test_training_with_the_default_speed_settings(copied):
    """显卡上的默认组合（8 位 AdamW、bf16、compile）从命令行跑几步，存出模型。"""
    call(
        a100_train,
        "--work_dir",
        copied,
        "--n_layer",
        2,
        "--n_embd",
        128,
        "--n_head",
        2,
        "--block_size",
        64,
        "--batch_size",
        4,
        "--effective_batch_size",
        8,
        "--max_steps",
        4,
        "--eval_steps",
        2,
        "--logging_steps",
        1,
        "--optim",
        "adamw_bnb_8bit",
    )
    assert (copied / "final_model/model.safetensors").exists()
