"""Four short examples with different masks, and the two calls that the engine makes of a loss."""

from typing import Any

import torch

from eaft_verl.data.prepare import Example


def example(number: int, length: int, first: int = 1) -> Example:
    ids = [(number * 7 + t) % 50 for t in range(length)]
    return Example(id=str(number), messages=[], input_ids=ids, loss_mask=[int(t >= first) for t in range(length)])


EXAMPLES = [example(number, length, first) for number, (length, first) in enumerate(((5, 2), (3, 1), (9, 4), (4, 1)))]


def both_calls(token_loss: Any, batch: Any, logits: Any) -> Any:
    """As the engine does: the hook, then the loss."""
    hook = token_loss(student_logits=logits, data=batch)
    offsets = batch["input_ids"].offsets()
    output = {name: torch.nested.nested_tensor_from_jagged(part[0], offsets) for name, part in hook.items()}
    return token_loss(model_output=output, data=batch)[0]
