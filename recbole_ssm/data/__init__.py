"""From atomic files to batches."""

from recbole_ssm.data.batch import SequenceBatch
from recbole_ssm.data.utils import create_dataset, data_preparation

__all__ = ["SequenceBatch", "create_dataset", "data_preparation"]
