"""What the file names of TCGA, GTEx and CPTAC say of a slide. This module never opens a file.

TCGA: NCI's "TCGA Barcode" (https://docs.gdc.cancer.gov/Encyclopedia/pages/TCGA_Barcode/) and code table of sample
types (https://gdc.cancer.gov/resources-tcga-users/tcga-code-tables/sample-type-codes). A diagnostic slide (DX) is
formalin-fixed and paraffin-embedded; a tissue slide is cut from a frozen portion, at its top, middle or bottom (TS, MS,
BS; "Diagnostic slide" and "Tissue slide" in https://wiki.nci.nih.gov/display/TCGA).

GTEx: sample ids begin with ``GTEX-<donor>-<tissue site>``; the tissue of its slides is fixed in PAXgene and embedded in
paraffin (Carithers et al., "A novel approach to high-quality postmortem tissue procurement: the GTEx project", 2015).

CPTAC: slide ids are ``<case>-<number>``; a case is C3L- or C3N- and five digits, or, in the earlier collections, two
digits, BR, CO or OV, and three digits (the slide tables of The Cancer Imaging Archive). The name does not say how a
slide was prepared.
"""

from __future__ import annotations

import re

TCGA = re.compile(
    r"(?P<patient>TCGA-(?P<source>[A-Z0-9]{2})-[A-Z0-9]{4})"
    r"(?:-(?P<sample>\d{2})[A-Z](?:-\d{2}-(?P<cut>DX|TS|BS|MS)[A-Z0-9]{1,3})?)?(?=[-._ ]|$)"
)
GTEX = re.compile(r"(?P<patient>GTEX-[A-Z0-9]{4,5})-(?P<tissue>\d{4})(?=[-._ ]|$)")
CPTAC = re.compile(r"(?P<patient>C3[LN]-\d{5}|\d{2}(?:BR|CO|OV)\d{3})-[0-9a-f]+(?=[-._ ]|$)")
SAMPLE_TYPES = {
    "01": "Primary Solid Tumor",
    "02": "Recurrent Solid Tumor",
    "03": "Primary Blood Derived Cancer - Peripheral Blood",
    "04": "Recurrent Blood Derived Cancer - Bone Marrow",
    "05": "Additional - New Primary",
    "06": "Metastatic",
    "07": "Additional Metastatic",
    "08": "Human Tumor Original Cells",
    "09": "Primary Blood Derived Cancer - Bone Marrow",
    "10": "Blood Derived Normal",
    "11": "Solid Tissue Normal",
    "12": "Buccal Cell Normal",
    "13": "EBV Immortalized Normal",
    "14": "Bone Marrow Normal",
    "20": "Control Analyte",
    "40": "Recurrent Blood Derived Cancer - Peripheral Blood",
    "50": "Cell Lines",
    "60": "Primary Xenograft Tissue",
    "61": "Cell Line Derived Xenograft Tissue",
}
FFPE = "FFPE"
FROZEN = "frozen"
# PAXgene-fixed, paraffin-embedded.
PFPE = "PFPE"


def facts_of(name: str) -> dict[str, str]:
    """What a slide's file name says, with or without its ending and folders; empty where it follows no convention.

    Returns:
        For TCGA ``patient`` (the first 12 characters), ``site`` (TCGA and the tissue source site) and, where the name
        goes on so far, ``sample_type`` (NCI's words) and ``preparation`` ("FFPE" or "frozen"); for GTEx ``patient``,
        ``tissue_code`` and ``preparation`` ("PFPE"); for CPTAC ``patient``.
    """
    name = name.rpartition("/")[2]
    if found := TCGA.match(name):
        facts = {"patient": found["patient"], "site": f"TCGA-{found['source']}"}
        if found["sample"] in SAMPLE_TYPES:
            facts["sample_type"] = SAMPLE_TYPES[found["sample"]]
        if found["cut"]:
            facts["preparation"] = FFPE if found["cut"] == "DX" else FROZEN
        return facts
    if found := GTEX.match(name):
        return {"patient": found["patient"], "tissue_code": found["tissue"], "preparation": PFPE}
    if found := CPTAC.match(name):
        return {"patient": found["patient"]}
    return {}
