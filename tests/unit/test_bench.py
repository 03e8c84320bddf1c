"""The measurements' own parts: what they take down, how they compare, and that one who breaks stops nobody else."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import load, report, table
from bench.__main__ import parser
from bench.clients import Missing, together
from bench.contenders import Contender, Place
from bench.figures import Ratio, Results, Spread
from bench.lineup import LINEUP
from bench.parts import PARTS, PICTURED
from bench.picture import draw
from bench.processes import Broken, Client, program
from bench.rounds import measure
from bench.works import FULL, QUICK, TINY, Part, Row, Work

ROWS = {row.key: row for part in PARTS.values() for row in part.rows}
SPEED, DELAY = Row("speed", "The speed"), Row("delay", "The delay", "p50", "ms", less=True)
PART = Part("part", "A part", (Work("speed", (SPEED,)), Work("delay", (DELAY,))))


def results(**values: Sequence[float]) -> Results:
    """Values of the row `speed`, run by run."""
    found = Results()
    for contender, figures in values.items():
        for run, value in enumerate(figures):
            found.add("speed", contender, run, value)
    return found


def test_a_spread_has_median_least_and_most() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(2.5, 1.0, 9.0, 4)


def test_a_ratio_is_that_of_the_medians_and_its_range_that_of_the_runs() -> None:
    found = results(HARP=[10, 20, 30], peer=[5, 20, 10])
    assert found.ratio("speed", "HARP", "peer") == Ratio(2.0, 1.0, 3.0)


def test_a_ratio_pairs_only_runs_in_which_both_were_measured() -> None:
    found = results(HARP=[10, 20])
    found.add("speed", "peer", 1, 5.0)
    assert found.ratio("speed", "HARP", "peer") == Ratio(3.0, 4.0, 4.0)
    assert found.ratio("speed", "HARP", "nobody") is None
    assert found.ratio("nothing", "HARP", "peer") is None


def test_ours_comes_first_and_then_the_best() -> None:
    found = results(slow=[1], HARP=[2], fast=[9])
    assert [line.contender for line in found.lines(SPEED, "HARP")] == ["HARP", "fast", "slow"]
    for contender, value in (("slow", 9.0), ("HARP", 5.0), ("fast", 1.0)):
        found.add("delay", contender, 0, value)
    assert [line.contender for line in found.lines(DELAY, "HARP")] == ["HARP", "fast", "slow"]


def test_the_table_has_every_figure_once_and_says_what_is_synced() -> None:
    found = results(HARP=[1000, 1200], peer=[100, 50])
    lines = list(table.lines(PART, found, "HARP", {"HARP": "all", "peer": "nothing", "absent": "never"}))
    assert lines[2].split() == ["median", "least", "most", "ours/theirs", "(least", "to", "most)"]
    assert "The speed, calls/s" in lines
    assert [line.split() for line in lines if line.startswith(("  HARP ", "  peer "))] == [
        ["HARP", "1,100", "1,000", "1,200"],
        ["peer", "75.0", "50.0", "100", "14.7", "x", "(10.0", "to", "24.0)"],
    ]
    assert "  peer: nothing." in lines
    assert not any("absent" in line or "delay" in line for line in lines)
    assert list(table.lines(PART, Results(), "HARP", {})) == []


@pytest.mark.parametrize(("value", "text"), [(12345.6, "12,346"), (99.96, "100.0"), (12.34, "12.3"), (0.123, "0.12")])
def test_figures_have_the_digits_that_mean_something(value: float, text: str) -> None:
    assert table.figure(value) == text


def test_a_reason_of_many_lines_is_told_whole() -> None:
    assert list(table.left_out([("jobs", "RQ", "its start", "one\ntwo")])) == [
        "left out: jobs: RQ: its start: one",
        "    two",
    ]


def test_the_picture_is_svg_with_a_bar_for_each_contender() -> None:
    found = results(HARP=[1000, 1200], **{"a & b": [100, 50]})
    root = ElementTree.fromstring(draw([SPEED, DELAY], found, "HARP", 'A "title"', {"a & b"}))
    title, _, *texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert title == 'A "title"'
    assert texts == ["The speed", "calls/s, more is better", "HARP", "1,100", "a & b", "75.0  (14.7 x)"]
    bars = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert [bar.attrib["fill"] == "none" for bar in bars] == [False, True]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[0] / widths[1] == pytest.approx(1100 / 75, rel=0.01)
    assert float(root.attrib["width"]) > max(float(bar.attrib["x"]) for bar in root.iter() if "x" in bar.attrib)


def test_the_file_of_a_run_has_everything() -> None:
    found = results(HARP=[100, 300], peer=[50])
    found.leave_out("part", "peer", "The delay", "it has none")
    synced = {"part": {"HARP": "all", "peer": "nothing"}}
    document = report.document([PART], found, synced, TINY, {"commit": "abc"})
    assert document["commit"] == "abc"
    ours, theirs = document["rows"]
    assert (ours["contender"], ours["values"], ours["median"], ours["durability"]) == ("HARP", [100, 300], 200, "all")
    assert theirs["ours_to_this"] == {"ratio": 4.0, "least": 2.0, "most": 2.0}
    assert document["left_out"] == [{"part": "part", "contender": "peer", "what": "The delay", "why": "it has none"}]


def test_the_machine_is_described(tmp_path: Path) -> None:
    found = report.machine(tmp_path)
    assert found["cores"] >= 1
    assert found["sync_ms"] >= 0


def test_the_command_line_takes_parts_sizes_and_runs() -> None:
    options = parser().parse_args(["direct", "jobs", "--quick", "--runs", "3", "--only", "HARP", "--only", "RQ"])
    assert (options.parts, options.size, options.name, options.runs) == (["direct", "jobs"], QUICK, "quick", 3)
    assert options.only == ["HARP", "RQ"]
    options = parser().parse_args([])
    assert (options.parts, options.size, options.name, options.runs) == ([], FULL, "latest", None)


@pytest.mark.parametrize("arguments", [["nothing"], ["--runs", "0"], ["--runs", "many"]])
def test_a_wrong_command_line_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_the_help_names_every_part() -> None:
    assert all(f"\n  {key} " in parser().format_help() for key in PARTS)


def test_contenders_do_works_that_there_are_and_have_names_of_their_own() -> None:
    assert LINEUP.keys() == PARTS.keys()
    for key, contenders in LINEUP.items():
        works = {work.key for work in PARTS[key].works}
        assert all(set(contender.works) <= works for contender in contenders)
        assert set().union(*(contender.works for contender in contenders)) == works
        assert len({contender.name for contender in contenders}) == len(contenders)
        assert contenders[0].ours


def test_the_picture_shows_rows_that_exist() -> None:
    assert ROWS.keys() >= PICTURED


def test_no_work_is_asked_for_what_sizes_lack() -> None:
    for part in PARTS.values():
        for work in part.works:
            assert work.request(TINY).keys() >= work.sized.keys()


class Echo(load.Queue):
    """A queue that has every result at once."""

    def submit(self, value: Any) -> Any:
        return value

    def submit_waiting(self, value: Any) -> Any:
        return None

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)


class Liar(Echo):
    """One whose results are others'."""

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        return [load.payload(999) for _ in handles]


