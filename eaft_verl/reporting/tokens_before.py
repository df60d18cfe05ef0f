"""What an analysis beside the report says of the data, and of how its tokens moved: files of `eaft analyze`."""

from pathlib import Path
from typing import Any

from eaft_verl.files import read_json

FOLDER, PAGE, DATA, MOVED = "analysis", "analysis.html", "analysis.json", "dynamics.json"
Row = dict[str, Any]


def analysis(out: Path) -> Row:
    """{sentences, moved} from the folder `analysis` beside the report's: what was found in the data before training,
    and [{arm, step, fixed: {group: {tokens, nll, prob}}}] of runs whose exports were analysed; None without them."""
    folder = out.resolve().parent / FOLDER
    sentences, moved = None, None
    if (folder / PAGE).is_file() and (folder / DATA).is_file():
        sentences = [row["text"] for row in read_json(folder / DATA)["verdict"]["sentences"]]
    if (folder / MOVED).is_file():
        moved = read_json(folder / MOVED)["rows"]
    return {"sentences": sentences, "moved": moved}
