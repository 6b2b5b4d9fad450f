"""A printed command can be pasted into the shell of the system."""

import shlex
from pathlib import Path, PureWindowsPath

from config.wording import shell_argument


def test_a_path_in_a_printed_command_is_one_argument():
    for name in ("checkpoints/best_model.pth", "my run/best.pth", "it's/$HOME.pth"):
        assert shlex.split(shell_argument(Path(name), windows=False)) == [str(Path(name))]
    # cmd.exe knows double quotes only, and would take single ones for a part of the name
    assert shell_argument(PureWindowsPath("checkpoints/best.pth"), windows=True) == r"checkpoints\best.pth"
    for name in ("my run", "R&D"):
        assert shell_argument(PureWindowsPath(name, "best.pth"), windows=True) == rf'"{name}\best.pth"'
