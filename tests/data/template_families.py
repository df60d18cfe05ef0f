"""Tokenizers of the template families in tests/templates: byte-level, with each family's own control tokens."""

import functools
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "templates"
_CHATML = ("<|im_start|>", "<|im_end|>")
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_DEEPSEEK = tuple(
    f"<\uff5c{name}\uff5c>"
    for name in (
        *("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end"),
        *("tool▁call▁begin", "tool▁call▁end", "tool▁sep", "tool▁output▁begin", "tool▁output▁end"),
    )
)
_MISTRAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
# family: (special tokens, first of a text, end of sequence)
FAMILIES: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "chatml": (_CHATML, None, "<|im_end|>"),
    "qwen3": (_CHATML, None, "<|im_end|>"),
    "llama3_1": (_LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "gemma3": (("<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>"),
    "mistral_small": (_MISTRAL, "<s>", "</s>"),
    "deepseek_v3": (_DEEPSEEK, _DEEPSEEK[0], _DEEPSEEK[1]),
    "glm4_5": (_GLM, None, "<|endoftext|>"),
    "gpt_oss": (_HARMONY, None, "<|return|>"),
}


@functools.cache
def tokenizer_of(family: str) -> Any:
    """The family's tokenizer, with its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special, first, end = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = [AddedToken(token, special=True, normalized=False) for token in ("<|endoftext|>", *special)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["user assistant system The answer is nine"] * 9,
        trainers.BpeTrainer(vocab_size=340, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=first, eos_token=end, pad_token="<|endoftext|>", name_or_path=family
    )
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer
