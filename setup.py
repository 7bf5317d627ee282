"""Packaging: the five top-level folders are installed as ``eosin.*``.

``ssl/`` has no ``__init__.py``, so that Python's own ``ssl`` module is found even when the checkout's root is first
on ``sys.path``; it becomes the namespace package ``eosin.ssl`` here.
"""

from pathlib import Path

from setuptools import setup

ROOMS = ["configs", "data_tools", "ssl", "eval", "launch"]
ROOT = Path(__file__).parent


def packages() -> dict[str, str]:
    """Map every package name to its folder: ``eosin.ssl.stain`` -> ``ssl/stain``."""
    found = {}
    for room in ROOMS:
        folders = [ROOT / room, *(p.parent for p in (ROOT / room).rglob("__init__.py"))]
        for folder in folders:
            relative = folder.relative_to(ROOT).as_posix()
            found["eosin." + relative.replace("/", ".")] = relative
    return found


setup(
    packages=sorted(packages()),
    package_dir=packages(),
    package_data={
        "eosin.configs": ["*.yaml", "suites/*.yaml"],
        "eosin.data_tools": ["*.html.j2"],
        "eosin.eval": ["*.html.j2"],
        "eosin.launch": ["*.md.j2"],
    },
)
