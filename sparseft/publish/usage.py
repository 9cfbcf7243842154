"""How what is published is loaded: in sparseft, PEFT, transformers and the engines, by what the folder holds."""

from __future__ import annotations

from sparseft.publish.facts import Facts, is_hub_id
from sparseft.report.numbers import number
from sparseft.selection.engine_ranks import RANKS, file_rank

REPO, BASE = "USER/NAME", "BASE_MODEL"  # what `card.filled` replaces

LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
model = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="auto")"""


def usage(facts: Facts) -> str:
    """Markdown: a heading and code for each tool that loads it; nothing that it does not load in."""
    base = facts.base_id or BASE
    tokenizer = facts.tokenizer if facts.tokenizer and is_hub_id(facts.tokenizer) else base
    load = LOAD.format(
        base=base, tokenizer=tokenizer, revision=f', revision="{facts.revision}"' if facts.revision else ""
    )
    get = f"hf download {REPO} --local-dir"
    if facts.kind == "sparse":
        parts = _sparse(facts, base, load)
    elif facts.kind in ("peft", "peft-lora", "peft-shira"):
        parts = _peft(facts, base, load)
    elif facts.kind == "patch":
        apply = f'import sparseft\n{load}\nsparseft.apply_patch(model, "patch")'
        parts = [("sparseft", f"{_shell(f'{get} patch')}\n\n{_python(apply)}")]
    elif facts.kind == "mlx":
        run = f"mlx_lm.generate --model {base} --adapter-path adapter"
        parts = [("mlx-lm", _shell(f"{get} adapter\n{run}"))]
    elif facts.kind == "gguf-lora":
        run = f"hf download {REPO} adapter.gguf --local-dir .\nllama-cli -m base.gguf --lora adapter.gguf"
        parts = [("llama.cpp", f"on a GGUF of its base, in whatever quantization:\n\n{_shell(run)}")]
    else:  # full, merged, packed
        whole = LOAD.format(base=REPO, tokenizer=REPO, revision="")
        parts = [("transformers", _python(whole)), ("vLLM", _shell(f"vllm serve {REPO}"))]
    return "\n\n".join(f"**{name}**\n\n{text}" for name, text in parts)


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _shell(code: str) -> str:
    return f"```\n{code}\n```"


def _sparse(facts: Facts, base: str, load: str) -> list[tuple[str, str]]:
    rank = number(facts.summary.get("export_rank"))
    ready = f" --max-lora-rank {file_rank(int(rank))}" if rank and rank <= RANKS[-1] else " --max-lora-rank RANK"
    told = "" if rank and rank <= RANKS[-1] else "\n\nThe export prints RANK; of one above 512, serve `merged`."
    return [
        ("sparseft", _python(f'import sparseft\n{load}\nsparseft.load_adapter(model, "{REPO}")')),
        (
            "PEFT",
            "written as an exact LoRA first:\n\n"
            + _shell(f"sparseft export {REPO} --format peft-lora --out my-lora")
            + "\n\n"
            + _python(f'from peft import PeftModel\n{load}\nmodel = PeftModel.from_pretrained(model, "my-lora")'),
        ),
        (
            "transformers",
            "merged into the base's weights:\n\n"
            + _shell(f"sparseft export {REPO} --format merged --out merged")
            + "\n\n"
            + _python('model = AutoModelForCausalLM.from_pretrained("merged")'),
        ),
        ("vLLM", f"the LoRA folder, on its base:\n\n{_shell(_vllm(base, 'my-lora', ready))}{told}"),
    ]


def _vllm(base: str, adapter: str, rank: str) -> str:
    return f"vllm serve {base} --enable-lora --lora-modules tuned={adapter}{rank}"


def _peft(facts: Facts, base: str, load: str) -> list[tuple[str, str]]:
    peft = _python(f'from peft import PeftModel\n{load}\nmodel = PeftModel.from_pretrained(model, "{REPO}")')
    merged = "as a plain model, after PEFT has loaded it:\n\n" + _python("model = model.merge_and_unload()")
    parts = [("PEFT", peft), ("transformers", merged)]
    if facts.kind == "peft-shira":
        return parts
    parts.insert(0, ("sparseft", _python(f'import sparseft\n{load}\nmodel = sparseft.load_adapter(model, "{REPO}")')))
    rank = facts.rank
    if facts.content.get("use_dora"):
        parts.append(("vLLM", "It takes no DoRA: merge it first."))
    elif rank is not None and rank <= RANKS[-1]:
        parts.append(("vLLM", _shell(_vllm(base, REPO, f" --max-lora-rank {file_rank(rank)}"))))
    return parts
