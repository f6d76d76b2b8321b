"""gpu_bundle's runner: whatever becomes of a stage or of the runner, the report is there, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cases.gpu_bundle_stages import gone, outcomes, planted, report, run, verdicts, wait_for
from gpu_bundle.plan import Stage

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def path(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def pid_file(tmp_path) -> Path:
    return tmp_path / "pid"


# ---- what a stage may do ---------------------------------------------------------------------------------------


def test_outcomes_verdicts_and_exit_codes(tmp_path):
    good, bad = planted("run(fine, elsewhere)", "good"), planted("run(fine, wrong)", "bad")
    neither = planted("run(elsewhere)", "neither")
    code, found = run(tmp_path, good, neither)
    assert code == 0 and found["verdict"] == "passed" and verdicts(found) == ["passed", "skipped"]
    code, found = run(tmp_path, good, bad, neither)
    assert code == 1 and found["verdict"] == "failed" and verdicts(found) == ["passed", "failed", "skipped"]
    assert outcomes(found["stages"][0]) == {"fine": "passed", "elsewhere": "skipped"}
    assert found["stages"][1]["counts"] == {"passed": 1, "failed": 1}
    said = (tmp_path / "out" / "report.md").read_text()
    assert "* bad: `wrong`: " in said and "ValueError: 1 is not 2" in said and "1 skipped: not on this machine" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs", "report.json", "report.md"]


def test_a_crash_costs_what_crashed_alone(tmp_path):
    code, found = run(tmp_path, planted("run(fine, crashes, wrong, elsewhere)"), planted("run(fine)", "next"))
    stage, after = found["stages"]
    assert code == 1 and after["verdict"] == "passed" and stage["problems"] == []
    assert outcomes(stage) == {"fine": "passed", "crashes": "failed", "wrong": "failed", "elsewhere": "skipped"}
    assert stage["items"][1]["message"] == "its process ended: SIGSEGV"


def test_a_crash_at_the_start_is_the_stages(tmp_path):
    code, found = run(tmp_path, planted("print('last words'); crashes()"), planted("run(fine)", "next"))
    assert code == 1 and verdicts(found) == ["failed", "passed"]
    assert found["stages"][0]["problems"] == ["a process ended: SIGSEGV\nlast words"]


def test_a_hang_costs_what_hung_alone(tmp_path, pid_file):
    code, found = run(tmp_path, planted(f"PID_FILE = {str(pid_file)!r}; run(hangs, fine)", patience=4))
    assert code == 1 and outcomes(found["stages"][0]) == {"hangs": "failed", "fine": "passed"}
    assert found["stages"][0]["items"][0]["message"] == "its process ended: no sign of life for 4 seconds"
    assert gone([int(pid_file.read_text())])


def test_children_do_not_outlive_a_stage_that_passes(tmp_path, pid_file):
    program = f"PID_FILE = {str(pid_file)!r}; time.sleep = lambda seconds: seconds == 600 or fine(); run(hangs)"
    code, _ = run(tmp_path, planted(program))
    assert code == 0 and gone([int(pid_file.read_text())])


def test_a_lost_gpu_costs_a_process(tmp_path):
    code, found = run(tmp_path, planted("run(fine, loses_the_gpu, elsewhere)"))
    assert code == 1
    assert outcomes(found["stages"][0]) == {"fine": "passed", "loses_the_gpu": "failed", "elsewhere": "skipped"}
    assert found["stages"][0]["notes"] == ["an error of the GPU ended a process; another one went on behind it"]


def test_crashes_without_end_are_given_up(tmp_path):
    calls = ", ".join(f"type(fine)(crashes.__code__, globals(), 'c{i}')" for i in range(9))
    code, found = run(tmp_path, planted(f"run({calls})"))
    assert code == 1 and found["stages"][0]["counts"] == {"failed": 6, "not reached": 3}


GARBAGE = r"""
os.write(1, bytes(range(256)) * 100)
events.tell(plan=7); events.tell(start=[1]); events.tell(end="x", outcome="?"); events.tell(table="none")
events.tell(facts=None); events.tell(table={"title": "t", "rows": [3, {"name": 1, "GB/s": "fast"}]})
os.write(events._file, b'\xff\xfe\n[1]\n"text"\nnull\n{"start": "half of a')
Events().tell(start="fine")
events.tell(end="fine", outcome="passed", seconds="soon", message=["?"])
events.tell(end="fine", outcome="passed", seconds=float("nan"), message="")
events.tell(end="fine", outcome="passed", seconds=1, message="")
events.tell(table={"title": "t", "rows": [{"name": "x", "GB/s": float("inf"), "ms": 2}]})
"""


def test_garbage_is_no_result(tmp_path):
    code, found = run(tmp_path, planted(GARBAGE), planted("run(fine)", "next"))
    assert code == 1 and verdicts(found) == ["failed", "passed"]
    assert found["stages"][0]["counts"] == {"passed": 1}
    first, second = found["stages"][0]["tables"]  # another process was tried, and came no further
    assert first == second == {"title": "t", "rows": [{"name": "x", "GB/s": None, "ms": 2}]}
    assert found["stages"][0]["problems"][0].startswith("a process ended: status 0")


# ---- time ------------------------------------------------------------------------------------------------------


def test_the_time_is_over(tmp_path, pid_file):
    """The first stage's part of it; the second has the rest."""
    hangs = planted(f"PID_FILE = {str(pid_file)!r}; run(fine, hangs, wrong)", "long", share=1)
    code, found = run(tmp_path, hangs, planted("run(fine)", "next", share=1), seconds=12)
    assert code == 3 and found["verdict"] == "unfinished" and verdicts(found) == ["unfinished", "passed"]
    assert outcomes(found["stages"][0]) == {"fine": "passed", "hangs": "unfinished", "wrong": "not reached"}
    assert gone([int(pid_file.read_text())])
    assert "* long: 2, the first of which are `hangs`, `wrong`" in (tmp_path / "out" / "report.md").read_text()


