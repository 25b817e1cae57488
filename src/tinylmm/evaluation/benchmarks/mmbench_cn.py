"""MMBench-CN: the Chinese translation of MMBench, asked and scored like it."""

from __future__ import annotations

from tinylmm.evaluation.benchmarks.choice import LETTER_SUFFIX_CN
from tinylmm.evaluation.benchmarks.mmbench import MMBench


class MMBenchCN(MMBench):
    """MMBench-CN, dev; see `MMBench`."""

    name = "mmbench_cn"
    files = ("mmbench_dev_cn_20231003.tsv", "mmbench_dev_cn.tsv", "MMBench_DEV_CN.tsv")
    config = "cn"
    suffix = LETTER_SUFFIX_CN
    get = (
        "mmbench_dev_cn_20231003.tsv is at https://download.openmmlab.com/mmclassification/datasets/mmbench/. In Hugging "
        "Face's layout: lmms-lab/MMBench, config cn."
    )
