"""Augmented crops from volumes on the GPU: `python kernels/augment/bench.py` on a GPU."""

from collections.abc import Sequence

import torch

from medkernels.augment import Volumes, augment, prepared, reference
from medkernels.measurement import Case, asked, compare, compiled

# the places of a row's fields as in medseg.rows for four channels
SIZES = {
    "warp": 1,
    "matrix": 12,
    "flip": 3,
    "noise": 1,
    "blur": 1,
    "contrast": 4,
    "low": 1,
    "gamma": 4,
    "scale": 4,
    "shift": 4,
}
FIELDS = {
    name: slice(sum(list(SIZES.values())[:n]), sum(list(SIZES.values())[: n + 1])) for n, name in enumerate(SIZES)
}


def rows_of(turned: bool) -> torch.Tensor:
    """Two rows with all flips and intensities, and a rotation by 0.2 about W if asked."""
    row = torch.zeros(2, sum(SIZES.values()))
    for name, value in {"flip": 1.0, "contrast": 1.0, "low": 1.0, "gamma": 1.0, "scale": 1.1, "shift": 0.1}.items():
        row[:, FIELDS[name]] = value
    if turned:
        cosine, sine = torch.cos(torch.tensor(0.2)), torch.sin(torch.tensor(0.2))
        matrix = torch.tensor([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0]])
        row[:, FIELDS["matrix"]], row[:, FIELDS["warp"]] = matrix.reshape(-1), 1.0
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a batch of two crops, as they lie and turned."""
    options = asked(__doc__ or "", arguments)
    size, side = ((6, 5, 7), 4) if options.smoke else ((160, 192, 160), 128)
    image = torch.randn(4, *size, device=options.device).half()
    label = torch.randint(0, 4, size, device=options.device).to(torch.uint8)
    volumes = Volumes.pack([(image, label), (image, label)], options.device)
    boxes, crop = [((0, 0, 0), (side, side, side))] * 2, (side, side, side)
    for what, rows in (("crop", rows_of(False)), ("crop and rotation", rows_of(True))):
        table, parameters = prepared(volumes, [0, 1], boxes, rows, FIELDS, crop)

        def plain(table: torch.Tensor = table, parameters: torch.Tensor = parameters) -> object:
            return reference.augment(volumes.image, volumes.label, table, parameters, 4, crop, torch.float32)

        def fused(rows: torch.Tensor = rows) -> object:
            return augment(volumes, [0, 1], boxes, rows, FIELDS, crop, impl="fused")

        # each voxel of the crop: float16 and a code read, float32 and a code written
        case = Case("augment", what, (2, 4, side, side, side), "float16", "channels first", 2 * side**3 * (4 * 6 + 2))
        rivals = {"eager": plain, "torch.compile": compiled(plain, options.smoke), "fused": fused}
        compare(case, rivals, options)


if __name__ == "__main__":
    main()
