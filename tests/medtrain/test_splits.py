import numpy as np
import pytest

from medtrain.splits import draw_key, split_cases, split_groups


def test_split_is_a_pure_function_of_the_set_of_ids() -> None:
    ids = [f"case{i}" for i in range(50)]
    split = split_cases(ids, seed=1, test_fraction=0.1)
    assert split == split_cases(ids[::-1], seed=1, test_fraction=0.1)
    assert split != split_cases(ids, seed=2, test_fraction=0.1)
    assert (len(split.train), len(split.val), len(split.test)) == (35, 10, 5)
    assert sorted(split.train + split.val + split.test) == sorted(ids)


def test_a_wanted_test_part_is_never_empty() -> None:
    assert len(split_cases(["a", "b", "c", "d"], test_fraction=0.1).test) == 1
    assert split_cases(["a", "b", "c", "d"]).test == ()


def numbered(count: int) -> list[str]:
    """Names as data sets have them: alike but for their digits."""
    return [f"BRATS_{n:03}" for n in range(1, count + 1)]


def pair_overlaps(splits: list[tuple[str, ...]]) -> np.ndarray:
    pairs = [(a, b) for n, a in enumerate(splits) for b in splits[:n]]
    return np.array([len(set(a) & set(b)) for a, b in pairs])


def test_another_seed_is_another_split_by_chance() -> None:
    splits = [split_cases(numbered(484), seed=seed).val for seed in range(20)]
    found = pair_overlaps(splits)
    # hypergeometric: 97 of 484 drawn twice share 19.4 on average, with a standard deviation of 3.5
    assert abs(found.mean() - 97 * 97 / 484) < 1.5
    assert 2 < found.std() < 5
    assert found.min() >= 5
    assert found.max() <= 36
    held = np.bincount([int(case[-1]) for split in splits for case in split], minlength=10)
    assert held.min() > 0.7 * held.mean()  # no last digit is always trained on


def test_another_seed_is_another_split_of_groups_by_chance() -> None:
    ids = [f"benign/benign_{n:04}.jpg" for n in range(1, 1001)]
    splits = [split_groups(ids, list(range(1000)), [0] * 1000, seed=seed).test for seed in range(12)]
    found = pair_overlaps(splits)
    assert abs(found.mean() - 22.5) < 2
    assert found.min() >= 8
    assert found.max() <= 40


@pytest.mark.parametrize("options", [{}, {"folds": 5, "fold": 3}, {"test_fraction": 0.2}])
def test_a_patient_lies_on_one_side(options: dict) -> None:
    ids = [f"{n:04}-{scan:03}" for n in range(60) for scan in range(1 + n % 3)]
    patients = {case: case[:4] for case in ids}
    split = split_cases(ids, patients=patients, **options)
    assert sorted(split.train + split.val + split.test) == ids
    sides = [{patients[case] for case in part} for part in (split.train, split.val, split.test)]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    assert abs(len(split.val) - 24) <= 4
    if "test_fraction" in options:
        assert abs(len(split.test) - 24) <= 2


def test_a_held_out_patient_is_held_out_whole() -> None:
    patients = {"a1": "a", "a2": "a", "b1": "b"}
    assert split_cases(["a1", "a2", "b1"], patients=patients, holdout=["a1", "a2"]).train == ("b1",)
    with pytest.raises(ValueError, match="case a2 is of the same patient as held-out case a1"):
        split_cases(["a1", "a2", "b1"], patients=patients, holdout=["a1"])


def test_folds_cover_every_case_once() -> None:
    ids = [f"case{i}" for i in range(13)]
    folds = [split_cases(ids, fold=f, folds=5) for f in range(5)]
    assert sorted(case for s in folds for case in s.val) == sorted(ids)
    assert all(not set(s.train) & set(s.val) for s in folds)


def test_holdout_and_no_validation() -> None:
    split = split_cases(["a", "b", "c"], holdout=["b"])
    assert (split.train, split.val) == (("a", "c"), ("b",))
    assert split_cases(["a", "b"], val_fraction=0).val == ()


@pytest.mark.parametrize(
    "options", [{"holdout": ["z"]}, {"fold": 3, "folds": 3}, {"holdout": ["a", "b"]}, {"val_fraction": 1.0}]
)
def test_an_impossible_split_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"case|fold"):
        split_cases(["a", "b"], **options)


def grouped(count: int, seed: int) -> tuple[list[str], list[int], list[int]]:
    """Ids in three strata, in groups of one to five."""
    rng = np.random.default_rng(seed)
    ids, groups, strata = [], [], []
    group = 0
    while len(ids) < count:
        stratum = int(rng.integers(3))
        for _ in range(int(rng.integers(1, 6))):
            ids.append(f"{stratum}/{len(ids):04}")
            groups.append(group)
            strata.append(stratum)
        group += 1
    return ids, groups, strata


