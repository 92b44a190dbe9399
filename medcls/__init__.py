"""Cancer classification: folders of images, near-duplicate groups, augmentation, backbones, metrics, tables."""

import medtrain  # noqa: F401  (before torch: it says how threads wait)
