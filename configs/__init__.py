"""Training recipes as YAML. This package holds no code beyond finding them."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the recipes shipped with Eosin, sorted."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """Path of the shipped recipe ``name``; it need not exist."""
    return FOLDER / f"{name}.yaml"
