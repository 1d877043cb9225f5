from .data import ReportError, load_report
from .page import write_report

__all__ = ["ReportError", "load_report", "write_report"]
