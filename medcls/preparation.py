"""From folders of images to the cache: several processes, resumable, one pass over the files, bounded memory."""

import hashlib
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medcls import images, keypoints
from medcls.cache import ImageCache, Images, digest, write_images
from medcls.duplicates import NEAR_BITS, conflicts, joined, same_bytes, similar_pairs
from medcls.folders import ImageFolder, read_folders
from medtrain import hdf5
from medtrain.aside import listing_of, report
from medtrain.errors import UserError
from medtrain.files import replacing
from medtrain.paths import escapes, follows_links, origin, spelt
from medtrain.patients import NAME as PATIENTS
from medtrain.patients import has_patients, read_patients
from medtrain.preparing import existing, make_once, parts_of, refuse_other, say_outdated
from medtrain.processes import in_processes
from medtrain.progress import Progress
from medtrain.wording import shown

# files and bytes of one part; a process holds one part in memory
CHUNK, CHUNK_BYTES = 256, 64 << 20
# Type and axes of what a part holds.
PART_TYPES = {
    "bytes": ("u1", 1), "length": ("i8", 1), "size": ("i4", 2), "digest": ("u1", 2), "checksum": ("u1", 2),
    "hashes": ("u8", 3), "places": ("f2", 4), "descriptors": ("u1", 4), "histogram": ("f4", 2), "facts": ("u1", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Preparation:
    """How files become cache entries; stored with the cache."""

    near_bits: int = NEAR_BITS
    inliers: int = keypoints.INLIERS
    version: int = images.VERSION
    grouping: int = 2  # raised whenever groups of near-duplicates are drawn otherwise
    silence: int = 2  # raised whenever less of a file's metadata is kept, where no pixel changes


def prepare_folder(place: Path, out: Path, *, workers: int = 1, strict: bool = False) -> Path:
    """Make the image cache `out` from a data folder; a second call goes on where the first ended.

    Files that can not be used are set aside: named on stderr and in the cache's facts, or, if `strict`, a UserError.
    Parts wait in `<out>.parts` until all are there, then `out` appears whole. Raises UserError.
    """
    work = _Work.planned(place, out, workers, strict)
    return make_once(out, lambda: _holds(work), lambda: _make(work))


@dataclass(frozen=True)
class _Work:
    """What one call of `prepare_folder` has to do: the folder that was named, what was found, the files of each part,
    the parts' own files, whose the images are, and a hash of all that the cache depends on.
    """

    place: Path
    data: ImageFolder
    out: Path
    workers: int
    strict: bool
    chunks: list[tuple[tuple[str, int], ...]]
    parts: list[Path]
    patients: dict[str, int]
    wanted: str

    @classmethod
    def planned(cls, place: Path, out: Path, workers: int, strict: bool) -> "_Work":
        data = read_folders(place)
        for note in data.notes:
            print(f"note: {note}", flush=True)
        chunks = _chunks(data)
        recipes = [_recipe(data, chunk) for chunk in chunks]
        print(f"{shown(data.root.resolve().name)}: {data.in_words()}", flush=True)
        if place != data.root and has_patients(place):
            where = spelt(data.root)
            raise UserError(f"{spelt(place / PATIENTS)} lies above the folder of the images: move it to {where}.")
        patients = read_patients(data.root, {path for path, _ in data.files}, "file")
        known = [data.classes, recipes, *([patients] if patients else [])]
        wanted = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
        parts = [parts_of(out) / f"{recipe}.h5" for recipe in recipes]
        return cls(place, data, out, workers, strict, chunks, parts, patients, wanted)


def _make(work: _Work) -> None:
    _examine(work)
    _assemble(work)


def _examine(work: _Work) -> None:
    """Write the parts that are not there."""
    root = work.data.root
    todo = [(str(root), chunk, part) for chunk, part in zip(work.chunks, work.parts, strict=True) if not _whole(part)]
    if len(todo) < len(work.parts):
        print(f"{len(work.parts) - len(todo)} of {len(work.parts)} parts are prepared already", flush=True)
    with Progress(sum(len(chunk) for _, chunk, _ in todo), "prepare") as progress:
        for done in in_processes(_write_part, todo, work.workers, what=f"prepared {spelt(root)}"):
            progress.advance(count=done)


def _assemble(work: _Work) -> None:
    """Join the parts into the cache."""
    data, patients = work.data, work.patients
    small = [_read_part(part) for part in work.parts]
    bad = [item for part in small for item in part["bad"]]
    files = dict(data.files)
    paths = [path for part in small for path in part["paths"]]
    targets = [files[path] for path in paths]
    digests = [bytes(row) for part in small for row in part["digest"]]
    _refuse_empty(data, set(targets), bad)
    _refuse_bad(data.root, bad, work.strict)
    near = _near(work, targets, digests)
    facts = {
        "bad": bad,
        "converted": [item for part in small for item in part["converted"]],
        "conflicts": [[paths[n] for n in held] for held in conflicts(digests, targets)],
        "files": len(data.files),
        "patients": len(set(patients.values())),
        "nobodys": sum(path not in patients for path, _ in data.files) if patients else 0,
        "wanted": work.wanted,
    }
    _report(facts, work)
    groups = _groups(near, [patients.get(path) for path in paths])
    write_images(work.out, (_images(part, files) for part in work.parts), size=sum(part["size"] for part in small),
                 groups=groups, near=near, classes=data.classes, facts=facts, preparation=asdict(Preparation()),
                 origin=origin(work.place))  # fmt: skip


def _refuse_empty(data: ImageFolder, used: set[int], bad: list[list[str]]) -> None:
    """Raise UserError where no image of a class can be read."""
    for number in range(len(data.classes)):
        if number not in used:
            first = data.class_files(number)[0]
            place, reason = (data.root / first).parent, next(words for path, words in bad if path == first)
            raise UserError(
                f"{spelt(place)} holds no image that can be read ({Path(first).name}: {reason}): restore its files."
            )


def _groups(near: np.ndarray, patients: list[int | None]) -> np.ndarray:
    """(N,) groups that no split cuts: near-duplicates, and images of one patient where `patients` tells."""
    first: dict[int, int] = {}
    pairs = [(first.setdefault(who, n), n) for n, who in enumerate(patients) if who is not None]
    copies = np.stack([np.unique(near, return_index=True)[1][near], np.arange(len(near))], 1)
    return joined(len(near), np.concatenate([copies, np.array(pairs, np.int64).reshape(-1, 2)]))


def _near(work: _Work, targets: list[int], digests: list[bytes]) -> np.ndarray:
    """(N,) near-duplicate groups: the same bytes anywhere, or alike within one cancer; a process a cancer."""
    same = same_bytes(digests)
    pairs = [np.stack([same, np.arange(len(same))], 1)]
    cancer = np.array([work.data.classes[target][0] for target in targets])
    # copies are looked for within a cancer, so one of equal files stands for them in each
    within = same_bytes([name.encode() + digest for name, digest in zip(cancer.tolist(), digests, strict=True)])
    unique = within == np.arange(len(same))
    jobs = [(work.parts, np.flatnonzero(unique & (cancer == name))) for name in dict.fromkeys(cancer.tolist())]
    with Progress(int(unique.sum()), "compare") as progress:
        for count, found in in_processes(_alike, jobs, work.workers, what=f"compared {spelt(work.data.root)}"):
            pairs.append(found)
            progress.advance(count=count)
    return joined(len(same), np.concatenate(pairs))


def _alike(job: tuple[list[Path], np.ndarray]) -> tuple[int, np.ndarray]:
    """(how many images, pairs among them that show the same photograph) of images numbered over all parts."""
    parts, members = job
    looks, start = [], 0
    for part in parts:
        with hdf5.file(part) as file:
            count = len(_stored(file, "digest", part))
            mine = members[(members >= start) & (members < start + count)] - start
            if mine.size:
                looks.append([_stored(file, name, part)[()][mine] for name in ("hashes", "places", "descriptors")])
        start += count
    hashes, places, descriptors = (np.concatenate([part[n] for part in looks]) for n in range(3))
    return len(members), members[similar_pairs(hashes, places, descriptors)]


def _refuse_bad(root: Path, bad: list[list[str]], strict: bool) -> None:
    if bad and strict:
        path, reason = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        where = spelt(root / path)
        raise UserError(f"{where} can not be used: {reason}{more}; repair it, remove it, or leave out --strict.")


def _report(facts: dict[str, Any], work: _Work) -> None:
    """Tell what was set aside, on stderr and in a list beside the cache, and what lies under several classes."""
    if facts.get("patients"):
        nobodys = f", {facts['nobodys']} of {facts['files']} images have none" if facts.get("nobodys") else ""
        print(f"{facts['patients']} patients are told by {PATIENTS}{nobodys}: no group split cuts one", flush=True)
    report(facts["bad"], listing_of(work.out), "file", head="file", root=work.data.root)
    for held in facts["conflicts"][:20]:
        print(f"WARNING: the same image under several classes: {', '.join(held)}", file=sys.stderr)


def _write_part(job: tuple[str, tuple[tuple[str, int], ...], Path]) -> int:
    """Examine some files and write what is known of them, atomically; returns their number."""
    root, files, part = job
    kept: list[images.Examined] = []
    paths, bad, converted = [], [], []
    for path, _ in files:
        try:
            if (Path(root) / path).is_symlink() and escapes(Path(root), Path(root) / path):
                raise images.BadImage("a link that leaves the data folder; MEDTRAIN_FOLLOW_LINKS=1 allows it")
            made = images.examine(images.read_file(Path(root) / path))
        except images.BadImage as error:
            bad.append([path, str(error)])
            continue
        except OSError as error:  # a fault of the disk or network, not of the file: not to be remembered
            raise UserError(f"{spelt(Path(root) / path)} can not be read ({error.strerror}): run it again.") from None
        kept.append(made)
        paths.append(path)
        if made.converted:
            converted.append([path, made.converted])
    with replacing(part) as temporary, hdf5.file(temporary, "w") as file:
        file["bytes"] = np.frombuffer(b"".join(made.encoded for made in kept), np.uint8)
        file["length"] = np.array([len(made.encoded) for made in kept], np.int64)
        file["size"] = np.array([made.size for made in kept], np.int32).reshape(-1, 2)
        for name, width in (("digest", 16), ("checksum", 16)):
            values = [made.digest if name == "digest" else digest(made.encoded) for made in kept]
            file[name] = np.frombuffer(b"".join(values), np.uint8).reshape(-1, width)
        file["hashes"] = np.array([made.hashes for made in kept], np.uint64).reshape(-1, 8, 4)
        file["places"] = np.array([made.places for made in kept], np.float16).reshape(-1, 2, keypoints.POINTS, 2)
        descriptors = np.array([made.descriptors for made in kept], np.uint8)
        file["descriptors"] = descriptors.reshape(-1, 2, keypoints.POINTS, 32)
        file["histogram"] = np.array([made.histogram for made in kept], np.float32).reshape(-1, images.HISTOGRAM)
        facts = {"paths": paths, "bad": bad, "converted": converted}
        file["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    return len(files)


def _stored(file: Any, name: str, part: Path) -> Any:
    """What lies under a name in an opened part, not read yet; UserError where it is damaged or lies elsewhere."""
    kind, axes = PART_TYPES[name]
    try:
        return hdf5.dataset(file, name, kind, axes, part.stat().st_size, plain=True)
    except hdf5.FAULTS as error:
        if fault := hdf5.system_fault(error):
            raise UserError(f"{part} can not be read ({fault}): see to it, and run this again.") from None
        raise UserError(f"{part} is damaged ({shown(error, 80)}): remove it, and run this again.") from None


def _facts(file: Any, part: Path) -> Any:
    return json.loads(_stored(file, "facts", part)[()].tobytes())


def _read_part(part: Path) -> dict[str, Any]:
    """A part's paths, files set aside, digests, and the size of its encoded bytes."""
    with hdf5.file(part) as file:
        sizes = {"digest": _stored(file, "digest", part)[()], "size": _stored(file, "bytes", part).size}
        return {**_facts(file, part), **sizes}


def _images(part: Path, files: dict[str, int]) -> Images:
    with hdf5.file(part) as file:
        read = {name: _stored(file, name, part)[()] for name in ("bytes", "length", "size", "checksum", "histogram")}
        paths = _facts(file, part)["paths"]
    content, ends = read.pop("bytes").tobytes(), np.concatenate([[0], np.cumsum(read.pop("length"))])
    encoded = [content[a:b] for a, b in itertools.pairwise(ends)]
    return Images(encoded, paths, {**read, "target": np.array([files[path] for path in paths], np.int32)})


def _whole(part: Path) -> bool:
    try:
        with hdf5.file(part) as file:
            held, known = {name: _stored(file, name, part) for name in PART_TYPES}, _facts(file, part)
            count = len(known["paths"])
            same = {len(column) for name, column in held.items() if name not in ("bytes", "facts")} == {count}
            return bool(same and held["length"][()].sum() == held["bytes"].size and isinstance(known["bad"], list))
    except (UserError, *hdf5.FAULTS):
        return False


def _chunks(data: ImageFolder) -> list[tuple[tuple[str, int], ...]]:
    """The files in parts that are bounded in number and in bytes."""
    chunks: list[list[tuple[str, int]]] = []
    size = 0
    for path, number in data.files:
        try:
            length = (data.root / path).stat().st_size
        except OSError:
            length = 0
        if not chunks or len(chunks[-1]) >= CHUNK or size + length > CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append((path, number))
        size += length
    return [tuple(chunk) for chunk in chunks]


def _recipe(data: ImageFolder, chunk: tuple[tuple[str, int], ...]) -> str:
    """Names what a part holds (paths, sizes, times) and how it was made, so that a changed file is read anew."""
    stats: list[Any] = []
    for path, _ in chunk:
        try:
            stat = (data.root / path).stat()
            stats.append([path, stat.st_size, stat.st_mtime_ns])
        except OSError:  # it is set aside, with its reason, when it is read
            stats.append([path, None, None])
    # what was set aside as a link is looked at again where links may be followed now
    text = json.dumps([asdict(Preparation()), stats, *([True] if follows_links() else [])])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _holds(work: _Work) -> bool:
    """Whether the cache is there and up to date; raises UserError where it is something else than an older state."""
    cache = existing(work.out, ImageCache)
    if cache is None:
        return False
    cache.close()
    facts = cache.facts
    if facts.get("wanted") == work.wanted:
        print(f"{work.out} already holds these {facts['files']} images", flush=True)
        _refuse_bad(work.data.root, facts["bad"], work.strict)
        _report(facts, work)
        return True
    if cache.origin not in ("", origin(work.place)):
        refuse_other(work.out, work.place)
    say_outdated(work.out)
    return False
