"""The page of a report: what it says about bad input, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_runs

from lens_megatron.tools.report import command, watch
from lens_megatron.tools.report.digest import RolloutReader
from lens_megatron.tools.report.page import make
from lens_megatron.tools.report.run_data import read_runs
from lens_megatron.tools.report.sections import probe_topics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const form = document.getElementById("filters");
  const answers = [];
  const filtered = (name, value) => {
    form.elements[name].value = value;
    form.dispatchEvent(new Event("input"));
    answers.push(document.getElementById("count").textContent);
  };
  filtered("gate", "open");
  filtered("other", "grpo_s0");
  answers.push(document.querySelectorAll("#shown article").length + " articles");
  answers.push(document.querySelectorAll("#shown article:first-child del").length + " deleted");
  answers.push(document.querySelectorAll("#shown article:first-child .noise").length + " noise");
  filtered("gate", "");
  filtered("text", "NO SUCH TEXT");
  filtered("text", "onerror=ALERT");
  filtered("text", "");
  filtered("status", "wrong");
  filtered("step", "2");
  document.querySelector(".numbers summary").click();
  document.getElementById("theme").click();
  document.body.append(Object.assign(document.createElement("pre"), {id: "answers", textContent: answers.join("|")}));
});</script>"""
"""Uses the filters as a reader would, and leaves what the page answers in its document."""


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, ...]:
    rollouts = {
        1: [*report_runs.samples(1, 1, "01R", gate=True, text=report_runs.NASTY), *report_runs.samples(1, 2, "11")],
        2: [*report_runs.samples(2, 3, "00"), *report_runs.samples(2, 4, "01R", gate=True)],
    }
    folders = []
    for method in ("lens", "grpo"):
        for seed in (0, 1):
            rows = [report_runs.metrics(s, accuracy=0.2 + s * (0.1 + 0.01 * seed)) for s in (1, 2, 3)]
            rows[1] |= {"lens_probe/gate_purifier": 0.5, "lens_probe/gate_random": 0.2}
            folders.append(
                report_runs.write_run(tmp_path / f"{method}_s{seed}", rows, seed=seed, method=method, rollouts=rollouts)
            )
    return tuple(folders)


