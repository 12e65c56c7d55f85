"""What a run shows and leaves behind: metrics.jsonl, the live line and report.html."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from train import drawing, metrics, progress
from train.metrics import MetricsLog
from train.progress import Progress
from train.report import write_report

ROOT = Path(__file__).parents[2]


def _fill(path, steps):
    with MetricsLog(path) as log:
        for step in steps:
            log.write(step=step, seconds=0.5 * step, loss=3.0 / (1 + step), bits_per_byte=5.0 / (1 + step))


# metrics.jsonl


def test_rows_come_back_as_plain_numbers(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(step=np.int32(1), seconds=np.float32(0.5), loss=np.float32(2.5), mfu=None, grad_norm=float("nan"))
        assert metrics.read(path)[0]["step"] == 1, "a row is on disk as soon as it is written"
        log.write(step=2, seconds=1.0, loss=float("inf"), skipped=1)
    assert metrics.read(path) == [
        {"step": 1, "seconds": 0.5, "loss": 2.5, "mfu": None, "grad_norm": None},
        {"step": 2, "seconds": 1.0, "loss": None, "skipped": 1},
    ]
    assert metrics.read(tmp_path / "absent.jsonl") == []


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _fill(path, range(3))
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in metrics.read(path)] == [0, 1]
        _fill(path, [2])
        assert path.read_bytes() == whole


def test_after_a_restore_no_step_is_there_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _fill(path, range(1, 10))
    with MetricsLog(path) as log:
        assert log.truncate(after=6) == 3
        assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4, 5, 6]
        log.write(step=7, seconds=9.0)
        assert log.truncate(after=7) == 0
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", [b'{"step": 2, "sec\n', b"[1]\n", b'{"loss": 1.0}\n', b"\x00\xff\n"])
def test_damage_before_the_last_line_is_an_error(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    _fill(path, range(2))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*remove that line"):
        metrics.read(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsLog(path)


def test_kill_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = f"""
import itertools
from train.metrics import MetricsLog
log = MetricsLog({str(path)!r})
for step in itertools.count():
    log.write(step=step, seconds=0.1 * step, loss=1 / 3)
    if step == 200:
        print("going", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    steps = [row["step"] for row in metrics.read(path)]
    assert len(steps) > 200
    assert steps == list(range(len(steps)))


# The live line


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets: `now[0]`."""
    moment = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: moment[0])
    return moment


FIGURES = {
    "loss": 1.25,
    "bits_per_byte": 1.803,
    "val_bits_per_byte": 1.912,
    "tokens_per_second": np.float32(98765.0),
    "mfu": 0.3127,
}


def test_a_log_gets_a_line_every_five_seconds_and_the_last_state(now):
    file = io.StringIO()
    with Progress(30, None, console=Console(file=file, width=40)) as shown:
        for step in range(1, 24):
            now[0] += 1.0
            shown.update(step=step, seconds=2.0 * step, metrics=FIGURES | {"mfu": None})
        shown.say("saved [bold] a checkpoint")
    lines = file.getvalue().splitlines()
    assert [re.findall(r"step (\d+)/30", line) for line in lines] == [["1"], ["6"], ["11"], ["16"], ["21"], [], ["23"]]
    assert lines[5] == "saved [bold] a checkpoint"
    assert lines[-1] == ("77%  step 23/30  loss 1.250  1.80 bits/byte  held out 1.912  98.8k tokens/s  0:46  0:14 left")


def test_a_run_that_was_at_its_end_claims_no_step():
    file = io.StringIO()
    with Progress(12, None, console=Console(file=file)) as shown:
        shown.say("restored step 12")
    assert file.getvalue() == "restored step 12\n"


@pytest.mark.parametrize(
    ("width", "wanted"),
    [
        (20, ["42%"]),
        (40, ["42%", "1.80 bits/byte", "0:36 left"]),
        (80, ["42%", "step 720", "loss 1.250", "1.80 bits/byte", "0:36 left"]),
        (140, ["held out 1.912", "98.8k tokens/s", "MFU 31.3%", "0:26"]),
    ],
)
def test_the_live_line_fits_the_window(width, wanted):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    shown = Progress(None, 62.0, console=console)
    shown.update(step=720, seconds=26.0, metrics=FIGURES)
    lines = ["".join(segment.text for segment in line) for line in console.render_lines(shown, pad=False)]
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert all(part in lines[0] for part in wanted)


def test_the_fraction_follows_whichever_end_is_nearer():
    shown = Progress(200, 50.0, console=Console(file=io.StringIO()))
    assert (shown.fraction(), shown.seconds_left()) == (0.0, 50.0)
    shown.update(step=100, seconds=10.0, metrics={})
    assert (shown.fraction(), shown.seconds_left()) == (0.5, 40.0)
    shown.update(step=150, seconds=20.0, metrics={})  # 5 steps a second since the start: 10 s for 50 steps
    assert (shown.fraction(), shown.seconds_left()) == (0.75, 10.0)
    shown.update(step=150, seconds=60.0, metrics={})
    assert (shown.fraction(), shown.seconds_left()) == (1.0, 0.0)
    endless = Progress(None, None, console=Console(file=io.StringIO()))
    endless.update(step=5, seconds=1.0, metrics={"loss": float("nan")})
    assert (endless.fraction(), endless.seconds_left()) == (None, None)


def _on_a_terminal(program, term, columns):
    """What `program` writes to a terminal of that kind and width."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=slave, env=environment | {"TERM": term}
    ) as process:
        os.close(slave)
        written = b""
        try:
            while chunk := os.read(master, 4096):
                written += chunk
        except OSError:  # how Linux reports that the other end is closed
            pass
    os.close(master)
    assert process.returncode == 0
    return written.decode()


