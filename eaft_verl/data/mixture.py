"""Which rows of several sources make up a mixture of the shares and caps that were asked for."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eaft_verl.data.spec import Source
from eaft_verl.errors import DataError


def choose(sources: Sequence[Source], source_N: NDArray[np.int64], digest_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each usable row is in the mixture, [N].

    source_N: index of each row's source; digest_N: a hash of what it says. Of a source that is not taken whole the
    rows with the smallest hashes are: a choice that depends on neither order nor seed, and grows by adding to itself.
    Sources without a share are taken whole, up to their cap, and are the rest of the mixture:
    n_i = share_i / (1 - sum of shares) * rest. Where all have a share, the mixture is the largest one with these.
    Raises DataError for a share that needs more rows than there are.
    """
    available = [int((source_N == index).sum()) for index in range(len(sources))]
    capped = [min(rows, source.cap or rows) for rows, source in zip(available, sources, strict=True)]
    wanted = _wanted(sources, capped)
    chosen_N = np.ones(len(source_N), bool)
    for index, count in enumerate(wanted):
        rows = np.flatnonzero(source_N == index)
        if count < len(rows):
            chosen_N[rows[np.argsort(digest_N[rows], kind="stable")[count:]]] = False
    return chosen_N


def drawn(names: Sequence[str], trained_N: NDArray[np.int64], rows: Sequence[int]) -> dict[str, dict[str, float]]:
    """{source: {examples, tokens}}: the shares of what training saw, by `rows`, one entry for every time it saw one.

    names: source of each row; trained_N: its trained tokens.
    """
    seen_N = np.bincount(np.asarray(rows, int), minlength=len(names))
    tokens_N, of_N = seen_N * trained_N, np.asarray(names)
    return {
        name: {
            "examples": float(seen_N[of_N == name].sum() / seen_N.sum()),
            "tokens": float(tokens_N[of_N == name].sum() / tokens_N.sum()),
        }
        for name in sorted(set(names))
    }


def _wanted(sources: Sequence[Source], capped: Sequence[int]) -> list[int]:
    """Rows of each source."""
    shares = [source.share for source in sources]
    given = sum(share or 0 for share in shares)
    if not given:
        return list(capped)
    rest = sum(rows for rows, share in zip(capped, shares, strict=True) if share is None)
    if None in shares:
        total = rest / (1 - given) if given < 1 else 0.0
    else:
        total = min(rows / share for rows, share in zip(capped, shares, strict=True) if share)
    wanted = [rows if share is None else round(share * total) for rows, share in zip(capped, shares, strict=True)]
    for source, rows, count in zip(sources, capped, wanted, strict=True):
        if count > rows:
            raise DataError(
                f"{source.name} has {rows} usable rows, and share {source.share:g} of {round(total)} needs {count}; "
                f"lower its share (at most {rows / total:.4g} as the others are), or cap the sources without a share"
            )
    return wanted
