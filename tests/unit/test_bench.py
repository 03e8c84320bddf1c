"""The harness of the measurements: the figures, their summary, and contenders that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import load
from bench.__main__ import parser
from bench.contenders import CONTENDERS, Ask, Contender, Place
from bench.goals import GOALS, compare, needed, report
from bench.harness import Measurement
from bench.load import Missing, Queue, together
from bench.picture import PICTURED, draw
from bench.processes import Broken, program, run_client
from bench.results import F1, Entry, Results, conditions, figure, table, update, write
from bench.workloads import PARTS, Part, Row, Sizes, Workload
from support.daemonlog import DEADLINE
from support.deadline import wait_until

ROOT = Path(__file__).parents[2]
ROWS = {row.key: row for part in PARTS.values() for row in part.rows}
SPEED, DELAY = Row("speed", "The speed", "calls/s"), Row("delay", "The delay", "ms", "p50")
PART = Part(
    "part", "A part", (Workload("speed", lambda sizes: {}, (SPEED,)), Workload("delay", lambda sizes: {}, (DELAY,)))
)
SIZES = Sizes().scaled(0.001)


def results(row: str = "speed", **values: Sequence[float]) -> Results:
    """Results of one row; the values of each contender run by run."""
    found = Results()
    for contender, figures in values.items():
        for run, value in enumerate(figures):
            found.add(row, contender, run, {"rate": value}, "rate")
    return found


def one(entries: Sequence[Entry], contender: str) -> Entry:
    [found] = [entry for entry in entries if entry["contender"] == contender]
    return found


def test_entry_has_median_min_and_max() -> None:
    entry = one(results(HARP=[3.0, 1.0, 2.0, 9.0]).entries(PART), "HARP")
    assert (entry["median"], entry["min"], entry["max"], entry["runs"]) == (2.5, 1.0, 9.0, 4)
    assert "ratio" not in entry


def test_ratio_is_of_medians_and_its_range_of_common_runs() -> None:
    found = results(HARP=[10, 20, 30], peer=[5, 20, 10])
    found.add("speed", "late", 1, {"rate": 5.0}, "rate")
    entries = found.entries(PART)
    assert [one(entries, "peer")[key] for key in ("ratio", "ratio_min", "ratio_max")] == [2.0, 1.0, 3.0]
    assert [one(entries, "late")[key] for key in ("ratio", "ratio_min", "ratio_max")] == [4.0, 4.0, 4.0]
    assert "ratio" not in one(results(peer=[5]).entries(PART), "peer")


def test_entries_begin_with_harp_then_the_best() -> None:
    names = [entry["contender"] for entry in results(slow=[1], HARP=[2], fast=[9]).entries(PART)]
    assert names == ["HARP", "fast", "slow"]
    names = [entry["contender"] for entry in results("delay", slow=[9], HARP=[5], fast=[1]).entries(PART)]
    assert names == ["HARP", "fast", "slow"]


def test_table_has_each_figure_and_marks_durable_contenders() -> None:
    part = replace(PART, stored=True)
    lines = list(table(results(HARP=[1000, 1200], peer=[100, 50]).entries(part, ["HARP"])))
    assert lines[0].split() == ["median", "min", "max", "HARP/this", "(min", "to", "max)"]
    assert lines[1] == "The speed, calls/s"
    assert [line.split() for line in lines[2:4]] == [
        ["HARP", "*", "1,100", "1,000", "1,200"],
        ["peer", "75.0", "50.0", "100", "14.7", "x", "(10.0", "to", "24.0)"],
    ]
    assert lines[4].startswith("* each job")


@pytest.mark.parametrize(("value", "text"), [(12345.6, "12,346"), (99.96, "100.0"), (12.34, "12.3"), (0.123, "0.12")])
def test_figure_shows_significant_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_document_keeps_parts_that_are_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    old: dict[str, Any] = {
        "parts": {"part": {"date": "old"}, "other": {"date": "old"}},
        "goals": [{"goal": 2, "row": "speed"}, {"goal": 3, "row": "else"}],
        "rows": [{"part": "other"}, {"part": "part"}],
    }
    entries = results(HARP=[100.0, 301.23456], peer=[50.0]).entries(PART)
    write(update(old, {"part": {"date": "new"}}, entries, [{"goal": 1, "row": "speed"}]), file)
    document = json.loads(file.read_text())
    assert document["parts"] == {"part": {"date": "new"}, "other": {"date": "old"}}
    assert [row["part"] for row in document["rows"]] == ["other", "part", "part"]
    assert (document["rows"][1]["median"], document["rows"][1]["max"]) == (200.6, 301.2)
    assert document["goals"] == [{"goal": 1, "row": "speed"}, {"goal": 3, "row": "else"}]
    assert len(file.read_text().splitlines()) == 15


def test_committed_results_match_the_rows_of_the_tables() -> None:
    file = ROOT / "bench" / "results" / "latest.json"
    document = json.loads(file.read_text())
    assert len(file.read_text().splitlines()) <= 300
    assert {entry["row"] for entry in document["rows"]} <= ROWS.keys()
    assert {entry["part"] for entry in document["rows"]} == document["parts"].keys() <= PARTS.keys()
    assert all(part["interpreter"] and part["machine"] and part["date"] for part in document["parts"].values())
    for entry in document["rows"]:
        assert entry["min"] <= entry["median"] <= entry["max"]
    assert file.with_suffix(".svg").read_text() == draw(document)


def drawn(less_is_better: bool, durable: Sequence[str], **values: Sequence[float]) -> tuple[list[str], list[str]]:
    """Draw one row; return the texts below the scale, and the colour of each bar."""
    row = PICTURED[0]
    workload = Workload(row, lambda sizes: {}, (Row(row, "A row", "ms" if less_is_better else "calls/s"),))
    part = Part("part", "A part", (workload,), stored=True)
    root = ElementTree.fromstring(draw({"rows": results(row, **values).entries(part, durable)}))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    return texts[5:], [bar.attrib["fill"] for bar in root.iter("{http://www.w3.org/2000/svg}rect")]


def test_picture_shows_factor_faster_or_slower() -> None:
    values = {"HARP": [1000, 1200], "a & b": [100, 50], "better": [2200, 2200]}
    texts, colours = drawn(False, [], **values)
    assert texts == ["A row: 1,100 calls/s", "better", "2.00 x slower", "a & b", "14.7 x faster"]
    assert len(set(colours)) == 2
    texts, _ = drawn(True, [], **values)
    assert texts == ["A row: 1,100 ms", "a & b", "14.7 x slower", "better", "2.00 x faster"]


def test_picture_shows_durable_peers_and_the_best_of_the_others() -> None:
    texts, _ = drawn(False, ["safe"], HARP=[8], safe=[1], fast=[4], faster=[16])
    assert texts[1::2] == ["faster", "safe *"]
    texts, _ = drawn(False, [], HARP=[8], one=[1], two=[2], three=[4], four=[16])
    assert texts[1::2] == ["four", "three", "two"]


def test_conditions_name_machine_and_interpreter(tmp_path: Path) -> None:
    found = conditions(tmp_path)
    assert "cores" in found["machine"]
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in found["interpreter"]
    assert found["configured"] == " ".join(sysconfig.get_config_var("CONFIG_ARGS").split())


def test_command_line_takes_parts_sizes_and_contenders() -> None:
    options = parser().parse_args(["direct", "jobs", "--quick", "--runs", "3", "--only", "HARP", "--only", "RQ"])
    assert (options.parts, options.quick, options.runs, options.only) == (["direct", "jobs"], True, 3, ["HARP", "RQ"])


@pytest.mark.parametrize("arguments", [["nothing"], ["--runs", "0"], ["--runs", "many"], ["--scale", "much"]])
def test_command_line_error_names_the_value(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_help_names_every_part() -> None:
    assert all(f"\n  {key} " in parser().format_help() for key in PARTS)


def test_contenders_run_listed_workloads_and_harp_runs_all() -> None:
    workloads = {workload.key for part in PARTS.values() for workload in part.workloads}
    assert set(PICTURED) <= ROWS.keys()
    assert CONTENDERS[0].name == "HARP"
    assert CONTENDERS[0].functions.keys() == workloads
    assert all(contender.functions.keys() <= workloads for contender in CONTENDERS)
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)


def test_goals_need_only_workloads_of_contenders() -> None:
    workloads = {row.key: workload for part in PARTS.values() for workload in part.workloads for row in workload.rows}
    by_name = {contender.name: contender for contender in CONTENDERS}
    figures = [("HARP", goal.row) for goal in GOALS] + [goal.other for goal in GOALS if goal.other]
    assert {goal.number for goal in GOALS} == set(range(1, 14))
    not_quick = {goal.row for goal in GOALS if not goal.quick}
    for contender, row in figures:
        assert workloads[row].key in by_name[contender].functions, (contender, row)
        assert needed(by_name[contender], workloads[row]) is (row not in not_quick)
    assert not needed(by_name["RQ"], workloads["jobs"])


def test_goal_is_compared_with_the_other_figure_of_the_same_runs() -> None:
    found = results("kept-cpu", **{"HARP": [1.5, 1.6, 1.7], F1: [0.5, 0.5, 0.5]})
    found.add("entries", "HARP", 0, {"entries": 700.0, "entries client": 600.0, "entries worker": 100.0}, "entries")
    found.add("jobs", "HARP", 0, {"rate": 400.0, "cpu worker": 0.5}, "rate")
    goals = compare(found)
    assert [(goal["goal"], goal["reached"]) for goal in goals] == [(1, False), (5, None), (11, False)]
    assert (goals[0]["ratio"], goals[0]["ratio_min"]) == (pytest.approx(3.2), 3.0)
    entries = [entry for part in PARTS.values() for entry in found.entries(part)]
    assert [line.strip() for line in report(goals, entries)] == [
        "1  CPU of harpd for a call with a process of its own, 4 clients: 1.60 (1.50 to 1.70) ms",
        "SHORT    3.20 (3.00 to 3.40) x F1: bare fork; to reach: at most 3 x",
        "5  Jobs end to end, 4 clients: 400 (400 to 400) jobs/s",
        "CPU ms: 0.5, worker 0.5",
        "?        not measured: F2: bare zygote; to reach: at least 0.5 x",
        "11  Functions of HARP that add(1, 2).get() enters: 700 (700 to 700) entries",
        "entries: 700, client 600, worker 100",
        "SHORT    to reach: at most 600 entries",
        "reached: 0 of 3; short in 1, 11",
    ]


def test_scaled_sizes_are_at_least_one() -> None:
    assert Sizes().scaled(1) == Sizes()
    assert (SIZES.jobs, SIZES.hosts, SIZES.seconds) == (2, 1, 0.003)


def connect_echo() -> Queue:
    return Queue(lambda value: value, lambda handle: handle, lambda value: None, lambda values: None)


def connect_liar() -> Queue:
    return Queue(lambda value: value, lambda handle: load.payload(999), lambda value: None)


def test_calls_are_counted() -> None:
    found = load.calls(lambda: lambda value: value, clients=2, seconds=0.05)
    assert found["rate"] > 0
    assert 0 < found["cpu client"] < 2 * 1000 / found["rate"]


SPIN = """
import os, time
while not os.path.exists({go!r}): time.sleep(0.01)
began = time.process_time()
while time.process_time() - began < {seconds}: pass
touched = b"x" * (4 << 20)
"""
SERVER = """
import subprocess, sys
kept, ended = (subprocess.Popen([sys.executable, "-c", program]) for program in {programs!r})
{spin}
ended.wait()
time.sleep(600)
"""


def test_cpu_of_servers_is_measured_with_all_that_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes 0.1 s, a child of it that takes 0.2 s, and one that takes 0.3 s and is reaped."""
    go = str(tmp_path / "go")
    first, second, spin = (SPIN.format(go=go, seconds=seconds) for seconds in (0.2, 0.3, 0.1))
    code = SERVER.format(programs=[first + "time.sleep(600)", second], spin=spin)
    with subprocess.Popen([sys.executable, "-c", code]) as server:
        monkeypatch.setitem(load.SETTINGS, "pids", {"server": server.pid, "below": -server.pid})

        def body(client: int, ready: load.Ready) -> None:
            ready()
            before = load.costs()
            Path(go).touch()
            enough = {"cpu server": 90, "cpu below": 490, "faults server": 1, "faults below": 1}
            deadline = time.monotonic() + DEADLINE
            while any(load.less(load.costs(), before)[name] < cost for name, cost in enough.items()):
                assert time.monotonic() < deadline
                time.sleep(0.1)

        try:
            wait_until(lambda: len(psutil.Process(server.pid).children()) == 2, 30, "the children")
            _, spent = together(1, body)
        finally:
            for process in psutil.Process(server.pid).children():
                with suppress(psutil.NoSuchProcess):  # the server reaps one of them
                    process.kill()
            server.kill()
    assert spent["cpu server"] == pytest.approx(100, abs=90)
    assert spent["cpu below"] == pytest.approx(500, abs=150)
    assert spent["cpu client"] < 1000
    assert spent["faults server"] > 0
    assert spent["faults below"] > 0


