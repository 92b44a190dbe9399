"""Synthetic tumour pictures in the folders of the Kaggle "Multi Cancer" set, with near-duplicates that are known."""

import io
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.interpolate import BSpline

from medtrain.files import replacing, write_text

CANCERS: dict[str, tuple[str, ...]] = {
    "Brain Cancer": ("brain_glioma", "brain_menin", "brain_tumor"),
    "Oral Cancer": ("oral_normal", "oral_scc"),
}
CLASSES = sum(map(len, CANCERS.values()))
COPY_KINDS = ("exact", "flip", "turn", "brightness", "jpeg", "resize", "rotate", "shift", "zoom", "mixed")
TRUTH_NAME = "phantom_truth.csv"
Rng = np.random.Generator
_Group = tuple[tuple[str, int, str, str, int], list[tuple[str, str, str, tuple[int, ...]]]]
# Optical density (red, green, blue) of haematoxylin and eosin: Ruifrok and Johnston (2001), table 1.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32)


def make_image(seed: int, cancer: str, kind: str, index: int, *, size: int = 160) -> np.ndarray:
    """Make picture `index` of class `kind`: uint8 (size, size, 3), RGB; the same arguments give the same picture.

    "Brain Cancer" is a grey axial slice, face up; "Oral Cancer" a stained tissue tile. size is the edge in pixels; the
    anatomy does not depend on it. Raises ValueError for a negative seed or index, size < 32, or an unknown name.
    """
    _check_request(seed, index, size, [cancer])
    if kind not in CANCERS[cancer]:
        raise ValueError(f"{kind=} is not one of {CANCERS[cancer]}")
    rng = np.random.default_rng((seed, list(CANCERS).index(cancer), CANCERS[cancer].index(kind), index))
    image = _draw_brain(rng, kind, size) if cancer == "Brain Cancer" else _draw_oral(rng, kind, size)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def write_dataset(
    folder: Path,
    *,
    images: int = 60,
    size: int = 160,
    seed: int = 0,
    copies: float = 0.25,
    cancers: Sequence[str] = tuple(CANCERS),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `images` JPEG files a class as folder/cancer/class/class_0001.jpg and return `folder`.

    A share `copies` (0 to 0.8) of each class are changed copies of its other pictures, listed in phantom_truth.csv:
    path, source, kind (one of COPY_KINDS, taken in turn). That file comes last: a folder without it is unfinished. A
    picture that is there stays; the same arguments give the same bytes. size is the edge in pixels; workers counts
    threads; progress(done, total) is called in this one, for every picture. Raises ValueError for images or workers
    below 1, a share out of range and what make_image refuses, FileExistsError where the folder holds another set.
    """
    _check_request(seed, 0, size, cancers)
    if min(images, workers) < 1 or not 0 <= copies <= 0.8:
        raise ValueError(f"need {images=} and {workers=} >= 1, {copies=} from 0 to 0.8")
    groups = _plan_groups(images, seed, copies, cancers)
    listed = sorted(copy[:3] for _, group in groups for copy in group)
    truth = "".join(",".join(row) + "\n" for row in [("path", "source", "kind"), *listed])
    if (folder / TRUTH_NAME).exists() and (folder / TRUTH_NAME).read_text(encoding="utf-8") != truth:
        raise FileExistsError(f"{folder} holds a phantom made with other arguments; choose another folder")
    total = sum(1 + len(group) for _, group in groups)
    pool = ThreadPoolExecutor(workers)
    try:
        written = pool.map(lambda group: _write_group(folder, size, *group), groups)
        for done, _ in enumerate(itertools.chain.from_iterable(written), start=1):
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    write_text(folder / TRUTH_NAME, truth)
    return folder


def _check_request(seed: int, index: int, size: int, cancers: Sequence[str]) -> None:
    if min(seed, index) < 0 or size < 32:
        raise ValueError(f"need {seed=} and {index=} >= 0, {size=} >= 32")
    if not cancers or set(cancers) - set(CANCERS) or len(set(cancers)) < len(cancers):
        raise ValueError(f"cancers={list(cancers)} must be different names out of {list(CANCERS)}")


def _plan_groups(images: int, seed: int, copies: float, cancers: Sequence[str]) -> list[_Group]:
    """Each original, (path, *arguments of make_image), with its copies, (path, source, kind, seeds), paths relative."""
    plan: list[_Group] = []
    changes, made = itertools.cycle(COPY_KINDS), min(round(copies * images), images - 1)
    for cancer in cancers:
        for number, kind in enumerate(CANCERS[cancer]):
            names = [f"{cancer}/{kind}/{kind}_{place + 1:04d}.jpg" for place in range(images)]
            seeds = (seed, list(CANCERS).index(cancer), number)
            rng = np.random.default_rng((*seeds, 0, 1))
            places = rng.permutation(images).tolist()
            sources = rng.permutation(np.repeat(places[made:], max(3, -(-made // (images - made)))))[:made].tolist()
            groups: dict[int, list] = {place: [] for place in sorted(places[made:])}
            for place, source in zip(places[:made], sources, strict=True):
                groups[source].append((names[place], names[source], next(changes), (*seeds, place, 2)))
            plan += [((names[place], seed, cancer, kind, place), group) for place, group in groups.items()]
    return plan


def _write_group(folder: Path, size: int, original: tuple, copies: list[tuple]) -> range:
    name, *arguments = original
    if not (folder / name).exists():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(_encode(make_image(*arguments, size=size)))
    content = (folder / name).read_bytes()
    for path, _, kind, seeds in copies:
        if not (folder / path).exists():
            with replacing(folder / path) as temporary:
                temporary.write_bytes(make_copy(np.random.default_rng(seeds), kind, content))
    return range(1 + len(copies))


def _encode(image: np.ndarray, quality: int = 90) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=quality)
    return file.getvalue()


def make_copy(rng: Rng, kind: str, content: bytes) -> bytes:
    """The JPEG file of a copy of the kind (one of COPY_KINDS), from the JPEG file of its original."""
    if kind == "exact":
        return content
    image = np.asarray(Image.open(io.BytesIO(content)))
    if kind == "resize":
        image = np.asarray(Image.fromarray(image).reduce(2))
    if kind == "turn":
        image = np.rot90(image, int(rng.integers(1, 4)))
    if kind in ("rotate", "shift", "zoom", "mixed"):
        image = _move(rng, image, ("rotate", "shift", "zoom") if kind == "mixed" else (kind,))
    if kind in ("flip", "mixed"):
        image = np.flip(image, int(rng.integers(2)))
    if kind in ("brightness", "mixed"):
        image = np.clip(np.rint(image * rng.uniform(0.5, 1.2)), 0, 255).astype(np.uint8)
    return _encode(np.ascontiguousarray(image), 50 if kind == "jpeg" else 90)


def _move(rng: Rng, image: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Rotate by 3 to 10 degrees, shift by 3 to 10 % on both axes, zoom by 2 to 10 %, either way; edges are extended."""
    amounts = rng.choice([-1, 1], 4) * rng.uniform([3, 0.03, 0.03, 0.02], [10, 0.1, 0.1, 0.1])
    angle, zoom = np.deg2rad(amounts[0] * ("rotate" in kinds)), 1 + amounts[3] * ("zoom" in kinds)
    shift = amounts[1:3] * ("shift" in kinds) * image.shape[:2]
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    offset = (middle := (np.array(image.shape[:2]) - 1) / 2) - matrix @ (middle + shift)
    planes = [ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode="nearest") for c in range(3)]
    return np.stack(planes, axis=-1)


