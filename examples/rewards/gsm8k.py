"""Rewards for arithmetic whose answers end in "#### 42", as GSM8K's do: no reward model, answers are checked.

  python batch_infer.py --eval_task generate_vllm --pretrain MODEL --dataset train.jsonl \
      --input_key question --input_template "Question: {}\\nAnswer:" --best_of_n 8 --output_path g.jsonl
  python batch_infer.py --eval_task rm --reward_fn examples/rewards/gsm8k.py:correct \
      --dataset g.jsonl --post_processor rs --output_path best.jsonl

The column "answer" of the prompts (a worked solution that ends in "#### 42", or just the number) stays in the
rows of their samples: that is the row which a reward function gets.
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"####\s*\$?\s*(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text):
    """The number behind the last "####" of a text, or None: 1,000 and $1000.00 are the same."""
    found = NUMBER.findall(text)
    return Decimal("".join(found[-1]).replace(",", "")) if found else None


def correct(prompt, response, row):
    """1 if the response's final number is that of row["answer"], else 0, also where it has none."""
    answer = str(row["answer"])
    right = final_number(answer if "####" in answer else f"#### {answer.strip()}")
    if right is None:
        raise ValueError(f"no number in the answer {answer[-40:]!r}")
    return float(final_number(response) == right)


def marked(prompt, response, row):
    """1 if the response says which number is its answer."""
    return float(final_number(response) is not None)
