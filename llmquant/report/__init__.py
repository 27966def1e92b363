"""What a run says of its result: report.json, tables, verdict, report.html and the model card."""
