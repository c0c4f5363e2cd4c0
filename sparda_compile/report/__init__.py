"""What `explain` found, and how it is shown."""

from sparda_compile.report.model import (
    LayerPlan,
    PassSummary,
    PromptMemory,
    Report,
    SiteSummary,
)

__all__ = ["LayerPlan", "PassSummary", "PromptMemory", "Report", "SiteSummary"]
