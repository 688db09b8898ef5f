"""The report of one run, or of several compared: one self-contained page, made from output folders alone.

`run_reader` reads the files, `curves`, `run_outcome` and `report_tables` say what is shown of them, `report_page` puts
the page together, `live_server` keeps it up to date. A new section is a file read in `run_reader`, its text in
`run_outcome` or `report_tables`, and a place in `report_body.html`.
"""

from finetune.report.report_page import FILE, render_report, write_at_the_end, write_report
from finetune.report.run_reader import RunRecord, has_ended, read_run
