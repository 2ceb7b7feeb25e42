"""A malformed file of any format is refused with its name and line, and leaves no store behind."""

from pathlib import Path

import pytest

from elmo_stream.data.shard import convert
from elmo_stream.errors import UserError
from tests.data.readers.bad_files import ODD, TEXT_FORMATS


def refused(folder: Path, files: dict[str, bytes], **options: object) -> str:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert([folder / next(iter(files))], folder / "store", workers=1, **{"tokenizer": None} | options)
    assert not (folder / "store").exists()
    return str(caught.value)


@pytest.mark.parametrize(("files", "line", "says"), (TEXT_FORMATS | ODD).values(), ids=(TEXT_FORMATS | ODD).keys())
def test_a_malformed_file_is_refused_with_its_line(tmp_path, files, line, says):
    message = refused(tmp_path, files)
    assert says in message and message.startswith(str(tmp_path)), message
    assert line == 0 or f":{line}: " in message, message
