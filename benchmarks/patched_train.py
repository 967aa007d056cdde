#!/usr/bin/env python3
"""运行 a100_train.py，但先打上几处“补丁”：只为测量而设、使用者用不着的开关，不值得写进训练脚本。

    python benchmarks/patched_train.py --patch 'BETAS=[0.9,0.999]' --patch forward=transformers -- \\
        --preset demo --work_dir try

不给 --patch，就和直接运行 a100_train.py 是同一个 main()。`--` 后面是 a100_train.py 自己的参数。补丁有：
    大写名=值      改 a100_train.py 的一个常数，如 WARMUP=0.17、WEIGHT_DECAY=0
    args.名=值     改 TrainingArguments 的一项，如 args.torch_compile_mode=reduce-overhead
    config.名=值   改 GPT2Config 的一项，如 config.activation_function=gelu_new
    其余见 PATCHES，每个函数的说明就是它做的事
--report 文件：结束时写下峰值内存，JSON。
"""

import argparse
import json
import math
import resource
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import a100_train  # noqa: E402


def override(name, changes):
    """把 transformers.<name>（一个类）换成先改几个关键字参数再调用的版本。"""
    # transformers 导入途中会换掉 sys.modules 里的自己，所以要改 a100_train.py 手里的那一个
    library = a100_train.transformers
    original = getattr(library, name)
    setattr(library, name, lambda *args, **kwargs: original(*args, **(kwargs | changes)))


def after_build(change):
    """模型建好以后，先交给 change 改一改。"""
    original = a100_train.build_model

    def build_model(s):
        model = original(s)
        change(model)
        return model

    a100_train.build_model = build_model


def schedule_cosine(_):
    """学习率：预热后按余弦降到 0（公开参考就是这样），而不是线性。"""

    def cosine(step, total_steps):
        warmup_steps = round(a100_train.WARMUP * total_steps)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        rising = (step + 1) / max(1, warmup_steps)
        if step < warmup_steps:
            return rising
        return (1 + math.cos(math.pi * progress)) / 2

    a100_train.learning_rate_scale = cosine


def forward_transformers(_):
    """transformers 原版的 forward：算损失，也把 fp32 的 logits 一起交出来（公开参考就是这样）。"""
    original = transformers.GPT2LMHeadModel.forward

    def forward(self, input_ids=None, labels=None, **kwargs):
        if labels is not None:
            # 原版在内部错位，这里的 labels 已经错开了：shift_labels 是它留给这种情况的参数
            kwargs |= {"labels": labels, "shift_labels": labels, "use_cache": False}
        return original(self, input_ids, **kwargs)

    a100_train.GPT2LMHeadModel.forward = forward
    after_build(lambda model: setattr(model, "loss_type", "ForCausalLM"))  # 否则损失小 1/T，还有一条警告


def attention_padding_mask(_):
    """带 padding 的 collator 会附上一个全 1 的 attention_mask；原样传给注意力（eager、sdpa、FA2 都行）。"""
    original = transformers.GPT2Model.forward

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return original(self, input_ids, attention_mask=mask, **kwargs)

    def see_masks(model):
        if model.config._attn_implementation == "sdpa_causal":  # 它不看掩码，换回会看的那个
            model.set_attn_implementation("sdpa")

    transformers.GPT2Model.forward = forward
    after_build(see_masks)


def vocab_extra(value):
    """词表多出几行用不到的。"""
    original = a100_train.build_model
    a100_train.build_model = lambda s: original(
        argparse.Namespace(**vars(s) | {"vocab_size": s.vocab_size + int(value)})
    )


def layernorm_liger(_):
    """LayerNorm 换成 Liger 的融合核；要显卡。"""
    from liger_kernel.transformers.monkey_patch import _patch_layer_norm_module

    def change(model):
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                _patch_layer_norm_module(module)

    after_build(change)


def positions_off(_):
    """没有位置向量：全是 0，也不训练。"""

    def change(model):
        model.transformer.wpe.weight.requires_grad_(False).zero_()

    after_build(change)


def vectors_rate(value):
    """偏置和 LayerNorm 的学习率是词向量的几倍。"""
    original = a100_train.parameter_groups

    def parameter_groups(*args):
        groups = original(*args)
        for group in groups:
            if all(p.ndim < 2 for p in group["params"]):
                group["lr"] *= float(value)
        return groups

    a100_train.parameter_groups = parameter_groups


def blocks_tenth(_):
    """只用前十分之一的块，读十遍，每遍重新打乱；步数不变。"""

    class Tenth(a100_train.BlockStream):
        def __getitem__(self, index):
            size = max(1, len(self) // 10)
            epoch, place = divmod(index, size)
            order = torch.randperm(size, generator=torch.Generator().manual_seed(epoch))
            return super().__getitem__(int(order[place]))

    a100_train.BlockStream = Tenth


def extras_off(_):
    """不续写、不存盘、不画图：只要速度和损失。"""
    override("TrainingArguments", {"save_strategy": "no"})
    a100_train.generate_samples = lambda *_: {"": ""}
    a100_train.save_final_model = lambda *_: None


PATCHES = {
    "schedule=cosine": schedule_cosine,
    "forward=transformers": forward_transformers,
    "attention=padding_mask": attention_padding_mask,
    "vocab_extra": vocab_extra,
    "layernorm=liger": layernorm_liger,
    "positions=off": positions_off,
    "blocks=tenth": blocks_tenth,
    "vectors": vectors_rate,
    "extras=off": extras_off,
}


def parse_value(text):
    """补丁的值：能当 JSON 读就按 JSON（数、true、列表），否则是字符串。"""
    try:
        return json.loads(text)
    except ValueError:
        return text


def apply_patches(patches):
    """打上全部补丁；不认识的直接报错。"""
    classes = {"args": "TrainingArguments", "config": "GPT2Config"}
    for patch in patches:
        key, _, value = patch.partition("=")
        kind, _, name = key.partition(".")
        if name and kind in classes:
            override(classes[kind], {name: parse_value(value)})
        elif key.isupper() and hasattr(a100_train, key):
            setattr(a100_train, key, parse_value(value))
        elif patch in PATCHES:
            PATCHES[patch](value)
        elif key in PATCHES:
            PATCHES[key](value)
        else:
            sys.exit(
                f"错误：没有补丁 {patch}；可用 大写常数=值、args.名=值、config.名=值、{'、'.join(PATCHES)}"
            )


def write_report(path):
    """峰值内存：显卡上是 torch 分配过的最大值；CPU 上是整个进程的峰值常驻内存（RSS，含 Python 和库）。"""
    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    if cuda:
        report = {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "memory_kind": "cuda"}
    else:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report = {"peak_memory_bytes": kilobytes * 1024, "memory_kind": "rss"}
    path.write_text(json.dumps(report), "utf-8")


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", action="append", default=[], metavar="名=值", help="可以重复")
    parser.add_argument("--report", type=Path, help="把峰值内存写到这个文件")
    args = parser.parse_args(sys.argv[1:split])
    apply_patches(args.patch)
    sys.argv = [str(ROOT / "a100_train.py"), *sys.argv[split + 1 :]]
    try:
        a100_train.run(a100_train.main)
    finally:
        if args.report:
            write_report(args.report)


if __name__ == "__main__":
    main()
