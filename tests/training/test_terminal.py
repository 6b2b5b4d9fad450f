"""On a terminal of 80 columns: the bar shows what matters, no line breaks another, and stories are wrapped."""

import os
import re
import sys

import pytest
from tqdm import tqdm

from training import terminal
from training.metrics_file import read_metrics

RATE = "tok/s 1,830,000"


def read_screen(output: str, columns: int = 80) -> list[str]:
    """The rows that a terminal shows after the output."""
    rows, y, x = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]", output):
        if part == "\r":
            x = 0
        elif part == "\x1b[A":
            y -= 1
        elif part == "\n" or (len(part) == 1 and x == columns):
            x, y = x if part == "\n" else 0, y + 1
            rows += [""] * (y == len(rows))
        if len(part) == 1 and part not in "\r\n":
            rows[y] = rows[y].ljust(x)[:x] + part + rows[y][x + 1:]
            x += 1
    return [row.rstrip() for row in rows]


def plain(story: str) -> str:
    """Without the layout, and one mark for whatever an untrained model writes."""
    return " ".join(re.sub(r"[^\n\t\x20-\x7e]", "\ufffd", story).split())


def test_a_terminal_that_is_closed_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(terminal, "columns", lambda stream: 80)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        monkeypatch.setattr(sys, "stderr", nowhere)
        bar = terminal.open_bar(10, 0, True)
        monkeypatch.setattr(terminal, "columns", lambda stream: None)
        terminal.show_figures(bar, 1, {"loss": "2.000", "tok/s": "1,000"})
        assert not bar.disable and "loss 2.000" in bar.postfix
        bar.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_run_on_a_terminal_of_80_columns(workplace, start_script):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start_script("--set", "training.max_steps=12", "--set", "sampling.max_new_tokens=60", stdin=theirs,
                           stdout=theirs, stderr=theirs, environment={"NO_COLOR": "", "TERM": "xterm"})
    os.close(theirs)
    output = b""
    try:
        while piece := os.read(ours, 2**16):
            output += piece
    except OSError:  # on Linux, the end
        pass
    os.close(ours)
    text = output.decode("utf-8", "replace")
    assert process.wait() == 0, text
    frames, rows = re.split(r"[\r\n]+", text), read_screen(text)

    assert re.search(r"[\r\n]tokenizer: \d+ stories", text) and not re.search(r"\d */ *0\b", text)
    bars = [frame for frame in frames if "%|" in frame and "steps" in frame]
    assert bars and all(len(bar) <= 80 and " left" in bar for bar in bars)
    assert re.search(r"100%\|.+\| 12/12 steps, 00:00 left, loss \d\.\d+, tok/s [\d,]+", bars[-1])
    whole = [row for row in rows if "%|" in row]
    assert len(whole) == 1 and whole[0].lstrip().startswith("100%|")  # all others were cleared
    for beginning in ("whole validation split: ", "\x1b[1mstep 10, epoch", "\x1b[1mFinished at step 12"):
        assert re.search(r"[\r\n]" + re.escape(beginning), text)

    samples = [entry["samples"] for entry in read_metrics(workplace / "checkpoints/quickstart/metrics.jsonl")
               if "samples" in entry]
    assert [len(stories) for stories in samples] == [1, 3, 3]
    stories = "\n".join(row[4:] if row.startswith("  |") else "" for row in rows)
    blocks = [plain(block) for block in re.split(r"\n{2,}", stories) if block.strip()]
    assert blocks[:-1] == [plain(story) for step in samples for story in step]
    assert blocks[-1] not in blocks[:-1]  # another seed than the samples'
    end = "".join(rows[rows.index("Next:"):])
    for part in ("checkpoints/quickstart/report.html", "python evaluate.py --checkp", "python generate.py --checkp"):
        assert part in end


@pytest.mark.parametrize(("width", "shown"), [(60, ["loss 1.453"]), (80, ["loss 1.453", RATE]),
                                              (95, ["loss 1.453", RATE, "lr 5.0e-04"]), (40, [])])
def test_what_does_not_fit_beside_the_bar_is_dropped(monkeypatch, capsys, width, shown):
    monkeypatch.setattr(terminal, "columns", lambda stream: width)
    bar = terminal.open_bar(18_000, 9_000, show=True)
    terminal.show_figures(bar, 9_000, {"loss": "1.453", "tok/s": "1,830,000", "lr": "5.0e-04", "peak": "27%"})
    line = tqdm.format_meter(**{**bar.format_dict, "ncols": width})
    bar.close()
    assert " 50%|" in line and "| 9000/18000 steps, ? left" in line and len(line) <= width
    assert [text for text in ("loss 1.453", RATE, "lr 5.0e-04", "peak") if text in line] == shown


def test_without_a_terminal_the_figures_are_lines_of_their_own(capsys):
    bar = terminal.open_bar(1_000, 0, show=True)
    terminal.show_figures(bar, 20, {"loss": "1.453", "tok/s": "1,000"})
    assert capsys.readouterr() == ("step 20 of 1,000: loss 1.453, tok/s 1,000\n", "")


class Terminal:
    """A standard output that is a terminal, or says so."""

    def isatty(self):
        return True

    def fileno(self):
        return 1


@pytest.mark.parametrize(("surroundings", "coloured"), [
    ({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)])
def test_colour_only_on_a_terminal_and_not_with_no_color(monkeypatch, surroundings, coloured):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WT_SESSION": "1", **surroundings}.items():
        monkeypatch.setenv(name, value)
    assert terminal.bold("a step") == "a step"  # pytest's standard output is no terminal
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert (terminal.bold("a step") != "a step") == coloured


def test_stories_are_wrapped_on_a_terminal_only(monkeypatch):
    story = "One. " * 30 + "\n\nTwo."
    assert terminal.wrapped("A\x1b[2J\rB\x07\tC.\n") == "  | A�[2J�B�\tC.\n  |\n"
    assert terminal.wrapped(story) == f"  | {('One. ' * 30).strip()}\n  |\n  | Two.\n"
    monkeypatch.setattr(terminal, "columns", lambda stream: 40)
    lines = terminal.wrapped(story).splitlines()
    assert len(lines) > 5 and max(map(len, lines)) < 40 and lines[-2:] == ["  |", "  | Two."]
    assert " ".join(" ".join(line[4:] for line in lines).split()) == " ".join(story.split())
