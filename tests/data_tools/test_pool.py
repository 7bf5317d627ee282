"""A pool of processes against jobs that end, crash, and take their time."""

import time

from eosin.data_tools.pool import AHEAD, run_each


def test_a_job_that_kills_its_process_is_refused_and_the_others_finish():
    jobs = ["1", "2", "__import__('os').abort()", "4", "5", "6"]
    results = list(run_each(eval, jobs, 2))
    assert [results[i] for i in (0, 1, 3, 4, 5)] == [1, 2, 4, 5, 6]
    assert results[2] == "reading it killed the process"


def test_results_come_in_order_and_few_jobs_are_begun_ahead(tmp_path):
    """While the first result is not taken, no more jobs are handed out than may be ahead."""
    jobs = [f"__import__('pathlib').Path({str(tmp_path)!r}, '{n}').touch() or {n}" for n in range(3 * AHEAD)]
    results = run_each(eval, jobs, 2)
    assert next(results) == 0
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 * AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == 2 * AHEAD
    assert list(results) == list(range(1, 3 * AHEAD))