def test_call_with_a_wrong_answer_fails() -> None:
    with pytest.raises(RuntimeError, match="expected"):
        load.calls(lambda: lambda value: "something", clients=2, seconds=0.05)


def test_job_with_another_jobs_result_fails() -> None:
    assert load.jobs(connect_echo, clients=3, jobs=10)["rate"] > 0
    assert load.latency(connect_echo, jobs=3)["p50"] > 0
    with pytest.raises(RuntimeError, match="expected"):
        load.jobs(connect_liar, clients=3, jobs=10)


@pytest.mark.parametrize("batch", [0, 10])
def test_submissions_are_counted(batch: int) -> None:
    assert load.submissions(connect_echo, clients=2, seconds=0.05, batch=batch)["rate"] > 0


@pytest.mark.parametrize("lost", [5, 99])
def test_stream_with_a_lost_record_fails(lost: int) -> None:
    def stream(records: int) -> Iterator[Any]:
        return (one for one in load.fast_records(records) if records == 10 or one["number"] != lost)

    assert load.follow(load.fast_records, 100)["rate"] > 0
    with pytest.raises(RuntimeError, match="expected"):
        load.follow(stream, 100)


def test_client_that_dies_is_reported() -> None:
    def body(client: int, ready: load.Ready) -> None:
        if client == 1:
            sys.exit(3)

    with pytest.raises(RuntimeError, match="died"):
        together(2, body)


