"""Whether a model's logits are the plain product of its hidden states and one matrix: what a fused head stands on."""

from typing import Any

import torch

AFTER_THE_HEAD = (  # keys of Hugging Face configurations: what a model does to its logits
    *("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale"),
    *("logits_soft_cap", "output_logits_scaling"),
)


def output_head(model: Any) -> torch.nn.Linear | str:
    """The `Linear` that makes the logits of a model without adapter; why there is none that could be fused."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config().to_dict()
    if not isinstance(linear, torch.nn.Linear):
        return f"its head is {type(linear).__name__}, not a plain Linear"
    if changed := [name for name in AFTER_THE_HEAD if config.get(name) not in (None, 1)]:
        return f"it changes its logits after the head ({changed[0]}={config[changed[0]]})"
    return linear
