"""What the plan says of the encoder's memory is what a step allocates."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from elmo_stream.config import Config, load_config
from elmo_stream.model.encoder import Encoder, create_encoder
from elmo_stream.training.encoder_memory import encoder_memory
from elmo_stream.training.optim import build_optimizer, optimizer_tensors

LENGTH, VOCABULARY = 32, 600
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer BERT that asks for all hidden states, as some configurations on the hub do."""
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("wide") / "bert"
    BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=384,
            max_position_embeddings=64,
            output_hidden_states=True,
        )
    ).save_pretrained(folder)
    words = {"[UNK]": 0, **{f"word{i}": i for i in range(1, VOCABULARY)}}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder


def _encoder(config: Config, folder: Path) -> Encoder:
    tokenizer = folder / "tokenizer.json"
    made = create_encoder(config.encoder, vocab_size=VOCABULARY, max_length=LENGTH, tokenizer=tokenizer, seed=0)
    return made.train()


def _allocated(encoder: Encoder, instances: int, *, again: bool) -> int:
    """Peak of what torch's own profiler sees allocated in a forward and backward pass; ``again``: in a second one."""
    token_ids_BT = torch.randint(0, VOCABULARY, (instances, LENGTH))
    mask_BT = torch.ones(instances, LENGTH, dtype=torch.bool)
    mask_BT[0, 20:] = False
    if again:
        encoder(token_ids_BT, mask_BT).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        x_BD = encoder(token_ids_BT, mask_BT)
        if x_BD.requires_grad:
            x_BD.backward(torch.ones_like(x_BD))
        del x_BD
    now = peak = 0
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "keys",
    [
        ["train.batch=64"],
        ["train.batch=64", "encoder.checkpointing=true"],
        ["train.batch=64", "train.micro_batch=16"],
        ["train.batch=96", "train.micro_batch=32", "encoder.checkpointing=true", "encoder.format=bf16"],
        ["train.batch=64", "encoder.frozen=true"],
        ["train.batch=64", "encoder.kind=bag", "encoder.dim=96", "encoder.hidden=64", "encoder.name="],
    ],
)
def test_predicted_bytes_are_within_a_tenth_of_the_measured(wide_bert: Path, keys: list[str]) -> None:
    config = load_config(None, ["encoder.kind=transformer", f"encoder.name='{wide_bert}'", *keys])
    encoder = _encoder(config, wide_bert)
    told = encoder_memory(encoder, config, length=LENGTH, device=CPU)
    again = 0 < config.train.micro_batch < config.train.batch
    measured = _allocated(encoder, config.train.micro_batch or config.train.batch, again=again)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert told.gradients == sum(p.numel() * p.element_size() for p in trained)
    expected = told.activations + (0 if again else told.gradients)
    assert measured == pytest.approx(expected, rel=0.1)


def test_the_layers_behind_a_frozen_body_are_counted_for_the_whole_batch(wide_bert: Path) -> None:
    keys = ["encoder.kind=transformer", f"encoder.name='{wide_bert}'", "encoder.frozen=true", "encoder.hidden=768"]
    config = load_config(None, [*keys, "train.batch=4096"])
    encoder = _encoder(config, wide_bert)
    told = encoder_memory(encoder, config, length=LENGTH, device=CPU).activations
    stored = 4096 * 768 * 4  # the hidden layer's activation
    assert 2 * stored < told < 6 * stored


def test_each_key_saves_what_it_is_there_to_save(wide_bert: Path) -> None:
    def activations(*keys: str) -> int:
        config = load_config(None, ["encoder.kind=transformer", f"encoder.name='{wide_bert}'", "train.batch=64", *keys])
        return encoder_memory(_encoder(config, wide_bert), config, length=LENGTH, device=CPU).activations

    plain = activations()
    assert activations("train.micro_batch=16") < 0.4 * plain
    assert activations("encoder.checkpointing=true") < 0.5 * plain
    assert activations("encoder.format=bf16") < 0.75 * plain
    assert activations("encoder.frozen=true") < 0.3 * plain


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["optimizer.states=8bit"],
        ["encoder.format=bf16"],
        ["encoder.format=bf16", "encoder.rounding=stochastic"],
        ["encoder.format=bf16", "encoder.rounding=stochastic", "optimizer.states=8bit"],
    ],
)
def test_the_optimizers_bytes_are_those_that_it_takes(wide_bert: Path, keys: list[str]) -> None:
    config = load_config(None, ["encoder.kind=transformer", f"encoder.name='{wide_bert}'", "train.batch=2", *keys])
    encoder = _encoder(config, wide_bert)
    optimizer = build_optimizer(encoder, config.optimizer, rounding=config.encoder.rounding)
    assert optimizer is not None
    encoder(torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)).sum().backward()
    optimizer.step()
    taken = sum(t.numel() * t.element_size() for t in optimizer_tensors(optimizer)[0].values())
    told = encoder_memory(encoder, config, length=8, device=CPU)
    assert told.optimizer_held == told.optimizer
    assert taken == pytest.approx(told.optimizer, rel=0.02)
    assert told.weights == sum(t.numel() * t.element_size() for t in (*encoder.parameters(), *encoder.buffers()))
