"""``python -m recbole_ssm`` is ``run_recbole``."""

import sys

from recbole_ssm.cli.run_recbole import main

if __name__ == "__main__":
    sys.exit(main())
