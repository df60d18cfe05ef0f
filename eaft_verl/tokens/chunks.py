"""How many rows of logits are held at a time. Nothing here imports torch: `eaft plan` counts with it."""

CHUNK_TOKENS = 1024  # rows of whole logits upcast at a time: bounds the float32 copy to CHUNK_TOKENS * V
HEAD_BYTES = {"cpu": 64 << 20}  # of a chunk in the fused head; more does not stay in a cache
ACCELERATOR_HEAD_BYTES = 1280 << 20  # with few rows units idle, and every chunk reads and writes all of dW
IN_PLACE_HEAD_BYTES = 448 << 20  # the same rows need less where nothing is copied: 1,536 of Qwen's vocabulary in bf16


def bytes_per_logit(itemsize: int) -> int:
    """Of a chunk in the fused head at its peak: float32 is worked on in place, less is upcast beside itself."""
    return itemsize if itemsize >= 4 else itemsize + 4


def head_chunk(vocab: int, itemsize: int, device: str, *, in_place: bool = False) -> int:
    """Rows of a chunk in the fused head: a multiple of 64 that fills the budget of its device, at least 64.

    in_place: the Triton kernels', which copy nothing.
    """
    budget = IN_PLACE_HEAD_BYTES if in_place else HEAD_BYTES.get(device, ACCELERATOR_HEAD_BYTES)
    each = itemsize if in_place else bytes_per_logit(itemsize)
    return max(64, budget // (vocab * each) // 64 * 64)
