"""The readers of files from elsewhere, as the fuzzer calls them: each with valid files to start from."""

import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from hostile import listing, msd_folder, nifti, png
from PIL import Image

from medcls import images
from medcls.cache import ImageCache, Images, digest, write_images
from medcls.recipes import RECIPES as CLS_RECIPES
from medlaunch.plan import Request, make_plan, read_plan, read_recipes, write_plan
from medlaunch.report import read_jobs, standings
from medlaunch.tasks import read_recipe
from medseg import cache as volumes
from medseg.cache import Cache
from medseg.msd import read_dataset
from medseg.nifti import read_nifti
from medseg.recipes import RECIPES as SEG_RECIPES
from medslurm.cluster import read_cluster
from medslurm.commands import ClusterError
from medtrain.errors import UserError
from medtrain.results import read_rows


@dataclass(frozen=True)
class Reader:
    """`read` takes a folder and the bytes to be read, and may only raise `told`. `seeds` are valid bytes."""

    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path, bytes], object]
    told: tuple[type[Exception], ...] = (UserError,)
    apart: bool = False  # in a process of its own: a library in C can not be interrupted


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def scans(folder: Path) -> list[bytes]:
    small = np.arange(2 * 3 * 2 * 4, dtype=np.int16).reshape(2, 3, 2, 4)
    second = nib.Nifti2Image(small.astype(np.float32), np.eye(4)).to_bytes()
    return [nifti(small), nifti(small[..., 0].astype(np.uint8)), second]


def _packed_scans(folder: Path) -> list[bytes]:
    return [gzip.compress(raw, 1) for raw in scans(folder)]


@cache
def _data(folder: Path) -> Path:
    data = msd_folder(folder / "data")
    for path in sorted((data / "labelsTr").iterdir()):  # the same as nnU-Net has it; nobody reads its voxels
        for number in range(4):
            (data / "imagesTr" / path.name.replace(".nii", f"_{number:04d}.nii")).write_bytes(path.read_bytes())
    return data


NNUNET = json.dumps({
    "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}, "file_ending": ".nii.gz", "numTraining": 1,
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3},
}).encode()  # fmt: skip


def _listing(folder: Path, content: bytes) -> object:
    data = _data(folder)
    _put(data, "dataset.json", content)
    return read_dataset(data)


def volume_cache(folder: Path) -> list[bytes]:
    """A plain cache of one tiny case, and a compressed one."""
    made = []
    for compressed in (False, True):
        part, out = folder / "part.h5", folder / "seed.h5"
        image = np.ones((4, 3, 3, 3), np.float16)
        arrays = {"voxels_1": np.zeros((1, 3), np.int16), "label_native": np.zeros((4, 3, 3), np.uint8)}
        case = volumes.Case(image_CDHW=image, label_DHW=np.zeros((3, 3, 3), np.uint8), arrays=arrays, facts={"a": 1})
        volumes.write_part(part, case, recipe="r", compressed=compressed)
        volumes.assemble(out, [("c", part)], channels=["a"] * 4, labels={"name": "x"}, spacing_mm=1, preparation={})
        with h5py.File(out, "r") as source, h5py.File(folder / "tight.h5", "w", libver="v110") as tight:
            for key, value in source.attrs.items():
                tight.attrs[key] = value
            source.copy("cases", tight)  # without the padding to pages
        made.append((folder / "tight.h5").read_bytes())
    return made


def _volumes(folder: Path, content: bytes) -> None:
    opened = Cache(_put(folder, "x.h5", content))
    try:
        assert len(opened.fingerprint) == 16
        for case in opened.ids[:3]:
            opened.facts(case)
            for name in ("image", "label", "label_native", "voxels_1"):
                if opened.has(case, name):
                    opened.read(case, name)
            opened.patch(case, "image", (0, 0, 0), (1, 1, 1))
        dict(opened.verify())
    finally:
        opened.close()


