from lib.errors import report_errors

report_errors()
