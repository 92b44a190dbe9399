"""How a step grows with the number of GPUs, on paper: a ring all-reduce, beside the backward pass or after it."""

from dataclasses import dataclass

BUCKET = 25 << 20  # bytes of gradients that are sent together: PyTorch's default
BACKWARD = 2 / 3  # of a step without communication: it computes two gradients for each product of the forward pass
# What is sent, as a part of an all-reduce of all gradients, by ZeRO stage: at 3 weights are gathered in the forward and
# in the backward pass (Rajbhandari et al. 2020, section 7).
VOLUME = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.5}


@dataclass(frozen=True)
class Links:
    """Bytes a second of one GPU to the others of its node, and of a node to the other nodes (all its adapters
    together); seconds of one hop.
    """

    inside: float
    between: float
    hop: float


def all_reduce_seconds(size: float, gpus: int, per_node: int, links: Links) -> float:
    """2 (n-1)/n size / bandwidth + 2 (n-1) hop, with the slowest link of the ring (Patarasuk & Yuan 2009)."""
    if gpus == 1:
        return 0.0
    bandwidth = links.inside if gpus <= per_node else min(links.inside, links.between)
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * (gpus - 1) * links.hop


def step_seconds(alone: float, size: float, gpus: int, per_node: int, links: Links, stage: int = 0,
                 overlaps: bool = True) -> float:  # fmt: skip
    """Seconds of a step on `gpus`, each with the batch that one GPU alone steps over in `alone` seconds.

    Gradients are sent in buckets while the backward pass goes on; what it does not hide is waited for, at least the
    last bucket, which is ready when the pass ends. Where nothing `overlaps`, they are sent in one piece afterwards.
    """
    if not overlaps:
        return alone + all_reduce_seconds(size, gpus, per_node, links)
    sent = size * VOLUME[stage]
    buckets = max(1, round(sent / BUCKET))
    whole = buckets * all_reduce_seconds(sent / buckets, gpus, per_node, links)
    last = whole / buckets
    return alone + max(last, whole - alone * BACKWARD)
