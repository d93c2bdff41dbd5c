"""By how much a model holds right answers more likely than wrong ones. A script, in an interpreter that has torch.

JSON on standard input: {"base": a GGUF file, "adapters": [folders], "pairs": [{"prompt", "chosen", "rejected"}]}, all
messages. It prints a list: for each adapter the margins, in log-probability of the whole answer, one a pair.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def main() -> None:
    told = json.load(sys.stdin)
    path = Path(told["base"])
    at = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **at)
    found = []
    for adapter in told["adapters"]:
        base = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **at)
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
        found.append(
            [likely(model, tokenizer, p, "chosen") - likely(model, tokenizer, p, "rejected") for p in told["pairs"]]
        )
    print(json.dumps(found))


def likely(model: Any, tokenizer: Any, pair: dict[str, Any], which: str) -> float:
    """The log-probability of an answer after its prompt."""
    before = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*pair["prompt"], *pair[which]], return_dict=False)
    assert whole[: len(before)] == before
    with torch.no_grad():
        chances = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(chances[place - 1, whole[place]]) for place in range(len(before), len(whole)))


if __name__ == "__main__":
    main()