def _noise(rng: Rng, size: int, knots: int) -> np.ndarray:
    """Smooth noise (size, size), mean 0 and deviation 1: a cubic B-spline with `knots` random values a side."""
    position = np.linspace(0, knots, size)
    basis = BSpline.design_matrix(position, np.arange(-3, knots + 4), 3).toarray().astype(np.float32)
    field = basis @ rng.standard_normal((knots + 3, knots + 3), dtype=np.float32) @ basis.T
    return (field - field.mean()) / field.std()


def _ramp(value: np.ndarray, start: float, stop: float) -> np.ndarray:
    return np.clip((value - start) / (stop - start), 0, 1)


def _draw_brain(rng: Rng, kind: str, size: int) -> np.ndarray:
    """Grey slice (size, size, 3), 0 to 1: anatomy in coordinates where the brain is about the unit disc."""
    y, x = (2 * np.indices((size, size), np.float32) + 1) / size - rng.uniform(0.9, 1.1, (2, 1, 1)).astype(np.float32)
    tilt = rng.uniform(-0.2, 0.2)
    x, y = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    x, y = x / rng.uniform(0.54, 0.72), y / rng.uniform(0.66, 0.80)
    x = x * (1 - rng.uniform(0, 0.14) * y)
    radius = np.hypot(x, y) + 0.015 * _noise(rng, size, 6)
    white, grey, fluid = rng.uniform(0.5, 0.62), rng.uniform(0.36, 0.48), rng.uniform(0.1, 0.3)
    if rng.random() < 0.1:  # T2-like
        white, grey, fluid = grey, white, rng.uniform(0.75, 0.9)
    sulci = np.abs(_noise(rng, size, 14)) / 5 + 0.9 * np.maximum(0.72 - radius, 0)
    fissure = np.abs(x + 0.02 * _noise(rng, size, 5)) + 0.8 * np.maximum(0.55 - np.abs(y), 0)
    to_fluid = np.minimum(np.minimum(sulci, fissure), 1 - radius) + 0.01 * _noise(rng, size, 20)
    signal = grey + (white - grey) * _ramp(to_fluid, 0.09, 0.15)
    signal += (fluid - signal) * (1 - _ramp(to_fluid, 0.01, 0.045))
    width, middle = rng.uniform(0.04, 0.11), rng.uniform(-0.15, 0.1)
    bend = np.abs(x) - width - 0.04 - rng.uniform(0.3, 0.9) * (y - middle) ** 2
    ventricles = _ramp(np.hypot(bend / width, (y - middle) / rng.uniform(0.25, 0.5)), 1.15, 0.9)
    signal += (fluid - signal) * ventricles * (rng.random() < 0.85)
    signal *= 1 + rng.uniform(0.03, 0.08) * _noise(rng, size, 28)
    for a, b in rng.uniform(-0.7, 0.7, (rng.integers(0, 4), 2)):  # vessels, as bright as a lesion
        signal += (0.9 - signal) * _ramp(np.hypot(x - a, y - b), 0.05, 0.03)
    signal = _add_lesion(rng, kind, x, y, signal, max(white, grey))
    skull, scalp = 1 + rng.uniform(0.03, 0.06), rng.uniform(0.08, 0.16)
    shell = _ramp(radius, skull, skull + 0.03) * _ramp(radius, skull + scalp, skull + scalp - 0.03)
    signal = np.where(radius < 1, signal, fluid * _ramp(radius, 1.03, 1) + rng.uniform(0.5, 0.9) * shell)
    signal *= np.exp(rng.uniform(0.04, 0.16) * _noise(rng, size, 3))
    signal = ndimage.gaussian_filter(signal, rng.uniform(0.003, 0.007) * size)
    real, imaginary = rng.uniform(0.01, 0.05) * rng.standard_normal((2, size, size), dtype=np.float32)
    image = rng.uniform(0.75, 1.2) * np.hypot(signal + real, imaginary) ** rng.uniform(0.8, 1.3)
    return np.repeat(image[..., None], 3, axis=-1)