def test_program_ends_with_its_children(tmp_path: Path) -> None:
    leaves = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    log = tmp_path / "log"
    with program([sys.executable, "-c", leaves], log, ready=lambda: log.read_text().endswith("\n")):
        left = psutil.Process(int(log.read_text()))
    left.wait(30)


def test_program_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    fails = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    with pytest.raises(Broken, match=r"ended with status 1.*\n?.*no room"):
        with program(fails, tmp_path / "log", ready=lambda: False):
            pass


CLIENT = """
from bench.load import SETTINGS, Missing

def fails():
    raise Missing("it has none")

def prints(rate):
    print("to the log")
    return {"rate": rate + SETTINGS["more"]}

FUNCTIONS = {"prints": prints, "fails": fails}
"""


def test_client_returns_figures_or_missing_module(tmp_path: Path) -> None:
    (tmp_path / "own_client.py").write_text(CLIENT)
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from bench.client import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", start, "own_client"]
    assert run_client([*command, "prints", '{"rate": 1}'], tmp_path, {"more": 2}, 30) == {"rate": 3}
    assert "to the log" in (tmp_path / "client.log").read_text()
    with pytest.raises(Missing, match="it has none"):
        run_client([*command, "fails"], tmp_path, {}, 30)
    with pytest.raises(Broken, match="KeyError"):
        run_client([*command, "unknown"], tmp_path, {}, 30)