def test_time_that_is_left_goes_to_the_next(tmp_path):
    slow = planted("time.sleep(3); run(fine)", "slow", share=1)
    code, found = run(tmp_path, planted("run(fine)", share=9), slow, seconds=20)
    assert code == 0 and verdicts(found) == ["passed", "passed"]


def test_a_stage_that_was_cut_off_has_what_all_leave(tmp_path):
    """It goes on with what was under way, and does nothing twice."""
    program = f"""
def slow_at_first():
    if not os.path.exists({str(tmp_path / "once")!r}):
        open({str(tmp_path / "once")!r}, "w")
        time.sleep(600)
def counted():
    open({str(tmp_path / "count")!r}, "a").write("x")
run(counted, slow_at_first, fine)"""
    code, found = run(tmp_path, planted(program, "slow", share=1), planted("run(fine)", "next", share=3), seconds=24)
    assert code == 0 and verdicts(found) == ["passed", "passed"] and found["stages"][0]["counts"] == {"passed": 3}
    assert (tmp_path / "count").read_text() == "x" and found["stages"][0]["seconds"] > found["stages"][1]["seconds"]


# ---- the runner's own end --------------------------------------------------------------------------------------

RUNNER = """
import sys
from pathlib import Path
from cases.gpu_bundle_stages import planted, run
program = f"PID_FILE = {sys.argv[2]!r}; run(fine, hangs)"
stages = planted("run(fine)", "first"), planted(program, "second"), planted("run(fine)", "last")
code, _ = run(Path(sys.argv[1]), *stages)
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_the_runner_is_ended(number, tmp_path, pid_file):
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(tmp_path), str(pid_file)])
    hanging = int(wait_for(pid_file))
    while outcomes(report(tmp_path)["stages"][1]).get("hangs") != "unfinished":  # the report follows
        assert runner.poll() is None
    runner.send_signal(number)
    assert runner.wait(20) == (-number if number == signal.SIGKILL else 3)
    assert gone([hanging])
    found = report(tmp_path)
    assert verdicts(found) == ["passed", "unfinished", "not reached"]
    assert found["ended"] == ("" if number == signal.SIGKILL else f"by {number.name}")


def test_an_unusable_machine_ends_the_run(tmp_path):
    program = "from gpu_bundle.environment import Unusable\ndef no():\n    raise Unusable('no GPU: bring one')\nrun(no)"
    code, found = run(tmp_path, planted(program, "environment", module="environment"), planted("run(fine)", "next"))
    assert code == 4 and found["ended"] == "no GPU: bring one" and verdicts(found) == ["failed", "not reached"]


# ---- tests as a stage ------------------------------------------------------------------------------------------

CONFTEST = "def pytest_addoption(parser):\n    parser.addoption('--backends')\n"
SUITE = """
import os, signal, pytest
@pytest.mark.parametrize("i", range(4))
def test_many(i): assert i != 2, "two"
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_skipped(): pytest.skip("no")
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_error(broken): pass
def test_teardown(request): request.addfinalizer(lambda: 1 / 0)
"""


def test_pytest_as_a_stage(tmp_path):
    """Its tests are told one by one, and it goes on behind a crash."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests" / "test_suite.py").write_text(SUITE)
    (tmp_path / "tests" / "test_broken.py").write_text("import no_such_module")
    code, found = run(tmp_path, Stage("tests", "all", 60, ("tests/test_suite.py",)))
    stage = found["stages"][0]
    told = {name.partition("::")[2]: outcome for name, outcome in outcomes(stage).items()}
    assert code == 1 and stage["counts"] == {"passed": 3, "failed": 4, "skipped": 1} and stage["problems"] == []
    assert [name for name in told if told[name] == "failed"] == [
        name for name in told if name in ("test_many[2]", "test_crash", "test_error", "test_teardown")
    ]
    messages = {item["name"].partition("::")[2]: item["message"] for item in stage["items"]}
    assert messages["test_many[2]"].startswith("AssertionError: two\nassert 2 != 2")
    assert messages["test_crash"] == "its process ended: SIGSEGV" and messages["test_skipped"] == "no"
    _, found = run(tmp_path, Stage("tests", "all", 60, ("tests/test_broken.py",)))
    assert verdicts(found) == ["failed"] and "No module named 'no_such_module'" in str(found["stages"][0]["items"])


def test_nothing_is_written_elsewhere(tmp_path):
    """Nor into the bundle, which may lie in a folder with a space that cannot be written to."""
    folders = bundle, out, temporary = tmp_path / "a bundle", tmp_path / "my report", tmp_path / "tmp"
    for folder in folders:
        folder.mkdir()
    bundle.chmod(0o500)
    program = "import tempfile; open(tempfile.mkstemp()[1], 'w'); run(fine)"
    script = "from cases.gpu_bundle_stages import *\n"
    script += f"sys.exit(Runner(Path({str(bundle)!r}), Path({str(out)!r}), [planted({program!r})]).run())"
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(temporary)}
    subprocess.run([sys.executable, "-B", "-c", script], cwd=bundle, env=environment, check=True)
    assert {*tmp_path.iterdir()} == {*folders} and not [*bundle.iterdir(), *temporary.iterdir()]
    assert sorted(path.name for path in out.iterdir()) == ["logs", "report.json", "report.md"]
