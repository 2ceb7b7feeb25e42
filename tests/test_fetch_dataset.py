"""The tool that lays out data sets trusts no download, and its recipes are whole."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from elmo_stream.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "yso-tiny"
FILES = ("raw/trn_X.txt", "trn_X_Y.txt", "raw/tst_X.txt", "tst_X_Y.txt", "raw/Y.txt")


def fetch(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "fetch_dataset.py", *map(str, words)]
    path = f"{ROOT}:{ROOT / 'kernels'}"
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"})


def test_every_data_set_has_a_recipe_that_loads_and_a_place_where_it_is_to_be_had():
    names = fetch().stdout.split()
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == set(names)
    for name in names:
        load_config(ROOT / "recipes" / f"{name}.toml")
    said = fetch("amazon-3m").stdout
    assert "manikvarma.org" in said and "elmo-stream shard DATA/trn.json.gz" in said


def test_an_archive_is_laid_out_within_the_folder_and_its_rows_are_counted(tmp_path):
    with zipfile.ZipFile(tmp_path / "download.zip", "w") as archive:
        for name, rows in (("trn_X_Xf.txt", 4880), ("tst_X_Xf.txt", 2515)):
            archive.writestr(f"../../{name}", f"{rows} 1836\n" + "0:1\n" * rows)
            archive.writestr(f"x/{name.replace('Xf', 'Y')}", f"{rows} 159\n" + "7:1\n" * rows)
    done = fetch("bibtex", "--from", tmp_path / "download.zip", "--out", tmp_path / "in" / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == sorted(
        path.name for path in (tmp_path / "in" / "out").iterdir()
    )
    assert "2,515 rows" in done.stdout and "Y.txt: not there" in done.stdout


@pytest.mark.parametrize(
    ("rows", "labels", "says"), [(4800, 159, "4,800 rows where the data set has 4,880"), (4880, 160, "160 labels")]
)
def test_a_download_of_another_size_is_refused_and_nothing_stays(tmp_path, rows, labels, says):
    (tmp_path / "given").mkdir()
    for name, count in (("trn", rows), ("tst", 2515)):
        (tmp_path / "given" / f"{name}_X_Xf.txt").write_text(f"{count} 1836\n" + "0:1\n" * count)
        (tmp_path / "given" / f"{name}_X_Y.txt").write_text(f"{count} {labels}\n" + "7:1\n" * count)
    done = fetch("bibtex", "--from", tmp_path / "given", "--out", tmp_path / "out")
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "out").exists()
    assert fetch("delicious", "--from", tmp_path / "none", "--out", tmp_path / "out").returncode == 2


def test_the_real_files_of_a_data_set_pass(tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    done = fetch("yso-tiny", "--from", DATA, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(Path(name).name for name in FILES)