def test_calls_are_counted_and_timed() -> None:
    found = load.calls(lambda: lambda value: value, clients=2, seconds=0.05)
    assert found["rate"] > 0
    assert 0 < found["p50"] <= found["p99"]


def test_a_wrong_answer_is_no_call() -> None:
    with pytest.raises(RuntimeError, match="expected"):
        load.calls(lambda: lambda value: "something", clients=2, seconds=0.05)


def test_jobs_need_their_own_results() -> None:
    assert load.jobs(Echo, clients=3, jobs=10)["rate"] > 0
    assert load.latency(Echo, jobs=3)["p50"] > 0
    with pytest.raises(RuntimeError, match="expected"):
        load.jobs(Liar, clients=3, jobs=10)


def test_submissions_are_counted_and_a_queue_may_lack_bulk() -> None:
    assert load.submissions(Echo, clients=2, seconds=0.05)["rate"] > 0
    with pytest.raises(Missing, match="one job a request"):
        load.submissions(Echo, clients=2, seconds=0.05, batch=10)


@pytest.mark.parametrize("lost", ["record", "end"])
def test_a_stream_with_a_gap_is_no_stream(lost: str) -> None:
    def stream(records: int) -> Iterator[Any]:
        for number in range(records):
            if records == 10 or number != (5 if lost == "record" else records - 1):
                yield load.record(number)

    assert load.follow(lambda records: map(load.record, range(records)), 100)["rate"] > 0
    with pytest.raises(RuntimeError, match="expected"):
        load.follow(stream, 100)


