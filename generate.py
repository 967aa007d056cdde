"""让训练好的模型续写：一边生成一边显示。

读工作目录（或其中的 final_model/，或 Hub 上的 名字/仓库）。标准输出只有提示词和续写，其余都在标准错误。

    python generate.py "中国的历史"                      # 训练好的模型
    python generate.py "中国的历史" --snapshot 500       # 训练到第 500 步时的模型
    python generate.py "中国的历史" --compare            # 同样的开头和种子，每个快照各写一段
    python generate.py "中国的历史" --temperature 0      # 每步都取最可能的词块（greedy）
    python generate.py --heads 春夏秋冬                  # 藏头诗：给定各句的第一个字（用写诗的模型，--preset poem）
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import httpx
import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

# ==== 1. 设置 ====

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"

SETTINGS = (  # 名字，默认，最小，最大，说明
    ("temperature", 0.8, 0, 100, "越高越敢选少见的词块，0 是每步取最可能的"),
    ("top_k", 50, 0, 1_000_000, "只在最可能的几个词块里抽，0 是不限"),
    ("top_p", 0.9, 0.01, 1, "只在累计概率到这么多的词块里抽，1 是不限"),
    ("repetition_penalty", 1.1, 0.1, 10, "出现过的词块不那么可能再出现，1 是不罚"),
    ("max_new_tokens", 200, 1, 1_000_000, "最多写多少个词块；写到上下文的末尾也停"),
    ("seed", 42, 0, 2**63, "同样的种子，同样的续写"),
)


def parse_arguments():
    parser = argparse.ArgumentParser(description="让训练好的模型续写", allow_abbrev=False)
    parser.add_argument("prompt", nargs="?", default="", help="开头；有 --heads 时是题目，可以不写")
    parser.add_argument("--model", default=str(HOME), help="文件夹，或 Hub 上的 名字/仓库；默认 %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--snapshot", type=int, metavar="步", help="用训练到这一步的快照")
    which.add_argument("--compare", action="store_true", help="每个快照各写一段")
    parser.add_argument("--heads", metavar="字", help="藏头诗：各句的第一个字，例如 春夏秋冬")
    for name, default, _, _, text in SETTINGS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text}；默认 {default}")
    args = parser.parse_args()
    for name, _, low, high, _ in SETTINGS:
        value = getattr(args, name)
        if not low <= value <= high:
            sys.exit(f"错误：--{name} 是 {value}；要在 {low} 到 {high} 之间")
    return args


def choose_prompt(args):
    """模型要接着写的开头。写藏头诗时是题目；没有题目，就拿那几个字当题目。"""
    prompt = args.prompt.encode("utf-8", "replace").decode()  # 终端送来的坏字节变成问号
    if args.heads is None:
        if not prompt.strip():
            sys.exit('错误：提示词是空的；给一个开头，例如 python generate.py "中国的历史"')
        return prompt
    if not re.fullmatch(r"[〇\u3400-\u9fff\U00020000-\U0003ffff]+", args.heads):
        sys.exit(f"错误：--heads 是 {args.heads!r}；只能是汉字，至少一个，例如 --heads 春夏秋冬")
    return prompt.strip() or args.heads


# ==== 2. 找到模型 ====


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def find_root(args):
    """模型所在的文件夹；本机没有，就从 Hub 下载用得到的文件。"""
    root = Path(args.model)
    if root.is_dir():
        return root.resolve()
    wanted = ["*.json", "model.safetensors"]
    if args.compare:
        wanted.append("snapshots/*")
    if args.snapshot is not None:
        wanted.append(f"snapshots/step-{args.snapshot}/*")
    try:
        return Path(snapshot_download(args.model, allow_patterns=wanted))
    except (OSError, ValueError, ImportError, httpx.HTTPError) as error:  # 后两种：代理用不了，网络断了
        reason = str(error).partition("\n")[0]
        sys.exit(f"错误：没有文件夹 {args.model}，Hub 上也取不到（{reason}）；先训练，或检查名字、网络和代理")


def find_models(args, root):
    """返回（分词器的文件夹，要用的模型的文件夹的列表）。还没训练完、没有最终模型时，用最新的快照。"""
    final = root
    if (root / "final_model").is_dir():
        final = root / "final_model"
    tokenizer = final
    if not (final / "tokenizer.json").exists():
        tokenizer = root / "tokenizer"
    # 快照在 root 里；给的是工作目录里的 final_model/ 时，在上一层
    home = root if (root / "snapshots").is_dir() else root.parent
    snapshots = {int(folder.name[5:]): folder for folder in home.glob("snapshots/step-*[0-9]")}
    chosen = [snapshots[step] for step in sorted(snapshots) if args.snapshot in (None, step)]
    if args.snapshot is None and not args.compare:
        chosen = chosen[-1:]
        if (final / "model.safetensors").exists():
            chosen = [final]
    if not chosen:
        steps = "、".join(map(str, sorted(snapshots))) or "没有"
        sys.exit(f"错误：{args.model} 里没有要用的模型（有快照的步：{steps}）；先训练，或换一个 --model")
    return tokenizer, chosen


def is_poem_model(folder):
    """训练的设置 config.json 里 preset 是 poem。它在模型旁边，或在上一两层的工作目录里。"""
    places = [folder, *folder.parents[:2]]
    return any(read_json(place / "config.json").get("preset") == "poem" for place in places)


def load(folder, tokenizer_folder):
    """返回（模型，分词器）。模型用 fp32：快照存成 bf16 是为了省地方，多数 CPU 算 bf16 慢得多。"""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"错误：{folder} 读不出来（{reason}）；可能没写完，换一个")
    note = read_json(folder / "snapshot.json")
    if note:
        print("[第 {step} 步；第 {eval_step} 步的验证损失 {eval_loss}]".format(**note), file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer


# ==== 3. 续写 ====


class Printer(transformers.TextStreamer):
    """收到词块就显示。生僻字由几个字节词块（如 <0xE4>）拼成，凑齐才显示；拼不成字的（U+FFFD）不显示。"""

    broken = False

    def on_finalized_text(self, text, stream_end=False):
        if "\ufffd" in text:
            self.broken = True
        print(text.replace("\ufffd", ""), end="", flush=True)


def continue_text(model, ids, printer, args, max_new_tokens, **more):
    """接着 ids（1 × 词块数）写，返回连同新写的。"""
    top_k = args.top_k
    if args.temperature == 0:
        top_k = 1  # 只在一个里抽，就是取最可能的
    return model.generate(
        ids,
        streamer=printer,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=max(args.temperature, 0.01),
        top_k=top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        use_cache=True,
        pad_token_id=printer.tokenizer.pad_token_id,
        **more,
    )


def share_room(tokenizer, heads, room):
    """藏头诗的每一句至多写多少个词块：去掉给定的字和换行，余下的平分。"""
    given = tokenizer("\n".join(heads))["input_ids"]
    share = (room - len(given)) // len(heads)
    if share < 8:  # 七言的一句，连标点
        sys.exit(f"错误：--heads 的字太多，只能写 {room} 个词块；少给几个，缩短题目，或加大 --max_new_tokens")
    return share


def write_acrostic(model, ids, printer, args, share):
    """藏头诗：每一句先写上给定的字，再由模型写到句末的标点。词表里没有的字，写的是它的几个字节。"""
    tokenizer = printer.tokenizer
    never = [tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]]  # 诗没写完，不许结束；换行由下面来定
    full_stops = tokenizer.convert_tokens_to_ids(["。", "！", "？"])
    ends = full_stops + tokenizer.convert_tokens_to_ids(["，", "；"])
    for i, head in enumerate(args.heads):
        start = head
        if i % 2 == 0:
            start = "\n" + head  # 训练用的诗是两句一行；显示出来一句一行，看得清
        if i + 1 == len(args.heads):
            ends = full_stops  # 最后写到句号：字是奇数个时多一句，凑成一联
        print("\n" + head, end="", flush=True)
        start_ids = tokenizer(start, return_tensors="pt")["input_ids"].to(ids.device)
        ids = torch.cat([ids, start_ids], dim=1)
        ids = continue_text(model, ids, printer, args, share, eos_token_id=ends, suppress_tokens=never)
    return ids


def write(model, tokenizer, prompt, args):
    """显示提示词和续写，再在标准错误里说写了多少、多快。"""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    length = ids.size(1)
    context = model.config.max_position_embeddings
    if length >= context:
        sys.exit(f"错误：提示词有 {length} 个词块，模型的上下文只有 {context}；缩短提示词")
    room = min(args.max_new_tokens, context - length)
    if args.heads:
        room = share_room(tokenizer, args.heads, room)
    torch.manual_seed(args.seed)
    printer = Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    print(prompt, end="", flush=True)
    if args.heads:
        ids = write_acrostic(model, ids, printer, args, room)
    else:
        ids = continue_text(model, ids, printer, args, room)
    print()
    used = ids.size(1)
    speed = (used - length) / (time.perf_counter() - start)
    note = f"{used - length} 个词块，每秒 {speed:.1f} 个，种子 {args.seed}，上下文用了 {used}/{context}"
    if printer.broken:
        note += "，有的字节拼不成字，没有显示"
    print(f"[{note}]", file=sys.stderr)


# ==== 4. 主程序 ====


def main():
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # 中文 Windows 的管道默认是 GBK
    args = parse_arguments()
    prompt = choose_prompt(args)
    transformers.utils.logging.disable_progress_bar()
    tokenizer_folder, folders = find_models(args, find_root(args))
    if args.heads and not is_poem_model(folders[0]):
        print("注意：没有找到 preset 是 poem 的 config.json，多半不是写诗的模型；照样写", file=sys.stderr)
    for folder in folders:
        model, tokenizer = load(folder, tokenizer_folder)
        write(model, tokenizer, prompt, args)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):  # | head 不读了，或 Ctrl-C：安静地结束
        os._exit(130)
    except OSError as error:
        sys.exit(f"错误：读写失败（{error}）；检查路径和权限")
