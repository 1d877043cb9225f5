from .page import ReportError, write_report
from .recorder import ReportRecorder

__all__ = ["ReportError", "ReportRecorder", "write_report"]
