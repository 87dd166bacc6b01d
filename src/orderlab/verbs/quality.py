"""Verbs of measuring quality: weights, reference, score, compare, neighbours."""

from __future__ import annotations

from pathlib import Path

from orderlab.errors import UserError


def weights_inception(file: Path | None = None, download: bool = False) -> None:
    """Take or fetch the Inception weights that FID needs, check them and keep them in the cache.

    Args:
        file: the file pt_inception-2015-12-05-6726825d.pth, already on this machine
        download: fetch it
    """
    from orderlab.evaluate import weights

    if (file is None) == (not download):
        raise UserError(f"give either --file or --download; {weights.how_to_get()}")
    place = weights.download() if file is None else weights.install(file)
    print(f"Inception weights: {place}")