class _Outside(HTMLParser):
    """Collects the addresses that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_says_what_runs_did_and_holds_all_it_needs(runs: tuple[Path, ...], capsys: pytest.CaptureFixture):
    assert command.main(list(map(str, runs))) == 0
    assert "report.html" in capsys.readouterr().out
    page = (runs[0] / "report.html").read_text()
    assert len(page) < 10e6
    # Means of the seeds: lens 0.305, 0.41, 0.515 at steps 1, 2, 3, and grpo the same.
    assert "lens reaches the best of grpo (51.5 % at step 3) at step 3, 1.00 times fewer steps." in page
    assert "Options in which the configurations differ" in page and "lens.purifier" in page
    assert "Probe on held-out prompts: gate" in page and "All 16 groups are here." in page
    parser = _Outside()
    parser.feed(page)
    assert parser.found and all(address.startswith(("#", "data:")) for address in parser.found), parser.found


def test_nothing_in_a_file_becomes_part_of_the_page(runs: tuple[Path, ...]):
    (runs[0] / "config.yaml").write_text(json.dumps({"run": {"seed": 0}, "lens": {"purifier": "<img src=z>"}}))
    page = make(runs, RolloutReader())
    assert "dataset.hacked" in page, "the completion is there"
    assert "<script>document.body" not in page and "<img src=z" not in page and "<b>nuts" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH (apt-get install chromium)")
def test_a_browser_draws_the_charts_without_errors_and_its_filters_work(runs: tuple[Path, ...], tmp_path: Path):
    page = make(runs, RolloutReader())
    head, _, tail = page.rpartition("</body>")
    (tmp_path / "page.html").write_text(f"{head}{PROBE}</body>{tail}")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    address = f"file://{tmp_path / 'page.html'}"
    done = subprocess.run([str(CHROMIUM), *options, profile, "--dump-dom", address], capture_output=True, text=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    document = done.stdout
    figures = document.count("<figure>")
    assert figures > 10 and f'data-drawn="{figures}"' in document
    assert len(re.findall(r"<svg[^>]*class=\"marks\"", document)) == figures
    assert 'data-theme="light"' in document and "Theme: light" in document and "dataset.hacked =" in document
    assert 'data-hacked="yes"' not in document
    answers = re.search(r'id="answers">(.*?)</pre>', document, re.DOTALL)
    assert answers and answers[1].split("|") == [
        "2 groups match.",  # rescued ones of lens_s0
        "2 groups match.",
        "2 articles",
        "1 deleted",
        "2 noise",
        "4 groups match.",
        "0 groups match.",
        "1 groups match.",  # whatever the case of the letters
        "4 groups match.",
        "3 groups match.",
        "2 groups match.",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no metrics.jsonl"),
        ("", "holds no step yet (0 broken lines)"),
        ('garbage\n{"step": "1"}\n', "holds no step yet (2 broken lines)"),
    ],
)
def test_a_folder_without_steps_is_an_error_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: str | None, said: str
):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert command.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*report*")) and not list(tmp_path.glob(".*"))
    assert command.main([str(tmp_path / "absent")]) == 2
    assert "absent is no folder" in capsys.readouterr().err


def test_broken_lines_and_files_are_named_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [report_runs.metrics(1), {"step": 2, "actor/entropy": float("nan"), "lens/extra_rollouts": 1.0}]
    folder = report_runs.write_run(tmp_path / "run", rows, rollouts={1: [{"completion": "half"}], 2: []})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"st\n{"step": 3, "x": "text"}\n{"step": 4, "half')
    (folder / "config.yaml").write_text("a: [")
    (folder / "rollouts" / "step_000003.jsonl").mkdir()
    assert command.main([str(folder), "--out", str(tmp_path / "out.html")]) == 0
    page = (tmp_path / "out.html").read_text()
    assert "1 lines of run/metrics.jsonl are broken" in page and "The options of run are not known" in page
    assert "1 lines of the rollout files of run are broken" in page
    assert "step_000003.jsonl of run cannot be read (it is a folder, not a file)" in page
    assert command.main([str(folder), "--out", str(tmp_path / "no" / "out.html")]) == 2
    assert "cannot be written: No such file or directory; name another file with --out" in capsys.readouterr().err


def test_text_prints_the_summary(runs: tuple[Path, ...], capsys: pytest.CaptureFixture):
    for folder in runs:
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "val-core/toy/acc/mean@2": 0.25}) + "\n")
    assert command.main([*map(str, runs[:2]), "--text"]) == 0
    assert capsys.readouterr().out.count("accuracy on toy: 25.0 % before") == 2
    assert not (runs[0] / "report.html").exists()


def test_watching_writes_the_page_again_when_a_run_goes_on(runs: tuple[Path, ...], capsys: pytest.CaptureFixture):
    out = runs[0] / "report.html"
    seen: list[tuple[bool, str]] = []

    def sleep(_: float) -> None:
        page = out.read_text()
        seen.append(('data-reload-seconds="20"' in page, max(re.findall(r"<td>(\d)</td>", page))))
        if len(seen) == 2:  # nothing has changed since the first look
            with (runs[0] / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(report_runs.metrics(7)) + "\n")
        if len(seen) == 3:
            (runs[0] / "metrics.jsonl").write_text("")  # as for a moment, while a run is restarted
        if len(seen) == 4:
            raise KeyboardInterrupt

    reader, page = RolloutReader(), (runs[0],)
    watch.watch(page, lambda: command._write(out, make(page, reader, 20)), sleep)
    assert seen == [(True, "3"), (True, "3"), (True, "7"), (True, "7")]
    with pytest.raises(command.ReportError):
        watch.watch((runs[0] / "absent",), lambda: command._write(out, make((runs[0] / "absent",), reader)), sleep)


def test_probes_of_one_topic_are_drawn_together(runs: tuple[Path, ...]):
    assert probe_topics(read_runs(runs)) == {"gate": ["lens_probe/gate_purifier", "lens_probe/gate_random"]}