@pytest.mark.parametrize("seed", range(6))
def test_a_group_never_lies_on_two_sides_and_every_stratum_has_its_share(seed: int) -> None:
    ids, groups, strata = grouped(400, seed)
    split = split_groups(ids, groups, strata, seed=seed)
    parts = {"train": split.train, "val": split.val, "test": split.test}
    assert sorted(case for part in parts.values() for case in part) == sorted(ids)
    group, stratum = dict(zip(ids, groups, strict=True)), dict(zip(ids, strata, strict=True))
    held = [{group[case] for case in part} for part in parts.values()]
    assert not held[0] & held[1] | held[0] & held[2] | held[1] & held[2]
    for s in range(3):
        total = strata.count(s)
        for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
            found = sum(stratum[case] == s for case in parts[name])
            assert abs(found - share * total) <= 5, (name, s)


def test_a_group_split_is_a_function_of_the_set() -> None:
    ids, groups, strata = grouped(200, 1)
    turned = [n for n in range(len(ids))][::-1]
    again = split_groups([ids[n] for n in turned], [1000 - groups[n] for n in turned], [strata[n] for n in turned])
    assert again == split_groups(ids, groups, strata)
    assert again != split_groups(ids, groups, strata, seed=1)
    assert split_groups(ids, groups, strata, test_fraction=0).test == ()


def test_an_image_a_group_is_a_stratified_random_split() -> None:
    ids = [f"{n:03}" for n in range(200)]
    split = split_groups(ids, list(range(200)), [n % 2 for n in range(200)])
    assert (len(split.train), len(split.val), len(split.test)) == (140, 30, 30)
    assert sum(int(case) % 2 for case in split.test) == 15


def test_too_few_groups_are_refused_and_one_giant_group_stays_whole() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 groups for 3 parts"):
        split_groups(["a", "b", "c", "d", "e"], [0, 1, 2, 3, 4], [0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="leave nothing for training"):
        split_groups(["a", "b", "c"], [0, 1, 2], [0, 0, 0], val_fraction=0.5, test_fraction=0.5)
    ids = [f"{n:02}" for n in range(20)]
    for seed in range(5):
        split = split_groups(ids, [0] * 18 + [1, 2], [0] * 20, seed=seed)
        assert sorted(map(len, (split.train, split.val, split.test))) == [1, 1, 18]
        assert len(split.train) == 18


def test_folds_of_groups_hold_every_id_once_and_split_no_group() -> None:
    ids = [f"i{n:03}" for n in range(120)]
    groups, strata = [n // 3 for n in range(120)], [n % 2 for n in range(120)]
    splits = [split_groups(ids, groups, strata, folds=5, fold=fold, val_fraction=0.2) for fold in range(5)]
    assert sorted(case for split in splits for case in split.test) == ids
    for split in splits:
        assert 20 <= len(split.test) <= 28
        assert not set(split.train) & {*split.val, *split.test}
        assert not set(split.val) & set(split.test)
        sides = [{groups[ids.index(case)] for case in part} for part in (split.train, split.val, split.test)]
        assert not sides[0] & sides[2]
        assert not sides[0] & sides[1]
    with pytest.raises(ValueError, match="fold 5 is not one of 0 to 4"):
        split_groups(ids, groups, strata, folds=5, fold=5)
    with pytest.raises(ValueError, match="has 4 groups"):
        split_groups(ids[:8], [0, 0, 1, 1, 2, 2, 3, 3], [0] * 8, folds=5)


def test_patients_with_two_classes_are_split_whole() -> None:
    ids = [f"{n:02}/{k}" for n in range(30) for k in range(8)]
    groups, strata = [n for n in range(30) for _ in range(8)], [0, 0, 0, 0, 0, 0, 1, 1] * 30
    split = split_groups(ids, groups, strata)
    for part in (split.train, split.val, split.test):
        assert {int(name[-1]) >= 6 for name in part} == {True, False}
    with pytest.raises(ValueError, match="class 1 has 0 groups for 1 parts"):
        split_groups(["a", "b", "c", "d", "e", "f", "g", "h"], [0, 1, 2, 3, 4, 5, 5, 5], [0] * 7 + [1],
                     seed=next(s for s in range(99) if draw_key(s, "f") == min(draw_key(s, n) for n in "abcdef")),
                     val_fraction=0.1, test_fraction=0.4)  # fmt: skip
