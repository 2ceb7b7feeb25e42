"""Workers, prefetch depth and storage backend change no batch."""

import hashlib
import random
from itertools import islice
from pathlib import Path

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import BACKENDS
from elmo_stream.data.loader import StreamLoader
from tests.torture.materials import make_store
from tests.torture.tally import Tally


def attack(tries: int, folder: Path, seed: int) -> Tally:
    """A try is a random setting of a loader, from a random position on, beside the plainest of all."""
    tally, chance = Tally(), random.Random(seed)
    stores = {backend: make_store(folder, backend, rows=400, rows_per_shard=32) for backend in BACKENDS}
    whole = _digests(stores["zarr"], LoaderConfig(workers=0, bucket=4), 0)
    for _ in range(tries):
        backend, skipped = chance.choice(BACKENDS), chance.randrange(len(whole))
        config = LoaderConfig(workers=chance.randint(0, 8), prefetch=chance.randint(1, 16), bucket=4)
        tally.tries += 1
        if _digests(stores[backend], config, skipped) != whole[skipped:]:
            tally.lost += 1
            tally.notes.append(f"{backend}, {config}, from batch {skipped} on: other batches")
    return tally


def _digests(store: Path, config: LoaderConfig, skipped: int) -> list[str]:
    """SHA-256 of every batch of two epochs behind the first ``skipped``, resumed there."""
    options = {"batch": 24, "seed": 5, "block_labels": 1024, "config": config}
    with StreamLoader(store, **options) as first:
        count = 2 * first.batches_per_epoch + 1
        for _ in islice(first, skipped):
            pass
        state = first.state_dict()
    with StreamLoader(store, **options) as loader:
        loader.load_state_dict(state | {"store": loader.state_dict()["store"]})
        return [_digest(batch) for batch in islice(loader, count - skipped)]


def _digest(batch: object) -> str:
    positives = batch.positives
    tensors = [batch.token_ids_BT, batch.mask_BT, batch.instance_B]
    tensors += [positives.label_P, positives.instance_P, positives.block_ptr]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
