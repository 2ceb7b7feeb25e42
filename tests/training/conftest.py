"""A two-layer BERT whose tokenizer is the store's, as a user would have it in a folder."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bert(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a randomly initialised two-layer BERT for the tokens of ``store``."""
    import torch
    from transformers import BertConfig, BertModel

    from elmo_stream.data.index import StoreIndex

    folder = tmp_path_factory.mktemp("bert") / "model"
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=StoreIndex.load(store).tokenizer.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    model.save_pretrained(folder)
    shutil.copy(store / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    return folder
