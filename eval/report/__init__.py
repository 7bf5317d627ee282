"""The report of a run: one self-contained HTML page, in the order of the road from slides to probes."""

from eosin.eval.report.write import write_report

__all__ = ["write_report"]
