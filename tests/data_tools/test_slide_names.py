"""Names as their projects publish them, and names that only look like these."""

import pytest

from eosin.data_tools.slide_names import facts_of

TCGA = {"patient": "TCGA-A6-2680", "site": "TCGA-A6"}
PRIMARY = "Primary Solid Tumor"
UUID = "1a4c9bdf-5f4b-4d9e-a8e1-0c1d7e3fb2ac"


@pytest.mark.parametrize(
    ("name", "sample_type", "preparation"),
    [
        (f"TCGA-A6-2680-01Z-00-DX1.{UUID}.svs", PRIMARY, "FFPE"),
        ("TCGA-A6-2680-01Z-00-DX10", PRIMARY, "FFPE"),
        ("TCGA-A6-2680-06Z-00-DX1.svs", "Metastatic", "FFPE"),
        (f"TCGA-A6-2680-01A-01-TS1.{UUID}.svs", PRIMARY, "frozen"),
        ("TCGA-A6-2680-01A-01-BS1", PRIMARY, "frozen"),
        ("TCGA-A6-2680-11A-01-TSA.svs", "Solid Tissue Normal", "frozen"),
        ("TCGA-A6-2680-11A-01-MSA.svs", "Solid Tissue Normal", "frozen"),
        ("TCGA-A6-2680-03A-01-BSB.svs", "Primary Blood Derived Cancer - Peripheral Blood", "frozen"),
        ("colon/TCGA-A6-2680-02Z-00-DX1.svs", "Recurrent Solid Tumor", "FFPE"),
    ],
)
def test_tcga_slides(name, sample_type, preparation):
    assert facts_of(name) == TCGA | {"sample_type": sample_type, "preparation": preparation}


def test_tcga_names_that_end_early_say_what_they_say():
    assert facts_of("TCGA-A6-2680.svs") == TCGA
    assert facts_of("TCGA-A6-2680-11A.svs") == TCGA | {"sample_type": "Solid Tissue Normal"}
    assert facts_of("TCGA-A6-2680-99A-01-TS1") == TCGA | {"preparation": "frozen"}


def test_gtex():
    facts = {"patient": "GTEX-1117F", "tissue_code": "0126", "preparation": "PFPE"}
    assert facts_of("GTEX-1117F-0126.svs") == facts
    assert facts_of("GTEX-ZYWO-1326") == facts | {"patient": "GTEX-ZYWO", "tissue_code": "1326"}


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("C3L-00001-21.svs", "C3L-00001"),
        ("C3N-04162-26", "C3N-04162"),
        ("01BR030-1f5a9aad-61a1-4a64-a9b0-38cd2b.svs", "01BR030"),
        ("02OV005-a72cb87f-17eb-483a-9e7f-c3d00d.svs", "02OV005"),
    ],
)
def test_cptac_names_say_only_the_patient(name, patient):
    assert facts_of(name) == {"patient": patient}


@pytest.mark.parametrize(
    "name",
    [
        *("", "slide.svs", "TCGA.svs", "TCGA-A6", "TCGA-A6-268.svs", "TCGA-A6-26801-01Z-00-DX1.svs"),
        *("XTCGA-A6-2680.svs", "tcga-a6-2680-01z-00-dx1.svs", "TCGA-A6-2680/slide.svs"),
        *("GTEX-1117F.svs", "GTEX-1117F-01.svs", "GTEX-1117F-01265.svs"),
        *("C3L-00001.svs", "C3X-00001-21.svs", "C3L-1-21", "01XX030-1f5a.svs"),
    ],
)
def test_other_names_say_nothing(name):
    assert facts_of(name) == {}
