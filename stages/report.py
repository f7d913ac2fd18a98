"""Report on all seeds: figures, curves and tables of every stage -> report.html, metrics.json, submission/."""

from pathlib import Path

from lib.artifacts.files import write_bytes, write_json
from lib.artifacts.metrics import METRICS_FILE
from lib.artifacts.paths import REPORT_FOLDER
from lib.params import load_params, read_params
from lib.reporting.config import ReportParams
from lib.reporting.html import make_metrics, make_report
from lib.reporting.runs import check_runs
from lib.reporting.summary import read_metrics
from lib.submission.bundle import list_packages, make_bundle
from lib.submission.folder import Program, write_submission


def main() -> None:
    """Run the stage."""
    report, params = load_params("report", ReportParams), read_params()
    recorded = check_runs(params)
    metrics = read_metrics(params["seeds"])
    write_bytes(REPORT_FOLDER / "report.html", make_report(report, params, metrics, recorded=recorded).encode())
    write_json(REPORT_FOLDER / METRICS_FILE, make_metrics(report, params["seeds"], metrics))
    program = Program(make_bundle(params, Path()), list_packages(Path()))
    write_submission(REPORT_FOLDER / "submission", report, params, metrics, program)


if __name__ == "__main__":
    main()
