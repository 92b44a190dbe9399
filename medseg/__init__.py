"""Brain-tumour segmentation on MRI: regions TC, WT and ET."""
