"""What the experiments share: records, processes, tables and where they come from."""

import json
import os
import time

import experiment
import pytest
import torch


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_record_is_made_once_and_says_where(tmp_path):
    file = tmp_path / "new folder" / "run.json"
    made = []

    def make():
        made.append(1)
        return {"value": (1, 2), "nothing": None}

    record = experiment.kept(file, make)
    assert record["value"] == [1, 2]  # as it will be read
    assert experiment.kept(file, make) == record and len(made) == 1
    where = record["environment"]
    assert where["torch"] == torch.__version__ and where["threads"] == torch.get_num_threads()
    assert where["command"].startswith("python ") and where["commit"] and where["cpu"]


def test_a_record_of_another_time_is_read_and_one_without_origin_made_again(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"value": 1, "environment": {"commit": "a0028d0"}}\n')
    assert experiment.kept(file, lambda: {"value": 2})["value"] == 1
    file.write_text('{"value": 1}\n')
    assert experiment.kept(file, lambda: {"value": 2})["value"] == 2


def test_an_interrupted_run_leaves_no_record(tmp_path, monkeypatch):
    file = tmp_path / "run.json"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.kept(file, interrupted)
    assert not file.exists()

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        experiment.kept(file, lambda: {"value": 1})
    # What was written aside is not taken for a record.
    assert [found.suffix for found in tmp_path.iterdir()] == [".part"]
    assert experiment.kept(file, lambda: {"value": 2})["value"] == 2


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "table.md"
    experiment.write(file, "old\n")

    def full(source, target):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(os, "replace", full)
        experiment.write(file, "new")
    assert file.read_text() == "old\n"
    experiment.write(file, "new")
    assert file.read_text() == "new\n"


def test_what_is_missing_is_named(tmp_path, capsys):
    files = [tmp_path / f"{index}.json" for index in range(4)]
    for file in files[1:]:
        experiment.kept(file, lambda: {"value": 1})
    files[3].write_text('{"value": "from before records said where"}')
    assert list(experiment.there(files)) == files[1:3]
    assert capsys.readouterr().err == f"missing: {files[0]}\nmissing: {files[3]}\n"
    files[1].with_suffix(".npz").touch()
    assert list(experiment.there(files[1:3], beside=".npz")) == [files[1]]
    assert capsys.readouterr().err == f"missing: {tmp_path / '2.npz'}\n"
    assert list(experiment.there(files[1:2], beside=".npz")) == [files[1]]
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit, match=r"missing: .*0\.json\nnothing to draw"):
        experiment.there(files[:1])


def work(value, fails=False, folder=None):
    if fails:
        raise ZeroDivisionError(f"job {value}")
    if folder is not None:
        (folder / str(value)).touch()
        time.sleep(0.1)
    return 10 * value, torch.get_num_threads(), os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    torch.set_num_threads(2)
    results = experiment.in_processes(work, [(3,), (1,), (2,)], workers)
    values, threads, processes = zip(*results, strict=True)
    assert values == (30, 10, 20) and set(threads) == {1}
    assert (os.getpid() in processes) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_job_surfaces_and_keeps_others_from_beginning(workers, tmp_path):
    jobs = [(0, True), *((value, False, tmp_path) for value in range(1, 60))]
    with pytest.raises(ZeroDivisionError, match="job 0"):
        experiment.in_processes(work, jobs, workers)
    assert len(list(tmp_path.iterdir())) < 59


def test_a_line_says_where_a_table_comes_from():
    where = {"torch": "2.13.0", "cpu": "EPYC", "cores": 2, "threads": 1}
    records = [
        {"seed": seed, "environment": where | {"command": "python a.py", **rest}}
        for seed, rest in (
            (1, {"commit": "abc", "load_average": 0.5}),
            (0, {"commit": "abc", "load_average": 2.0}),
            (1, {"commit": "def", "load_average": 1.0}),
        )
    ]
    assert experiment.provenance(records) == (
        "`python a.py`, seeds 0, 1; commit abc, def, torch 2.13.0, threads: 1 on 2 cores (EPYC), "
        "load average 0.5–2 at the end."
    )
    del records[0]["seed"]
    assert experiment.provenance(records[:1]).startswith("`python a.py`; commit abc, ")


def test_a_table_has_dashes_where_numbers_are_missing():
    columns = {"a": lambda r: f"{r['a']:.1f}", "b": lambda r: f"{r['b']:.0e}"}
    rows = [["x", *experiment.cells(record, columns)] for record in ({"a": 1, "b": None}, {"b": 2})]
    assert experiment.table(["of", *columns], rows).splitlines() == [
        "| of | a | b |",
        "|" + " --- | ---: | ---: |",
        "| x | 1.0 | – |",
        "| x | – | 2e+00 |",
    ]


def test_scripts_share_their_command_line():
    parser = experiment.command_line("what it does", "results/x", ("quick", "long"), pool=False)
    arguments = vars(parser.parse_args(["--preset", "long", "--figures"]))
    assert json.loads(json.dumps(arguments, default=str)) == {
        "preset": "long", "seed": 0, "output": "results/x", "figures": True,
    }  # fmt: skip
