from .page import write_report
from .recorder import ReportRecorder

__all__ = ["ReportRecorder", "write_report"]
