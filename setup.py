"""Packages by hand: the folders keep the names users know, the import names all begin with `med`."""

from setuptools import setup

setup(
    name="medtrain",
    version="0.1.0",
    description="Distributed HPC training toolkit for cancer imaging",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels`, `launch` and `slurm` are the top-level names of other distributions, hence the prefix.
    packages=[
        "medkernels",
        "medkernels.augment",
        "medkernels.conv3d",
        "medkernels.group_norm_relu",
        "medkernels.region_dice",
        "medkernels.upsample_add",
        "medkernels.window_accumulate",
        "medtrain",
        "medseg",
        "medcls",
        "medlaunch",
        "medslurm",
    ],
    package_dir={"medkernels": "kernels", "medlaunch": "launch", "medslurm": "slurm"},
    install_requires=[
        "torch>=2.6",
        "triton>=3; platform_system == 'Linux'",
        "torchvision>=0.21",
        "timm>=1.0",
        "monai>=1.6,<1.7",  # where an upper bound stands, some of its inner names are used
        "einops",  # MONAI's UNETR needs it
        "nvidia-dali-cuda130>=2.0,<3",
        "deepspeed>=0.18,<0.20",
        "submitit>=1.5,<1.6",
        "tensorboard",
        "h5py",
        "nibabel",
        "numpy",
        "simpleitk",
        "scipy",
        "scikit-learn",
        "pillow",
        "imagehash",
        "opencv-python-headless",
        "safetensors",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"],
        "bench": ["blosc2"],
    },
)
