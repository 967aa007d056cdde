"""模型爱重复吗：greedy、采样、重复惩罚各写一批，数重复的词块。

    python benchmarks/repetition.py --work_dir gpt2-chinese          # 写 results/repetition.md、results/repetition.json

开头是验证集各篇的前 8 个词块，续写到上下文写满；不许提前结束，各种设置才一样长。两个数都是一篇之内数、各篇平均：
distinct-2 是不同的相邻两个词块占几成（Li 等，2016），越低越重复；重复的 4 连是再次出现的连续四个词块占几成
（seq-rep-4，Welleck 等，2020），越高越重复。
同样位置的真实文本是对照：比它还不重复，也不像人写的。
"""

import argparse
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from common import ROOT, provenance, read_lines, write_atomic
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT_TOKENS = 8
SEEDS = (1, 2, 3)
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
SETTINGS = {
    "greedy（每步取最可能的）": GREEDY,
    "greedy，重复惩罚 1.1": GREEDY | {"repetition_penalty": 1.1},
    "greedy，重复惩罚 1.3": GREEDY | {"repetition_penalty": 1.3},
    "采样": SAMPLING,
    "采样，重复惩罚 1.1（generate.py 的默认）": SAMPLING | {"repetition_penalty": 1.1},
    "采样，重复惩罚 1.3": SAMPLING | {"repetition_penalty": 1.3},
}


def ngrams(tokens, n):
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_2(tokens):
    pairs = ngrams(tokens, 2)
    return len(set(pairs)) / len(pairs)


def repeated_4(tokens):
    fours = ngrams(tokens, 4)
    return 1 - len(set(fours)) / len(fours)


def figures(texts):
    """一批续写（词块编号的列表）的两个数，各篇平均；短于 4 个词块的不算。"""
    texts = [tokens for tokens in texts if len(tokens) >= 4]
    if not texts:
        return {"distinct_2": None, "repeated_4": None}
    return {
        "distinct_2": round(sum(map(distinct_2, texts)) / len(texts), 4),
        "repeated_4": round(sum(map(repeated_4, texts)) / len(texts), 4),
    }


def held_out_documents(work_dir, tokenizer, context, limit):
    """验证集里够长的文档的前 context 个词块，一篇一行。"""
    texts = [
        text
        for path in sorted((work_dir / "corpus").glob("eval-*.parquet"))
        for text in pq.read_table(path, columns=["text"]).column("text").to_pylist()
    ]
    ids = (tokenizer.encode(text, add_special_tokens=False)[:context] for text in texts)
    return torch.tensor([tokens for tokens in ids if len(tokens) == context][:limit])


def write(model, prompts, settings, seed):
    torch.manual_seed(seed)
    length = model.config.n_positions - PROMPT_TOKENS
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=0,
        use_cache=True,
        **settings,
    )
    return output[:, PROMPT_TOKENS:].tolist()


def measure(model, documents):
    """[{设置，种子，两个数}]，真实文本在最前。greedy 没有随机，一个种子就够。"""
    rows = [{"setting": "真实文本", "seed": None} | figures(documents[:, PROMPT_TOKENS:].tolist())]
    for name, settings in SETTINGS.items():
        for seed in SEEDS if settings["do_sample"] else SEEDS[:1]:
            texts = write(model, documents[:, :PROMPT_TOKENS], settings, seed)
            rows.append({"setting": name, "seed": seed} | figures(texts))
            print(rows[-1], flush=True)
    return rows


def training_samples(work_dir, tokenizer):
    """训练途中的续写（samples.jsonl）里同样的两个数，按步数。"""
    steps = {}
    for row in read_lines(work_dir / "samples.jsonl"):
        text = row["text"].removeprefix(row["prompt"])
        steps.setdefault(row["step"], []).append(tokenizer.encode(text, add_special_tokens=False))
    return [{"step": step, "samples": len(texts)} | figures(texts) for step, texts in steps.items()]


def span(rows, key):
    """一个设置的几个种子：平均（最低到最高）。"""
    values = [row[key] for row in rows]
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean}（{min(values):.3f}–{max(values):.3f}）"


def report(result):
    lines = [
        "# 重复",
        "",
        f"日期 {result['date']}。机器：{result['machine']}。{result['versions']}。",
        "",
        f"    {result['command']}",
        "",
        f"模型 {result['parameters']:,} 参数，上下文 {result['context']}；{result['documents']} 篇，"
        f"每篇给 {PROMPT_TOKENS} 个词块，续写 {result['context'] - PROMPT_TOKENS} 个。采样是温度 0.8、top_k 50、"
        "top_p 0.9，三个种子的平均（最低到最高）。",
        "",
        "| 设置 | distinct-2（低：重复） | 重复的 4 连（高：重复） |",
        "|---|---:|---:|",
    ]
    for name in dict.fromkeys(row["setting"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["setting"] == name]
        lines.append(f"| {name} | {span(rows, 'distinct_2')} | {span(rows, 'repeated_4')} |")
    lines += [
        "",
        "训练途中的续写（`samples.jsonl`，每次五条，只看大概）：",
        "",
        "| 步 | distinct-2 | 重复的 4 连 |",
        "|---:|---:|---:|",
    ]
    lines += [
        f"| {row['step']:,} | {row['distinct_2']:.3f} | {row['repeated_4']:.3f} |"
        for row in result["samples"]
        if row["distinct_2"] is not None
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="数重复的词块", allow_abbrev=False)
    parser.add_argument("--work_dir", type=Path, default=Path("gpt2-chinese"), help="训练好的工作目录")
    parser.add_argument("--documents", type=int, default=100, help="最多用多少篇；默认 100")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "repetition", help="结果，不带扩展名"
    )
    args = parser.parse_args()
    if not (args.work_dir / "final_model" / "model.safetensors").exists():
        sys.exit(f"错误：{args.work_dir} 里没有训练好的模型；先 python a100_train.py --preset demo")
    tokenizer = AutoTokenizer.from_pretrained(args.work_dir / "final_model")
    model = AutoModelForCausalLM.from_pretrained(args.work_dir / "final_model", dtype=torch.float32).eval()
    documents = held_out_documents(args.work_dir, tokenizer, model.config.n_positions, args.documents)
    if not len(documents):
        sys.exit(
            f"错误：{args.work_dir}/corpus 的验证集里没有一篇有 {model.config.n_positions} 个词块；换一个语料"
        )
    result = provenance() | {
        "command": "python a100_train.py --preset demo && python benchmarks/repetition.py",
        "parameters": model.num_parameters(),
        "context": model.config.n_positions,
        "documents": len(documents),
        "rows": measure(model, documents),
        "samples": training_samples(args.work_dir, tokenizer),
    }
    write_atomic(args.output.with_suffix(".json"), json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_atomic(args.output.with_suffix(".md"), report(result))
    print(report(result))


if __name__ == "__main__":
    main()