def contender(name: str, *answers: float | Exception, functions: tuple[str, str] = ("a", "b")) -> Contender:
    """A contender with known figures; in each run it continues where it was."""
    left = list(answers)

    def ask(function: str, arguments: Mapping[str, Any], seconds: float) -> load.Figures:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"rate": answer, "p50": answer}

    @contextmanager
    def start(place: Place) -> Iterator[Ask]:
        assert not list(place.directory.iterdir())
        yield ask

    return Contender(name, dict(zip(("speed", "delay"), functions, strict=True)), start)


def measurement(tmp_path: Path, *contenders: Contender, **options: Any) -> tuple[Measurement, list[str]]:
    """A measurement in an empty directory, and what it says."""
    printed: list[str] = []
    return Measurement(contenders, SIZES, Place(tmp_path, None), Results(), printed.append, **options), printed


def test_contenders_alternate_and_failed_ones_are_omitted(tmp_path: Path) -> None:
    measured, _ = measurement(
        tmp_path,
        contender("good", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
        contender("breaks", 1.0, Broken("it fell over"), 3.0, Broken("and again")),
        contender("lacks", Missing("it has none"), 2.0, Missing("it has none"), 3.0, Missing("it has none"), 4.0),
    )
    assert measured.measure([PART], 3) == 3
    found = measured.results
    assert found.values["speed"] == {"good": {0: 1.0, 1: 3.0, 2: 5.0}, "breaks": {0: 1.0, 1: 3.0}}
    assert found.values["delay"] == {"good": {0: 2.0, 1: 4.0, 2: 6.0}, "lacks": {0: 2.0, 1: 3.0, 2: 4.0}}
    assert found.left_out == [
        ("part", "breaks", "delay: it fell over"),
        ("part", "lacks", "speed: it has none"),
        ("part", "breaks", "speed: and again"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_contender_is_started_once_for_all_rounds_and_parts(tmp_path: Path) -> None:
    measured, printed = measurement(tmp_path, contender("first", *range(8)), contender("second", *range(8)))
    other = replace(PART, key="other", workloads=(replace(PART.workloads[0], once=True),))
    assert measured.measure([other, PART], 2) == 2
    assert printed == [
        "round 1 of 2: other",
        "  starting first",
        "  starting second",
        "round 1 of 2: part",
        "round 2 of 2: other",
        "round 2 of 2: part",
    ]
    assert measured.results.values["delay"] == {"first": {0: 2, 1: 4}, "second": {0: 2, 1: 4}}


def test_round_that_would_end_too_late_is_not_started(tmp_path: Path) -> None:
    measured, _ = measurement(tmp_path, contender("one", *range(8)))
    assert measured.measure([PART], 3, until=time.monotonic()) == 1


def test_contender_that_fails_at_its_end_keeps_its_figures(tmp_path: Path) -> None:
    @contextmanager
    def start(place: Place) -> Iterator[Ask]:
        yield lambda function, arguments, seconds: {"rate": 1.0, "p50": 1.0}
        raise AssertionError("a process is left")

    measured, _ = measurement(tmp_path, Contender("fails", {"speed": "a"}, start))
    measured.measure([PART], 1)
    assert measured.results.values == {"speed": {"fails": {0: 1.0}}}
    assert measured.results.left_out == [("end", "fails", "a process is left")]


def test_only_needed_workloads_are_measured(tmp_path: Path) -> None:
    measured, _ = measurement(tmp_path, contender("one", 1.0), needed=lambda one, workload: workload.key == "delay")
    measured.measure([PART], 1)
    assert measured.results.values == {"delay": {"one": {0: 1.0}}}


def test_figure_same_function_and_arguments_runs_once(tmp_path: Path) -> None:
    measured, _ = measurement(tmp_path, contender("same", 7.0, functions=("a", "a")))
    measured.measure([PART], 1)
    assert measured.results.values == {"speed": {"same": {0: 7.0}}, "delay": {"same": {0: 7.0}}}


def test_part_without_contenders_has_no_entries(tmp_path: Path) -> None:
    measured, _ = measurement(tmp_path)
    measured.measure([PART], 2)
    found = measured.results
    assert (found.values, found.left_out, found.entries(PART)) == ({}, [], [])
