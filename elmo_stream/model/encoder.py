"""Encoders: token ids -> embedding. ``bag`` is fast on any machine, ``transformer`` is accurate where there is a GPU.

Shapes: B instances, T tokens, D features, V vocabulary.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
from elmo_kernels.types import DIM_MULTIPLE
from torch import Tensor, nn
from torch.nn import functional

from elmo_stream.config import PAD_MULTIPLE, EncoderConfig
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.pretrained import find_pretrained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
INIT_STD = 0.1
# Odd 32-bit multipliers of the hash of a bigram; their products with token ids stay below 2**63.
_LEFT, _RIGHT = 0x9E3779B1, 0x85EBCA6B
EVALUATION_PIECE = 64
"""Texts that a transformer embeds at a time when it is not trained, however many are asked for."""


class BagEncoder(nn.Module):
    """Weighted sum of the embeddings of tokens and hashed bigrams, with a learned weight per entry and per position.

    Bigrams share ``bigrams`` buckets by a hash of the two token ids (Weinberger et al., ICML 2009). The sum needs no
    division by its weights, since the embedding is scaled to unit mean square afterwards. Features without an order
    (``ordered`` false) have neither bigrams nor positions, but weights of their own.
    """

    def __init__(
        self,
        config: EncoderConfig,
        vocab_size: int,
        max_length: int,
        generator: torch.Generator | None,
        ordered: bool = True,
    ) -> None:
        super().__init__()
        self.dim = config.dim
        self._vocab_size, self._bigrams = vocab_size, config.bigrams if ordered else 0
        entries = vocab_size + self._bigrams
        self.embedding_VD = nn.Parameter(torch.empty(entries, config.dim))
        self.log_weight_V = nn.Parameter(torch.zeros(entries))
        self.log_weight_T = nn.Parameter(torch.zeros(max_length)) if ordered else None
        if generator is not None:
            nn.init.normal_(self.embedding_VD, std=INIT_STD, generator=generator)

    def forward(self, token_ids_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """x_BD in the dtype of the weights; token_ids_BT int64, mask_BT bool, weight_BT float32 for features."""
        if self.log_weight_T is None:
            return self._embed(token_ids_BT, self._learned_weight(token_ids_BT).exp() * mask_BT, weight_BT)
        width = int(mask_BT.shape[1])
        weight_T = functional.pad(self.log_weight_T[:width], (0, max(0, width - len(self.log_weight_T))))
        entries, weights, masks = [token_ids_BT], [weight_T.expand_as(mask_BT)], [mask_BT]
        if self._bigrams and width > 1:
            mixed = token_ids_BT[:, :-1] * _LEFT + token_ids_BT[:, 1:] * _RIGHT
            entries.append(self._vocab_size + ((mixed >> 15) % self._bigrams))
            weights.append(weights[0][:, :-1])
            masks.append(mask_BT[:, 1:])
        entry_BN, mask_BN = torch.cat(entries, 1), torch.cat(masks, 1)
        weight_BN = (self._learned_weight(entry_BN) + torch.cat(weights, 1)).exp() * mask_BN
        return self._embed(entry_BN, weight_BN)

    def _learned_weight(self, entry_BN: Tensor) -> Tensor:
        # An embedding of size 1: its backward pass adds in a fixed order, which that of indexing does not.
        return functional.embedding(entry_BN, self.log_weight_V.unsqueeze(1)).squeeze(2)

    def _embed(self, entry_BN: Tensor, weight_BN: Tensor, given_BN: Tensor | None = None) -> Tensor:
        if given_BN is not None:
            weight_BN = weight_BN * given_BN.to(weight_BN.dtype)
        return functional.embedding_bag(entry_BN, self.embedding_VD, per_sample_weights=weight_BN, mode="sum")

    def describe(self) -> dict[str, Any]:
        """What decides about an embedding beside the weights."""
        return {"kind": "bag", "vocab_size": self._vocab_size, "bigrams": self._bigrams}


def _residual_mlp(dim: int, hidden: int, generator: torch.Generator | None) -> nn.Module:
    up, down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
    with torch.no_grad():
        up.weight.normal_(0, dim**-0.5, generator=generator)
        down.weight.normal_(0, 0.1 * hidden**-0.5, generator=generator)
        up.bias.zero_()
        down.bias.zero_()
    return nn.Sequential(up, nn.GELU(), down)


def _unit_mean_square(x_BD: Tensor) -> Tensor:
    return functional.rms_norm(x_BD, (x_BD.shape[1],), eps=1e-12)


class TransformerEncoder(nn.Module):
    """A Hugging Face encoder with mean or first-token pooling; keeps no hidden states but the last."""

    def __init__(self, model: Any, pooling: str, checkpointing: bool) -> None:
        super().__init__()
        self.dim = int(model.config.hidden_size)
        self._pooling = pooling
        if hasattr(model, "pooler"):
            model.pooler = None
        if checkpointing:
            model.config.use_cache = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the new name is not in every version that we accept
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model

    def forward(self, token_ids_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """x_BD in the dtype of the weights; token_ids_BT int64, mask_BT bool; there are no weights of tokens."""
        if not self.training and len(token_ids_BT) > EVALUATION_PIECE:
            pieces = zip(token_ids_BT.split(EVALUATION_PIECE), mask_BT.split(EVALUATION_PIECE), strict=True)
            return torch.cat([self(*piece) for piece in pieces])
        # A configuration may ask for the hidden states of all layers; they would be kept to no use.
        hidden_BTD = self.model(
            input_ids=token_ids_BT,
            attention_mask=mask_BT.long(),
            output_hidden_states=False,
            output_attentions=False,
        ).last_hidden_state
        if self._pooling == "cls":
            return hidden_BTD[:, 0]
        mask_BT1 = mask_BT.unsqueeze(2).to(hidden_BTD.dtype)
        return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)

    def describe(self) -> dict[str, Any]:
        """What decides about an embedding beside the weights: not where they came from, nor who wrote them down."""
        left_out = ("_name_or_path", "transformers_version")
        architecture = {key: value for key, value in self.model.config.to_dict().items() if key not in left_out}
        return {"kind": "transformer", "pooling": self._pooling, "architecture": architecture}


class Encoder(nn.Module):
    """The trained text encoder: a body (bag or transformer), a residual MLP where asked for, then dropout.

    The embedding is scaled to unit mean square, which lets one learning rate of the classifier fit every encoder.
    Dropout draws from torch's global generator, which the trainer seeds from (run seed, step). A frozen body has no
    dropout and is not trained; the MLP is.
    """

    def __init__(
        self, body: BagEncoder | TransformerEncoder, config: EncoderConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.body = body.to(DTYPES[config.format])
        self.dim = body.dim
        self.mlp: nn.Module | None = None
        if config.hidden:
            self.mlp = _residual_mlp(body.dim, config.hidden, generator).to(DTYPES[config.format])
        self._dropout, self._frozen = config.dropout, config.frozen
        if config.frozen:
            self.body.requires_grad_(False)

    def train(self, mode: bool = True) -> "Encoder":
        """As of any module, but a frozen body stays as it is when it predicts."""
        super().train(mode)
        self.body.train(mode and not self._frozen)
        return self

    def forward(self, token_ids_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """x_BD float32; token_ids_BT int64, mask_BT bool, weight_BT float32 where tokens are features."""
        return self.head(self.embed(token_ids_BT, mask_BT, weight_BT))

    def embed(self, token_ids_BT: Tensor, mask_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """The embedding of the body, float32 of unit mean square, (B, D)."""
        return _unit_mean_square(self.body(token_ids_BT, mask_BT, weight_BT).float())

    def head(self, x_BD: Tensor) -> Tensor:
        """From what ``embed`` gives to the embedding that the classifier takes."""
        if self.mlp is not None:
            dtype = next(self.mlp.parameters()).dtype
            x_BD = _unit_mean_square(x_BD + self.mlp(x_BD.to(dtype)).float())
        return functional.dropout(x_BD, self._dropout, self.training)


def create_encoder(
    config: EncoderConfig,
    *,
    vocab_size: int,
    max_length: int,
    tokenizer: Path | None,
    seed: int,
    ordered: bool = True,
) -> Encoder:
    """A new encoder, pretrained where ``config.name`` says so.

    ``tokenizer`` is the store's ``tokenizer.json``, which must be the pretrained one's; None before there is a store.

    ``ordered`` says whether tokens come in an order, as those of a text, or are features.

    Raises:
        UserError: the model is not to be had, is not an encoder, or does not fit the store's tokenizer.
    """
    if not ordered and (config.kind != "bag" or config.name):
        raise UserError(
            "encoder.kind: the store holds features, which only a bag without a pretrained name can embed; set "
            "encoder.kind=bag and leave encoder.name out."
        )
    generator = torch.Generator().manual_seed(seed)
    if config.kind == "transformer":
        model = _load_pretrained(config.name, tokenizer)
        _check_transformer(config.name, model, max_length)
        return Encoder(TransformerEncoder(model, config.pooling, config.checkpointing), config, generator)
    body = BagEncoder(config, vocab_size, max_length, generator, ordered)
    if config.name:
        table_VD = _load_pretrained(config.name, tokenizer).get_input_embeddings().weight.detach()
        if len(table_VD) < vocab_size:
            raise UserError(f"encoder.name: {config.name!r} has fewer embeddings than the tokenizer has entries.")
        if table_VD.shape[1] != config.dim:
            raise UserError(
                f"encoder.dim is {config.dim}, but the embeddings of {config.name} have "
                f"{table_VD.shape[1]} features; set encoder.dim={table_VD.shape[1]}."
            )
        with torch.no_grad():
            body.embedding_VD[:vocab_size] = table_VD[:vocab_size]
    return Encoder(body, config, generator)


def _check_transformer(name: str, model: Any, max_length: int) -> None:
    dim = getattr(model.config, "hidden_size", None)
    if not isinstance(dim, int) or model.config.is_encoder_decoder:
        raise UserError(f"encoder.name: {name!r} is no text encoder with one hidden size, and without a decoder.")
    if dim % DIM_MULTIPLE:
        raise UserError(
            f"encoder.name: {name!r} gives embeddings of {dim} features, but the classifier needs a multiple of "
            f"{DIM_MULTIPLE}; choose another model."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # no limit
        return
    # RoBERTa and its kin number positions from behind that of padding on, and batches are padded to a multiple.
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    positions -= 0 if padding is None else padding + 1
    positions -= positions % PAD_MULTIPLE
    if max_length > positions:
        raise UserError(
            f"encoder.name: {name!r} has room for {positions} tokens, but the store keeps {max_length} of a text; "
            f"shard the data with --max-length {positions} or less."
        )


def save_architecture(encoder: Encoder, folder: Path) -> None:
    """Write what ``restore_encoder`` needs beside the weights; a bag needs nothing but the run's configuration."""
    if isinstance(encoder.body, TransformerEncoder):
        folder.mkdir(exist_ok=True)
        encoder.body.model.config.save_pretrained(folder)


