"""State-space sequential recommenders for RecBole.

Importing this package makes its models known to RecBole by name: ``recbole.utils.get_model("STARRec")``.
"""

from importlib.metadata import PackageNotFoundError, version

from recbole_ssm.config import Config
from recbole_ssm.errors import UserError
from recbole_ssm.quick_start import load_data_and_model, run_recbole
from recbole_ssm.registry import list_models, register
from recbole_ssm.search import tune
from recbole_ssm.serving import Recommender

try:
    __version__ = version("recbole-ssm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Config", "Recommender", "UserError", "__version__", "list_models", "load_data_and_model", "run_recbole", "tune",
]  # fmt: skip

register()
