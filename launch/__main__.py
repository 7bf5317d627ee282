"""``python -m eosin.launch VERB ...``, which is what launchers start on every rank."""

from eosin.launch.cli import entry

entry()
