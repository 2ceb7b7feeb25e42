"""A typo in a configuration must cost a sentence, not a night of training."""

from pathlib import Path

import pytest

from elmo_stream.config import Config, load_config
from elmo_stream.errors import UserError


def test_a_written_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(
        None,
        ["train.batch=7", 'encoder.name="a \\"quoted\\" näme"', "encoder.dropout=0", "encoder.frozen=true", "seed=12"],
    )
    for comments in (False, True):
        (tmp_path / "config.toml").write_text(config.to_toml(comments=comments), encoding="utf-8")
        assert load_config(tmp_path / "config.toml") == config


def test_overrides_win_over_the_file_and_words_need_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("seed = 1\n[classifier]\nformat = 'fp32'\n[train]\nbatch = 3\n")
    config = load_config(tmp_path / "c.toml", ["classifier.format=bf16", "optimizer.encoder_lr=1"])
    assert (config.classifier.format, config.train.batch, config.seed) == ("bf16", 3, 1)
    assert config.optimizer.encoder_lr == 1.0


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.bach=3", "train.batch"),
        ("trian.batch=3", "train"),
        ("train.batch=many", "train.batch"),
        ("train.batch=0", "train.batch"),
        ("train.batch=2.5", "train.batch"),
        ("train.batch=true", "train.batch"),
        ("train=3", "train"),
        ("seed=-1", "seed"),
        ("seed.x=1", "seed"),
        ("train.batch", "KEY=VALUE"),
        ("encoder.kind=lstm", "encoder.kind"),
        ("encoder.kind=transformer", "encoder.name"),
        ("encoder.dim=100", "encoder.dim"),
        ("encoder.format=fp8", "encoder.format"),
        ("encoder.rounding=stochastic", "encoder.rounding"),
        ("optimizer.states=4bit", "optimizer.states"),
        ("encoder.dropout=nan", "encoder.dropout"),
        ("encoder.dropout=1.5", "encoder.dropout"),
        ("classifier.format=fp4", "classifier.format"),
        ("classifier.fp8_logits=1", "classifier.fp8_logits"),
        ("classifier.loss=softmax", "classifier.loss"),
        ("optimizer.classifier_lr=inf", "optimizer.classifier_lr"),
        ("checkpoint.keep=1", "checkpoint.keep"),
        ("checkpoint.every_minutes=0", "checkpoint.every_minutes"),
    ],
)
def test_a_bad_value_is_refused_with_its_key(override: str, key: str) -> None:
    with pytest.raises(UserError, match="(?s)" + key.replace(".", r"\.")):
        load_config(None, [override])


@pytest.mark.parametrize(
    "content",
    [
        b"seed = ",
        b"\xff\xfe",
        b"[train]\nbatch = 'x'\n",
        b"[[train]]\nbatch = 1\n",
        b"[unknown]\na = 1\n",
        b"a = " + b"[" * 5000,
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.toml"):
        load_config(path)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


def test_kahan_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(UserError, match="kahan"):
        load_config(None, ["classifier.format=fp32", "classifier.rounding=kahan"])


def test_what_is_left_to_choose_is_resolved_and_stays_so(tmp_path: Path) -> None:
    assert Config().optimizer.encoder_lr == 0
    config = load_config(None)
    assert config.optimizer.encoder_lr > 0
    transformer = load_config(None, ["encoder.kind=transformer", "encoder.name=x"])
    assert 0 < transformer.optimizer.encoder_lr < config.optimizer.encoder_lr
    frozen = load_config(None, ["encoder.kind=transformer", "encoder.name=x", "encoder.frozen=true"])
    assert frozen.optimizer.encoder_lr > transformer.optimizer.encoder_lr
    assert (config.optimizer.states, load_config(None, ["encoder.format=bf16"]).optimizer.states) == ("fp32", "bf16")
