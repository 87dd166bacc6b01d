"""One colour an order, the same in every figure, in a light and a dark shade. Figures are drawn in the light shades; inline SVG then
swaps each for its CSS variable, so that the same drawing follows the reader's colour scheme; every light shade is unique for that."""

import re

INK, MUTED, RULE, PAPER = "#22211f", "#77736c", "#d9d5cc", "#fdfcf9"
_NEUTRALS = {"ink": (INK, "#e9e6df"), "muted": (MUTED, "#9f9b93"), "rule": (RULE, "#3a3937"), "paper": (PAPER, "#151517")}
_ORDERS = {
    "raster": ("#3b3f45", "#d7dade"),
    "zigzag": ("#c4552b", "#ec9067"),
    "diagonal": ("#b07d0a", "#e0b850"),
    "stride-2": ("#57893a", "#97c872"),
    "spiral": ("#17877f", "#5cc7bd"),
    "column-major": ("#2e6db0", "#7db1ea"),
    "center-spiral": ("#6654b5", "#a99ff0"),
    "reverse": ("#a8417e", "#e486ba"),
    "random": ("#85898f", "#a4abb5"),
    "z-curve": ("#7c5b3b", "#bd9a78"),
    "hilbert": ("#b4394a", "#f2838e"),
    "multiscale": ("#6d7a14", "#bccb5a"),
    "halton": ("#3a4da3", "#93a5f3"),
    "learned": ("#cc2b8c", "#ff80cb"),
    "masked": ("#4f7386", "#94bace"),
}
_OTHER = ("#8a7f72", "#b5aa9c")


def order_key(order: str) -> str:
    """The palette name of an order: "random(seed=0)" and "random-seed0" are "random"; unknown names are "other"."""
    if order in _ORDERS:
        return order
    stem = re.split(r"[(\s:]", order)[0]
    known = [name for name in _ORDERS if stem.startswith(name)]
    return max(known, key=len) if known else "other"


def order_colour(order: str) -> str:
    """The light shade of an order, as a hex string."""
    return _ORDERS.get(order_key(order), _OTHER)[0]


def css_variables(shade: int) -> dict[str, str]:
    """CSS variable name to hex: shade 0 light, 1 dark."""
    named = {**_NEUTRALS, **{f"order-{name}": pair for name, pair in _ORDERS.items()}, "order-other": _OTHER}
    return {f"--{name}": pair[shade] for name, pair in named.items()}


def themed(svg: str) -> str:
    """The same SVG with every palette colour replaced by its CSS variable."""
    by_hex = {colour: name for name, colour in css_variables(0).items()}
    return re.sub("|".join(by_hex), lambda match: f"var({by_hex[match[0]]})", svg)