def _add_lesion(rng: Rng, kind: str, x: np.ndarray, y: np.ndarray, signal: np.ndarray, tissue: float) -> np.ndarray:
    """The lesion's brightness is the same lottery for every class; its place, outline and inside tell the class."""
    bright = tissue * rng.uniform(1.4, 1.85)
    noise = [_noise(rng, len(x), knots) for knots in (10, 18, 12)]
    if kind == "brain_glioma":
        size, rough = rng.uniform(0.26, 0.42), 0.17
        centre = (rng.choice([-1, 1]) * rng.uniform(0.28, 0.5), rng.uniform(-0.5, 0.5))
    elif kind == "brain_menin":
        size, rough, angle = rng.uniform(0.22, 0.36), 0.03, rng.uniform(0, 2 * np.pi)
        centre = ((1 - 0.6 * size) * np.cos(angle), (1 - 0.6 * size) * np.sin(angle))
    else:
        size, rough = rng.uniform(0.13, 0.22), 0.06
        centre = (rng.uniform(-0.06, 0.06), rng.uniform(0, 0.32))
    stretch = rng.uniform(0.85, 1.18)
    distance = np.hypot((x - centre[0]) * stretch, (y - centre[1]) / stretch) / size + rough * noise[0]
    inside = bright * (1 + 0.03 * noise[1])
    if kind == "brain_glioma":
        swelling = _ramp(distance + 0.15 * noise[2], rng.uniform(1.3, 1.9), 1.1)
        signal = signal + (tissue * rng.uniform(0.6, 0.85) - signal) * 0.8 * swelling
        patchy, hollow = bright * np.clip(0.8 + 0.3 * noise[2], 0.4, 1.1), _ramp(distance + 0.1 * noise[1], 0.8, 0.6)
        inside = patchy if rng.random() < 0.3 else inside + (tissue * rng.uniform(0.3, 0.75) - inside) * hollow
    return signal + (inside - signal) * _ramp(distance, 1.06, 0.94)


