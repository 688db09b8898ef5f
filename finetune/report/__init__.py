"""The report of a run, or of several over each other: one page that stands alone, made from output folders alone.

`reading` takes what the files say, `curves`, `outcome` and `facts` what is shown of it, `page` puts it together,
`watching` keeps it up to date. A new section is a file read in `reading`, what to say of it in `outcome` or `facts`,
and a place in `body.html`.
"""

from __future__ import annotations

from finetune.report.report_file import FILE, write_at_the_end, write_report
from finetune.report.report_page import render_report
from finetune.report.run_reader import RunRecord, has_ended, read_run

__all__ = ["FILE", "RunRecord", "has_ended", "read_run", "render_report", "write_at_the_end", "write_report"]
