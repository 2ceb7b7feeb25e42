"""The benchmarks measure what they say: whole batches, every document of the store, in every way alike."""

import sys
from itertools import islice

import pytest

from tools.bench_loader import WAYS, Setting, measure, prepare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    setting = Setting(tmp_path_factory.mktemp("bench"), tokens=8, labels=5000, batch=50, workers=1)
    prepare(setting, "webdataset", 2000)
    return setting


@pytest.mark.parametrize("way", WAYS)
def test_every_way_reads_the_same_documents(setting, way):
    found = {}
    for batch in islice(WAYS[way](setting), 40):
        positives = batch.positives
        for place, row in enumerate(batch.instance_B.tolist()):
            labels = positives.label_P[positives.instance_P == place].tolist()
            found[row] = (batch.token_ids_BT[place][batch.mask_BT[place]].tolist(), labels)
    assert sorted(found) == list(range(2000))
    reference = {}
    for batch in islice(WAYS["numpy memmap, shuffled"](setting), 40):
        for place, row in enumerate(batch.instance_B.tolist()):
            labels = batch.positives.label_P[batch.positives.instance_P == place].tolist()
            reference[row] = (batch.token_ids_BT[place].tolist(), labels)
    assert found == reference


def test_a_measurement_counts_the_documents_that_it_read(setting):
    result = measure("elmo-stream, shuffled", setting, 6000)
    assert result["documents"] >= 6000 and result["documents_per_second"] > 0
    assert result["peak_rss_mib"] >= max(result["rss_mib_by_tenth"]) > 0