def _draw_oral(rng: Rng, kind: str, size: int) -> np.ndarray:
    """Stained tile (size, size, 3), 0 to 1: densities of two stains, whose colours are this picture's own."""
    y, x = (np.indices((size, size), np.float32) + 0.5) / size
    zoom = rng.uniform(0.9, 1.3) if kind == "oral_normal" else rng.uniform(1.4, 2.0)
    pearls = rng.uniform([0.1, 0.1, 0.08], [0.9, 0.9, 0.18], ((kind == "oral_scc") * rng.choice([0, 1, 1, 2]), 3))
    eosin = 0.55 + 0.1 * _noise(rng, size, 6) + 0.08 * _noise(rng, size, 40)
    if kind == "oral_normal":
        nuclei_N5, depth = _layered_nuclei(rng, zoom, x, y)
        eosin += 0.12 * np.sin(depth * rng.uniform(60, 110) + _noise(rng, size, 8)) * _ramp(depth, 0.1, 0.4)
    else:
        nuclei_N5 = _crowded_nuclei(rng, zoom, pearls)
    for a, b, radius in pearls:
        distance = np.hypot(x - a, (y - b) * rng.uniform(0.8, 1.25)) * (1 + 0.12 * _noise(rng, size, 5))
        coil = 2 * np.pi * distance / rng.uniform(0.035, 0.055) + np.arctan2(y - b, x - a)
        whorl = 0.85 + 0.25 * np.sin(coil + 0.8 * _noise(rng, size, 12))
        eosin += (whorl - eosin) * _ramp(distance, radius, 0.75 * radius)
    chromatin = 1 + rng.uniform(0.05, 0.2) * _noise(rng, size, 60)
    haematoxylin = chromatin * _paint(rng, size, nuclei_N5, 0.04 if kind == "oral_normal" else 0.08)
    tissue = _ramp(_noise(rng, size, 5), -2.6, -2.3)  # now and then a tear
    haematoxylin = (haematoxylin * tissue + rng.uniform(0.02, 0.2)) * rng.uniform(0.5, 1.5)
    amounts = np.stack([haematoxylin, eosin * tissue * rng.uniform(0.3, 1.0)], axis=-1)
    stains, vivid = np.maximum(_STAINS + rng.normal(0, 0.09, (2, 3)), 0.02), rng.uniform(0.6, 1.15)
    density = amounts @ stains.astype(np.float32)
    density = vivid * density + (1 - vivid) * density.mean(axis=-1, keepdims=True)
    density = ndimage.gaussian_filter(density, (*[rng.uniform(0.002, 0.005) * size] * 2, 0))
    image = rng.uniform(0.85, 1.05, 3) * np.exp(-np.maximum(density, 0))
    return image + rng.uniform(0.005, 0.025) * rng.standard_normal(image.shape, dtype=np.float32)


