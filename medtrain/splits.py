"""Which cases are for training, for choosing the checkpoint and for testing: pure functions of the set of names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Case ids for training, for choosing the checkpoint, and (possibly none) for the final judgement."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...] = ()


def split_cases(
    ids: Sequence[str],
    *,
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
    fold: int = 0,
    folds: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    holdout: Sequence[str] = (),
) -> Split:
    """Split case ids; a pure function of the set of ids and the arguments, whatever the order of the ids.

    `patients` tells whose scans belong together: no patient lies on two sides. `holdout` names the validation cases
    outright. Else, with `folds` > 1, validation is fold `fold` of that many; else it is `val_fraction` of the cases (0:
    no validation). `test_fraction` of the cases is set aside first. Raises ValueError where training or a wanted
    validation would be empty, a name is unknown, or a scan of a held-out patient is not named.
    """
    unknown = sorted(set(holdout) - set(ids))
    if unknown:
        raise ValueError(f"held-out case {unknown[0]} is not in the data set")
    if folds > 1 and not 0 <= fold < folds:
        raise ValueError(f"fold {fold} is not one of 0 to {folds - 1}")
    owner = {case: (patients or {}).get(case, case) for case in ids}
    scans: dict[str, list[str]] = {}
    for case in sorted(ids):
        scans.setdefault(owner[case], []).append(case)
    for case in sorted(holdout):
        missing = sorted(set(scans[owner[case]]) - set(holdout))
        if missing:
            raise ValueError(f"case {missing[0]} is of the same patient as held-out case {case}: hold it out too")
    drawn = sorted(scans.values(), key=lambda group: draw_key(seed, group[0]))
    tests, rest = _first(drawn, max(1, round(test_fraction * len(ids))) if test_fraction else 0)
    if holdout:
        tests = [case for case in tests if case not in set(holdout)]
        vals = sorted(set(holdout))
    elif folds > 1:
        vals = [case for group in rest[fold::folds] for case in group]
    else:
        vals = _first(rest, max(1, round(val_fraction * len(ids))))[0] if val_fraction else []
    trains = [case for case in ids if case not in set(tests) | set(vals)]
    if not trains or (not vals and (holdout or folds > 1 or val_fraction)):
        raise ValueError(f"{len(ids)} cases leave {len(trains)} for training and {len(vals)} for validation")
    return Split(tuple(sorted(trains)), tuple(sorted(vals)), tuple(sorted(tests)))


def draw_key(seed: int, name: str) -> tuple[str, str]:
    """Where a name comes in the order that `seed` draws: a hash, not a position, so that one more name does not
    reshuffle the others. A cyclic code such as CRC-32 would not do: another seed only exclusive-ors it with a constant,
    which leaves names that follow each other in splits that are alike or have nothing in common.
    """
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).hexdigest(), name


def _first(groups: Sequence[list[str]], count: int) -> tuple[list[str], list[list[str]]]:
    """The cases of the first groups, at least `count` of them, and the groups that are left."""
    taken: list[str] = []
    for n, group in enumerate(groups):
        if len(taken) >= count:
            return taken, list(groups[n:])
        taken += group
    return taken, []


class TooFewGroups(ValueError):
    """A stratum has too few groups for the wanted parts."""

    def __init__(self, stratum: int, groups: int, parts: int):
        super().__init__(f"class {stratum} has {groups} groups for {parts} parts")
        self.stratum, self.groups, self.parts = stratum, groups, parts


def split_groups(
    ids: Sequence[str],
    groups: Sequence[int],
    strata: Sequence[int],
    *,
    seed: int = 0,
    fold: int = 0,
    folds: int = 0,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
) -> Split:
    """Split ids so that no group lies on two sides and every stratum (class) has about its share on each: groups are
    taken in a drawn order as long as half of one still fits. A pure function of the ids with their groups and strata,
    whatever their order.

    With `folds` > 1 the test part is fold `fold` of that many, whatever `test_fraction` says: every id is in one.

    A group belongs to the stratum of most of its members; a stratum that has the majority in none goes with the others'
    groups. Each id its own group is a stratified random split. Raises
    TooFewGroups where a stratum has too few groups for the wanted parts, ValueError where they take everything.
    """
    if folds > 1:
        if not 0 <= fold < folds:
            raise ValueError(f"fold {fold} is not one of 0 to {folds - 1}")
        test_fraction = 1 / folds
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"validation {val_fraction:g} and test {test_fraction:g} leave nothing for training")
    members: dict[int, list[int]] = {}
    for n in sorted(range(len(ids)), key=lambda n: ids[n]):
        members.setdefault(groups[n], []).append(n)
    by_stratum: dict[int, list[list[int]]] = {}
    for group in members.values():
        held = [strata[n] for n in group]
        by_stratum.setdefault(max(sorted(set(held)), key=held.count), []).append(group)
    chosen: dict[str, list[str]] = {"test": [], "val": [], "train": []}
    fractions = {"test": test_fraction, "val": val_fraction}
    wanted = [part for part, fraction in fractions.items() if fraction]
    for stratum, found in sorted(by_stratum.items()):
        if len(found) < max(folds, len(wanted) + 1):
            raise TooFewGroups(stratum, len(found), max(folds, len(wanted) + 1))
        found.sort(key=lambda group: draw_key(seed, ids[group[0]]))
        total, left = sum(map(len, found)), found
        if folds > 1:
            tests = _folds(found, folds)[fold]
            chosen["test"] += [ids[n] for group in tests for n in group]
            left = [group for group in found if group not in tests]
        for part in [part for part in wanted if folds < 2 or part == "val"]:
            taken, rest = _fill(left, fractions[part] * total, keep=len(wanted) - wanted.index(part))
            chosen[part] += [ids[n] for group in taken for n in group]
            left = rest
        chosen["train"] += [ids[n] for group in left for n in group]
    of = dict(zip(ids, strata, strict=True))
    for stratum in sorted(set(strata) - {of[name] for name in chosen["train"]}):
        raise TooFewGroups(stratum, 0, 1)
    return Split(*(tuple(sorted(chosen[part])) for part in ("train", "val", "test")))


def _folds(groups: list[list[int]], folds: int) -> list[list[list[int]]]:
    """Groups in order as so many parts of nearly equal size."""
    size, left, parts = sum(map(len, groups)) / folds, groups, []
    for later in range(folds - 1, 0, -1):
        taken, left = _fill(left, size, keep=later)
        parts.append(taken)
    return [*parts, left]


def _fill(groups: list[list[int]], size: float, keep: int) -> tuple[list[list[int]], list[list[int]]]:
    """Take groups in order until `size` ids are reached as nearly as possible, at least one, leaving `keep` groups."""
    taken: list[list[int]] = []
    rest: list[list[int]] = []
    count = 0
    for n, group in enumerate(groups):
        room = len(groups) - n + len(rest) > keep
        if room and count + len(group) / 2 <= size:
            taken.append(group)
            count += len(group)
        else:
            rest.append(group)
    if not taken:  # every group is too large
        smallest = min(rest, key=len)
        rest.remove(smallest)
        taken = [smallest]
    return taken, rest
