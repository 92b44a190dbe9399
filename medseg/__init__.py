"""Brain-tumour segmentation on MRI: regions TC, WT and ET."""

import medtrain  # noqa: F401  (before torch: it says how threads wait)