def image_cache(folder: Path) -> list[bytes]:
    encoded = [png(2, 1), png(1, 2)]
    columns = {
        "target": np.arange(2, dtype=np.int32), "size": np.array([[1, 2], [2, 1]], np.int32),
        "checksum": np.frombuffer(b"".join(map(digest, encoded)), np.uint8).reshape(2, 16),
        "histogram": np.zeros((2, 3), np.float32),
    }  # fmt: skip
    part = Images(encoded, ["a/1.png", "b/2.png"], columns)
    write_images(folder / "seed.h5", [part], size=sum(map(len, encoded)), groups=np.arange(2),
                 classes=[("X", "a"), ("X", "b")], facts={"bad": []}, preparation={"version": 1})  # fmt: skip
    return [(folder / "seed.h5").read_bytes()]


def _images(folder: Path, content: bytes) -> None:
    opened = ImageCache(_put(folder, "x.h5", content))
    try:
        assert len(opened.fingerprint) == 16
        assert opened.histogram.shape[0] == len(opened.ids)
        for n in range(len(opened.ids)):
            assert opened.encoded(n).size
        dict(opened.verify())
    finally:
        opened.close()


def pictures(folder: Path) -> list[bytes]:
    made = []
    image = Image.fromarray(np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form, options in (("JPEG", {"exif": exif}), ("PNG", {"exif": exif}), ("GIF", {}), ("BMP", {}), ("TIFF", {}),
                          ("WEBP", {}), ("PPM", {}), ("JPEG2000", {})):  # fmt: skip
        out = io.BytesIO()
        image.save(out, form, **options)
        made.append(out.getvalue())
    return [*made, png(3, 3)]


def recipes(folder: Path) -> list[bytes]:
    return [
        RECIPE().to_json().encode() for RECIPE in (SEG_RECIPES["brats_segresnet"], CLS_RECIPES["multicancer_vgg19"])
    ]


def _plan(folder: Path) -> list[bytes]:
    request = Request(sweep="brats_demo", data="/data", seeds=2, models=("segresnet",))
    write_plan(folder, make_plan(request, request.recipes()))
    return [(folder / "plan.json").read_bytes()]


def _read_plan(folder: Path, content: bytes) -> None:
    _put(folder, "plan.json", content)
    (folder / "jobs.csv").unlink(missing_ok=True)
    plan = read_plan(folder)
    standings(folder, plan, {})
    read_recipes(plan, folder)


JOBS = b"kind,job,folder,log,code\nprepare,6,,,c\ntrain,7_0,m,/x/jobs/7_0.out,c\nfinish,8,,,c\n"
ROWS = b"member,case,part,mean,TC,WT,ET\nsegresnet,A_1,val,0.5,0.25,0.75,0.5\nsegresnet,B_2,test,1,1,1,1\n"
CLUSTERS = b"""[lab]
partition = "gpu"
gpus_per_node = 4
mem = "64G"
time = "1-02:00:00"
modules = ["cuda", "python"]
[lab.sbatch]
comment = "x"
"""
READERS: dict[str, Reader] = {
    "nifti": Reader(scans, lambda folder, content: read_nifti(_put(folder, "x.nii", content))),
    "nifti_gz": Reader(_packed_scans, lambda folder, content: read_nifti(_put(folder, "x.nii.gz", content))),
    "listing": Reader(lambda folder: [json.dumps(listing()).encode(), NNUNET], _listing),
    "volumes": Reader(volume_cache, _volumes, apart=True),
    "images": Reader(image_cache, _images, apart=True),
    "pictures": Reader(pictures, lambda folder, content: images.usable(content), (images.BadImage,)),
    "recipe": Reader(recipes, lambda folder, content: read_recipe(content.decode("utf-8", "replace"), "recipe.json")),
    "clusters": Reader(lambda folder: [CLUSTERS], lambda folder, content: read_cluster(
        "lab", _put(folder, "x.toml", content)), (ClusterError,)),
    "plan": Reader(_plan, _read_plan),
    "jobs": Reader(lambda folder: [JOBS], lambda folder, content: read_jobs(_put(folder, "jobs.csv", content).parent)),
    "rows": Reader(lambda folder: [ROWS], lambda folder, content: read_rows(_put(folder, "cases.csv", content))),
}  # fmt: skip
