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
    parts = {
        "sparse": _sparse,
        "patch": _patch,
        **dict.fromkeys(("peft", "peft-lora", "peft-shira"), _peft),
        **dict.fromkeys(("full", "merged", "packed"), _whole),
        "mlx": _mlx,
        "gguf-lora": _gguf,
    }[facts.kind](facts, base, load)
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


def _whole(facts: Facts, base: str, load: str) -> list[tuple[str, str]]:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{REPO}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{REPO}", dtype="auto")'
    )
    return [("transformers", _python(code)), ("vLLM", _shell(f"vllm serve {REPO}"))]


def _patch(facts: Facts, base: str, load: str) -> list[tuple[str, str]]:
    get = _shell(f"hf download {REPO} --local-dir patch")
    return [("sparseft", f"{get}\n\n" + _python(f'import sparseft\n{load}\nsparseft.apply_patch(model, "patch")'))]


def _mlx(facts: Facts, base: str, load: str) -> list[tuple[str, str]]:
    get = f"hf download {REPO} --local-dir adapter"
    return [("mlx-lm", _shell(f"{get}\nmlx_lm.generate --model {base} --adapter-path adapter"))]


def _gguf(facts: Facts, base: str, load: str) -> list[tuple[str, str]]:
    return [
        (
            "llama.cpp",
            "on a GGUF of its base, in whatever quantization:\n\n"
            + _shell(f"hf download {REPO} adapter.gguf --local-dir .\nllama-cli -m base.gguf --lora adapter.gguf"),
        )
    ]
