"""One colour and one marker per arm, the same in every figure and on the page."""

KNOWN = {"base": "#6b7280", "sft": "#0072b2", "eaft": "#e06c00", "sft_kl": "#009e73", "dft": "#aa4499"}
SPARE = ("#7d6b00", "#6f4fc4", "#3aa0d8", "#882255", "#117733", "#661100")
MARKERS = "os^DvPX*"


def palette(arms: list[str]) -> dict[str, str]:
    """{arm: colour}, told apart by colour-blind readers: base grey, sft blue, eaft orange, others in fixed order."""
    spare = iter(SPARE * (1 + len(arms) // len(SPARE)))
    return {arm: KNOWN[arm] if arm in KNOWN else next(spare) for arm in ["base", *arms]}


def marker(index: int) -> str:
    """Matplotlib marker of the arm at that place in the report."""
    return MARKERS[index % len(MARKERS)]
