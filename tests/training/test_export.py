"""Where an exported model stops: at what the base stopped at, and at what ended the turns it was trained on."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from eaft_verl.errors import Diverged
from eaft_verl.training.export import export_weights, generation_config, stored_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: it stops at the end of a document, its template ends turns with another token."""
    return tiny.tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("shipped", "ends", "expected"),
    [
        (0, [2], [0, 2]),  # <|endoftext|> of the base, <|im_end|> of the turns
        ([0, 2], [2], [0, 2]),
        (2, [2], 2),  # nothing to add: as it was
        ([0], [1, 2], [0, 1, 2]),
        (None, [2], [2]),
    ],
)
def test_generation_stops_at_the_trained_end_of_turn(
    base: Path, shipped: object, ends: list[int], expected: object
) -> None:
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": shipped}))
    assert generation_config(str(base), ends).eos_token_id == expected


def test_a_base_without_a_generation_config_gets_one(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").unlink()
    config = generation_config(str(base), [0])
    config.save_pretrained(tmp_path)
    eos = json.loads((base / "config.json").read_text())["eos_token_id"]
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [eos, 0]


def test_weights_that_are_parts_of_longer_buffers_are_exported(tmp_path: Path) -> None:
    """As three ranks gather them: 64 rows in 66, the last two nobody's."""
    base = tiny.tiny_model(tmp_path / "base")
    whole = {name: torch.cat([weight, torch.full_like(weight[:2], 9.0)]) for name, weight in stored_weights(base)}
    parts = ((name, weight[:-2]) for name, weight in whole.items())
    export_weights(parts, tmp_path / "export", str(base), "float32", write=True)
    expected = dict(stored_weights(base))
    made = dict(stored_weights(tmp_path / "export"))
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bfloat16"), (-float("inf"), "float32"), (7e4, "float16")])
def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, value: float, dtype: str) -> None:
    """Every rank gathers all of them first: one that stopped half way would leave the others waiting."""
    base = tiny.tiny_model(tmp_path / "base")
    weights, asked = dict(stored_weights(base)), []
    names = sorted(weights)
    weights[names[3]].view(-1)[5] = value

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            asked.append(name)
            yield name, weights[name]

    with pytest.raises(Diverged, match=f"export is not exported: 1 weights .* {dtype}, first {names[3]}; go on with"):
        export_weights(gathered(), tmp_path / "export", str(base), dtype, write=True)
    assert asked == names and not (tmp_path / "export").exists()