def _layered_nuclei(rng: Rng, zoom: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Small round nuclei in wavy layers: x, y, radius in tile widths, length / width, angle; depth of the pixels."""
    turn, gap = rng.uniform(0, 2 * np.pi), rng.uniform(0.075, 0.09) * zoom
    swing, pace, phase = rng.uniform(0.01, 0.05), rng.uniform(4, 9), rng.uniform(0, 6)
    disorder = rng.uniform(0.1, 0.25)
    along = (x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn)
    depth = (y - 0.5) * np.cos(turn) - (x - 0.5) * np.sin(turn) - swing * np.sin(pace * along + phase)
    steps = np.arange(-0.8, 0.8, gap)
    u, v = (g.ravel() for g in np.meshgrid(steps, steps + rng.uniform(0, gap)))
    u = u + np.repeat(rng.uniform(0, gap, len(steps)), len(steps)) + rng.normal(0, disorder * gap, len(u))
    keep = rng.random(len(u)) < np.where(v > rng.uniform(0.1, 0.5), 0.3, 0.92)
    v = v + swing * np.sin(pace * u + phase) + rng.normal(0, disorder * gap, len(v))
    u, v = u[keep], v[keep]
    radii = 0.34 * gap * np.exp(rng.normal(0, 0.1, len(u)))
    place = 0.5 + u * np.cos(turn) - v * np.sin(turn), 0.5 + u * np.sin(turn) + v * np.cos(turn)
    return np.column_stack([*place, radii, rng.uniform(1, 1.3, len(u)), turn + rng.normal(0, 0.3, len(u))]), depth


def _crowded_nuclei(rng: Rng, zoom: float, pearls: np.ndarray) -> np.ndarray:
    """Large, uneven nuclei in no order, which may touch, and flat ones around the pearls: rows as _layered_nuclei's."""
    grade, count = rng.uniform(0.5, 1), int(230 / zoom**2)  # a low grade is nearer to normal
    place, angles = rng.uniform(-0.05, 1.05, (2, count)), rng.uniform(0, np.pi, count)
    radii = np.clip((0.027 + 0.007 * grade) * np.exp(rng.normal(0, 0.12 + 0.26 * grade, count)), 0.015, 0.08) * zoom
    nuclei_N5 = np.column_stack([*place, radii, rng.uniform(1, 1.2 + 0.6 * grade, count), angles])
    for a, b, radius in pearls:
        turn, away = rng.uniform(0, 2 * np.pi, 18), radius * rng.uniform(1.0, 1.15, 18)
        flat = [a + away * np.cos(turn), b + away * np.sin(turn), [0.022 * zoom] * 18, [2.4] * 18, turn + np.pi / 2]
        outside = np.hypot(nuclei_N5[:, 0] - a, nuclei_N5[:, 1] - b) > radius
        nuclei_N5 = np.concatenate([np.column_stack(flat), nuclei_N5[outside]])
    x, y, radii = nuclei_N5.T[:3]
    close = np.hypot(x[:, None] - x, y[:, None] - y) < 0.75 * (radii[:, None] + radii)
    return nuclei_N5[~np.tril(close, -1).any(axis=1)]  # of two that overlap much the later one goes


def _paint(rng: Rng, size: int, nuclei_N5: np.ndarray, rough: float) -> np.ndarray:
    """Haematoxylin (size, size), 0 to 1, of nuclei with uneven outlines, drawn at twice the size."""
    draw = ImageDraw.Draw(picture := Image.new("L", (2 * size, 2 * size)))
    x, y, radii, stretch, angles = nuclei_N5.T[..., None]
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    bumps = sum(np.cos(k * turn + rng.uniform(0, 2 * np.pi, x.shape)) for k in (2, 3, 4))
    outline = radii * (1 + rough * bumps) * 2 * size
    long, short = outline * np.cos(turn) * stretch**0.5, outline * np.sin(turn) / stretch**0.5
    across = 2 * size * x + long * np.cos(angles) - short * np.sin(angles)
    down = 2 * size * y + long * np.sin(angles) + short * np.cos(angles)
    for polygon, shade in zip(np.dstack([across, down]), rng.integers(140, 256, len(x)), strict=True):
        draw.polygon(polygon.ravel().tolist(), fill=int(shade))
    return np.asarray(picture.reduce(2), np.float32) / 255
