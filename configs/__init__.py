"""Training recipes and suites of evaluations as YAML. This package holds no code beyond finding them."""

from pathlib import Path

FOLDER = Path(__file__).parent
SUITES = "suites"


def names(kind: str = "") -> list[str]:
    """Names of the recipes shipped with Eosin, sorted; of the suites where ``kind`` is :data:`SUITES`."""
    return sorted(p.stem for p in (FOLDER / kind).glob("*.yaml"))


def path(name: str, kind: str = "") -> Path:
    """Path of the shipped recipe or suite ``name``; it need not exist."""
    return FOLDER / kind / f"{name}.yaml"