TALK = """
from train.progress import Progress
with Progress(8, None) as shown:
    for step in range(1, 9):
        shown.update(step=step, seconds=float(step), metrics={"bits_per_byte": 2.5})
        if step == 4:
            shown.say("half way")
            print("printed")
"""


def test_a_terminal_shows_one_live_line_and_messages_above_it():
    written = _on_a_terminal(TALK, "xterm-256color", 40)
    assert "\x1b[2K" in written
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written)
    lines = [line.split("\r")[-1] for line in plain.replace("\r\n", "\n").split("\n")]
    assert [line.strip() for line in lines[:2]] == ["half way", "printed"]
    assert "100%  step 8/8  2.50 bits/byte" in lines[2]
    assert all(len(frame) <= 40 for frame in re.split(r"[\r\n]", plain))


def test_a_dumb_terminal_gets_plain_lines():
    written = _on_a_terminal(TALK, "dumb", 40)
    assert "\x1b" not in written
    assert written.split("\r\n")[1:-1] == ["half way", "printed", "100%  step 8/8  2.50 bits/byte  0:08"]


def test_a_message_the_encoding_lacks_does_not_stop_the_run():
    raw = io.BytesIO()
    with Progress(
        None, None, console=Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    ) as shown:
        shown.say("λ decays")
    assert raw.getvalue().startswith(b"? decays\n")


def test_numbers_for_people():
    assert [progress.clock(s) for s in (0, 7.4, 59.6, 727, 11527, 270000)] == [
        "0:00", "0:07", "1:00", "12:07", "3:12:07", "3d 03:00",
    ]  # fmt: skip
    assert [progress.count(n) for n in (0, 934, 999.6, 9814, 99960, 761344, 1.2e6, 7e9)] == [
        "0", "934", "1.00k", "9.81k", "100k", "761k", "1.20M", "7.00B",
    ]  # fmt: skip


# report.html


