"""Cancer classification: folders of images, near-duplicate groups, augmentation, backbones, metrics, tables."""
