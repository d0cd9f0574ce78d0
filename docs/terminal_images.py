"""Make docs/images/{run,export,bench}.svg: real output of the command line at 80 columns.

    python docs/terminal_images.py

Each command runs in a pseudo-terminal; what it left on the screen is drawn by rich, which the
command line needs anyway. Paths in the package are shown from the package on. Times are those of
the machine, so that a new run changes the files.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

import mobilevlm

COLUMNS, ROWS = 80, 60
IMAGES = Path(__file__).parent / "images"
INSTALLED = f"{Path(mobilevlm.__file__).parents[1]}/"
SCENES: dict[str, tuple[str, ...]] = {
    "run": (
        "mobilevlm demo --seed 11 -o scene.png",
        "mobilevlm run nano --image scene.png --prompt 'Describe the image.'",
    ),
    "export": ("mobilevlm export nano -o bundle --target rpi5",),
    "bench": ("mobilevlm bench nano --runs 20",),
}
"""Commands of each image, in the order in which they run in one folder."""
ERASED = re.compile(r"\x1b\[1A\x1b\[2K|\x1b\[2K|\x1b\[\?25[lh]")
"""Control sequences of bars of progress: a line up and erased, erased, cursor hidden or shown."""


def output_of(command: str, folder: Path) -> str:
    """Run a command in a terminal of ``COLUMNS`` columns; return all that it wrote.

    Raises:
        SystemExit: the command failed.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        program = shlex.split(command)
        os.execvp(program[0], program)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so that the other end is closed.
            break
        if not part:
            break
        written += part
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{command}: exit code {status}\n{written.decode()}")
    return written.decode()


def left_on_screen(written: str) -> str:
    """Return what stays on the screen, colours included, when bars of progress are erased."""
    lines = [""]
    for piece in re.split(f"({ERASED.pattern}|\r\n|\r|\n)", written):
        if piece in ("\r\n", "\n"):
            lines.append("")
        elif piece == "\r" or piece.endswith("25l") or piece.endswith("25h"):
            continue
        elif piece.startswith("\x1b[1A"):
            lines.pop()
            lines[-1] = ""
        elif piece == "\x1b[2K":
            lines[-1] = ""
        else:
            lines[-1] += piece
    return "\n".join(lines).rstrip("\n")


def draw(name: str, commands: tuple[str, ...]) -> None:
    """Run the commands and write docs/images/NAME.svg."""
    with tempfile.TemporaryDirectory() as folder:
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        for number, command in enumerate(commands):
            console.print("\n" * (number > 0), end="")
            console.print(Text("$ ", style="green") + Text(command, style="bold"))
            shown = left_on_screen(output_of(command, Path(folder))).replace(INSTALLED, "")
            console.print(Text.from_ansi(shown))
        text = console.export_svg(title="mobilevlm", unique_id=f"terminal-{name}")
    # Fonts of this machine's reader; none is fetched.
    text = re.sub(r"\s*@font-face \{.*?\}\n", "\n", text, flags=re.DOTALL)
    text = text.replace("Fira Code, monospace", "ui-monospace, DejaVu Sans Mono, Menlo, monospace")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    (IMAGES / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name, commands in SCENES.items():
        draw(name, commands)
