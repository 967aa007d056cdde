#!/usr/bin/env python3
"""运行 a100_train.py，但先打上几处“补丁”：只为测量而设、使用者用不着的开关，不值得写进训练脚本。

    python benchmarks/patched_train.py --patch args.adam_beta2=0.999 --patch forward=transformers -- \\
        --preset demo --work_dir try

不给 --patch，就和直接运行 a100_train.py 是同一个 main()。`--` 后面是 a100_train.py 自己的参数。补丁有：
    args.名=值     改 TrainingArguments 的一项，如 args.torch_compile_mode=reduce-overhead
    config.名=值   改 GPT2Config 的一项，如 config.activation_function=gelu_new
    其余见 PATCHES，每个函数的说明就是它做的事
--report 文件：结束时写下峰值内存等，JSON。
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import a100_train  # noqa: E402

PLAIN_FORWARD = a100_train.GPT2LMHeadModel.forward


def override(name, changes):
    """把 a100_train.<name>（一个类或函数）换成先改几个关键字参数再调用的版本。"""
    original = getattr(a100_train, name)
    setattr(a100_train, name, lambda *args, **kwargs: original(*args, **(kwargs | changes)))


def document_positions(input_ids):
    """每篇文档从 0 数起的位置，形状 (B, T)。</s> 是下一篇的开头：它后面的那个词由它预测。"""
    index = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
    return index - torch.where(input_ids == a100_train.EOS, index, 0).cummax(dim=1).values


# 下面几个补丁改的都是训练时的 forward，可以叠加
FORWARD = {"inputs": None, "z_loss": 0.0, "original": False}


def patched_forward(self, input_ids=None, labels=None, **kwargs):
    if labels is None:
        return PLAIN_FORWARD(self, input_ids=input_ids, **kwargs)
    extra = FORWARD["inputs"](input_ids) if FORWARD["inputs"] else {}
    if FORWARD["original"]:
        # 原版在内部错位，这里的 labels 已经错开了：shift_labels 是它留给这种情况的参数
        return transformers.GPT2LMHeadModel.forward(self, input_ids, labels=labels, shift_labels=labels,
                                                    use_cache=False, **extra)
    logits = self.lm_head(self.transformer(input_ids, use_cache=False, **extra).last_hidden_state)
    logits = logits.flatten(0, 1)
    loss = a100_train.cross_entropy(logits, labels.flatten())
    if self.training and FORWARD["z_loss"]:
        loss = loss + FORWARD["z_loss"] * logits.float().logsumexp(-1).square().mean()
    return {"loss": loss}


def change_forward(**changes):
    FORWARD.update(changes)
    a100_train.GPT2LMHeadModel.forward = patched_forward


def forward_transformers(_):
    """transformers 原版的 forward：算损失，也把 fp32 的 logits 一起交出来（公开参考就是这样）。"""
    change_forward(original=True)


def attention_padding_mask(_):
    """带 padding 的 collator 会附上一个全 1 的 attention_mask；原样传给注意力（eager、sdpa、FA2 都行）。"""
    original = a100_train.GPT2Config

    def config(**kwargs):          # sdpa_causal 不看掩码，换回会看的那个
        name = kwargs["attn_implementation"]
        return original(**kwargs | {"attn_implementation": "sdpa" if name == "sdpa_causal" else name})
    a100_train.GPT2Config = config
    change_forward(inputs=lambda ids: {"attention_mask": torch.ones_like(ids)})


def attention_documents(_):
    """一块里的几篇文档互相看不见，位置各从 0 数起（验证时也这样）。"""
    override("GPT2Config", {"attn_implementation": "sdpa"})
    change_forward(inputs=lambda ids: {"position_ids": document_positions(ids)})


def z_loss(value):
    """损失里加上 系数 × logsumexp(logits)²（PaLM 用 1e-4），不让 logits 整体漂走；验证时不加。"""
    change_forward(z_loss=float(value))


def vocab_extra(value):
    """词表多出几行用不到的：一个整数，或 pad64（补到 64 的倍数，矩阵乘的形状更整齐）。"""
    original = a100_train.build_model

    def build_model(size, *args):
        return original(size + (-size % 64 if value == "pad64" else int(value)), *args)
    a100_train.build_model = build_model


def embedding_lr(value):
    """Muon 时，词向量和位置向量的学习率乘上这么多倍；LayerNorm 和偏置不变。"""
    original = a100_train.muon_groups

    def groups(*args):
        result = original(*args)
        result[0]["lr"] *= float(value)
        return result
    a100_train.muon_groups = groups


def liger(value):
    """只要 Liger 的一半（配合 --liger）：layernorm 或 loss（输出层与交叉熵融合）。"""
    original = a100_train.build_model

    def build_model(*args):
        if value == "layernorm":
            model = original(*args)
            model.liger = False
            return model
        model = original(*args[:-2], False, args[-1])
        model.liger = args[-2]
        return model
    a100_train.build_model = build_model


def extras(_):
    """不续写、不画图：搜索时只要损失，省下每次验证的几秒钟。"""
    a100_train.generate_samples = lambda *_: [("", "")]
    a100_train.plot_curve = lambda *_: None


PATCHES = {"forward=transformers": forward_transformers, "attention=padding_mask": attention_padding_mask,
           "attention=documents": attention_documents, "z_loss": z_loss, "vocab_extra": vocab_extra,
           "embedding_lr": embedding_lr, "liger": liger, "extras=off": extras}


def parse_value(text):
    """补丁的值：能当 JSON 读就按 JSON（数、true、字典），否则是字符串。"""
    try:
        return json.loads(text)
    except ValueError:
        return text


def apply_patches(patches):
    """打上全部补丁；同一类的 args.、config. 合成一次。不认识的直接报错。"""
    changes = {"args": {}, "config": {}}
    for patch in patches:
        key, _, value = patch.partition("=")
        kind, _, name = key.partition(".")
        if name and kind in changes:
            changes[kind][name] = parse_value(value)
        elif patch in PATCHES or key in PATCHES:
            PATCHES.get(patch, PATCHES.get(key))(value)
        else:
            sys.exit(f"错误：没有补丁 {patch}；可用 args.名=值、config.名=值、{'、'.join(PATCHES)}")
    for name, change in (("TrainingArguments", changes["args"]), ("GPT2Config", changes["config"])):
        if change:
            override(name, change)


def write_report(path):
    """峰值内存：显卡上是 torch 分配过的最大值；CPU 上是整个进程的峰值常驻内存（RSS，含 Python 和库）。"""
    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    memory = torch.cuda.max_memory_allocated() if cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    report = {"peak_memory_bytes": memory, "memory_kind": "cuda" if cuda else "rss"}
    path.write_text(json.dumps(report), "utf-8")


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", action="append", default=[], metavar="名=值", help="可以重复")
    parser.add_argument("--report", type=Path, help="把峰值内存写到这个文件")
    args = parser.parse_args(sys.argv[1:split])
    apply_patches(args.patch)
    sys.argv = [str(ROOT / "a100_train.py"), *sys.argv[split + 1:]]
    try:
        a100_train.run(a100_train.main)
    finally:
        if args.report:
            write_report(args.report)


if __name__ == "__main__":
    main()
