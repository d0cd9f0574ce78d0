"""``mobilevlm chat`` on a terminal, typed at as a person does."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_program

import mobilevlm
from mobilevlm.console.line_editing import completions, edited, expanded, files_in, history_file

PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self._program = subprocess.Popen(
            [sys.executable, "-m", "mobilevlm", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, words: str, seconds: float = 90) -> None:
        """Read until the words come, then forget what stood before them."""
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self._master], [], [], 0.2)[0]:
                self.text += os.read(self._master, 65536).decode(errors="replace")
        self.text = self.text.split(words, 1)[1]

    def close(self) -> int:
        try:
            return self._program.wait(30)
        finally:
            self._program.kill()
            os.close(self._master)


def _take_terminal() -> None:
    """Make standard input the terminal that Ctrl-C goes through."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    started = Terminal("chat", "nano", "--max-new-tokens", "8")
    yield started
    started._program.kill()


def test_ctrl_c_clears_a_half_typed_line_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("this is not sen")
    terminal.wait_for("not sen")
    time.sleep(0.5)  # readline echoes, then waits; a signal in between is seen at the next key only
    terminal.type("\x03")
    terminal.wait_for("(Ctrl-D or /quit leaves)")
    terminal.wait_for("> ")
    terminal.type("/timings\n")
    terminal.wait_for("> ")
    terminal.type("Hello!\n")
    terminal.wait_for("tokens/s")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_ctrl_c_leaves_a_text_of_several_lines(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type('"""one\n')
    terminal.wait_for(". ")
    terminal.type("/two")
    terminal.wait_for("/two")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for("(Ctrl-D or /quit leaves)")
    terminal.wait_for("> ")
    terminal.type("/context\n")
    terminal.wait_for("room for 1024 of 1024 tokens", 20)
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def test_a_home_of_nobody_is_a_file_that_is_not_there() -> None:
    lines = ["/image ~nobody-here/a.jpg", "/save ~nobody-here/talk.json", "/context"]
    done = run_program("chat", "nano", stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    assert "error: ~nobody-here/a.jpg: no such image file" in done.stderr
    assert "error: ~nobody-here/talk.json: " in done.stderr
    assert "room for 1024 of 1024 tokens" in done.stderr
    run = run_program("run", "nano", "-p", "@~nobody-here/question.txt")
    assert run.returncode == 2 and "~nobody-here/question.txt: No such file" in run.stderr
    assert expanded("~a\0b/c") == Path("~a\0b/c")
    assert completions("/image ~nobody-here/", ("/image",)) == []


def test_who_has_no_home_types_without_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("readline")

    class Typed:
        """Standard input that is a terminal."""

        def isatty(self) -> bool:
            return True

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nowhere)
    monkeypatch.setattr("sys.stdin", Typed())
    with edited(("/quit",)):
        pass


def test_texts_that_begin_with_a_slash_are_no_commands_where_they_are_quoted_or_long() -> None:
    lines = ['"""/quit"""', "/etc/hosts has this: \\", "what is it?", "/system Be \\", "brief.",
             "/system", '/system ""', "/system", "/ect"]  # fmt: skip
    done = run_program("chat", "nano", "-n", 4, stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(done.stdout.splitlines()) >= 2
    assert said.index("Be  brief.") < said.index("no system message of your own")
    assert [line for line in said if "not a command" in line] == [
        line for line in said if line.startswith("/ect: not a command")
    ]


def test_a_conversation_is_saved_under_the_whole_name_or_not(tmp_path: Path) -> None:
    lines = [f"/save {tmp_path}/my talk.json", f"/save '{tmp_path}/my talk.json'"]
    done = run_program("chat", "nano", stdin="\n".join(lines).encode())
    assert f"error: {tmp_path}/my talk.json: one file is written: put a name with" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["my talk.json"]


def test_images_are_given_as_a_shell_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    spaced = tmp_path / "my photo's.jpg"
    shutil.copyfile(PHOTO, spaced)
    for typed in (
        str(spaced),
        "~/my photo's.jpg",
        f'"{spaced}"',
        str(spaced).replace(" ", "\\ ").replace("'", "\\'"),
        "~/my\\ photo\\'s.jpg",
    ):
        assert files_in(typed) == [str(spaced)], typed
    assert files_in(f"{PHOTO} '{PHOTO}'") == [str(PHOTO), str(PHOTO)]
    assert files_in("it's gone.jpg") == ["it's gone.jpg"]


def test_a_context_that_is_nearly_full_is_told_before_it_is() -> None:
    lines = [b"word " * 860, b"Again?"]
    done = run_program("chat", "nano", "--max-new-tokens", "4", stdin=b"\n".join(lines))
    assert done.returncode == 0
    assert "the context is nearly full: room for " in done.stderr
    assert "of 1024 tokens: /reset begins anew" in done.stderr


def test_uris_are_given_as_they_are() -> None:
    uri = "data:image/png;base64,AA//BB=="
    assert files_in(uri) == [uri]
    assert files_in(f"{uri} file:///a//b.png") == [uri, "file:///a//b.png"]
    assert files_in("a" * 9000) == ["a" * 9000]


def test_commands_and_files_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "a.jpg").touch()
    (tmp_path / ".hidden").touch()
    commands = ("/image", "/new", "/save")
    assert completions("/im", commands) == ["/image "]
    assert completions("Who is", commands) == []
    assert completions("/image ~/my", commands) == ["/image ~/my\\ photos/"]
    assert completions("/image b.jpg ~/my\\ photos/", commands) == [
        "/image b.jpg ~/my\\ photos/a.jpg"
    ]
    assert completions(f"/image {tmp_path}/", commands) == [f"/image {tmp_path}/my\\ photos/"]
    assert completions("/image /no/such/", commands) == []
    line = completions("/image ~/my\\ photos/", commands)[0].partition(" ")[2]
    assert files_in(line) == [str(tmp_path / "my photos" / "a.jpg")]


def test_a_terminal_remembers_and_completes_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    terminal = Terminal("chat", "nano", "--max-new-tokens", "4")
    terminal.wait_for("> ")
    terminal.type("/cont\t\n")
    terminal.wait_for("room for 1024 of 1024 tokens")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.close() == 0
    assert history_file().read_text().splitlines()[-2:] == ["/context ", "/quit"]
    assert history_file().stat().st_mode & 0o77 == 0


def test_a_conversation_has_further_images_a_system_message_and_is_saved(tmp_path: Path) -> None:
    saved, photo = tmp_path / "my talk.json", tmp_path / "a b.jpg"
    shutil.copyfile(PHOTO, photo)
    lines = [
        "/system", "/system Be brief.", "/system", "What", 'is \\', "it?", f"/image {photo}",
        '"""Which', 'colour?"""', "/context", f'/save "{saved}"', f'/save "{saved}"',
        "/save /no/such/talk.json", "/new", "/context", "Who?",
    ]  # fmt: skip
    done = run_program("chat", "nano", "-n", 4, "--image", PHOTO, stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert "no system message of your own" in said and "Be brief." in said
    assert f"{saved}: 7 messages" in said
    assert f"error: {saved}: there is such a file: give another name" in said
    assert any(line.startswith("error: /no/such/talk.json: ") for line in said)
    assert len([line for line in said if line.startswith("room for ")]) == 2
    messages = json.loads(saved.read_text())
    users = [message["content"] for message in messages if message["role"] == "user"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert users[0] == [{"type": "image", "image": str(PHOTO)}, {"type": "text", "text": "What"}]
    assert users[1] == [{"type": "text", "text": "is \nit?"}]
    assert users[2] == [
        {"type": "image", "image": str(photo)}, {"type": "text", "text": "Which\ncolour?"},
    ]  # fmt: skip
    with mobilevlm.load("nano") as vlm:
        again = vlm.generate(messages[:-1], max_new_tokens=4)
    assert again.text == messages[-1]["content"]
