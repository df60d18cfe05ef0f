"""Four short examples with different masks."""

from eaft_verl.data.prepare import Example


def example(number: int, length: int, first: int = 1) -> Example:
    ids = [(number * 7 + t) % 50 for t in range(length)]
    return Example(id=str(number), messages=[], input_ids=ids, loss_mask=[int(t >= first) for t in range(length)])


EXAMPLES = [example(number, length, first) for number, (length, first) in enumerate(((5, 2), (3, 1), (9, 4), (4, 1)))]
