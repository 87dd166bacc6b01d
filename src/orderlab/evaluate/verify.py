"""`orderlab reference verify`: is this file ADM's reference? It is if ADM's own published samples score ADM's published numbers against it.

The file `VIRTUAL_imagenet256_labeled.npz` has no published hash, so a reference proves itself: network, resize, statistics and arithmetic of this
machine together must reproduce what Dhariwal and Nichol's evaluator prints for `admnet_guided_upsampled_imagenet256.npz`. Its hash is then kept,
and records against it may be comparable.
"""

from __future__ import annotations

from pathlib import Path

from orderlab.errors import UserError
from orderlab.evaluate.features import FeatureExtractor
from orderlab.evaluate.measure import Options, records
from orderlab.evaluate.record import SHA256_PREFIX, Record, remember_reference
from orderlab.evaluate.reference import read_reference
from orderlab.evaluate.samples import load_samples

# ADM's evaluator on its own samples, and how far another framework's arithmetic may move it (seen: 0.002, 0.0001, 0.14, 0.001, 0.003).
PUBLISHED = {"FD": (3.9426, 0.01), "sFD": (6.1404, 0.01), "IS": (215.84, 0.5), "precision": (0.8265, 0.002), "recall": (0.5309, 0.005)}


def verify(reference: Path, samples: Path, network: FeatureExtractor) -> list[Record]:
    """Score ADM's samples; keeps the reference's hash when all five numbers agree, else UserError with the first that does not."""
    if not network.weights_hash.startswith(SHA256_PREFIX):
        raise UserError(f"{network.name} has other weights than the field's; install them first (orderlab weights inception)")
    known = read_reference(reference, network)
    found = records(load_samples(samples)[0].measured(network), known, network, Options(pr_mode="adm-fp16"))
    by_name = {record.quantity: record for record in found}
    for quantity, (published, tolerance) in PUBLISHED.items():
        if quantity not in by_name:
            raise UserError(f"{reference} gives no {quantity}; expected ADM's reference with images, mu, sigma, mu_s and sigma_s")
        value = by_name[quantity].value
        if abs(value - published) > tolerance:
            raise UserError(
                f"{quantity} of {samples.name} against {reference.name} is {value:.4f}; ADM published {published} (tolerance {tolerance}): "
                "this is not ADM's reference, not admnet_guided_upsampled_imagenet256.npz, or the machine's arithmetic is off"
            )
    evidence = {record.quantity: record.value for record in found}
    remember_reference(known.hash, {"file": reference.name, "weights_hash": network.weights_hash, **evidence})
    return found