def restore_encoder(
    config: EncoderConfig, folder: Path, *, vocab_size: int, max_length: int, ordered: bool = True
) -> Encoder:
    """An encoder of a run with weights yet to be loaded; reads the run folder only, no network, no code from data.

    Raises:
        CorruptError: the architecture of a transformer cannot be read, or is none that transformers knows.
    """
    if config.kind == "bag":
        return Encoder(BagEncoder(config, vocab_size, max_length, None, ordered), config)
    from transformers import AutoConfig, AutoModel

    try:
        architecture = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_config(architecture, trust_remote_code=False)
    except (OSError, TypeError, ValueError) as error:
        raise CorruptError(
            f"{folder / 'config.json'}: no architecture that can be restored ({_reason(error)})."
        ) from error
    return Encoder(TransformerEncoder(model, config.pooling, config.checkpointing), config)


def _load_pretrained(name: str, tokenizer: Path | None) -> Any:
    from huggingface_hub import model_info
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = find_pretrained(name, "config.json")
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    try:
        try:
            model = AutoModel.from_pretrained(folder or name, local_files_only=True, **options)
        except (OSError, ValueError):
            if folder is not None:
                raise
            model_info(name, timeout=10)  # says at once that a name is wrong or the network is down
            model = AutoModel.from_pretrained(name, **options)
        if tokenizer is not None:
            _check_tokenizer(name, folder, tokenizer)
    except UserError:
        raise
    except Exception as error:  # not found, no network, no safetensors, unknown architecture, damaged files, ...
        raise UserError(
            f"encoder.name: {name!r} is neither a model folder, nor an installed package that ships one, "
            f"nor a model on the hub that can be reached ({_reason(error)})."
        ) from error
    return model


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _check_tokenizer(name: str, folder: Path | None, tokenizer: Path) -> None:
    from transformers.utils import cached_file

    own = folder / "tokenizer.json" if folder else Path(cached_file(name, "tokenizer.json"))
    if not own.is_file():
        raise UserError(f"encoder.name: {name!r} has no tokenizer.json to compare with that of the store.")
    if _tokenization(own) != _tokenization(tokenizer):
        raise UserError(
            f"encoder.name: the store was not tokenized for {name!r}; shard the data with --tokenizer {name}."
        )


def _tokenization(path: Path) -> str:
    """Everything that decides about token ids, in one spelling."""
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.no_padding()
    inner.no_truncation()
    return str(inner.to_str())
