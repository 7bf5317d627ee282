"""The ``eosin`` command line, its launchers, and the release of a model."""