class _Page(HTMLParser):
    """Checks that elements nest, collects ids, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["text"]):
            self.text += data


def _workdir(path, rows, **files):
    with MetricsLog(path / "metrics.jsonl") as log:
        for step in range(rows):
            log.write(
                step=step + 1,
                seconds=0.2 * step,
                bits_per_byte=1.5 + 6 / (1 + step),
                val_bits_per_byte=2.0 + 1 / (1 + step) if step % 3 == 0 else None,
                tokens_per_second=9000.0 + step,
                mfu=None,
                learning_rate=0.01,
                grad_norm=float("nan") if step == 1 else 1.0 + step % 5,
                skipped=int(step >= 1),
            )
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("rows", "drawings"), [(0, 0), (1, 5), (3, 5), (50, 5), (30_000, 5)])
def test_a_report_of_any_length_is_one_sound_page(tmp_path, rows, drawings):
    path = write_report(_workdir(tmp_path, rows))
    page = _Page(path.read_text())
    assert path.name == "report.html"
    assert path.read_text().count("<svg") == drawings
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "http:" not in path.read_text()
    assert "https:" not in path.read_text()
    assert "nan" not in page.text.lower()
    assert path.stat().st_size < 600_000
    assert ("No steps were logged yet." in page.text) == (rows == 0)


def test_a_report_leaves_out_what_is_not_finite(tmp_path):
    with open(_workdir(tmp_path, 12) / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 13, "seconds": 2.6, "bits_per_byte": Infinity, "grad_norm": NaN, "tokens_per_second": 0}\n'
        )
        file.write('{"step": 14, "bits_per_byte": 2.0, "grad_norm": 0.0, "learning_rate": -Infinity}\n')
    text = write_report(tmp_path).read_text()
    assert text.count("<svg") == 5
    assert not re.search(r"\b(nan|inf|infinity)\b", text.lower())


def test_a_report_shows_all_that_the_run_left(tmp_path):
    summary = {
        "val_bits_per_byte": 1.5349, "seconds": 181.0, "steps": 1700, "tokens_per_second": 9812.0, "params": 761344,
        "baselines": {"xz -9 基线 <9>": 1.97, "xz $-9, $5": 1.3},
    }  # fmt: skip
    samples = [
        {"step": 10, "prompt": "The ", "text": "early <b> words"},
        {"step": 1700, "prompt": "The ", "text": "The late words & \ud800"},
    ]
    config = {"recipe": "pydoc<lm>", "model": {"width": 128, "pattern": ["lightning", "sliding_window"], "bias": None}}
    path = write_report(
        _workdir(tmp_path, 20, summary=summary, samples=samples, config=config, environment={"jax": "0.12.0"})
    )
    text = _Page(path.read_text()).text
    for wanted in ("pydoc<lm>", "1.535", "1,700", "3:01", "9.81k", "761k", "early <b> words", "late words & ?"):
        assert wanted in text
    assert re.search(r"xz \$-9, \$51\.300this model, on held-out text1\.535xz -9 基线 <9>1\.970", text), "best first"
    assert re.search(r"model\.width128model\.patternlightning, sliding_windowmodel\.biasnull", text)
    assert re.search(r"updates skipped1\b", text)
    assert "The The" not in text
    drawing = path.read_text().split("<svg", 2)[1]
    assert "xz $-9, $5" in drawing
    assert "xz -9 基线 &lt;9&gt;" in drawing
    assert "var(--c4)" in drawing
    assert not re.search(r"#0[1-6]0", path.read_text())


def test_a_report_without_held_out_text_says_so(tmp_path):
    _fill(tmp_path / "metrics.jsonl", range(4))
    page = _Page(write_report(tmp_path).read_text()).text
    assert "1.250bits per byte in training" in page.replace(" bits", "bits")
    assert "held out" not in page
    assert tmp_path.name in page


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 3')
    with pytest.raises(ValueError, match=r"summary\.json: no valid JSON .*remove it"):
        write_report(tmp_path)


def test_smoothing_does_not_shift_a_curve():
    line = drawing._binned(np.linspace(3.0, 1.0, 1201))
    assert line.shape == (drawing.BINS,)
    np.testing.assert_allclose(line[[0, -1]], [3.0, 1.0], atol=4e-3)
    smooth = drawing._smooth(line)
    np.testing.assert_allclose(smooth[30:-30], line[30:-30], rtol=1e-5)
    np.testing.assert_allclose(drawing._smooth(np.full(50, 2.0)), 2.0, rtol=1e-12)
    noise = np.random.default_rng(0).standard_normal(400)
    assert drawing._smooth(noise).std() < 0.4 * noise.std()


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_ends_where_it_was_last_measured_and_says_where(log):
    steps = np.arange(1.0, 21.0)
    loss = 3 + (-1.0) ** steps

    def drawn(x, values):
        series = [(values, drawing.TRAIN, False)]
        return drawing.draw(x, series, x_label="step", alt="Loss", baselines={}, labels=True, log=log, size=(400, 300))

    # A validation is a row of its own, without a loss.
    validated = drawn(np.append(steps, 20.0), np.append(loss, np.nan))
    assert validated == drawn(steps, loss)
    (end,) = re.findall(r">(\d\.\d{3})<", validated)
    assert 2.3 < float(end) < 3.7  # not the last point, which is 4


@pytest.mark.parametrize("decades", [-9, -1, 0, 4])
def test_logarithmic_axes_have_a_few_round_ticks(decades):
    for low in np.geomspace(1, 10, 37) * 10.0**decades:
        for span in np.geomspace(1.61, 1e6, 41):
            ticks = drawing._log_ticks(low, low * span)
            assert 2 <= len(ticks) <= 7
            assert all(low <= tick <= low * span for tick in ticks)
            # No half of the axis is without.
            assert np.diff(np.log([low, *ticks, low * span])).max() < 0.5 * np.log(span)


def test_ticks_are_short():
    values = (0, 0.05, 12.5, 999, 1000, 1250, 40_000, 120_000, 1e6, -5000)
    assert [drawing._tick(value) for value in values] == [
        "0", "0.05", "12.5", "999", "1k", "1.25k", "40k", "120k", "1M", "-5k",
    ]  # fmt: skip


def test_importing_the_report_does_not_import_matplotlib():
    program = "import sys, train.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
