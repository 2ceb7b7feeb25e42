"""Jobs on many machines that share a folder make the very store that one conversion makes, whatever happens to them."""

import json
import os
import signal
import subprocess
import sys

import pytest

from elmo_stream.data.index import StoreIndex
from elmo_stream.errors import LockedError, UserError
from tests.cli_helpers import assert_refused, run_cli
from tests.data.readers.conftest import corpus as corpus_of
from tests.data.readers.conftest import write_format

JOBS = 3


@pytest.fixture(scope="module")
def options(sample_store):
    """A tokenizer that is known beforehand, as jobs need one."""
    return {"tokenizer": str(sample_store / "tokenizer")}


@pytest.fixture(scope="module")
def single(sample, options, tmp_path_factory):
    """The store that one conversion makes."""
    out = tmp_path_factory.mktemp("stores") / "single"
    sample.convert(out, **options)
    return out


def test_jobs_in_any_order_and_a_finalize_make_the_store_of_one_conversion(sample, options, single, tree, tmp_path):
    out = tmp_path / "store"
    parts = [sample.convert(out, job=(index, JOBS), **options)["parts"] for index in (2, 0, 1)]
    assert len(parts) == JOBS and min(parts) > 0
    with pytest.raises(UserError, match="unfinished conversion"):
        StoreIndex.load(out)
    summary = sample.convert(out, finalize=True, **options)
    assert summary["train"]["instances"] == 1497
    assert tree(out) == tree(single)


def run_at_once(*arguments):
    """Run all jobs in processes of their own, at once."""
    command = [
        sys.executable,
        "-m",
        "elmo_stream",
        "shard",
        *arguments,
        "--workers=1",
        f"--num-shards={JOBS}",
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    jobs = [
        subprocess.Popen([*command, f"--shard-index={index}"], stdout=subprocess.PIPE, text=True, env=environment)
        for index in range(JOBS)
    ]
    return [json.loads(job.communicate(timeout=120)[0]) for job in jobs]


def test_jobs_that_run_at_once_do_not_disturb_each_other(sample, options, single, tree, tmp_path):
    out = tmp_path / "store"
    settings = {key: value for key, value in (sample.options | options).items() if key != "part_bytes"}
    given = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    arguments = [sample.train, "--test", sample.test, "--out", out, *given]
    assert [result["job"] for result in run_at_once(*arguments)] == list(range(JOBS))
    assert run_cli("shard", *arguments, "--workers=1", "--finalize").exit_code == 0
    assert tree(out) == tree(single)


def test_jobs_share_what_was_unpacked_the_names_of_labels_and_the_filter(options, tree, tmp_path):
    splits = {"train": corpus_of(400, seed=1), "test": corpus_of(60, seed=2)}
    files = write_format(tmp_path / "input", "xc-json", splits, ".gz")
    (tmp_path / "filter.txt").write_text("0 1\n7 3\n")
    arguments = [files["train"], "--test", files["test"], "--filter", tmp_path / "filter.txt"]
    arguments += ["--tokenizer", options["tokenizer"]]
    assert run_cli("shard", *arguments, "--workers=1", "--out", tmp_path / "one").exit_code == 0
    assert len(run_at_once(*arguments, "--out", tmp_path / "many")) == JOBS
    assert run_cli("shard", *arguments, "--workers=1", "--out", tmp_path / "many", "--finalize").exit_code == 0
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert {"labels/texts.bin", "filters/test.npy"} <= set(tree(tmp_path / "many"))


def test_jobs_over_features_make_the_store_of_one_conversion(features, tree, tmp_path):
    features.convert(tmp_path / "one")
    parts = [features.convert(tmp_path / "many", job=(index, JOBS))["parts"] for index in range(JOBS)]
    assert min(parts) > 0
    features.convert(tmp_path / "many", finalize=True)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_a_job_that_was_killed_is_missed_by_finalize_and_can_run_again(sample, options, single, tree, tmp_path):
    out = tmp_path / "store"
    child = os.fork()
    if child == 0:  # a job that ends in the middle of its share, as a machine that fails

        def die(stage, done, total):
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            sample.convert(out, job=(0, JOBS), progress=die, part_bytes=15_000, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for index in (1, 2):
        sample.convert(out, job=(index, JOBS), part_bytes=15_000, **options)
    with pytest.raises(UserError, match=r"[1-9]\d* of \d+ parts of the input have not been read"):
        sample.convert(out, finalize=True, part_bytes=15_000, **options)
    sample.convert(out, job=(0, JOBS), part_bytes=15_000, **options)
    sample.convert(out, finalize=True, part_bytes=15_000, **options)
    assert tree(out) == tree(single)


def test_a_job_with_other_options_is_refused_and_destroys_nothing(sample, options, single, tree, tmp_path):
    out = tmp_path / "store"
    for index in range(JOBS):
        sample.convert(out, job=(index, JOBS), **options)
    for changes in ({"job": (1, JOBS)}, {"finalize": True}):
        with pytest.raises(UserError, match="must be given the same"):
            sample.convert(out, seed=8, **options, **changes)
    sample.convert(out, finalize=True, **options)
    for changes in ({"job": (0, JOBS)}, {"finalize": True}):
        with pytest.raises(UserError, match="exists already"):
            sample.convert(out, **options, **changes)
    assert tree(out) == tree(single)


def test_a_job_twice_at_once_and_a_finalize_beside_a_job_are_refused(sample, options, tmp_path):
    out, refused = tmp_path / "store", []

    def meanwhile(stage, done, total):
        for changes in ({"job": (0, JOBS)}, {"finalize": True}, {}):
            with pytest.raises(LockedError):
                sample.convert(out, **options, **changes)
            refused.append(changes)

    sample.convert(out, job=(0, JOBS), progress=meanwhile, **options)
    assert refused


def test_a_bad_line_ends_its_job_and_keeps_the_work_of_the_others(sample, options, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_bytes(sample.train.read_bytes() + b"{}\n")
    bad, out = type(sample)(train, sample.test), tmp_path / "store"
    results = []
    for index in range(JOBS):
        try:
            results.append(bad.convert(out, job=(index, JOBS), **options))
        except UserError as error:
            assert "train.jsonl:1501" in str(error)
    assert len(results) == JOBS - 1 and (out / ".build").is_dir()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shard-index", "0"], "--num-shards"),
        (["--num-shards", "2"], "--shard-index"),
        (["--shard-index", "2", "--num-shards", "2"], "from 0 to 1"),
        (["--shard-index", "0", "--num-shards", "2", "--finalize"], "--finalize alone"),
        (["--shard-index", "0", "--num-shards", "2"], "--tokenizer train:16000"),
        (["--finalize", "--tokenizer", "TOKENIZER"], "must be given the same"),
    ],
)
def test_options_that_do_not_go_together_are_refused(corpus, store, tmp_path, arguments, says):
    given = [str(store / "tokenizer") if argument == "TOKENIZER" else argument for argument in arguments]
    assert_refused(run_cli("shard", corpus / "train.jsonl", "--out", tmp_path / "store", *given), says)
