"""The encoder gives the same bits each time, also where threads share its gradients."""

from pathlib import Path

import pytest
import torch

from elmo_stream.config import EncoderConfig
from elmo_stream.errors import UserError
from elmo_stream.model.encoder import BagEncoder, create_encoder, restore_encoder

VOCABULARY, LENGTH = 500, 128


def _batch(seed: int, rows: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_ids_BT = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
    return token_ids_BT, torch.arange(LENGTH) < lengths


def _bag(**keys: object) -> BagEncoder:
    config = EncoderConfig(dim=32, bigrams=1000, **keys)  # type: ignore[arg-type]
    return BagEncoder(config, VOCABULARY, LENGTH, torch.Generator().manual_seed(1))


def test_gradients_of_a_large_batch_do_not_depend_on_the_race_of_threads() -> None:
    bag, (token_ids_BT, mask_BT) = _bag(), _batch(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = set()
        for _ in range(60):
            bag.zero_grad()
            bag(token_ids_BT, mask_BT).square().cumsum(1).sum().backward()
            seen.add(b"".join(p.grad.numpy().tobytes() for p in bag.parameters() if p.grad is not None))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


def test_padding_changes_no_embedding() -> None:
    bag, (token_ids_BT, mask_BT) = _bag(hidden=16), _batch(1, rows=5)
    wider = torch.nn.functional.pad(token_ids_BT, (0, 8), value=7), torch.nn.functional.pad(mask_BT, (0, 8))
    torch.testing.assert_close(bag(token_ids_BT, mask_BT), bag(*wider))


def test_the_order_of_words_counts_through_bigrams_and_positions() -> None:
    bag = _bag()
    forwards = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones_like(forwards, dtype=torch.bool)
    assert not torch.allclose(bag(forwards, mask), bag(forwards.flip(1), mask))


def test_every_embedding_has_unit_mean_square(tmp_path: Path) -> None:
    encoder = create_encoder(
        EncoderConfig(dim=32, hidden=16), vocab_size=VOCABULARY, max_length=LENGTH, tokenizer=tmp_path, seed=0
    ).eval()
    x_BD = encoder(*_batch(2, rows=9))
    torch.testing.assert_close(x_BD.square().mean(1), torch.ones(9))
    assert x_BD.dtype == torch.float32


def test_a_restored_encoder_takes_the_saved_weights(tmp_path: Path) -> None:
    config = EncoderConfig(dim=32, format="bf16")
    encoder = create_encoder(config, vocab_size=VOCABULARY, max_length=LENGTH, tokenizer=tmp_path, seed=0).eval()
    restored = restore_encoder(config, tmp_path, vocab_size=VOCABULARY, max_length=LENGTH).eval()
    restored.load_state_dict(encoder.state_dict())
    batch = _batch(3, rows=4)
    assert torch.equal(encoder(*batch), restored(*batch))


@pytest.mark.parametrize(("keys", "word"), [({"dim": 48}, "encoder.dim=32"), ({"dim": 32}, "")])
def test_a_bag_starts_from_a_transformers_embeddings_of_its_own_size(
    small_bert: tuple[Path, torch.Tensor], keys: dict[str, int], word: str
) -> None:
    folder, table_VD = small_bert
    config = EncoderConfig(name=str(folder), **keys)  # type: ignore[arg-type]
    arguments = {"vocab_size": len(table_VD), "max_length": 8, "tokenizer": folder / "tokenizer.json", "seed": 0}
    if word:
        with pytest.raises(UserError, match=word):
            create_encoder(config, **arguments)  # type: ignore[arg-type]
    else:
        body = create_encoder(config, **arguments).body  # type: ignore[arg-type]
        assert isinstance(body, BagEncoder)
        assert torch.equal(body.embedding_VD[: len(table_VD)], table_VD)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_transformer_pools_without_its_padding_and_refuses_longer_texts(
    small_bert: tuple[Path, torch.Tensor], pooling: str
) -> None:
    folder, table_VD = small_bert
    config = EncoderConfig(kind="transformer", name=str(folder), pooling=pooling, checkpointing=True)
    arguments = {"vocab_size": len(table_VD), "tokenizer": folder / "tokenizer.json", "seed": 0}
    encoder = create_encoder(config, max_length=16, **arguments).eval()  # type: ignore[arg-type]
    short = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    padded = torch.tensor([[1, 2, 3, 0, 0]]), torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(encoder(*short), encoder(*padded), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="--max-length 16"):
        create_encoder(config, max_length=17, **arguments)  # type: ignore[arg-type]


def _refusal_of(model: object, folder: Path, max_length: int) -> str:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    config = EncoderConfig(kind="transformer", name=str(folder))
    with pytest.raises(UserError) as caught:
        create_encoder(config, vocab_size=40, max_length=max_length, tokenizer=None, seed=0)
    return str(caught.value)


def test_models_that_cannot_embed_the_texts_are_refused_before_training(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5Model

    small = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaModel(RobertaConfig(**small, hidden_size=32, max_position_embeddings=34))
    assert "--max-length 32 or less" in _refusal_of(roberta, tmp_path / "roberta", 33)
    odd = BertModel(BertConfig(**small, hidden_size=32, max_position_embeddings=20))
    assert "--max-length 16 or less" in _refusal_of(odd, tmp_path / "odd", 17)
    narrow = BertModel(BertConfig(**small, hidden_size=24))
    assert "multiple of 16" in _refusal_of(narrow, tmp_path / "narrow", 8)
    both = T5Model(T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    assert "no text encoder" in _refusal_of(both, tmp_path / "both", 8)


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("small") / "bert"
    model = BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    model.save_pretrained(folder)
    words = {"[UNK]": 0, **{f"word{i}": i for i in range(1, 40)}}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder, model.get_input_embeddings().weight.detach()
