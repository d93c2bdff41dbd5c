"""The child that fine-tunes with Unsloth. A script with one argument, the job's folder (see _training.py).

Unsloth changes TRL and transformers when it is imported, so it comes first; all else is as in _huggingface_run.py.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_BESIDE = Path(__file__).parent


def main() -> None:
    """Go on from the last whole checkpoint, or begin, and leave the result."""
    # What it compiles goes where it would otherwise be found by whoever starts a program from the same folder.
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(Path(sys.argv[1]).resolve() / "checkpoints" / "compiled")
    from unsloth import FastLanguageModel

    ours = SimpleNamespace(**runpy.run_path(str(_BESIDE / "_child.py")))

    def made(base: str, told: dict[str, Any]) -> tuple[Any, Any, None]:
        model, tokenizer = FastLanguageModel.from_pretrained(
            base,
            max_seq_length=told["max_length"],
            dtype=ours.dtype_of(told),
            load_in_4bit=ours.in_four_bits(base, told),
            use_exact_model_name=True,  # otherwise another one, from the Hub, may be taken in its place
            random_state=told["seed"],
            local_files_only=True,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=told["rank"],
            target_modules=told["targets"],
            lora_alpha=told["alpha"],
            lora_dropout=told["dropout"],
            random_state=told["seed"],
        )
        return model, tokenizer, None

    runpy.run_path(str(_BESIDE / "_huggingface_run.py"))["main"](made)


if __name__ == "__main__":
    main()
