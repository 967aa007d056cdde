"""让训练好的模型续写：一边生成一边显示。

读工作目录（或其中的 final_model/，或 Hub 上的 名字/仓库）。标准输出只有提示词和续写，其余都在标准错误。

    python generate.py "中国的历史"                      # 训练好的模型
    python generate.py "中国的历史" --snapshot 500       # 训练到第 500 步时的模型
    python generate.py "中国的历史" --compare            # 同样的开头和种子，每个快照各写一段
    python generate.py "中国的历史" --temperature 0      # 每步都取最可能的词块（greedy）
"""

import argparse
import codecs
import json
import os
import sys
import time
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers.generation.streamers import BaseStreamer

WORK_DIR = "/root/autodl-tmp/gpt2-chinese" if os.path.isdir("/root/autodl-tmp") else "gpt2-chinese"


# ==== 1. 设置 ====

SETTINGS = (  # 名字，默认，最小，最大，说明
    ("temperature", 0.8, 0, 100, "越高越敢选少见的词块，0 是每步取最可能的"),
    ("top_k", 50, 0, 10**6, "只在最可能的几个词块里抽，0 是不限"),
    ("top_p", 0.9, 0.01, 1, "只在累计概率到这么多的词块里抽，1 是不限"),
    ("repetition_penalty", 1.1, 0.1, 10, "出现过的词块不那么可能再出现，1 是不罚"),
    ("max_new_tokens", 200, 1, 10**6, "最多写多少个词块；写到上下文的末尾也停"),
    ("seed", 42, 0, 2**63 - 1, "同样的种子，同样的续写"),
)


def parse_args():
    parser = argparse.ArgumentParser(description="让训练好的模型续写", allow_abbrev=False)
    parser.add_argument("prompt", help="开头")
    parser.add_argument("--model", default=WORK_DIR, help="文件夹，或 Hub 上的 名字/仓库；默认 %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--snapshot", type=int, metavar="步", help="用训练到这一步的快照")
    which.add_argument("--compare", action="store_true", help="每个快照各写一段")
    for name, default, _, _, text in SETTINGS:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text}；默认 {default}")
    args = parser.parse_args()
    for name, _, low, high, _ in SETTINGS:
        if not low <= getattr(args, name) <= high:
            sys.exit(f"错误：--{name} 是 {getattr(args, name)}；要在 {low} 到 {high} 之间")
    args.prompt = args.prompt.encode("utf-8", "replace").decode()      # 终端送来的坏字节变成问号
    if not args.prompt.strip():
        sys.exit('错误：提示词是空的；给一个开头，例如 python generate.py "中国的历史"')
    return args


# ==== 2. 模型和续写 ====

def find_folders(args):
    """返回 (分词器文件夹，要用的模型文件夹的列表)。还没训练完、没有最终模型时，用最新的快照。"""
    root = Path(args.model).resolve()
    if not root.is_dir():
        wanted = f"snapshots/step-{'*' if args.compare else args.snapshot}/*"
        try:
            root = Path(snapshot_download(args.model, allow_patterns=["*.json", "model.safetensors", wanted]))
        except (OSError, ValueError) as error:
            sys.exit(f"错误：没有文件夹 {args.model}，Hub 上也取不到（{str(error).split(chr(10))[0]}）；先训练，或检查名字")
    model = root / "final_model" if (root / "final_model").is_dir() else root
    home = root if (root / "snapshots").is_dir() else root.parent
    steps = {int(folder.name[5:]): folder for folder in home.glob("snapshots/step-*[0-9]")}
    chosen = [steps[step] for step in sorted(steps) if args.snapshot in (None, step)]
    if args.snapshot is None and not args.compare:
        chosen = [model] if (model / "model.safetensors").exists() else chosen[-1:]
    if not chosen:
        found = f"只有第 {'、'.join(map(str, sorted(steps)))} 步的快照" if steps else "也没有快照"
        sys.exit(f"错误：{args.model} 里没有要用的模型，{found}；先训练，或换一个 --model")
    return model if (model / "tokenizer.json").exists() else root / "tokenizer", chosen


def load(folder, tokenizer_folder):
    """返回 (模型，分词器)。模型用 fp32：快照存成 bf16 是为了省地方，多数 CPU 算 bf16 慢得多。"""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        sys.exit(f"错误：{folder} 读不出来（{str(error).split(chr(10))[0]}）；可能没写完，换一个")
    if (folder / "snapshot.json").exists():
        note = json.loads((folder / "snapshot.json").read_text(encoding="utf-8"))
        print("[第 {step} 步；第 {eval_step} 步的验证损失 {eval_loss}]".format(**note), file=sys.stderr)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


class Printer(BaseStreamer):
    """收到一个词块就显示。生僻字由几个字节词块（如 <0xE4>）拼成：凑齐才显示；拼不成字的不显示，只计数。"""

    def __init__(self, tokenizer, prompt_length):
        self.tokenizer, self.waiting, self.tokens, self.broken = tokenizer, prompt_length, 0, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, ids):
        for token in ids.flatten().tolist()[self.waiting:]:            # generate() 先交来提示词
            piece = self.tokenizer.convert_ids_to_tokens(token)
            text = self.tokenizer.decode([token], skip_special_tokens=True)
            self.show(self.decoder.decode(bytes.fromhex(piece[3:5]) if piece[:3] == "<0x" else text.encode()))
            self.tokens += 1
        self.waiting = 0

    def end(self):
        self.show(self.decoder.decode(b"", final=True) + "\n")

    def show(self, text):
        self.broken += text.count("\ufffd")
        print(text.replace("\ufffd", ""), end="", flush=True)


def write(model, tokenizer, args):
    """显示提示词和续写，再在标准错误里说写了多少、多快。"""
    ids = tokenizer(args.prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    length, context = ids["input_ids"].size(1), model.config.max_position_embeddings
    if length >= context:
        sys.exit(f"错误：提示词有 {length} 个词块，模型的上下文只有 {context}；缩短提示词")
    torch.manual_seed(args.seed)
    printer, start = Printer(tokenizer, length), time.perf_counter()
    print(args.prompt, end="", flush=True)
    model.generate(**ids, streamer=printer, max_new_tokens=min(args.max_new_tokens, context - length),
                   use_cache=True, do_sample=True, temperature=max(args.temperature, 0.01), top_p=args.top_p,
                   top_k=args.top_k if args.temperature else 1,        # 只在一个里抽，就是取最可能的
                   repetition_penalty=args.repetition_penalty, pad_token_id=tokenizer.pad_token_id)
    speed = printer.tokens / (time.perf_counter() - start)
    broken = f"，{printer.broken} 处字节拼不成字，没有显示" if printer.broken else ""
    print(f"[{printer.tokens} 个词块，每秒 {speed:.1f} 个，种子 {args.seed}，"
          f"上下文用了 {length + printer.tokens}/{context}{broken}]", file=sys.stderr)


def main():
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")         # 中文 Windows 的管道默认是 GBK
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokenizer_folder, folders = find_folders(args)
    for folder in folders:
        write(*load(folder, tokenizer_folder), args)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):                       # | head 不读了，或 Ctrl-C：安静地结束
        os._exit(130)
