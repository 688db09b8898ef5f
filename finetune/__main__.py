"""`finetune VERB`, the same as `python -m finetune VERB`."""

import signal
import sys

handler = signal.getsignal(signal.SIGINT)
if handler is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

from finetune import cli  # noqa: E402
from finetune.distributed.process_setup import force_data_only  # noqa: E402
from finetune.utils.console import accept_all_characters, open_standard_streams, use_utf8  # noqa: E402
from finetune.utils.errors import exit_on_error, process_exit_guard  # noqa: E402

signal.signal(signal.SIGINT, handler)


def main() -> None:
    """Run the console script."""
    with process_exit_guard(), exit_on_error():
        open_standard_streams()
        use_utf8()
        accept_all_characters()
        force_data_only()
        cli.main(sys.argv[1:])


if __name__ == "__main__":
    main()
