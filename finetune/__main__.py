"""`finetune VERB`, the same as `python -m finetune VERB`."""

from __future__ import annotations

import sys

from finetune import cli
from finetune.distributed.process_setup import force_data_only
from finetune.utils.console import accept_all_characters, open_standard_streams, use_utf8
from finetune.utils.errors import exit_on_error, process_exit_guard


def main() -> None:
    """Run the console script."""
    open_standard_streams()
    use_utf8()
    accept_all_characters()
    force_data_only()
    with process_exit_guard(), exit_on_error():
        cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