def test_a_client_that_dies_is_told() -> None:
    def body(client: int, start: Callable[[], object]) -> None:
        if client == 1:
            sys.exit(3)

    with pytest.raises(RuntimeError, match="died"):
        together(2, body)


def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    leaves = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    log = tmp_path / "log"
    with program([sys.executable, "-c", leaves], log, ready=lambda: log.read_text().endswith("\n")):
        left = psutil.Process(int(log.read_text()))
    left.wait(30)


def test_a_program_that_does_not_come_up_is_told_with_its_log(tmp_path: Path) -> None:
    says = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    with pytest.raises(Broken, match=r"ended with status 1.*\n?.*no room"):
        with program(says, tmp_path / "log", ready=lambda: False):
            pass


class Scripted(Client):
    """A client whose figures are known."""

    def __init__(self, *answers: float | Exception) -> None:
        self._answers = list(answers)

    def ask(self, work: str, deadline: float, **arguments: Any) -> dict[str, float]:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"rate": answer, "p50": answer}


def contender(name: str, *answers: float | Exception, names: tuple[str, str] = ("a", "b")) -> Contender:
    """A contender with known figures; in each run it answers from where it was."""
    client = Scripted(*answers)

    @contextmanager
    def serve(place: Place) -> Iterator[Client]:
        assert not list(place.directory.iterdir())
        yield client

    return Contender(name, "nothing", dict(zip(("speed", "delay"), names, strict=True)), serve)


def test_contenders_take_turns_and_one_who_breaks_stops_nobody(tmp_path: Path) -> None:
    found, said = Results(), list[str]()
    contenders = (
        contender("good", 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
        contender("breaks", 1.0, Broken("it fell over")),
        contender("lacks", Missing("it has none"), 2.0, 3.0, 4.0),
    )
    measure(PART, contenders, replace(TINY, runs=3), tmp_path, None, found, said.append)
    assert found.values["speed"] == {"good": {0: 1.0, 1: 3.0, 2: 5.0}, "breaks": {0: 1.0}}
    assert found.values["delay"] == {"good": {0: 2.0, 1: 4.0, 2: 6.0}, "lacks": {0: 2.0, 1: 3.0, 2: 4.0}}
    assert found.left_out == [
        ("part", "breaks", "The delay", "it fell over"),
        ("part", "lacks", "The speed", "it has none"),
    ]
    assert [line.rsplit(" ", 1)[1] for line in said] == ["good", "breaks", "lacks", "lacks", "good", "lacks", "good"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_the_same_for_a_contender_is_asked_for_once(tmp_path: Path) -> None:
    found = Results()
    same = contender("same", 7.0, names=("a", "a"))
    measure(PART, (same,), TINY, tmp_path, None, found, lambda text: None)
    assert found.values == {"speed": {"same": {0: 7.0}}, "delay": {"same": {0: 7.0}}}


def test_a_part_may_have_fewer_runs_and_rows_with_many_values(tmp_path: Path) -> None:
    found, said = Results(), list[str]()
    rows = (Row("slices", "Slices", "slice", series=True),)
    part = Part("part", "A part", (Work("work", rows, lasting="sustained"),), most_runs=2)

    class Slices(Client):
        def __init__(self) -> None:
            self.asked = 0

        def ask(self, work: str, deadline: float, **arguments: Any) -> dict[str, float]:
            assert deadline == TINY.deadline + TINY.sustained
            self.asked += 1
            return {"slice-0": self.asked, "slice-1": 10.0 * self.asked}

    client = Slices()

    @contextmanager
    def serve(place: Place) -> Iterator[Client]:
        assert place.sizes == sizes
        yield client

    sizes = replace(TINY, runs=5)
    measure(part, [Contender("HARP", "all", {"work": "a"}, serve)], sizes, tmp_path, None, found, said.append)
    assert found.values == {"slices": {"HARP": {0: 1.0, 1: 10.0, 2: 2.0, 3: 20.0}}}
    assert said[-1] == "part, run 2 of 2: HARP"


def test_a_part_that_nobody_takes_part_in_is_passed_over(tmp_path: Path) -> None:
    found = Results()
    measure(PART, [], TINY, tmp_path, None, found, lambda text: None)
    assert (found.values, found.left_out) == ({}, [])
