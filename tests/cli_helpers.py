"""Running the command line from tests."""

from click.testing import CliRunner, Result

from elmo_stream.cli import main

BAG = ["--set", "encoder.dim=32", "--set", "train.batch=256", "--steps", "4"]


def run_cli(*arguments: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str, code: int = 2) -> None:
    """One sentence with these words, no traceback, and the exit code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    if result.stderr.startswith("error: "):
        assert len(result.stderr.strip().splitlines()) == 1
