import numpy as np
import pytest

from medseg.cases import patient_of
from medseg.labels import KNOWN, RECODED, LabelMap, from_names


def test_msd_regions() -> None:
    masks = KNOWN["msd"].regions(np.array([0, 1, 2, 3]))
    assert masks.tolist() == [[False, False, True, True], [False, True, True, True], [False, False, False, True]]


def test_legacy_is_another_enhancing_tumour() -> None:
    assert KNOWN["legacy"].codes("ET") == (2,)
    assert KNOWN["msd"].codes("ET") == (3,)


@pytest.mark.parametrize("name", KNOWN)
def test_label_inverts_regions(name: str) -> None:
    known = KNOWN[name]
    label = np.array([[[0, known.edema, known.core, known.enhancing]]], np.uint8)
    assert np.array_equal(known.label(known.regions(label).astype(np.float32)), label)
    assert LabelMap.from_dict(known.to_dict()) == known


def test_et_wins_so_that_regions_nest() -> None:
    probs = np.zeros((3, 1, 1, 1), np.float32)
    probs[2] = 0.9
    assert KNOWN["msd"].label(probs).item() == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}, "msd"),
        ({"0": "bg", "1": "necrotic core (NCR)", "2": "oedema", "4": "enhancing tumor"}, "brats18"),
        ({"0": "bg", "1": "edema", "2": "enhancing tumour", "3": "non-enhancing"}, "legacy"),
        ({"0": "background", "1": "a", "2": "b", "3": "c"}, None),
        ({"0": "background", "1": "tumour"}, None),
    ],
)
def test_names_tell_the_map(names: dict[str, str], expected: str | None) -> None:
    found = from_names(names)
    assert (found.name if found else None) == expected


def test_scans_of_one_patient_by_their_names() -> None:
    assert patient_of("BraTS-GLI-00005-000") == patient_of("BraTS-GLI-00005-001") == "BraTS-GLI-00005"
    assert patient_of("BraTS-MEN-00005-000") != patient_of("BraTS-GLI-00005-000")
    assert patient_of("sub-01_ses-1") == patient_of("sub-01_ses-2_run-3") == patient_of("sub-01") == "sub-01"
    assert patient_of("sub-011_ses-1") != patient_of("sub-01_ses-1")
    assert patient_of("UPENN-GBM-00001_11") == patient_of("UPENN-GBM-00001_21") == "UPENN-GBM-00001"
    assert patient_of("UCSF-PDGM-0429_nifti") == patient_of("UCSF-PDGM-0429_FU003d_nifti") == "UCSF-PDGM-0429"
    for name in ("subject-01_ses-1", "BRATS_001", "Brats18_TCIA01_378_1", "BraTS2021_00005"):
        assert patient_of(name) == name


def test_recoding_keeps_the_regions() -> None:
    label = np.random.default_rng(0).integers(0, 4, (4, 5, 6)).astype(np.uint8)
    for name in ("brats18", "brats23", "msd"):
        other = KNOWN["msd"].recode(label, KNOWN[name])
        assert other.dtype == np.uint8
        assert np.array_equal(KNOWN[name].regions(other), KNOWN["msd"].regions(label))
        assert np.array_equal(KNOWN[name].recode(other, KNOWN["msd"]), label)
    assert set(np.unique(KNOWN["msd"].recode(label, KNOWN["brats18"])).tolist()) == {0, 1, 2, 4}


@pytest.mark.parametrize("name", sorted(RECODED))
def test_what_is_written_means_in_the_files_codes_what_was_read(name: str) -> None:
    read = np.random.default_rng(0).integers(0, 4, (4, 5, 6)).astype(np.uint8)
    written = KNOWN[name].in_files().label(KNOWN[name].regions(read).astype(np.float32))
    assert np.array_equal(np.vectorize({0: 0, **RECODED[name]}.get)(written), read)
