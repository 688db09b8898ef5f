"""What the `deepspeed` launcher runs; `deepspeed --module finetune.train` is the same for an installed package.

Running a file puts its folder first on the module path, where this very file would hide the package of the same name:
the folder above has to take that place first.
"""

import gc
import sys
from pathlib import Path

gc.disable()  # until the first step: loading libraries makes objects by the million, and hardly any garbage

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.distributed.launcher_processes import die_with_launcher  # noqa: E402
from finetune.utils.console import open_standard_streams, use_utf8  # noqa: E402
from finetune.utils.errors import exit_on_error  # noqa: E402

if __name__ == "__main__":
    die_with_launcher()  # before the imports, which take seconds
    open_standard_streams()
    use_utf8()
    with exit_on_error():
        from finetune.train import run

    run()
